"""Takes a list of recordings through a model, batch after batch, so that a run stopped anywhere can go on."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from cosyvoice.utils.interrupt import SOME_FAILED_EXIT_CODE, StopRequest
from cosyvoice.utils.provenance import check_made_with
from taste.failures import Failure, list_failures
from taste.feature_files import chunk_folder
from taste.feature_writer import FeatureWriter
from taste.prefetch import prefetched
from taste.progress_bar import progress_bar
from taste.recordings import Recording, plan_batches


class Work(NamedTuple):
    """What to do with recordings, in two steps."""

    prepare: Callable[[Path], Any]  # one recording, in a thread; a ValueError makes it a failure
    compute: Callable[[Sequence[Any]], Sequence[Any]]  # what is stored of each prepared recording of a batch


class Outcome(NamedTuple):
    """How a run ended."""

    exit_code: int  # 0 all good, 3 some recordings failed, 130/143 stopped by a signal
    failures: list[Failure]


def extract(
    recordings: Sequence[Recording],
    output: Path,
    work: Work,
    made_with: Mapping[str, object],
    *,
    batch_size: int,
    num_threads: int,
) -> Outcome:
    """Compute what `output` lacks of the recordings, and store it as `{utt_id: value}`.

    Values are written a chunk at a time; after any death the same call goes on where the last chunk ended and gives the
    same values. A recording that cannot be used is listed in `<output>.failures.jsonl` and tried again next time.

    Args:
        recordings: the whole list.
        output: the .pt file wanted.
        work: what to do with each recording.
        made_with: everything that the values depend on, noted in `<output>.made_with.json`.
        batch_size: recordings computed at once.
        num_threads: threads that prepare recordings.

    Returns:
        the exit code and what failed; unless a signal stopped the run, `output` is complete but for the failures.

    Raises:
        ValueError: what lies at `output` was made differently, or cannot be read.
        OSError: the output cannot be written (disk full, say); what was written before is safe.
        OutputBusyError: another process writes the same output.
    """
    with StopRequest() as stop, FeatureWriter(output) as writer:
        present = [place for place in (output, chunk_folder(output)) if place.exists()]
        check_made_with(output.with_suffix(".made_with.json"), made_with, present)
        batches = plan_batches(recordings, batch_size, num_threads)
        left = [[item for item in batch if item.utt_id not in writer.done_ids] for batch in batches]
        left = [batch for batch in left if batch]
        done = len(recordings) - sum(map(len, left))
        print(f"{len(recordings)} recordings, {done} of them done before")

        started = time.monotonic()
        failures: list[Failure] = []
        for _, results in zip(
            progress_bar(left, "extracting", "recordings", done=done, size=len),
            prefetched(left, lambda item: _prepare(item, work), num_threads),
            strict=True,
        ):
            try:
                failed = _store_batch(results, work, writer)
            except torch.OutOfMemoryError as error:
                writer.flush()
                raise ValueError(describe_full_device(error, batch_size)) from error
            for failure in failed:
                tqdm.write(f"failed: {failure.utt_id}: {failure.reason}", file=sys.stderr)
            failures += failed
            if stop.requested:
                break
        writer.flush()
        list_failures(output, failures)
        seconds = time.monotonic() - started
        if stop.requested:
            print(f"stopped after {seconds:.1f} s with {len(writer.done_ids)} recordings saved; run the same again")
            return Outcome(stop.exit_code, failures)
        writer.finish("single")
        print(f"{output}: {len(writer.done_ids)} recordings ({seconds:.1f} s for those of this run)")
    return Outcome(SOME_FAILED_EXIT_CODE if failures else 0, failures)


def describe_full_device(error: torch.OutOfMemoryError, batch_size: int) -> str:
    """What to tell whoever runs an extraction on a device that is out of memory.

    Args:
        error: what torch said.
        batch_size: recordings that were computed at once.

    Returns:
        the message.
    """
    return f"the device is out of memory ({error}); all before is saved. Go on with a --batch-size below {batch_size}"


def _prepare(recording: Recording, work: Work) -> tuple[str, Any] | Failure:
    try:
        return recording.utt_id, work.prepare(recording.audio_path)
    except ValueError as error:  # what our readers raise for a recording; anything else is a bug
        return Failure(recording.utt_id, str(recording.audio_path), str(error))


def _store_batch(results: Sequence[tuple[str, Any] | Failure], work: Work, writer: FeatureWriter) -> list[Failure]:
    """Compute and store what could be prepared of a batch; returns what could not."""
    usable = [result for result in results if not isinstance(result, Failure)]
    values = work.compute([prepared for _, prepared in usable]) if usable else []
    for (utt_id, _), value in zip(usable, values, strict=True):
        writer.add(utt_id, value)
    if writer.is_full:
        writer.flush()
    return [result for result in results if isinstance(result, Failure)]

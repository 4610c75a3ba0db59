"""Lists of recordings: a manifest, or a Kaldi-style folder with wav.scp, as the extraction tools take them."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from taste.audio import AudioError, duration_seconds
from taste.manifest import ManifestError, read_manifest
from taste.utterance_ids import normalise_key

BATCHES_SORTED_TOGETHER = 64  # by length: little padding, and yet the bar moves at an even pace
SECONDS_A_RECORDING = 30.0  # a batch holds at most its size times this much sound, however long the recordings


class Recording(NamedTuple):
    """One recording, by the id that its results will have."""

    utt_id: str
    audio_path: Path
    speaker: str | None


def list_recordings(manifest: str | None, folder: str | None) -> list[Recording]:
    """Read the list of recordings from wherever it is.

    Args:
        manifest: a .jsonl manifest, or None.
        folder: a folder with wav.scp, or None.

    Returns:
        the recordings in the list's order, at least one.

    Raises:
        ValueError: not exactly one of the two is given.
        ManifestError: the list is missing or malformed.
    """
    if (manifest is None) == (folder is None):
        raise ValueError("give either --manifest FILE (with --output FILE) or --dir FOLDER (with wav.scp in it)")
    if manifest is not None:
        return [Recording(item.utt_id, item.audio_path, item.speaker) for item in read_manifest(manifest)]
    return _read_kaldi_folder(Path(folder or ""))


def read_table(path: Path) -> dict[str, str]:
    """Read a Kaldi table: an id, white space, and the rest of the line, which may hold spaces.

    Args:
        path: wav.scp, utt2spk or the like.

    Returns:
        {id: rest}.

    Raises:
        ManifestError: the file is missing or empty, a line has one word, an id comes twice, or a line asks for a shell
            command (`... |`), which is never run.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # other line separators belong to the text
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ManifestError(f"{path}: there is no such file; expected lines of `utterance-id value`") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 text ({error})") from error
    table: dict[str, str] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        words = line.split(maxsplit=1)
        if not words:
            continue
        if len(words) == 1:
            problems.append(f"  line {number}: expected an id and a value, got {line!r}")
        elif words[0] in table:
            problems.append(f"  line {number}: {words[0]!r} is there already, as {table[words[0]]!r}")
        elif words[1].rstrip().endswith("|"):
            problems.append(f"  line {number}: commands are not run; write the path of a sound file: {line!r}")
        else:
            table[words[0]] = words[1].rstrip()
    if problems:
        raise ManifestError(f"{path}: {len(problems)} problems; correct these lines:\n" + "\n".join(problems))
    if not table:
        raise ManifestError(f"{path}: the file holds no line")
    return table


def plan_batches(recordings: Sequence[Recording], batch_size: int, num_threads: int) -> list[list[Recording]]:
    """Form batches of recordings of similar length.

    Batches depend on the whole list only, never on what is done already: a resumed run forms the same ones.

    Args:
        recordings: the whole list.
        batch_size: recordings in a batch, at most; fewer where they are longer than 30 s on average.
        num_threads: threads that read the sound files' headers.

    Returns:
        the batches; each recording is in one.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        seconds = list(pool.map(_seconds_or_nothing, recordings))
    batches: list[list[Recording]] = []
    window = batch_size * BATCHES_SORTED_TOGETHER
    for start in range(0, len(recordings), window):
        indices = range(start, min(start + window, len(recordings)))
        batch: list[Recording] = []
        batch_seconds = 0.0
        for index in sorted(indices, key=lambda index: seconds[index], reverse=True):
            is_full = batch_seconds + seconds[index] > batch_size * SECONDS_A_RECORDING
            if batch and (len(batch) == batch_size or is_full):
                batches.append(batch)
                batch, batch_seconds = [], 0.0
            batch.append(recordings[index])
            batch_seconds += seconds[index]
        batches.append(batch)
    return batches


def _read_kaldi_folder(folder: Path) -> list[Recording]:
    paths = read_table(folder / "wav.scp")
    speakers = read_table(folder / "utt2spk") if (folder / "utt2spk").exists() else {}
    recordings: dict[str, Recording] = {}
    for utt_id, path in paths.items():
        recording = Recording(normalise_key(utt_id), Path(path), speakers.get(utt_id))
        earlier = recordings.setdefault(recording.utt_id, recording)
        if earlier is not recording:
            raise ManifestError(
                f"{folder / 'wav.scp'}: {earlier.audio_path} and {path} are both utterance {recording.utt_id!r}"
            )
    return list(recordings.values())


def _seconds_or_nothing(recording: Recording) -> float:
    """A recording that cannot be read is short: it fails when its turn comes."""
    try:
        return duration_seconds(os.fspath(recording.audio_path))
    except AudioError:
        return 0.0

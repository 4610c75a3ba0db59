"""Stage 1: turn transcripts into text embeddings, and recordings into Whisper features and speaker vectors.

In:   a manifest (one {"audio_path", "text"} a line), a CosyVoice model folder, a folder with Whisper's encoder.
Out:  utt2_output/{split}_text_emb.pt       {utt_id: [T, D_text]}
      utt2_output/{split}_whisper_feats.pt  {"mid": {utt_id: [A, D]}, "final": {utt_id: [A, D]}}
      utt2_output/{split}_utt2info.pt       {utt_id: text, text_token, word_id, spk_embedding, duration_s, audio_path;
                                             speaker where the manifest names one}
      and beside the last one its .failures.jsonl, .settings.json and .made_with.json

    python utt2text_and_feature.py --jsonl json/train.jsonl --model_dir CosyVoice-300M
    python utt2text_and_feature.py --jsonl json/test.jsonl          # the embedded models, under a minute

Run the same command again after any stop: it goes on where it was. Exit codes: 0 all good, 1 error, 2 wrong usage,
3 finished but some recordings failed, 75 stopped by the memory guard, 130/143 stopped by Ctrl-C or SIGTERM.
"""

import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import taste  # noqa: F401 -- makes cosyvoice importable
from cosyvoice.utils.interrupt import SOME_FAILED_EXIT_CODE, StopRequest
from cosyvoice.utils.model_dir import CONFIG_FILE, SPEAKER_MODEL_FILE, ModelDir, get_tokenizer, text_embedding_table
from cosyvoice.utils.output_lock import OutputBusyError
from cosyvoice.utils.provenance import check_made_with, digest, file_digest
from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ, WHISPER_FRAMES_PER_SECOND
from cosyvoice.utils.settings import Settings, describe_device, parse_settings, pick_device
from taste.audio import duration_seconds, read_audio
from taste.background_flush import BackgroundFlush
from taste.extraction import describe_full_device
from taste.failures import Failure, list_failures
from taste.feature_files import chunk_folder, stored_bytes
from taste.feature_reader import open_features
from taste.feature_writer import DISK_RESERVE_BYTES, FeatureWriteError, FeatureWriter, check_save_mode
from taste.manifest import Utterance, read_manifest
from taste.memory_guard import MemoryGuard
from taste.prefetch import prefetched
from taste.progress_bar import progress_bar
from taste.speaker import SpeakerEncoder
from taste.text import tokenize
from taste.utterance_features import Models, Outputs, Prepared, add_batch, prepare
from taste.whisper_encoder import WhisperEncoder

# ---------------------------------------------------------------- settings: edit here, or --lower-case-name on the line
JSONL = "json/train.jsonl"  # manifest; its name without .jsonl is the {split}
MODEL_DIR = "CosyVoice-tiny"  # CosyVoice-300M, or another folder with the same files
WHISPER_DIR = None  # str: Whisper in transformers' format; none is <MODEL_DIR>/whisper
OUTPUT_TEXT = "utt2_output/{split}_text_emb.pt"  # where the text embeddings go
OUTPUT_WHISPER = "utt2_output/{split}_whisper_feats.pt"  # where the Whisper features go
OUTPUT_INFO = None  # str: where the rest goes; none is {split}_utt2info.pt beside OUTPUT_TEXT
SUBSET_RATIO: float = 1.0  # share of the manifest to use, lines taken evenly from all of it
MAX_DURATION: float = 30.0  # seconds; longer recordings are listed as failures
MID_LAYER = 6  # Whisper block to tap: 6 is the paper's, 16 the course template's
BATCH_SIZE = 8  # recordings a pass of the encoder
NUM_WORKERS = None  # int: threads that read recordings while the encoder works; none is one a core, at most 16
DEVICE = "auto"  # auto, cpu, cuda, cuda:1
ENCODER_DTYPE = "auto"  # float16, bfloat16, float32; auto is float16 on CUDA, float32 on a CPU
FEATURE_DTYPE = "float16"  # of the stored Whisper features: float16, bfloat16, float32
CHUNK_UTTERANCES = 200  # written at once while the next are computed; a kill costs at most twice these (or 4 minutes)
SAVE_MODE = "auto"  # single .pt, chunks, or auto: single up to 4 GB
MEMORY_LIMIT_PERCENT: float = 90.0  # of the machine's or the container's memory; above it the run stops, saved
# ----------------------------------------------------------------------------------------------------------------------

# T text tokens   A Whisper frames, 50 Hz   D channels
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_MOST_WORKERS = 16
_MEASURED_RECORDINGS = 200  # the disk use is estimated from so many
_SAME_LENGTH_S = 0.02  # by which two lengths of one recording may differ
_MEMORY_STOP_EXIT_CODE = 75  # EX_TEMPFAIL: try again later


@dataclass
class Progress:
    """What a run has done."""

    utterances: int = 0
    audio_seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    stopped_by: str | None = None
    exit_code: int = 0


def check_settings(settings: Settings) -> None:
    """Refuse values that no run could use, all at once.

    Raises:
        ValueError: some setting is out of its range.
    """
    check_save_mode(settings.save_mode)
    problems = []
    if settings.feature_dtype not in _DTYPES:
        problems.append(f"FEATURE_DTYPE is {settings.feature_dtype!r}; expected one of {', '.join(_DTYPES)}")
    if settings.encoder_dtype not in ("auto", *_DTYPES):
        problems.append(f"ENCODER_DTYPE is {settings.encoder_dtype!r}; expected auto or one of {', '.join(_DTYPES)}")
    for name in ("batch_size", "num_workers", "chunk_utterances", "max_duration", "memory_limit_percent"):
        if getattr(settings, name) is not None and getattr(settings, name) <= 0:
            problems.append(f"{name.upper()} is {getattr(settings, name)}; expected more than 0")
    if problems:
        raise ValueError("; ".join(problems))


def choose_subset(utterances: Sequence[Utterance], ratio: float) -> list[Utterance]:
    """Take a share of the manifest, evenly from all of it, so that every speaker keeps a part.

    Args:
        utterances: the whole manifest.
        ratio: share to take, above 0 and at most 1.

    Returns:
        at least one utterance, in the manifest's order.

    Raises:
        ValueError: the ratio is outside its range.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"SUBSET_RATIO is {ratio}; expected a share above 0 and at most 1")
    wanted = max(1, round(len(utterances) * ratio))
    return [utterances[index * len(utterances) // wanted] for index in range(wanted)]


def open_outputs(settings: Settings, stack: ExitStack) -> Outputs:
    """Open the three files of the manifest's split, each locked until the stack closes."""
    split = Path(settings.jsonl).stem
    text = Path(settings.output_text.replace("{split}", split))
    whisper = Path(settings.output_whisper.replace("{split}", split))
    info = Path((settings.output_info or str(text.parent / "{split}_utt2info.pt")).replace("{split}", split))
    chunk = settings.chunk_utterances
    return Outputs(
        text=stack.enter_context(FeatureWriter(text, chunk_utterances=chunk)),
        whisper=stack.enter_context(FeatureWriter(whisper, chunk_utterances=chunk, nested=True)),
        info=stack.enter_context(FeatureWriter(info, chunk_utterances=chunk)),
    )


def load_models(settings: Settings) -> Models:
    """Load what this stage needs; of CosyVoice's language model that is its text embedding alone.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file does not hold what it should, or the parts do not fit each other or the settings.
    """
    device = pick_device(settings.device)
    model_dir = ModelDir(settings.model_dir).check((CONFIG_FILE, "llm.pt", SPEAKER_MODEL_FILE))
    dtype_name = settings.encoder_dtype
    if dtype_name == "auto":
        dtype_name = "float16" if device.type == "cuda" else "float32"
    models = Models(
        tokenizer=get_tokenizer(model_dir),
        text_embedding=text_embedding_table(model_dir),
        speaker=SpeakerEncoder(model_dir.file(SPEAKER_MODEL_FILE), device),
        whisper=WhisperEncoder(
            settings.whisper_dir or model_dir.file("whisper"), settings.mid_layer, device, _DTYPES[dtype_name]
        ),
    )
    if models.tokenizer.encoding.n_vocab > len(models.text_embedding):
        raise ValueError(
            f"the tokenizer of {model_dir.path} has {models.tokenizer.encoding.n_vocab} tokens, "
            f"but its text embedding has {len(models.text_embedding)} rows"
        )
    if settings.max_duration > models.whisper.window_seconds:
        raise ValueError(
            f"MAX_DURATION is {settings.max_duration:g} s, but Whisper hears only {models.whisper.window_seconds:g} s"
        )
    return models


def note_models(settings: Settings, models: Models, outputs: Outputs) -> None:
    """Make sure that what lies in the outputs was made with these models, and note them for the next run.

    Raises:
        ValueError: it was made with others.
    """
    made_with = {
        "text_embedding": digest([models.text_embedding]),
        "whisper": models.whisper.digest,
        "speaker_model": file_digest(ModelDir(settings.model_dir).file(SPEAKER_MODEL_FILE)),
        "mid_layer": settings.mid_layer,
        "feature_dtype": settings.feature_dtype,
    }
    places = [place for writer in outputs for place in (writer.output_path, chunk_folder(writer.output_path))]
    present = [place for place in places if place.exists()]
    check_made_with(outputs.info.output_path.with_suffix(".made_with.json"), made_with, present)


def forget_changed(utterances: Sequence[Utterance], outputs: Outputs) -> None:
    """Let utterances be done again whose transcript is another one than when they were done.

    Recordings may have moved; one of another length than before under the same id is another recording. Of those that
    have moved and kept their transcripts, some from all parts are looked at.

    Args:
        utterances: of the manifest.
        outputs: the files; text embeddings and utterance info lose the utterances, Whisper features stay.

    Raises:
        ValueError: utterances have another recording: this is another corpus with the same ids.
        FeatureWriteError: the disk has no room for a copy of the text embeddings.
    """
    if not outputs.info.done_ids:
        return
    known = open_features(outputs.info.output_path)
    changed = [item for item in utterances if item.utt_id in known and known[item.utt_id]["text"] != item.text]
    moved = [
        item for item in utterances if item.utt_id in known and known[item.utt_id]["audio_path"] != str(item.audio_path)
    ]
    with_other_text = {item.utt_id for item in changed}
    others = [item for item in moved if item.utt_id in with_other_text]
    with_same_text = [item for item in moved if item.utt_id not in with_other_text]
    sample = with_same_text[:: math.ceil(len(with_same_text) / _MEASURED_RECORDINGS) or 1]
    others += [item for item in sample if _lasts_otherwise(item, known[item.utt_id])]
    if others:
        first = known[others[0].utt_id]
        places = [place for writer in outputs for place in (writer.output_path, chunk_folder(writer.output_path))]
        places_there = " ".join(str(place) for place in places if place.exists())
        raise ValueError(
            f"{len(others)} utterances were done with another recording; {others[0].utt_id} was {first['audio_path']} "
            f"({first['text']!r}), is {others[0].audio_path} ({others[0].text!r}). Choose other outputs, or start "
            f"again after: rm -r {places_there}, and likewise remove what s3.sh made of these ids: "
            "s3_output/<split>_utt2s3.*"
        )
    if changed:
        print(f"{len(changed)} transcripts have changed, {changed[0].utt_id} first: these utterances are done again")
        for writer in (outputs.text, outputs.info):  # what tells that a transcript has changed goes last
            writer.forget(item.utt_id for item in changed)


def _lasts_otherwise(utterance: Utterance, known: Mapping[str, Any]) -> bool:
    """Whether a recording has another length than the one that was done; not where it cannot be read."""
    try:
        if abs(duration_seconds(utterance.audio_path) - known["duration_s"]) <= _SAME_LENGTH_S:
            return False
        found = read_audio(utterance.audio_path, SPEECH_SAMPLE_RATE_HZ)  # the header of an mp3 only estimates it
        return abs(found.duration_seconds - known["duration_s"]) > _SAME_LENGTH_S
    except ValueError:
        return False  # it will be reported when its turn comes


def check_disk(utterances: Sequence[Utterance], models: Models, outputs: Outputs, settings: Settings) -> str:
    """Estimate what the run will write, from a sample of its recordings, and compare it with the free space.

    Args:
        utterances: those left to do, at least one.
        models: their widths are used.
        outputs: the files, perhaps with content.
        settings: feature_dtype, max_duration and save_mode are used.

    Returns:
        the estimate in words.

    Raises:
        FeatureWriteError: it does not fit.
    """
    sample = utterances[:: math.ceil(len(utterances) / _MEASURED_RECORDINGS)]
    frame_bytes = 2 * models.whisper.width * _DTYPES[settings.feature_dtype].itemsize
    token_bytes = models.text_embedding.shape[1] * models.text_embedding.element_size()
    sample_bytes, sample_seconds = 0.0, 0.0
    for utterance in sample:
        try:
            seconds = duration_seconds(utterance.audio_path)
            tokens = len(tokenize(models.tokenizer, utterance.text).tokens)
        except ValueError:
            continue  # it will be reported when its turn comes
        if seconds <= settings.max_duration:
            sample_seconds += seconds
            sample_bytes += seconds * WHISPER_FRAMES_PER_SECOND * frame_bytes + tokens * token_bytes
    new_bytes = sample_bytes / len(sample) * len(utterances)
    hours = sample_seconds / len(sample) * len(utterances) / 3600
    old_bytes = sum(stored_bytes(writer.output_path) for writer in outputs)
    # merging needs room for the merged copy beside the chunks
    has_chunks = any(chunk_folder(writer.output_path).exists() for writer in outputs)
    merges = settings.save_mode == "single" and (new_bytes > 0 or has_chunks)
    needed_bytes = new_bytes + (new_bytes + old_bytes if merges else 0) + DISK_RESERVE_BYTES
    free_bytes = shutil.disk_usage(outputs.whisper.output_path.parent).free
    estimate = (
        f"about {hours:.2f} h of sound to do, {new_bytes / 1e9:.2f} GB to write (at most {needed_bytes / 1e9:.2f} GB "
        f"while running); {free_bytes / 1e9:.2f} GB free"
    )
    if needed_bytes > free_bytes:
        raise FeatureWriteError(
            f"the disk of {outputs.whisper.output_path.parent} cannot hold the output: {estimate}. Free some space, "
            "write to another disk (--output-whisper), take less (--subset-ratio), or do not merge (--save-mode chunks)"
        )
    return estimate


def extract(
    batches: Sequence[Sequence[Utterance]],
    models: Models,
    outputs: Outputs,
    settings: Settings,
    stop: StopRequest,
    done: int,
) -> Progress:
    """Go through the batches until they end, a signal asks to stop, or memory runs short; all is saved then.

    Args:
        batches: what is left to do.
        models: what to do it with.
        outputs: where the features go.
        settings: max_duration, num_workers, feature_dtype and memory_limit_percent are used.
        stop: notes signals.
        done: utterances that earlier runs did, for what is shown.

    Returns:
        what was done, and why it stopped.

    Raises:
        FeatureWriteError: the disk is full.
        ValueError: the device has too little memory for the batch.
    """
    guard = MemoryGuard(settings.memory_limit_percent)
    dtype = _DTYPES[settings.feature_dtype]
    work = partial(prepare, models=models, max_duration=settings.max_duration)
    workers = settings.num_workers or min(os.cpu_count() or 1, _MOST_WORKERS)
    progress = Progress()
    started = time.monotonic()

    def speed() -> str:
        return f"{progress.audio_seconds / (time.monotonic() - started):.1f} x real time"

    with BackgroundFlush(tuple(reversed(outputs))) as background:  # in the order of outputs.flush()
        for _, results in zip(
            progress_bar(batches, "extracting", "utterances", done=done, size=len, note=speed),
            prefetched(batches, work, workers),
            strict=True,
        ):
            failed = [result for result in results if isinstance(result, Failure)]
            usable = [result for result in results if isinstance(result, Prepared)]
            try:
                failed += add_batch(usable, models, outputs, dtype)
            except torch.OutOfMemoryError as error:
                background.wait()
                outputs.flush()
                raise ValueError(describe_full_device(error, settings.batch_size)) from error
            if any(writer.is_full for writer in outputs):
                background.start()
            for failure in failed:
                tqdm.write(f"failed: {failure.utt_id}: {failure.reason}", file=sys.stderr)
            progress.failures += failed
            progress.utterances += len(results) - len(failed)
            progress.audio_seconds += sum(item.duration_seconds for item in usable)
            if stop.requested:
                progress.stopped_by, progress.exit_code = "a signal", stop.exit_code
                break
            if full := guard.over_limit(len(results)):
                progress.stopped_by = f"the memory guard: {full}, over MEMORY_LIMIT_PERCENT"
                progress.exit_code = _MEMORY_STOP_EXIT_CODE
                break
    outputs.flush()
    return progress


def report(progress: Progress, models: Models, outputs: Outputs, seconds: float) -> None:
    """Print what there is now, and how fast it came; list the failures in their file."""
    list_failures(outputs.info.output_path, progress.failures)
    for writer in outputs:
        size = stored_bytes(writer.output_path) / 1e6
        where = writer.output_path if writer.output_path.exists() else chunk_folder(writer.output_path)
        print(f"{where}: {len(writer.done_ids)} utterances, {size:.1f} MB")
    hours = progress.audio_seconds / 3600
    print(
        f"this run: {progress.utterances} utterances, {hours:.3f} h of sound in {seconds:.1f} s "
        f"({progress.audio_seconds / seconds:.1f} x real time); Whisper on {models.whisper.device} in "
        f"{str(models.whisper.dtype).removeprefix('torch.')}, speaker vectors on {models.speaker.provider}"
    )


def run(settings: Settings) -> Progress:
    """Do the whole stage.

    Raises:
        OSError, ValueError, OutputBusyError: the message is for the person at the keyboard.
    """
    check_settings(settings)
    utterances = choose_subset(read_manifest(settings.jsonl), settings.subset_ratio)
    with StopRequest() as stop, ExitStack() as stack:
        outputs = open_outputs(settings, stack)
        print(f"loading {settings.model_dir} onto {describe_device(pick_device(settings.device))} ...")
        models = load_models(settings)
        note_models(settings, models, outputs)
        forget_changed(utterances, outputs)
        settings.save(outputs.info.output_path.with_suffix(".settings.json"))

        # batches are formed before finished utterances are dropped, so that a resumed run computes the same batches
        done_ids = outputs.done_ids()
        starts = range(0, len(utterances), settings.batch_size)
        batches = [utterances[start : start + settings.batch_size] for start in starts]
        left = [[utterance for utterance in batch if utterance.utt_id not in done_ids] for batch in batches]
        left = [batch for batch in left if batch]
        to_do = [utterance for batch in left for utterance in batch]
        done = len(utterances) - len(to_do)
        print(f"{len(utterances)} utterances, {done} of them done before")
        if len(done_ids) > done:
            print(f"note: the outputs also hold {len(done_ids) - done} utterances outside this manifest; they stay")

        started = time.monotonic()
        progress = Progress()
        if to_do:
            print(check_disk(to_do, models, outputs, settings))
            progress = extract(left, models, outputs, settings, stop, done)
        if progress.stopped_by is None:
            for writer in outputs:
                writer.finish(settings.save_mode)
            progress.exit_code = SOME_FAILED_EXIT_CODE if progress.failures else 0
        report(progress, models, outputs, seconds=max(time.monotonic() - started, 1e-3))
    return progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage with the constants above, as the command line changes them; returns the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    print(f"settings:\n{settings.describe()}")
    try:
        progress = run(settings)
    except (OSError, ValueError, OutputBusyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if progress.stopped_by is not None:
        command = shlex.join(["python", Path(__file__).name, *(sys.argv[1:] if argv is None else argv)])
        print(f"stopped by {progress.stopped_by}; everything so far is saved. Go on with:\n    {command}")
    return progress.exit_code


if __name__ == "__main__":
    sys.exit(main())

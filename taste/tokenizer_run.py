"""Encodes the recordings of a manifest to files of codes, and decodes such files to sound."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from cosyvoice.utils.atomic import write_json
from cosyvoice.utils.file_utils import write_wav
from cosyvoice.utils.model_dir import ModelDir
from cosyvoice.utils.provenance import file_digest
from cosyvoice.utils.settings import Settings
from cosyvoice.utils.stops import leave_if_asked
from taste.code_files import read_codes, write_codes
from taste.failures import Failure, list_failures
from taste.manifest import Utterance, read_manifest
from taste.progress_bar import progress_bar
from taste.run_files import best_checkpoint, run_folder_of
from taste.samples import sampling_of
from taste.tokenizer import SpeechCodes, TasteTokenizer

CODES_FOLDER, DECODED_FOLDER = "codes", "decoded"  # in the run's folder
STOPPED = "stopped; what was written is whole"
HOW_FILE = "made_with.json"  # in DECODED_FOLDER: how its sounds were made
_HOW = ("sampling", "top_k", "tau_r", "min_units_per_token", "max_units_per_token", "seed")


def open_tokenizer(settings: Settings, device: torch.device) -> TasteTokenizer:
    """Open the tokenizer that a run has trained.

    Args:
        settings: the run, or in RESUME a checkpoint, or in TASTE_CHECKPOINT a released folder; and the models' folders.
        device: where to compute.

    Returns:
        the tokenizer.

    Raises:
        FileNotFoundError: the run has no checkpoint, or a file is missing.
        ValueError: it is of another variant, or does not fit.
    """
    if settings.taste_checkpoint:
        return TasteTokenizer.open_released(settings.taste_checkpoint, settings.cosyvoice_model_dir, device)
    path = best_checkpoint(run_folder_of(settings))
    if settings.resume not in ("auto", "never"):
        path = Path(settings.resume)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no tokenizer {path}; train one: python model_code.py --variant taste, and name it with "
            "--variant taste, --run-name or --resume"
        )
    return TasteTokenizer.open(path, settings.cosyvoice_model_dir, settings.whisper_dir, settings.mid_layer, device)


def encode_manifest(settings: Settings, device: torch.device, stop_requested: Callable[[], bool]) -> bool:
    """Write the codes of every recording of a manifest, `<run>/codes/<utterance>.json`.

    A file that this model wrote of the same text, after the recording was last changed, is kept. Where the manifest has
    no text, a whole Whisper writes down what is said, if the model folder has one.

    Args:
        settings: ENCODE_JSONL and CODES_DIR; and what `open_tokenizer` reads.
        device: where to compute.
        stop_requested: asked between recordings.

    Returns:
        whether all recordings have codes; the others are listed in `<run>/codes.failures.jsonl`.

    Raises:
        RunStopped: it was asked to stop.
        ValueError: the manifest or the model cannot be used, or no recording could be.
        OSError: a file is missing, or the disk is full.
    """
    utterances = read_manifest(settings.encode_jsonl, needs_text=False)
    tokenizer = open_tokenizer(settings, device)
    folder = codes_folder(settings)
    failures, words, seconds, kept = [], 0, 0.0, 0
    for utterance in progress_bar(utterances, "encoding", "utterances"):
        leave_if_asked(stop_requested, STOPPED)
        path = folder / f"{utterance.utt_id}.json"
        if spoken := _written_before(path, utterance, tokenizer):
            words, seconds, kept = words + len(spoken.words), seconds + spoken.seconds, kept + 1
            continue
        try:
            spoken = tokenizer.encode(utterance.audio_path, utterance.text, utterance.language)
        except ValueError as error:
            failures.append(Failure(utterance.utt_id, str(utterance.audio_path), str(error)))
            tqdm.write(f"failed: {utterance.utt_id}: {error}")
            continue
        for doubt in spoken.doubts:
            tqdm.write(f"warning: {utterance.utt_id}: the transcript may not fit the recording: {doubt}")
        write_codes(path, spoken)
        words, seconds = words + len(spoken.words), seconds + spoken.seconds
    list_failures(folder.with_suffix(".json"), failures)
    if not words:
        raise ValueError(f"no recording of {settings.encode_jsonl} could be encoded")
    bits = words * tokenizer.levels * math.log2(tokenizer.codebook_size) / seconds
    done = len(utterances) - len(failures)
    written = f"{done} of {len(utterances)} recordings" + (f" ({kept} of them before)" if kept else "")
    print(f"{written}, {words} words, {seconds:.1f} s: {bits:.0f} bit/s, in {folder}")
    return not failures


def decode_folder(settings: Settings, device: torch.device, stop_requested: Callable[[], bool]) -> None:
    """Speak every file of codes, `<run>/decoded/<utterance>.wav`.

    A sound that this model made in this way, after the codes were last changed, is kept.

    Args:
        settings: CODES_DIR, how units are chosen, the seed; and what `open_tokenizer` reads.
        device: where to compute.
        stop_requested: asked between files.

    Raises:
        RunStopped: it was asked to stop.
        ValueError: a file is no file of codes, or holds those of another model.
        OSError: a file is missing, or the disk is full.
    """
    folder = codes_folder(settings)
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no codes; write some: the same command with --mode encode, or name a folder: --codes-dir"
        )
    tokenizer = open_tokenizer(settings, device)
    all_spoken = {path: read_codes(path) for path in paths}
    foreign = []
    for path, spoken in all_spoken.items():
        try:
            tokenizer.check_mine(spoken)
        except ValueError as error:
            foreign.append(f"{path.name}: {error}")
    if foreign:
        raise ValueError(
            f"{len(foreign)} of {len(paths)} files in {folder} are not of this model, such as {foreign[0]}. "
            "What is not in the manifest any more stays when recordings are encoded anew: remove it"
        )
    written = run_folder_of(settings) / DECODED_FOLDER
    model_dir = ModelDir(settings.cosyvoice_model_dir).check(("flow.pt", "hift.pt"))
    vocoders = {name: file_digest(model_dir.file(f"{name}.pt")) for name in ("flow", "hift")}
    how = {"codes": str(folder.resolve()), "model": tokenizer.fingerprint, **vocoders}
    kept = _spoken_before(written, all_spoken, how | {name: settings.to_dict()[name] for name in _HOW})
    for path, spoken in progress_bar(all_spoken.items(), "decoding", "utterances"):
        leave_if_asked(stop_requested, STOPPED)
        if path in kept:
            continue
        try:
            sampling = sampling_of(settings)
            waveform = tokenizer.decode(spoken.codes, spoken.text, spoken.speaker, sampling, settings.seed)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        write_wav(written / f"{path.stem}.wav", waveform, tokenizer.sample_rate_hz)
    print(f"{len(paths)} wav files" + (f" ({len(kept)} of them from before)" if kept else "") + f" in {written}")


def _spoken_before(folder: Path, all_spoken: Mapping[Path, SpeechCodes], how: dict[str, object]) -> set[Path]:
    """The files of codes whose sounds are there already; notes how those that follow are made."""
    note = folder / HOW_FILE
    try:
        same = json.loads(note.read_text(encoding="utf-8")) == how
    except (OSError, ValueError):
        same = False
    if same:
        sounds = {path: folder / f"{path.stem}.wav" for path in all_spoken}
        return {path for path, wav in sounds.items() if wav.is_file() and wav.stat().st_mtime >= path.stat().st_mtime}
    for path in all_spoken:  # made in another way: they must not pass for these, should the run be stopped
        (folder / f"{path.stem}.wav").unlink(missing_ok=True)
    write_json(note, how)
    return set()


def _written_before(path: Path, utterance: Utterance, tokenizer: TasteTokenizer) -> SpeechCodes | None:
    """The codes that this model has written of an utterance as it is now."""
    try:
        if path.stat().st_mtime < Path(utterance.audio_path).stat().st_mtime:
            return None
        spoken = read_codes(path)
        tokenizer.check_mine(spoken)
    except (OSError, ValueError):
        return None
    return spoken if utterance.text in ("", spoken.text) else None


def codes_folder(settings: Settings) -> Path:
    """Where codes lie.

    Args:
        settings: CODES_DIR and the run.

    Returns:
        the folder.
    """
    return Path(settings.codes_dir) if settings.codes_dir else run_folder_of(settings) / CODES_FOLDER

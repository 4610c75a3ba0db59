"""Gathers what runs left in their folders into the report: sounds, measures, curves, attention, codes.

A run's folder holds metrics.json, settings.json, `wavs/<utterance>_{original,true_units,predicted}.wav`, and
shown.pt, which `note_shown` writes: what only the model knows of the utterances that were decoded.
"""

import json
import statistics
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyvoice.utils.atomic import write_text
from cosyvoice.utils.config import load_config
from cosyvoice.utils.model_dir import CONFIG_FILE, ModelDir, sizes
from cosyvoice.utils.tensor_file import save_tensors
from taste.asr import Found, find_aligner
from taste.audio import AudioError, read_audio
from taste.data import UtteranceDataset
from taste.measure_table import REFERENCES, Measures, title_of, to_markdown
from taste.report import ReportUtterance, write_report
from taste.run_files import RESULTS_FILE, SETTINGS_FILE
from taste.sound_evaluation import UtteranceSounds, evaluate_sounds
from taste.subsample import spread_evenly
from taste.text import SPELLED_BY_CHARACTER
from taste.text_normalisation import normalise
from taste.words import word_spans

# T text tokens   A Whisper frames, 50 Hz   W words   L levels

SHOWN_FILE = "shown.pt"
TABLE_FILE = "table.md"
OWN_SOUND = "predicted"  # how a run names what its model said
MOST_SHOWN = 12  # utterances on a page, of some hundred kB a sound


def note_shown(
    run_folder: Path,
    dataset: UtteranceDataset,
    tokenizer: Any,
    attention: Sequence[Tensor] = (),
    codes: Sequence[Tensor] = (),
) -> None:
    """Keep what a report needs to know of the decoded utterances beside their sounds, in `shown.pt`.

    Args:
        run_folder: the run's folder.
        dataset: the utterances.
        tokenizer: of the model folder; it names tokens and words.
        attention: of each utterance [T, A]; empty where the model has no aggregator.
        codes: of each utterance [W, L]; empty where it has no quantizer.
    """
    noted = {}
    for index, utt_id in enumerate(dataset.utt_ids):
        info = dataset.info(utt_id)
        tokens = [int(token) for token in info.get("text_token", ())]
        spans = word_spans(info["word_id"]) if "word_id" in info else []
        noted[utt_id] = {
            "text": info.get("text", ""),
            "language": info.get("language") or language_of(info.get("text", "")),
            "labels": [tokenizer.decode([token]) for token in tokens],
            "spans": spans,
            "words": [tokenizer.decode(tokens[first:end]).strip() for first, end in spans],
            "attention": attention[index].half() if attention and tokens else None,
            "codes": codes[index].long() if codes and spans else None,
        }
    save_tensors(Path(run_folder) / SHOWN_FILE, noted)


def measure_run(
    run_folder: Path,
    system: str,
    model_dir: str | Path,
    found: Found | None = None,
    device: str = "cpu",
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measure the sounds of a run against the recordings.

    Args:
        run_folder: the run's folder.
        system: name of its model in tables.
        model_dir: model folder, whose speaker encoder, Whisper and UTMOS judge.
        found: who listens; None looks for one.
        device: where Whisper, if it is the one, and UTMOS compute.
        stop_requested: asked before each utterance.

    Returns:
        for metrics.json: `measures` of `system`, `true_units` and `original`, `skipped` with reasons, `notes`.

    Raises:
        RunStopped: it was asked to stop.
    """
    rate_hz = sizes(model_dir).sample_rate
    rows = []
    for utt_id, noted in _read_shown(run_folder).items():
        sounds = _read_sounds({system: Path(run_folder)}, utt_id, rate_hz)
        original = sounds.pop("original", None)
        rows.append(UtteranceSounds(utt_id, noted["text"], original, sounds, noted["language"]))
    return evaluate_sounds(rows, rate_hz, model_dir, found, device, stop_requested).to_dict()


def write_run_report(
    folder: Path,
    runs: Mapping[str, Path],
    model_dir: str | Path,
    title: str,
    found: Found | None = None,
    more_measures: Measures | None = None,
) -> Path:
    """Write `report.html` and `table.md` of one run, or of several side by side.

    Args:
        folder: where to write.
        runs: system -> its run's folder, in the order of the comparison; the settings shown, and the attention and
            codes, where several have them, are those of the last one.
        model_dir: model folder, for its mel and its rate.
        title: heading of the page.
        found: who times the words of the recordings; None: pocketsphinx where it is installed.
        more_measures: of each system, what its metrics.json does not tell.

    Returns:
        path of the page.
    """
    metrics = {system: _read_json(path / RESULTS_FILE) for system, path in runs.items()}
    measures: dict[str, dict[str, float | None]] = {}
    skipped: dict[str, str] = {}
    notes: dict[str, list[str]] = {}  # note -> whose
    for system, own in metrics.items():
        measures[system] = measures_of(own) | dict((more_measures or {}).get(system, {}))
        sounds = own.get("sounds", {})
        for name, values in sounds.get("measures", {}).items():
            whose = name if name in REFERENCES else system  # a run calls its own sounds by its variant
            measures[whose] = {**measures.get(whose, {}), **values}
        skipped |= sounds.get("skipped", {})
        for note in sounds.get("notes", ()):
            notes.setdefault(note, []).append(title_of(system))
    lines = [note if len(owners) == len(runs) else f"{', '.join(owners)}: {note}" for note, owners in notes.items()]
    write_text(Path(folder) / TABLE_FILE, to_markdown(measures, skipped, lines))
    utterances, decoded = _utterances(runs, model_dir, found)
    return write_report(
        Path(folder),
        title=title,
        settings=_read_json(list(runs.values())[-1] / SETTINGS_FILE) if runs else {},
        histories={system: own["history"] for system, own in metrics.items() if own.get("history")},
        measures=measures,
        skipped=skipped,
        notes=lines,
        utterances=utterances,
        utterances_in_all=decoded,
        rate_hz=sizes(model_dir).sample_rate,
    )


def measures_of(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Pick the measures of a run, by their names in the table.

    Args:
        metrics: what metrics.json holds.

    Returns:
        teacher-forced scores, those of negative controls, of generated units, and of codes, as far as there are any.
    """
    measures = {name: metrics["test"][name] for name in ("loss", "top1", "top5") if name in metrics.get("test", {})}
    for control, scores in metrics.get("controls", {}).items():
        if isinstance(scores, Mapping):  # else a sentence that says why there are none
            measures[f"top5_{control}"] = scores["top5"]
    generated = metrics.get("generation", {})
    measures |= {"utterances_generated" if name == "utterances" else name: own for name, own in generated.items()}
    if codes := metrics.get("codes"):
        measures |= {
            "words_coded": codes["words"],
            "code_usage": statistics.fmean(codes["usage"]),
            "perplexity": statistics.fmean(codes["perplexity"]),
            "words_per_second": codes["words_per_second"],
            "bits_per_second": codes["bits_per_second"],
        }
    return measures


def language_of(text: str) -> str:
    """Guess the language of a transcript whose manifest does not say it.

    Args:
        text: the transcript.

    Returns:
        `ja` where there are kana, `zh` where there are other characters of a language without spaces, else `en`.
    """
    names = [unicodedata.name(character, "") for character in text]
    if any(name.startswith(("HIRAGANA", "KATAKANA")) for name in names):
        return "ja"
    return "zh" if any(name.startswith(SPELLED_BY_CHARACTER) for name in names) else "en"


def _utterances(
    runs: Mapping[str, Path], model_dir: str | Path, found: Found | None
) -> tuple[list[ReportUtterance], int]:
    """Of the utterances that every run has decoded as many as a page holds, evenly from all; and how many all are."""
    shown = {system: _read_shown(path) for system, path in runs.items()}
    shared = [utt_id for utt_id in next(iter(shown.values()), {}) if all(utt_id in own for own in shown.values())]
    if not shared:
        return [], 0
    rate_hz = sizes(model_dir).sample_rate
    mel_of = load_config(ModelDir(model_dir).file(CONFIG_FILE), ["feat_extractor"])["feat_extractor"]
    found = found or find_aligner()
    utterances = []
    for utt_id in (shared[index] for index in spread_evenly(len(shared), MOST_SHOWN)):
        sounds = _read_sounds(runs, utt_id, rate_hz)
        noted, notes = _of_all_runs({system: own[utt_id] for system, own in shown.items()})
        times = None
        if "original" in sounds and found.recogniser and found.recogniser.hears(noted["language"]):
            times = word_times(noted["words"], sounds["original"], rate_hz, found)
        utterances.append(
            ReportUtterance(
                utt_id,
                noted["text"],
                sounds,
                {name: mel_of(waveform[None])[0] for name, waveform in sounds.items()},
                noted["attention"],
                noted["labels"],
                noted["spans"],
                times,
                noted["codes"],
                notes,
                noted["words"],
            )
        )
    return utterances, len(shared)


def word_times(
    words: Sequence[str], original: Tensor, rate_hz: int, found: Found
) -> list[tuple[float, float] | None] | None:
    """Find the words of a transcript in its recording.

    Args:
        words: as they are written; one may be heard as several (`well-known`), or not at all (`-`).
        original: the recording, [N].
        rate_hz: its rate.
        found: who listens.

    Returns:
        start and end of each, in seconds; None for one that is not spoken; None where the text cannot be found.
    """
    spoken = [normalise(word).split() for word in words]
    aligned = found.recogniser.align(original, rate_hz, " ".join(words)) if found.recogniser else None
    if aligned is None or len(aligned) != sum(map(len, spoken)):
        return None
    times: list[tuple[float, float] | None] = []
    for parts in spoken:
        own, aligned = aligned[: len(parts)], aligned[len(parts) :]
        times.append((own[0].start_s, own[-1].end_s) if own else None)
    return times


def _of_all_runs(noted: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What runs know of an utterance: attention and codes of the last that has them, and whose they are."""
    merged, notes = dict(next(iter(noted.values()))), []
    for part in ("attention", "codes"):
        owners = [system for system, own in noted.items() if own[part] is not None]
        merged[part] = noted[owners[-1]][part] if owners else None
        if owners and len(noted) > 1:
            notes.append(f"{part.capitalize()} below: {title_of(owners[-1])}.")
    return merged, notes


def _read_sounds(runs: Mapping[str, Path], utt_id: str, rate_hz: int) -> dict[str, Tensor]:
    """The sounds of an utterance by system; those that are missing or silent are left out."""
    paths = {name: [path / "wavs" / f"{utt_id}_{name}.wav" for path in runs.values()] for name in REFERENCES}
    paths |= {system: [path / "wavs" / f"{utt_id}_{OWN_SOUND}.wav"] for system, path in runs.items()}
    sounds = {}
    for name, candidates in paths.items():
        path = next((path for path in candidates if path.is_file()), None)
        if path is not None:
            try:
                sounds[name] = read_audio(path, rate_hz).waveform
            except AudioError as error:
                print(f"left out of the report: {error}")
    return sounds


def _read_shown(run_folder: Path) -> dict[str, dict[str, Any]]:
    path = Path(run_folder) / SHOWN_FILE
    return torch.load(path, weights_only=True) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

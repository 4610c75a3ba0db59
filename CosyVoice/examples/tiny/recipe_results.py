"""What the stages of the tiny recipe measured, as the words and tables of the model's README."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOT_MEASURED = "not measured yet"
EVALUATIONS = {"its own test set": "test", "recordings of people": "real"}  # title, and folder of the report
_TOKENIZER_COUNTS = ("tokens_compared", "tokens_differing")  # between onnxruntime and s3tokenizer
LOSS_NAMES = {"llm": "loss", "flow": "loss", "hifigan": "loss_mel"}  # of the cross-validation
WRONG_TEXT = "loss_with_wrong_text"  # the language model's, beside it: as high where it does not read


def describe_results(work_dir: Path) -> dict[str, str]:
    """Describe what was trained, on what, and what it reaches.

    Args:
        work_dir: the recipe's folder; what is not there yet is said to be not measured.

    Returns:
        {name in the template: text}: corpus, encoders, trainings, evaluation, and provenance: what was done otherwise
        than run.sh does it, which a person writes into `<work-dir>/provenance.md`.
    """
    provenance = work_dir / "provenance.md"
    return {
        "provenance": provenance.read_text(encoding="utf-8").strip() if provenance.is_file() else "",
        "corpus": _corpus(_read(work_dir / "corpus" / "corpus.json")),
        "encoders": _encoders(work_dir),
        "trainings": "\n".join(_training(work_dir / "exp" / name, name) for name in LOSS_NAMES),
        "evaluation": "\n\n".join(
            f"On {title}:\n\n{_table(work_dir / 'evaluation' / folder / 'report.md')}"
            for title, folder in EVALUATIONS.items()
        ),
    }


def _corpus(counts: Mapping[str, Any]) -> str:
    if not counts:
        return NOT_MEASURED
    train, test = counts["train"], counts["test"]
    return (
        f"{train['hours']:.2f} hours, {train['utterances']} utterances of {counts['speakers']} speakers "
        f"(flite's voices {', '.join(counts['voices'])}, each at several pitches and rates), "
        f"{train['vocabulary']} words{_lively(counts)}. "
        f"Tested on {test['utterances']} sentences that do not occur in it"
    )


def _lively(counts: Mapping[str, Any]) -> str:
    if not counts.get("lively", {}).get("utterances"):
        return ""
    return (
        f"; the language model also on single words and short phrases, it and flow on {counts['lively']['hours']:.2f} "
        "hours in which each word has a rate and vowels of its own"
    )


def _encoders(work_dir: Path) -> str:
    tokenizer = _read(work_dir / "s3_tokenizer" / "metrics.json")
    measured = {**tokenizer.get("test", {}), **{key: tokenizer[key] for key in _TOKENIZER_COUNTS if key in tokenizer}}
    lines = [f"| S3 tokenizer: {key} | {value} |" for key, value in _flat(measured)]
    for name, folder in (("speaker encoder", "speaker_encoder"), ("Whisper encoder", "whisper")):
        metrics = _read(work_dir / folder / "metrics.json")
        lines += [f"| {name}: {key} | {value} |" for key, value in _flat(metrics)]
    return "\n".join(lines) or f"| encoders | {NOT_MEASURED} |"


def _training(folder: Path, name: str) -> str:
    """One row: part, epochs, steps, the best cross-validation."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    checks = [entry for entry in map(json.loads, filter(str.strip, lines)) if entry["tag"] == "CV"]
    if not checks:
        return f"| {name} | {NOT_MEASURED} | | | |"
    best, last = min(checks, key=lambda entry: entry[LOSS_NAMES[name]]), checks[-1]
    wrong = f"{best[WRONG_TEXT]:.4f}" if WRONG_TEXT in best else ""
    return f"| {name} | {last['epoch'] + 1} | {last['step']} | {best[LOSS_NAMES[name]]:.4f} | {wrong} |"


def _table(report: Path) -> str:
    """The table of an evaluation's report, without its title and command."""
    lines = report.read_text(encoding="utf-8").splitlines() if report.is_file() else []
    return "\n".join(line for line in lines if line.startswith("|")) or f"{NOT_MEASURED}."


def _flat(value: Mapping[str, Any], name: str = "") -> list[tuple[str, str]]:
    """The numbers and words of nested tables, each under its path; lists are left out."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        path = f"{name}, {key.replace('_', ' ')}" if name else key.replace("_", " ")
        if isinstance(item, Mapping):
            rows += _flat(item, path)
        elif isinstance(item, float):
            rows.append((path, f"{item:.4g}"))
        elif isinstance(item, (int, str)):
            rows.append((path, str(item)))
    return rows


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

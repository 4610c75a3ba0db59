"""From what was noted of each utterance to the table of a model: word error, voices, codes, speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from taste.word_error_rate import word_error_rate

CONDITIONS = {
    "original": "original recordings",
    "true_units": "true units → flow → HiFT",
    "text": "text → LM → flow → HiFT",
}
SYNTHETIC = ("true_units", "text")


class Row(NamedTuple):
    """A line of the table."""

    name: str
    value: str
    wanted: str  # "" where nothing was asked


def group_of(speaker: str) -> str:
    """Give the voice or corpus that a speaker belongs to: `slt` of `slt-07`."""
    return speaker.rpartition("-")[0] or speaker


def summarise(utterances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute every measure over a set.

    Args:
        utterances: each with `speaker`, `text`, `language`, `units`, `units_differing`, `seconds` and `spent` (of each
            condition), `heard` (of each, English only) and `similarity` (of each synthetic one).

    Returns:
        the measures by name, as JSON can hold them.
    """
    groups = sorted({group_of(item["speaker"]) for item in utterances})
    english = [item for item in utterances if item["language"] == "en"]
    errors, voices = {}, {}
    for condition in CONDITIONS:

        def error_of(items: Sequence[Mapping[str, Any]], condition: str = condition) -> float | None:
            return word_error_rate([item["text"] for item in items], [item["heard"][condition] for item in items])

        errors[condition] = {"all": error_of(english)} | {
            group: error_of(own) for group in groups if (own := [i for i in english if group_of(i["speaker"]) == group])
        }
    for condition in SYNTHETIC:
        voices[condition] = {"all": fmean(item["similarity"][condition] for item in utterances)} | {
            group: fmean(i["similarity"][condition] for i in utterances if group_of(i["speaker"]) == group)
            for group in groups
        }
    units = Counter(unit for item in utterances for unit in item["units"])
    compared, differing = units.total(), sum(item["units_differing"] for item in utterances)
    return {
        "utterances": len(utterances),
        "utterances_with_word_error": len(english),
        "speakers": len({item["speaker"] for item in utterances}),
        "word_error": errors,
        "speaker_similarity": voices,
        "codes_in_use": len(units),
        "tokens_compared": compared,
        "tokens_differing": differing,
        "token_agreement": 1 - differing / compared,
        "real_time_factor": _speed(utterances),
        "silent": {name: sum(item["seconds"][name] == 0 for item in utterances) for name in SYNTHETIC},
        "length_ratio": {
            name: sum(i["seconds"][name] for i in utterances) / sum(i["seconds"]["original"] for i in utterances)
            for name in SYNTHETIC
        },
    }


def _speed(utterances: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of work for each second of sound, of each part of the model."""
    speed = {}
    for part, conditions in (("lm", ("text",)), ("flow", SYNTHETIC), ("hift", SYNTHETIC)):
        sound = sum(item["seconds"][name] for item in utterances for name in conditions)
        spent = sum(item["spent"][name].get(part, 0.0) for item in utterances for name in conditions)
        speed[part] = spent / sound if sound else 0.0
    return speed | {"flow_and_hift": speed["flow"] + speed["hift"]}


def table_rows(results: Mapping[str, Any], with_targets: bool) -> list[Row]:
    """Lay the measures out as a table.

    Args:
        results: as `summarise` gives them, and `s3_tokenizer` where its own metrics were found.
        with_targets: fill in what the model must reach on its own test set.

    Returns:
        a line a measure.
    """
    errors, voices, speed = results["word_error"], results["speaker_similarity"], results["real_time_factor"]
    rows = []
    if tokenizer := results.get("s3_tokenizer"):
        rows.append(
            Row("S3 tokenizer: character error of its CTC", _percent(tokenizer["character_error_rate"]), "≤ 10 %")
        )
    rows += [
        Row("codes in use", str(results["codes_in_use"]), "≥ 500"),
        Row(
            "onnxruntime against s3tokenizer: tokens equal",
            f"{_percent(results['token_agreement'], 2)} of {results['tokens_compared']}",
            "100 %",
        ),
    ]
    original = errors["original"]["all"]
    for condition, name in CONDITIONS.items():
        wanted = "≤ 40 %" if condition == "text" else ""
        rows.append(Row(f"word error, {name}", _percent(errors[condition]["all"]), wanted))
        if condition == "true_units" and original is not None:
            above = errors[condition]["all"] - original
            rows.append(Row("— above that of the original recordings", f"{100 * above:+.1f} points", "≤ 15 points"))
        for group, value in errors[condition].items():
            if group != "all":
                rows.append(Row(f"— {group}", _percent(value), ""))
    for condition in SYNTHETIC:
        wanted = "≥ 0.80" if condition == "true_units" else ""
        name = f"speaker similarity to the original, {CONDITIONS[condition]}"
        rows.append(Row(name, f"{voices[condition]['all']:.3f}", wanted))
        rows += [Row(f"— {group}", f"{value:.3f}", "") for group, value in voices[condition].items() if group != "all"]
    for part, name in (("lm", "LM with text front end"), ("flow", "flow"), ("hift", "HiFT")):
        rows.append(Row(f"real-time factor, {name}", f"{speed[part]:.3f}", ""))
    rows.append(Row("real-time factor, flow + HiFT", f"{speed['flow_and_hift']:.3f}", "≤ 0.5 on 2 cores"))
    for condition in SYNTHETIC:
        rows.append(
            Row(
                f"length against the original, {CONDITIONS[condition]}", f"{results['length_ratio'][condition]:.2f}", ""
            )
        )
        if silent := results["silent"][condition]:
            rows.append(Row(f"utterances without sound, {CONDITIONS[condition]}", str(silent), "0"))
    return rows if with_targets else [row._replace(wanted="") for row in rows]


def to_markdown(rows: Sequence[Row], title: str) -> str:
    """Write the table as Markdown."""
    lines = [f"# {title}", "", "| measure | value | wanted |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {row.name} | {row.value} | {row.wanted} |" for row in rows)]) + "\n"


def to_text(rows: Sequence[Row]) -> str:
    """Write the table for a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{row.name:<{widths[0]}}  {row.value:>{widths[1]}}  {row.wanted}".rstrip() for row in rows)


def _percent(value: float | None, digits: int = 1) -> str:
    return "no words" if value is None else f"{100 * value:.{digits}f} %"

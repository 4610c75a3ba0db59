"""The table that compares systems: what each measure is called, how it is written, and what the paper has for it."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Measures = Mapping[str, Mapping[str, float | None]]  # system -> measure -> value; None: not measured

NOT_MEASURED = "–"
PAPER_MARK = "†"
PAPER_NOTE = (
    "The paper's own figures (TASTE, arXiv 2504.07053, tables 1 and 4): not measured here, on other data, with models "
    "of full size and other judges (of durations, Whisper's time stamps). They show which way a measure goes, no more. "
    "Durations: ours count as kept where they differ by 50 ms at most, and the words of all utterances are aligned, "
    "without case and punctuation. The published evaluation asks for less than 25 ms, drops an utterance in which the "
    "numbers of heard words differ, and compares only words that are written alike, case and punctuation included; "
    "which window gave the paper's figures is not known. Speaker similarity: our judge, CAM++, also gives the speaker "
    "vectors that the models are conditioned on, which may flatter them. Word error: published TASTE and text only "
    "speak what a recogniser wrote down of the recording, so its mistakes count; ours speak the manifest's text. "
    "Sampling: theirs is top-k of 10, for text only of 25; ours is what SAMPLING and TAU_R say: left alone, variants "
    "that hear may hold a unit longer than text only. UTMOS is measured where the model folder has its weights (the "
    "paper: 4.18 of true units, 4.31 of text only, 4.29 of TASTE), MUSHRA is not "
    "(70.2, 42.6, 68.3)."
)

SYSTEMS = {  # in the table's order; others come after them
    "text_only": "text only",
    "simple": "simple aggregator",
    "taste_novq": "TASTE without quantizer",
    "taste": "TASTE",
    "true_units": "true S3 units",
    "original": "original recording",
}
REFERENCES = ("original", "true_units")  # sounds that every run has, all alike: they do not compete for the best


class Measure(NamedTuple):
    """How to write a measure down."""

    label: str
    better: Literal["", "lower", "higher"]  # "": neither
    form: str  # for `format`
    unit: str = ""
    scale: float = 1.0  # multiplied before formatting


MEASURES = {
    "epochs_trained": Measure("epochs of training, earlier stages included", "", ".0f"),
    "loss": Measure("teacher-forced loss of a unit, nats", "lower", ".3f"),
    "top1": Measure("teacher-forced top-1 accuracy", "higher", ".3f"),
    "top5": Measure("teacher-forced top-5 accuracy", "higher", ".3f"),
    "top5_shuffled": Measure("top-5 accuracy, shuffled audio (control)", "", ".3f"),
    "top5_silenced": Measure("top-5 accuracy, silent audio (control)", "", ".3f"),
    "utterances_generated": Measure("utterances generated", "", ".0f"),
    "unit_error_rate": Measure("unit error rate, free running", "lower", ".3f"),
    "length_ratio": Measure("units for each true unit", "", ".2f"),
    "eos_rate": Measure("EOS rate", "higher", ".1f", " %", 100),
    "bleu": Measure("BLEU of units", "higher", ".1f"),
    "unigram_f1": Measure("unigram F1 of units", "higher", ".3f"),
    "words_coded": Measure("words whose codes were counted", "", ".0f"),
    "code_usage": Measure("codes in use, of those that so many words could use", "higher", ".1f", " %", 100),
    "perplexity": Measure("perplexity of codes", "higher", ".0f"),
    "words_per_second": Measure("words a second", "", ".2f"),
    "bits_per_second": Measure("bit rate", "", ".0f", " bit/s"),
    "utterances_with_sound": Measure("utterances with sound", "", ".0f"),
    "word_error": Measure("word error", "lower", ".1f", " %", 100),
    "speaker_similarity": Measure(
        "speaker similarity to the original (by CAM++, which conditions the models too)", "higher", ".3f"
    ),
    "utmos": Measure("naturalness by UTMOS, 1 to 5", "higher", ".2f"),
    "mcd_db": Measure("mel-cepstral distortion after alignment", "lower", ".2f", " dB"),
    "f0_correlation": Measure("F0 correlation", "higher", ".3f"),
    "voicing_error": Measure("voicing error", "lower", ".1f", " %", 100),
    "seconds_ratio": Measure("length against the original", "", ".2f"),
    "duration_consistency": Measure("words whose duration is kept within 50 ms", "higher", ".1f", " %", 100),
    "duration_consistency_25_ms": Measure(
        "words whose duration changes by less than 25 ms", "higher", ".1f", " %", 100
    ),
    "word_duration_error_ms": Measure("word-duration error", "lower", ".0f", " ms"),
    "word_duration_error_relative": Measure("word-duration error, of the words' length", "lower", ".1f", " %", 100),
    "words_compared": Measure("words whose durations were compared", "", ".0f"),
}
OTHER_FORM = ".3g"  # of a measure not listed

PAPER: dict[str, dict[str, float]] = {  # in our scale
    "top5": {"text_only": 0.65, "taste": 0.76, "taste_novq": 0.88},
    "word_error": {"true_units": 0.030, "text_only": 0.059, "taste": 0.044},
    "utmos": {"true_units": 4.18, "text_only": 4.31, "taste": 4.29},
    "speaker_similarity": {"true_units": 0.82, "text_only": 0.78, "taste": 0.80},
    "duration_consistency": {"true_units": 0.96, "text_only": 0.57, "taste": 0.91},
    "bits_per_second": {"taste": 150},
}


class Cell(NamedTuple):
    """A system's value of a measure."""

    value: str
    paper: str  # the paper's, "" where it has none that means the same
    best: bool  # of the systems that compete


class Row(NamedTuple):
    """A measure of every system."""

    label: str
    better: str
    cells: list[Cell]
    skipped: str  # why nobody has a value; "" where somebody has


class Table(NamedTuple):
    """The comparison, ready to be written."""

    systems: list[str]  # their titles
    rows: list[Row]
    has_paper: bool  # whether a cell shows the paper's figure


def title_of(system: str) -> str:
    """What a system is called in tables and under pictures.

    Args:
        system: its name.

    Returns:
        the title; an unknown name with blanks for its underscores.
    """
    return SYSTEMS.get(system, system.replace("_", " "))


def lay_out(measures: Measures, skipped: Mapping[str, str] | None = None) -> Table:
    """Arrange measures as a table with a column a system and a row a measure.

    Args:
        measures: of each system.
        skipped: why a measure is missing.

    Returns:
        the table: measures in the order of MEASURES, then those it does not list.
    """
    skipped = skipped or {}
    systems = [name for name in SYSTEMS if name in measures] + [name for name in measures if name not in SYSTEMS]
    known = dict.fromkeys([*(key for values in measures.values() for key in values), *skipped])
    rows = []
    for key in [key for key in MEASURES if key in known] + [key for key in known if key not in MEASURES]:
        values = {name: _number(measures[name].get(key)) for name in systems}
        reason = skipped.get(key, "") if all(value is None for value in values.values()) else ""
        measure = MEASURES.get(key) or Measure(key.replace("_", " "), "", OTHER_FORM)
        best = _best(values, measure)
        papers = PAPER.get(key, {})
        cells = [
            Cell(_written(values[name], measure), _papers(papers.get(name), measure), name in best) for name in systems
        ]
        rows.append(Row(measure.label, measure.better, cells, reason))
    return Table([title_of(name) for name in systems], rows, any(cell.paper for row in rows for cell in row.cells))


def to_markdown(measures: Measures, skipped: Mapping[str, str] | None = None, notes: Sequence[str] = ()) -> str:
    """Write the comparison as Markdown, the paper's figures beside ours and marked as theirs.

    Args:
        measures: of each system.
        skipped: why a measure is missing.
        notes: lines below the table.

    Returns:
        the text, with a line break at its end.
    """
    table = lay_out(measures, skipped)
    if not table.systems:
        return "Nothing was compared.\n"
    lines = [_line(["measure", *table.systems]), _line(["---"] * (1 + len(table.systems)))]
    for row in table.rows:
        cells = []
        for cell in row.cells:
            value = f"**{cell.value}**" if cell.best else cell.value
            cells.append(f"{value} (paper {cell.paper}{PAPER_MARK})" if cell.paper else value)
        arrow = {"lower": " ↓", "higher": " ↑"}.get(row.better, "")
        lines.append(_line([row.label + arrow, *cells]))
    footnotes = [f"{row.label}: {row.skipped}" for row in table.rows if row.skipped]
    if table.has_paper:
        footnotes.append(f"{PAPER_MARK} {PAPER_NOTE}")
    return "\n".join([*lines, "", *(f"- {note}" for note in (*notes, *footnotes))]).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _written(value: float | None, measure: Measure) -> str:
    return NOT_MEASURED if value is None else f"{value * measure.scale:{measure.form}}{measure.unit}"


def _papers(value: float | None, measure: Measure) -> str:
    """The paper's figure with no more digits than it has."""
    return "" if value is None else f"{value * measure.scale:g}{measure.unit}"


def _best(values: Mapping[str, float | None], measure: Measure) -> list[str]:
    """The models with the best value, where several compete."""
    competing = {name: value for name, value in values.items() if value is not None and name not in REFERENCES}
    if not measure.better or len(competing) < 2:
        return []
    best = (min if measure.better == "lower" else max)(competing.values())
    return [name for name, value in competing.items() if value == best]

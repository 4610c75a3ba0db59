"""Writes the report of a run: one page that holds its tables, curves, sounds and pictures, and opens anywhere."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosyvoice.utils.atomic import write_text
from cosyvoice.utils.rates import WHISPER_FRAMES_PER_SECOND
from taste import report_charts as charts
from taste.measure_table import PAPER_MARK, PAPER_NOTE, Measures, lay_out, title_of

# N samples   F mel frames, 86.13 Hz   T text tokens   A Whisper frames, 50 Hz   W words

REPORT_FILE = "report.html"
TEMPLATE_FILE = Path(__file__).with_name("report_template.html")
COLOURS = 6  # of lines, as the template defines them
HUES, HUE_STEP = 360, 137  # neighbouring codes get colours far apart
TICK_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # between the marks of a time axis
MOST_TICKS = 8


@dataclass(frozen=True)
class ReportUtterance:
    """A test utterance to show."""

    utt_id: str
    text: str
    sounds: Mapping[str, Tensor]  # system -> [N] float, -1..1; in the order in which they are shown
    mels: Mapping[str, Tensor]  # system -> [bands, F], of the same systems; one may be missing
    attention: Tensor | None = None  # [T, A], each row's sum is 1
    token_labels: Sequence[str] = ()  # T
    word_spans: Sequence[tuple[int, int]] = ()  # of each word the first token, and the one behind its last
    word_times: Sequence[tuple[float, float] | None] | None = None  # of each word in the original, seconds
    codes: Tensor | None = None  # [W, levels] int64
    notes: Sequence[str] = ()  # what a listener should know
    words: Sequence[str] = ()  # W; none: the labels of its tokens joined, which may cut a character of several tokens


class _Sound(NamedTuple):
    title: str
    seconds: float
    uri: str
    mel_uri: str  # "" where there is no mel
    percent: float  # its length, of the longest one's
    words: list["_Box"]


class _Box(NamedTuple):
    """A word's place, in percent of the picture."""

    label: str
    left: float
    width: float
    top: float
    height: float


class _Tick(NamedTuple):
    label: str
    percent: float


class _Attention(NamedTuple):
    uri: str
    labels: list[tuple[str, bool]]  # token, and whether a word begins there
    boxes: list[_Box]
    ticks: list[_Tick]


class _Code(NamedTuple):
    code: int
    hue: int


class _Utterance(NamedTuple):
    utt_id: str
    text: str
    sounds: list[_Sound]
    ticks: list[_Tick]
    attention: _Attention | None
    words: list[tuple[str, list[_Code]]]
    notes: Sequence[str]


def write_report(
    run_folder: Path,
    *,
    title: str,
    settings: Mapping[str, Any],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    measures: Measures,
    rate_hz: int,
    utterances: Sequence[ReportUtterance] = (),
    utterances_in_all: int | None = None,
    skipped: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write `report.html` into a run's folder.

    The page loads nothing: no server, no network, no file beside it. All text is escaped.

    Args:
        run_folder: where to write.
        title: heading.
        settings: of the run, by name.
        histories: of each run shown, its entries: `epoch`, `test` and, where trained, `train`, which hold `loss`,
            `top1`, `top5`. Runs without entries are left out of the curves.
        measures: of each system, as `taste.measure_table` writes them.
        rate_hz: of all sounds.
        utterances: what to hear and see; none is said in the page.
        utterances_in_all: how many there were to choose them from; None: no more than these.
        skipped: why a measure is missing.
        notes: below the table.

    Returns:
        path of the page.

    Raises:
        ValueError: the parts of an utterance do not fit each other (the message names it).
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE_FILE.read_text(encoding="utf-8"))
    page = template.render(
        title=title,
        settings=[(name, _shown(value)) for name, value in settings.items()],
        charts=_curves(histories),
        history_rows=_history_rows(histories),
        table=lay_out(measures, skipped),
        notes=list(notes),
        paper_mark=PAPER_MARK,
        paper_note=PAPER_NOTE,
        utterances=[_view(utterance, rate_hz) for utterance in utterances],
        utterances_in_all=max(len(utterances), utterances_in_all or 0),
    )
    path = Path(run_folder) / REPORT_FILE
    write_text(path, page)
    return path


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[charts.Chart]:
    """Loss and accuracies against epochs; one run has a colour a data set, several have a colour each."""
    alone = len(histories) == 1
    plans = {"Loss": (("loss", "nats a unit"),), "Accuracy": (("top1", "top-1"), ("top5", "top-5"))}
    drawn = []
    for title, measures in plans.items():
        lines = []
        for number, (run, history) in enumerate(histories.items()):
            for part_number, part in enumerate(("test", "train")):
                for measure, name in measures:
                    points = _points(history, part, measure)
                    label = part if len(measures) == 1 else f"{part} {name}"
                    if alone:
                        colour, dashed = part_number, measure == "top5"
                    elif measure == "top1" or (part == "train" and len(measures) > 1):
                        continue  # of several runs the top-5 on the test set is compared: more lines are a tangle
                    else:
                        colour, dashed, label = number, part == "train", f"{title_of(run)}, {label}"
                    if points:
                        lines.append(charts.Series(label, points, colour % COLOURS, dashed))
        if lines:
            unit = measures[0][1] if len(measures) == 1 else "share of units"
            drawn.append(charts.line_chart(f"{title} (teacher-forced)", "epoch", unit, lines))
    return drawn


def _points(history: Sequence[Mapping[str, Any]], part: str, measure: str) -> list[tuple[float, float]]:
    values = [(entry["epoch"], entry.get(part, {}).get(measure)) for entry in history]
    return [(epoch, value) for epoch, value in values if value is not None and math.isfinite(value)]


def _history_rows(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """The numbers of the curves, for those who do not see them."""
    rows = []
    for run, history in histories.items():
        for entry in history:
            scores = [
                f"{entry[part][name]:.4f}" if name in entry.get(part, {}) else "–"
                for part in ("train", "test")
                for name in ("loss", "top1", "top5")
            ]
            rows.append([title_of(run), str(entry["epoch"]), *scores])
    return rows


def _view(utterance: ReportUtterance, rate_hz: int) -> _Utterance:
    """What the page shows of an utterance."""
    _check(utterance)
    seconds = {name: len(waveform) / rate_hz for name, waveform in utterance.sounds.items()}
    longest = max(seconds.values(), default=0.0)
    mels = list(utterance.mels.values())
    lowest = min((float(mel.min()) for mel in mels), default=0.0)
    highest = max((float(mel.max()) for mel in mels), default=1.0)
    words = _words_of(utterance)
    sounds = []
    for name, waveform in utterance.sounds.items():
        mel = utterance.mels.get(name)
        picture = charts.picture(mel, charts.MELS_COLOURS, lowest, highest, upwards=True) if mel is not None else ""
        boxes = _word_boxes(utterance, words, seconds[name]) if name == "original" else []
        share = 100 * seconds[name] / longest if longest else 0.0
        sounds.append(
            _Sound(title_of(name), seconds[name], charts.sound(waveform, rate_hz), picture, round(share, 3), boxes)
        )
    codes = utterance.codes.tolist() if utterance.codes is not None else []
    return _Utterance(
        utterance.utt_id,
        utterance.text,
        sounds,
        _ticks(longest),
        _attention(utterance, words),
        [
            (word, [_Code(code, code * HUE_STEP % HUES) for code in row])
            for word, row in zip(words, codes, strict=False)
        ],
        utterance.notes,
    )


def _check(utterance: ReportUtterance) -> None:
    problems = []
    tokens, words = len(utterance.token_labels), len(utterance.word_spans)
    if utterance.attention is not None and utterance.attention.shape[0] != tokens:
        problems.append(f"attention of {utterance.attention.shape[0]} tokens, but {tokens} token labels")
    if utterance.codes is not None and len(utterance.codes) != words:
        problems.append(f"codes of {len(utterance.codes)} words, but {words} word spans")
    if utterance.words and len(utterance.words) != words:
        problems.append(f"{len(utterance.words)} words, but {words} word spans")
    if utterance.word_times is not None and len(utterance.word_times) != words:
        problems.append(f"times of {len(utterance.word_times)} words, but {words} word spans")
    if any(not 0 <= first < end <= tokens for first, end in utterance.word_spans):
        problems.append(f"word spans {list(utterance.word_spans)} beyond {tokens} tokens")
    if unknown := set(utterance.mels) - set(utterance.sounds):
        problems.append(f"mels without a sound: {', '.join(sorted(unknown))}")
    if problems:
        raise ValueError(f"report of {utterance.utt_id}: {'; '.join(problems)}")


def _words_of(utterance: ReportUtterance) -> list[str]:
    if utterance.words:
        return list(utterance.words)
    return ["".join(utterance.token_labels[first:end]).strip() for first, end in utterance.word_spans]


def _word_boxes(utterance: ReportUtterance, words: Sequence[str], seconds: float) -> list[_Box]:
    """Where words are spoken, over a whole picture of `seconds`."""
    return [
        _Box(word, *_across(times, seconds), top=0.0, height=100.0)
        for word, times in zip(words, utterance.word_times or (), strict=False)
        if times is not None and seconds
    ]


def _attention(utterance: ReportUtterance, words: Sequence[str]) -> _Attention | None:
    weights = utterance.attention
    if weights is None or not weights.numel():
        return None
    tokens, frames = weights.shape
    seconds = frames / WHISPER_FRAMES_PER_SECOND
    begins = {first for first, _ in utterance.word_spans}
    labels = [(label.strip() or "␣", index in begins) for index, label in enumerate(utterance.token_labels)]
    # a token that looks at one frame only must not turn the others black
    scaled = weights.float() / weights.float().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    boxes = [
        _Box(word, *_across(times, seconds), top=100 * first / tokens, height=100 * (end - first) / tokens)
        for word, (first, end), times in zip(words, utterance.word_spans, utterance.word_times or (), strict=False)
        if times is not None
    ]
    uri = charts.picture(scaled, charts.ATTENTION_COLOURS, 0.0, 1.0, upwards=False)
    return _Attention(uri, labels, boxes, _ticks(seconds))


def _across(times: tuple[float, float], seconds: float) -> tuple[float, float]:
    """Left edge and width, in percent; what lies beyond the picture is cut."""
    start, end = (min(max(0.0, time), seconds) for time in times)
    return round(100 * start / seconds, 3), round(100 * (end - start) / seconds, 3)


def _ticks(seconds: float) -> list[_Tick]:
    """Marks of a time axis."""
    if seconds <= 0:
        return []
    step = next((step for step in TICK_SECONDS if seconds / step <= MOST_TICKS), TICK_SECONDS[-1])
    count = int(seconds / step + 1e-9)
    return [_Tick(f"{number * step:g}", round(100 * number * step / seconds, 3)) for number in range(count + 1)]

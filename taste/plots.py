"""The pictures of a run."""

import functools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from cosyvoice.utils.atomic import atomic_path
from cosyvoice.utils.rates import MEL_FRAMES_PER_SECOND, S3_UNITS_PER_SECOND, WHISPER_FRAMES_PER_SECOND

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# T text tokens   A Whisper frames, 50 Hz   S S3 units, 50 Hz   F mel frames, 86.13 Hz

TRAIN_COLOUR, TEST_COLOUR, QUIET_COLOUR = "tab:blue", "tab:orange", "0.55"
DOTS_PER_INCH = 130
TITLE_COLUMNS, TITLE_LINES = 110, 3  # characters
INCHES_PER_TOKEN = 0.16
CHINESE_FONTS = re.compile(r"CJK|WenQuanYi|SimHei|PingFang|Microsoft YaHei|Droid Sans Fallback")


def plot_losses(path: Path, history: Sequence[Mapping[str, Any]], class_count: int, title: str) -> None:
    """Draw loss and accuracy against epochs, training set beside test set.

    Args:
        path: the picture to write.
        history: one entry an epoch with `epoch`, `test` and, but for epoch 0, `train`; these hold `loss`, `top1`,
            `top5`. Epoch 0 is before training.
        class_count: units and EOS: guessing evenly costs ln(class_count).
        title: shown above.
    """
    figure, (losses, accuracies) = _new_figure(1, 2, (11, 4.2))
    trained = [entry for entry in history if entry.get("train")]
    uniform = math.log(class_count)
    guess = f"even guess, ln {class_count} = {uniform:.2f}"
    shown = [entry[part]["loss"] for entry in history for part in ("train", "test") if entry.get(part)]
    if max(shown) > uniform / 2:
        losses.axhline(uniform, color=QUIET_COLOUR, linestyle=":", label=guess)
    else:  # drawn, it would leave the curves a flat line at the bottom
        losses.plot([], [], color=QUIET_COLOUR, linestyle=":", label=f"{guess}: far above")
    _line(losses, trained, "train", "loss", TRAIN_COLOUR, "-", "train (mean over the epoch)")
    _line(losses, history, "test", "loss", TEST_COLOUR, "-", "test")
    losses.set(title="Cross-entropy of the next S3 unit", xlabel="epoch", ylabel="nats for each unit")
    for measure, style in (("top1", "-"), ("top5", "--")):
        name = f"top-{measure[3:]}"
        _line(accuracies, trained, "train", measure, TRAIN_COLOUR, style, f"train {name}")
        _line(accuracies, history, "test", measure, TEST_COLOUR, style, f"test {name}")
    accuracies.set(title="Teacher-forced accuracy", xlabel="epoch", ylabel="share of units", ylim=(0, None))
    for axes in (losses, accuracies):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    _set_title(figure, title)
    _save(figure, path)


def plot_comparison(
    path: Path, histories: Mapping[str, Sequence[Mapping[str, Any]]], bars: Sequence[tuple[str, float, float | None]]
) -> None:
    """Draw how variants learn, and what each reaches with its recording and with a wrong one.

    Args:
        path: the picture to write.
        histories: of each variant, as for `plot_losses`.
        bars: variant, top-5, and top-5 with another utterance's recording; None where it hears none.
    """
    figure, (losses, reached) = _new_figure(1, 2, (11, 4.2))
    for number, (variant, history) in enumerate(histories.items()):
        _line(losses, history, "test", "loss", f"C{number}", "-", variant)
    losses.set(title="Test loss", xlabel="epoch", ylabel="nats for each unit")
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.grid(alpha=0.25)
    below: dict[str, Any] = {"frameon": False, "loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
    if histories:  # none where nothing was trained
        losses.legend(ncols=len(histories), **below)  # lines may lie anywhere
    places = np.arange(len(bars))
    for shift, colour, values, label in (
        (-0.2, TRAIN_COLOUR, [top5 for _, top5, _ in bars], "its own recording"),
        (0.2, QUIET_COLOUR, [np.nan if wrong is None else wrong for _, _, wrong in bars], "another one"),
    ):
        drawn = reached.bar(places + shift, values, 0.38, color=colour, label=label)
        reached.bar_label(drawn, [f"{value:.3f}" if np.isfinite(value) else "" for value in values], fontsize=8)
    everything = [value for _, top5, wrong in bars for value in (top5, wrong) if value is not None]
    reached.set(title="Teacher-forced top-5 on the test set", ylim=(max(0.0, min(everything) - 0.1), None))
    reached.set_xticks(places, [variant for variant, _, _ in bars])
    reached.legend(ncols=2, **below)
    _save(figure, path)


def plot_units(path: Path, rows: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Draw true against generated S3 units over time, one panel an utterance.

    Args:
        path: the picture to write.
        rows: utterance id, true units, generated units.
    """
    figure, panels = _new_figure(len(rows), 1, (11, 1.2 + 1.9 * len(rows)))
    for axes, (utt_id, true, predicted) in zip(np.atleast_1d(panels), rows, strict=True):
        for units, colour, marker, label in (
            (true, TRAIN_COLOUR, "o", f"true ({len(true)})"),
            (predicted, TEST_COLOUR, "x", f"generated ({len(predicted)})"),
        ):
            times = np.arange(len(units)) / S3_UNITS_PER_SECOND
            axes.scatter(times, units, s=9, c=colour, marker=marker, linewidths=0.8, label=label)
        axes.set(ylabel="S3 unit")
        axes.set_title(utt_id, loc="left")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
    np.atleast_1d(panels)[-1].set_xlabel("seconds")
    _save(figure, path)


def plot_mels(path: Path, mels: Mapping[str, Tensor], title: str) -> None:
    """Draw mel spectrograms below each other, on one time axis and one scale of colours.

    Args:
        path: the picture to write.
        mels: name -> [80, F], natural logarithm of the magnitude.
        title: shown above.
    """
    figure, panels = _new_figure(len(mels), 1, (11, 1.1 + 2.1 * len(mels)), sharex=True)
    panels = np.atleast_1d(panels)
    colours = min(float(mel.min()) for mel in mels.values()), max(float(mel.max()) for mel in mels.values())
    for axes, (name, mel) in zip(panels, mels.items(), strict=True):
        image = _draw_mel(axes, mel, colours)
        axes.set_title(f"{name}, {_mel_seconds(mel):.2f} s", loc="left")
    panels[0].set_xlim(0, max(map(_mel_seconds, mels.values())))
    panels[-1].set_xlabel("seconds")
    figure.colorbar(image, ax=list(panels), label="ln magnitude", pad=0.01, aspect=40)
    _set_title(figure, title)
    _save(figure, path)


def plot_alignment(path: Path, weights: Tensor, labels: Sequence[str], mel: Tensor | None, title: str) -> None:
    """Draw where each text token looks in the recording, with the recording below on the same time axis.

    Args:
        path: the picture to write.
        weights: attention of each token over the frames, [T, A], each row's sum is 1.
        labels: T words or parts of words.
        mel: of the recording, [80, F]; None where it is not to be had.
        title: shown above.
    """
    token_count, frame_count = weights.shape
    seconds = frame_count / WHISPER_FRAMES_PER_SECOND
    heights = [max(2.0, INCHES_PER_TOKEN * token_count)] + ([1.7] if mel is not None else [])
    size = 11, 1.3 + sum(heights)
    figure, panels = _new_figure(len(heights), 1, size, sharex=True, height_ratios=heights)
    panels = np.atleast_1d(panels)
    image = panels[0].imshow(  # the first token on top: speech then runs from the upper left to the lower right
        weights.cpu().numpy(), aspect="auto", extent=(0, seconds, token_count - 0.5, -0.5), interpolation="nearest"
    )
    shown = [label.strip() or "(space)" for label in labels]
    panels[0].set_yticks(range(token_count), shown, fontsize=8, parse_math=False)
    panels[0].set_ylabel("text token")
    figure.colorbar(image, ax=panels[0], label="attention", pad=0.01)
    if mel is not None:
        _draw_mel(panels[1], mel, (float(mel.min()), float(mel.max())))
    panels[0].set_xlim(0, seconds)
    panels[-1].set_xlabel("seconds")
    _set_title(figure, title)
    _save(figure, path)


def _draw_mel(axes: "Axes", mel: Tensor, colours: tuple[float, float]) -> "AxesImage":
    axes.set_ylabel("mel band")
    return axes.imshow(
        mel.cpu().numpy(),
        origin="lower",
        aspect="auto",
        extent=(0, _mel_seconds(mel), 0, mel.shape[0]),
        vmin=colours[0],
        vmax=colours[1],
    )


def _mel_seconds(mel: Tensor) -> float:
    return mel.shape[-1] / MEL_FRAMES_PER_SECOND


def _set_title(figure: "Figure", title: str) -> None:
    """A transcript is a title too: long, and with dollar signs that are not mathematics."""
    lines = textwrap.wrap(title, TITLE_COLUMNS, max_lines=TITLE_LINES, placeholder=" ...")
    figure.suptitle("\n".join(lines), parse_math=False)


def _new_figure(
    rows: int,
    columns: int,
    size: tuple[float, float],
    sharex: bool = False,
    height_ratios: Sequence[float] | None = None,
) -> tuple["Figure", Any]:
    """A figure and its axes, made without pyplot: no window, and nothing kept alive after saving."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["font.family"] = _fonts()
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=sharex, height_ratios=height_ratios)


@functools.cache
def _fonts() -> list[str]:
    """Matplotlib's own font, and behind it one with Chinese characters, where the machine has one."""
    from matplotlib.font_manager import get_font_names

    return ["DejaVu Sans", *sorted(name for name in get_font_names() if CHINESE_FONTS.search(name))[:1]]


def _line(
    axes: "Axes", entries: Sequence[Mapping[str, Any]], part: str, measure: str, colour: str, style: str, label: str
) -> None:
    epochs, values = [entry["epoch"] for entry in entries], [entry[part][measure] for entry in entries]
    axes.plot(epochs, values, color=colour, linestyle=style, marker=".", label=label)


def _save(figure: "Figure", path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH)

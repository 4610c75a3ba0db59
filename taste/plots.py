"""The pictures of a run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from taste.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# S S3 units, 50 Hz   F mel frames, 86.13 Hz

UNITS_PER_SECOND = 50
MEL_FRAMES_PER_SECOND = 22_050 / 256
TRAIN_COLOUR, TEST_COLOUR, QUIET_COLOUR = "tab:blue", "tab:orange", "0.55"
DOTS_PER_INCH = 130


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
    losses.axhline(uniform, color=QUIET_COLOUR, linestyle=":", label=f"even guess, ln {class_count} = {uniform:.2f}")
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
    figure.suptitle(title)
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
            times = np.arange(len(units)) / UNITS_PER_SECOND
            axes.scatter(times, units, s=9, c=colour, marker=marker, linewidths=0.8, label=label)
        axes.set(ylabel="S3 unit")
        axes.set_title(utt_id, loc="left")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
    np.atleast_1d(panels)[-1].set_xlabel("seconds")
    _save(figure, path)


def plot_mels(path: Path, mels: Mapping[str, Tensor], title: str) -> None:
    """Draw mel spectrograms below each other on one time axis.

    Args:
        path: the picture to write.
        mels: name -> [80, F], natural logarithm of the magnitude.
        title: shown above.
    """
    figure, panels = _new_figure(len(mels), 1, (11, 0.9 + 2.1 * len(mels)), sharex=True)
    for axes, (name, mel) in zip(np.atleast_1d(panels), mels.items(), strict=True):
        seconds = mel.shape[-1] / MEL_FRAMES_PER_SECOND
        axes.imshow(mel.cpu().numpy(), origin="lower", aspect="auto", extent=(0, seconds, 0, mel.shape[0]))
        axes.set(title=f"{name}, {seconds:.2f} s", ylabel="mel band")
    panel_list = np.atleast_1d(panels)
    panel_list[0].set_xlim(0, max(mel.shape[-1] for mel in mels.values()) / MEL_FRAMES_PER_SECOND)
    panel_list[-1].set_xlabel("seconds")
    figure.suptitle(title)
    _save(figure, path)


def _new_figure(rows: int, columns: int, size: tuple[float, float], sharex: bool = False) -> tuple["Figure", Any]:
    """A figure and its axes, made without pyplot: no window, and nothing kept alive after saving."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=sharex)


def _line(
    axes: "Axes", entries: Sequence[Mapping[str, Any]], part: str, measure: str, colour: str, style: str, label: str
) -> None:
    epochs, values = [entry["epoch"] for entry in entries], [entry[part][measure] for entry in entries]
    axes.plot(epochs, values, color=colour, linestyle=style, marker=".", label=label)


def _save(figure: "Figure", path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH)

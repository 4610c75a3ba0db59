"""The record of a training: lines for a person, metrics.jsonl, TensorBoard, and a picture of the losses."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cosyvoice.utils.atomic import atomic_path, write_text

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss_curve.png"
TRAIN_TAG, CV_TAG = "TRAIN", "CV"  # as published
MOST_PANELS = 6
PANEL_COLUMNS = 3
PANEL_INCHES = (4.2, 3.2)
DOTS_PER_INCH = 110


class TrainLog:
    """Where the main process notes what happens; in the others it does nothing.

    Args:
        model_dir: metrics.jsonl and loss_curve.png are written here.
        tensorboard_dir: for TensorBoard; None leaves it out.
        step: steps done by the checkpoint the run goes on from: what was noted after it is dropped.
        active: whether this is the main process.
    """

    def __init__(self, model_dir: Path, tensorboard_dir: Path | None, step: int, active: bool) -> None:
        self.path, self.curve_path, self.active = model_dir / METRICS_FILE, model_dir / CURVE_FILE, active
        self._bar: tqdm | None = None
        self._entries: list[dict[str, Any]] = []
        self._writer = None
        if not active:
            return
        self._entries = _entries_until(self.path, step)
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self._entries))
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard_dir), purge_step=step + 1 if step else None)

    def say(self, text: str) -> None:
        """Print a line, above the progress bar where there is one.

        Args:
            text: the line.
        """
        if self.active:
            tqdm.write(text)
            sys.stdout.flush()

    def start_epoch(self, epoch: int, max_epoch: int, done: int, total: int | None) -> None:
        """Show a bar for an epoch.

        Args:
            epoch: its number, from 0.
            max_epoch: epochs in all.
            done: batches done already.
            total: batches of the epoch; None where it is not known yet.
        """
        if self.active:
            title = f"epoch {epoch} of {max_epoch}"
            # disable=None: a bar only where somebody watches a terminal
            self._bar = tqdm(desc=title, total=total, initial=done, unit="batch", leave=False, disable=None)

    def advance(self, batches: int, loss: float, seconds_left: float | None) -> None:
        """Move the bar on.

        Args:
            batches: done since the last call.
            loss: of the last step.
            seconds_left: of the whole run; None where it is not known.
        """
        if self._bar is not None and not self._bar.disable:
            self._bar.update(batches)
            self._bar.set_postfix_str(f"loss {loss:.4f}, {shown_time(seconds_left)} left", refresh=False)

    def end_epoch(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def add(self, tag: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Note numbers.

        Args:
            tag: TRAIN or CV.
            epoch: from 0.
            step: steps done.
            values: by name; names are grouped under the tag in TensorBoard.
        """
        if not self.active:
            return
        entry = {"tag": tag, "epoch": epoch, "step": step, **values}
        self._entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{tag}/{name}", value, step)

    def draw(self, title: str) -> None:
        """Draw the losses so far into loss_curve.png.

        Args:
            title: shown above.
        """
        if self.active and self._entries:
            _draw(self.curve_path, self._entries, title)

    def close(self) -> None:
        """Bring everything to the disk."""
        self.end_epoch()
        if self._writer is not None:
            self._writer.close()


def shown_time(seconds: float | None) -> str:
    """A duration for a person.

    Args:
        seconds: None where it is not known.

    Returns:
        e.g. `95 s` or `2 h 05 min`.
    """
    if seconds is None:
        return "? s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _entries_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of an earlier run that its checkpoint includes; half a line, left by a kill, is none."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            entries.append(entry)
    return entries


def _draw(path: Path, entries: Sequence[Mapping[str, Any]], title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [entry for entry in entries if entry["tag"] == TRAIN_TAG]
    checked = [entry for entry in entries if entry["tag"] == CV_TAG]
    aside = {"tag", "epoch", "step", "steps_per_second", "data_wait"}
    aside |= {prefix + name for prefix in ("", "d_") for name in ("grad_norm", "lr", "skipped")}
    names = list(dict.fromkeys(name for entry in (*checked, *train) for name in entry if name not in aside))
    names = [*sorted(names, key=lambda name: name != "loss")[: MOST_PANELS - 1], "lr"]
    rows = -(-len(names) // PANEL_COLUMNS)
    width, height = PANEL_INCHES
    figure = Figure((width * min(len(names), PANEL_COLUMNS), height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, min(len(names), PANEL_COLUMNS), number + 1)
        for line, style, label in ((train, "-", "train"), (checked, ".-", "cross-validation")):
            points = [(entry["step"], entry[name]) for entry in line if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=5)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.25)
        if number == 0:
            axes.legend(frameon=False)
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH)

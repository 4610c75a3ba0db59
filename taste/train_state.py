"""Where a training run stands, and the record of how it came there."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosyvoice.utils.atomic import atomic_path
from taste.scores import Totals


@dataclass
class Progress:
    """Where a run stands: with weights and optimizer, all that is needed to go on as if it had never stopped.

    No random generator's state is in here, because none outlives a step: the order of the data follows from seed and
    epoch, and the dropout of a step from seed, step and process.
    """

    epoch: int = 0  # epochs completed, their evaluation included
    step_in_epoch: int = 0  # steps completed of the epoch in work
    step: int = 0  # steps completed in all
    skipped_in_a_row: int = 0  # the last so many of them were left out, because their loss or gradient was no number
    epoch_totals: Totals = field(default_factory=Totals)  # of the epoch in work
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry an epoch; the first is from before training
    best_epoch: int | None = None  # the one with the lowest test loss

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Read back what `dataclasses.asdict` made of it.

        Args:
            values: the fields.

        Returns:
            the progress.
        """
        return cls(**{**values, "epoch_totals": Totals(**values["epoch_totals"])})


class StepRecord:
    """The results of each step and epoch, a JSON object a line.

    Args:
        path: the file; it is made when the first line is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, kind: str, step: int, epoch: int, results: dict[str, Any]) -> None:
        """Append a line.

        Args:
            kind: `step`, `skipped` (a step that was left out) or `epoch`.
            step: steps completed.
            epoch: the epoch it belongs to.
            results: what to note.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **results}) + "\n")

    def keep_until(self, progress: Progress) -> None:
        """Drop what was noted after the checkpoint that a run goes on from; a new run starts with an empty record.

        Args:
            progress: of that checkpoint.
        """
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        epochs = len(progress.history)
        with atomic_path(self.path) as temporary:
            temporary.write_text(
                "".join(line for line in lines if _was_before(line, progress.step, epochs)), encoding="utf-8"
            )


def _was_before(line: str, step: int, epochs: int) -> bool:
    """Whether a line of the record is of a step or epoch that a checkpoint includes; False for half a line."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return False
    return entry["epoch"] < epochs if entry["kind"] == "epoch" else entry["step"] <= step

"""Shows a training run in TensorBoard."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EVENT_FILES = "events.out.tfevents.*"
PARTS = ("train", "test")
ASIDE = ("kind", "step", "epoch")  # of a record's line: where it belongs, no result


class TrainBoard:
    """Writes TensorBoard's files from what a run remembers of itself, so that a resumed run's curves have no seam.

    Open them with `tensorboard --logdir exp`.

    Args:
        folder: where the files lie; those of an earlier start of the run are replaced at the first update.
        record: metrics.jsonl of the run, whose steps are shown too; None shows epochs only.
    """

    def __init__(self, folder: Path, record: Path | None = None) -> None:
        self.folder, self.record = folder, record
        self._writer: Any = None
        self._epochs = 0  # entries of the history written
        self._read_bytes = 0  # of the record

    def update(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write what is new.

        Args:
            history: all entries of the run so far: `epoch`, `train` and `test`, which hold numbers by name.
        """
        if self._writer is None:
            self._writer = self._start()
        for entry in history[self._epochs :]:
            for part in PARTS:
                self._add(f"epoch {part}", entry.get(part, {}), entry["epoch"])
        self._epochs = len(history)
        for entry in self._new_lines():
            if entry["kind"] == "step":
                self._add("step", {name: value for name, value in entry.items() if name not in ASIDE}, entry["step"])
        self._writer.flush()

    def close(self) -> None:
        """Bring everything to the disk."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _start(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        for old in self.folder.glob(EVENT_FILES):
            old.unlink()
        return SummaryWriter(str(self.folder))

    def _add(self, group: str, values: Mapping[str, Any], at: int) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{group}/{name}", value, at)

    def _new_lines(self) -> list[dict[str, Any]]:
        """Whole lines of the record that were not read yet."""
        if self.record is None or not self.record.exists():
            return []
        with self.record.open("rb") as file:
            file.seek(self._read_bytes)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

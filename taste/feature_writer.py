"""Writes files of values by utterance id so that no crash loses more than the chunk in work and the one in writing."""

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cosyvoice.utils.atomic import atomic_path, remove_leftovers
from cosyvoice.utils.output_lock import OutputLock
from taste.feature_files import NESTED_FIELDS, chunk_files, chunk_folder, stored_bytes, stored_files
from taste.feature_reader import load_file, open_features, stored_ids

SAVE_MODES = ("single", "chunks", "auto")
AUTO_SINGLE_LIMIT_BYTES = 4 * 2**30  # `auto` leaves larger outputs in chunks
CHUNK_UTTERANCES = 200
CHUNK_BYTES = 256 * 2**20
CHUNK_SECONDS = 120  # of work, at most, in a chunk on a slow machine
DISK_RESERVE_BYTES = 64 * 2**20


class FeatureWriteError(OSError):
    """A feature file could not be written; what was written before is safe."""


class FeatureWriter:
    """Appends values to an output, a chunk at a time, and skips what an earlier run wrote.

    Values are what `torch.load(weights_only=True)` can read: tensors, numbers, text, and lists or dicts of them. Chunks
    end where the caller says that a batch has ended, so that a resumed run forms the same batches.

    Args:
        output_path: the .pt file wanted at the end.
        chunk_utterances: a chunk is written when it holds so many utterances (or CHUNK_BYTES, or CHUNK_SECONDS).
        nested: values are `{"mid": tensor, "final": tensor}`.

    Raises:
        OutputBusyError: another process writes this output.
        FeatureFileError: what an earlier run left cannot be read.
    """

    def __init__(
        self, output_path: str | os.PathLike[str], *, chunk_utterances: int = CHUNK_UTTERANCES, nested: bool = False
    ) -> None:
        self.output_path = Path(output_path)
        self.chunk_folder = chunk_folder(self.output_path)
        self.chunk_utterances = chunk_utterances
        self.nested = nested
        self._lock = OutputLock(self.output_path)
        try:
            remove_leftovers(self.output_path)
            _remove_stray(self.chunk_folder)
            self.done_ids: set[str] = stored_ids(self.output_path)
        except BaseException:
            self._lock.release()
            raise
        self._pending: dict[str, Any] = {}
        self._pending_bytes = 0
        self._closed_chunk: dict[str, Any] = {}
        self._last_write = time.monotonic()

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, utt_id: str, value: Any) -> None:
        """Take the value of one utterance into the chunk in work.

        Args:
            utt_id: its id, not in `done_ids`.
            value: its value; tensors are copied to the CPU, cut loose from larger storages.

        Raises:
            ValueError: the output has this id already, or a nested writer got no `mid` and `final`.
        """
        # the closed chunk before done_ids, where it goes: another thread may be writing it
        if any(utt_id in ids for ids in (self._pending, self._closed_chunk, self.done_ids)):
            raise ValueError(f"{self.output_path} has a value for {utt_id!r} already")
        if self.nested and (not isinstance(value, Mapping) or set(value) != set(NESTED_FIELDS)):
            raise ValueError(f"{utt_id!r}: expected a dict with the keys {NESTED_FIELDS}, got {type(value).__name__}")
        value = _detached(value)
        self._pending[utt_id] = value
        self._pending_bytes += _tensor_bytes(value)

    @property
    def is_full(self) -> bool:
        """Whether the chunk in work should be written at the end of this batch."""
        return bool(self._pending) and (
            len(self._pending) >= self.chunk_utterances
            or self._pending_bytes >= CHUNK_BYTES
            or time.monotonic() - self._last_write >= CHUNK_SECONDS
        )

    def flush(self) -> None:
        """Write the chunk in work, if it holds anything; call it where a batch has ended.

        Raises:
            FeatureWriteError: the disk is full, say; no half file is left and the chunk stays in memory.
        """
        self.write_closed_chunk()
        self.close_chunk()
        self.write_closed_chunk()

    def close_chunk(self) -> None:
        """End the chunk in work, if it holds anything; what is added from now on goes into the next one."""
        assert not self._closed_chunk, f"{self.output_path}: the chunk before is not written yet"
        self._closed_chunk, self._pending, self._pending_bytes = self._pending, {}, 0
        self._last_write = time.monotonic()

    def write_closed_chunk(self) -> None:
        """Write what `close_chunk` has ended; another thread may, and meanwhile the caller adds to the next chunk.

        Raises:
            FeatureWriteError: the disk is full, say; no half file is left and the chunk stays in memory.
        """
        if not self._closed_chunk:
            return
        number = max((int(chunk.stem) for chunk in chunk_files(self.output_path)), default=-1) + 1
        path = self.chunk_folder / f"{number:06d}.pt"
        self._write(
            path,
            self._closed_chunk,
            f"write {path}",
            f"the {len(self.done_ids)} utterances written before are safe. Free some space and run the same command "
            "again: it goes on from there.",
        )
        self.done_ids.update(self._closed_chunk)
        self._closed_chunk = {}

    def finish(self, save_mode: str = "auto") -> None:
        """Write what is left, bring the output into its final form, and give it free.

        Args:
            save_mode: `single` merges everything into the one .pt, `chunks` leaves the chunk files, `auto` merges up to
                AUTO_SINGLE_LIMIT_BYTES where the disk has room for both copies.

        Raises:
            ValueError: no such mode.
            FeatureWriteError: the merge does not fit on the disk; the chunks stay.
        """
        check_save_mode(save_mode)
        self.flush()
        chunks = chunk_files(self.output_path)
        if chunks and (save_mode == "single" or (save_mode == "auto" and self._merge_is_cheap())):
            self._merge(chunks)
        self.close()

    def forget(self, utt_ids: Iterable[str]) -> None:
        """Take utterances out again, so that they can be written anew; call it before anything is added.

        Args:
            utt_ids: some of `done_ids`.

        Raises:
            FeatureWriteError: the disk has no room for a copy of a file; call it again when it has.
        """
        gone = set(utt_ids) & self.done_ids
        for source in stored_files(self.output_path):
            content = load_file(source)  # mapped: what stays is not read before it is written
            kept = {utt_id: value for utt_id, value in content.items() if utt_id not in gone}
            if len(kept) == len(content):
                continue
            self._write(
                source,
                kept,
                f"write {source} without {len(content) - len(kept)} of its utterances",
                "it has not changed. Free some space, and run the same again.",
            )
        self.done_ids -= gone

    def close(self) -> None:
        """Give the output free; what was added since the last flush is dropped."""
        self._lock.release()

    def _merge_is_cheap(self) -> bool:
        size = stored_bytes(self.output_path)
        free = shutil.disk_usage(self.output_path.parent).free
        return size <= AUTO_SINGLE_LIMIT_BYTES and size + DISK_RESERVE_BYTES <= free

    def _merge(self, chunks: list[Path]) -> None:
        """One file from the earlier one and the chunks; tensors are mapped, so memory stays small, lists are held."""
        merged = open_features(self.output_path)
        self._write(
            self.output_path,
            merged,
            f"merge {self.chunk_folder} into {self.output_path}",
            "the chunks are untouched. Free some space, or run again with --save-mode chunks (training reads either).",
        )
        del merged  # it maps the chunks, and NFS keeps a mapped file under another name until nobody does
        for chunk in chunks:
            chunk.unlink()
        with suppress(OSError):  # not there, or not empty: the next run removes it
            self.chunk_folder.rmdir()

    def _write(self, path: Path, values: Mapping[str, Any], task: str, remedy: str) -> None:
        """Save values whole, or say what could not be done and what to do."""
        try:
            _save(path, self._layout(values))
        except (OSError, RuntimeError) as error:
            raise FeatureWriteError(f"cannot {task}: {_cause(error)}; {remedy}") from error

    def _layout(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if not self.nested:
            return dict(values)
        return {field: {utt_id: value[field] for utt_id, value in values.items()} for field in NESTED_FIELDS}


def check_save_mode(save_mode: str) -> None:
    """Refuse a save mode that does not exist.

    Args:
        save_mode: the setting.

    Raises:
        ValueError: it is not one of SAVE_MODES.
    """
    if save_mode not in SAVE_MODES:
        raise ValueError(f"SAVE_MODE is {save_mode!r}; expected one of {', '.join(SAVE_MODES)}")


def _remove_stray(folder: Path) -> None:
    """Temporary files of a chunk that a killed process never finished; an empty folder goes too."""
    if folder.is_dir():
        for file in folder.glob(".*"):
            file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _save(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def _detached(value: Any) -> Any:
    """A copy on the CPU that owns no more storage than it shows (torch.save writes whole storages)."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {name: _detached(part) for name, part in value.items()}
    return value


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_tensor_bytes(part) for part in value.values())
    return 0


def _cause(error: BaseException) -> str:
    """What went wrong, in the words of the system where torch hides them behind its own."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__context__
    return (link.strerror if link is not None else None) or str(error)

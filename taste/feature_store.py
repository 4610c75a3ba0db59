"""Files of values by utterance id, written so that no crash loses more than the chunk in work and the one in writing.

`train_text_emb.pt` is written as `train_text_emb.chunks/000000.pt`, `000001.pt` ...; `finish` merges them into the one
file, or leaves them. A reader takes either, or both at once. Flat files are `{utt_id: value}`; nested ones are
`{"mid": {utt_id: value}, "final": {utt_id: value}}`.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosyvoice.utils.atomic import atomic_path, remove_leftovers
from cosyvoice.utils.output_lock import OutputLock
from taste.safe_pickle import load_plain
from taste.utterance_ids import normalise_key

NESTED_FIELDS = ("mid", "final")
SAVE_MODES = ("single", "chunks", "auto")
AUTO_SINGLE_LIMIT_BYTES = 4 * 2**30  # `auto` leaves larger outputs in chunks
CHUNK_UTTERANCES = 200
CHUNK_BYTES = 256 * 2**20
CHUNK_SECONDS = 120  # of work, at most, in a chunk on a slow machine
DISK_RESERVE_BYTES = 64 * 2**20
ZIP_MAGIC = b"PK"
MAKERS = {"_utt2s3": "bash s3.sh", "": "python utt2text_and_feature.py"}  # by the end of the file's stem


class FeatureFileError(ValueError):
    """A feature file cannot be read; the message names it and the command that makes it again."""


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
            self.done_ids: set[str] = _stored_ids(self.output_path)
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
        number = max((int(chunk.stem) for chunk in _chunks(self.chunk_folder)), default=-1) + 1
        path = self.chunk_folder / f"{number:06d}.pt"
        try:
            _save(path, self._layout(self._closed_chunk))
        except (OSError, RuntimeError) as error:
            raise FeatureWriteError(
                f"cannot write {path}: {_cause(error)}; the {len(self.done_ids)} utterances written before are "
                "safe. Free some space and run the same command again: it goes on from there."
            ) from error
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
        chunks = _chunks(self.chunk_folder)
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
        for source in self._sources():
            content = _load(source)  # mapped: what stays is not read before it is written
            kept = {utt_id: value for utt_id, value in content.items() if utt_id not in gone}
            if len(kept) == len(content):
                continue
            try:
                _save(source, self._layout(kept))
            except (OSError, RuntimeError) as error:
                raise FeatureWriteError(
                    f"cannot write {source} without {len(content) - len(kept)} of its utterances: {_cause(error)}; it "
                    "has not changed. Free some space, and run the same again."
                ) from error
        self.done_ids -= gone

    def close(self) -> None:
        """Give the output free; what was added since the last flush is dropped."""
        self._lock.release()

    def _sources(self) -> list[Path]:
        return _sources(self.output_path)

    def _merge_is_cheap(self) -> bool:
        size = stored_bytes(self.output_path)
        free = shutil.disk_usage(self.output_path.parent).free
        return size <= AUTO_SINGLE_LIMIT_BYTES and size + DISK_RESERVE_BYTES <= free

    def _merge(self, chunks: list[Path]) -> None:
        """One file from the earlier one and the chunks; tensors are mapped, so memory stays small, lists are held."""
        merged = dict(open_features(self.output_path))
        try:
            _save(self.output_path, self._layout(merged))
        except (OSError, RuntimeError) as error:
            raise FeatureWriteError(
                f"cannot merge {self.chunk_folder} into {self.output_path}: {_cause(error)}; the chunks are untouched. "
                "Free some space, or run again with --save-mode chunks (training reads either)."
            ) from error
        del merged  # it maps the chunks, and NFS keeps a mapped file under another name until nobody does
        for chunk in chunks:
            chunk.unlink()
        with suppress(OSError):  # not there, or not empty: the next run removes it
            self.chunk_folder.rmdir()

    def _layout(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if not self.nested:
            return dict(values)
        return {field: {utt_id: value[field] for utt_id, value in values.items()} for field in NESTED_FIELDS}


class Features(Mapping[str, Any]):
    """Values by utterance id over memory-mapped files: a tensor is read from the disk when it is used."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, utt_id: str) -> Any:
        return self._values[utt_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Units(Features):
    """S3 units by utterance id, kept as int32 arrays; a list is made of them when they are used."""

    def __getitem__(self, utt_id: str) -> list[int]:
        return super().__getitem__(utt_id).tolist()


def open_features(path: str | os.PathLike[str], known_ids: Iterable[str] = ()) -> Features:
    """Open an output: the .pt file, its chunks, or both.

    Files that other scripts wrote open too: keys may be paths or dashed paths, a value of None (a recording that was
    too long) counts as absent, and a leading axis of length 1 is dropped. Untrimmed features stay untrimmed.

    Args:
        path: the .pt file; it need not exist where its chunk folder does. The chunk folder itself is taken too.
        known_ids: utterance ids that help to read dashed paths (see `taste.utterance_ids.normalise_key`).

    Returns:
        the values; a nested file gives `{"mid": tensor, "final": tensor}` for each id.

    Raises:
        FeatureFileError: nothing is there, a file is truncated or holds something else, or two keys are one id.
    """
    return Features(_values(Path(path), known_ids, lambda utt_id, value: value))


def open_units(path: str | os.PathLike[str], known_ids: Iterable[str] = ()) -> Units:
    """Open a file of S3 units, whichever way its numbers are stored.

    Args:
        path: as for `open_features`; values are lists or tensors of whole numbers, int or float.
        known_ids: as for `open_features`.

    Returns:
        the units of each utterance.

    Raises:
        FeatureFileError: as for `open_features`, or a value is no list of whole numbers.
    """
    path = Path(path)
    return Units(_values(path, known_ids, partial(_units, path)))


def chunk_folder(output_path: str | os.PathLike[str]) -> Path:
    """Where the chunks of an output lie.

    Args:
        output_path: the .pt file.

    Returns:
        `train_text_emb.chunks` beside `train_text_emb.pt`.
    """
    return Path(output_path).with_suffix(".chunks")


def stored_bytes(output_path: str | os.PathLike[str]) -> int:
    """The size on the disk of an output, merged or in chunks.

    Args:
        output_path: the .pt file.

    Returns:
        bytes; 0 where there is nothing yet.
    """
    return sum(source.stat().st_size for source in _sources(Path(output_path)))


def check_save_mode(save_mode: str) -> None:
    """Refuse a save mode that does not exist.

    Args:
        save_mode: the setting.

    Raises:
        ValueError: it is not one of SAVE_MODES.
    """
    if save_mode not in SAVE_MODES:
        raise ValueError(f"SAVE_MODE is {save_mode!r}; expected one of {', '.join(SAVE_MODES)}")


def _stored_ids(path: Path) -> set[str]:
    """The utterances of an output, perhaps none; its values are read, and dropped again, file by file."""
    return set(_values(path, (), lambda utt_id, value: None)) if _sources(path) else set()


def _chunks(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.pt") if file.stem.isdigit())


def _sources(path: Path) -> list[Path]:
    return ([path] if path.is_file() else []) + _chunks(chunk_folder(path))


def _remove_stray(folder: Path) -> None:
    """Temporary files of a chunk that a killed process never finished; an empty folder goes too."""
    if folder.is_dir():
        for file in folder.glob(".*"):
            file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _save(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(dict(content), file)


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            mappable = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        content = _content(path, mappable)
    except Exception as error:  # reading damaged pickles raises nearly anything
        if "Cannot allocate memory" in str(error):
            raise FeatureFileError(
                f"{path}: {path.stat().st_size / 1e9:.1f} GB are more than this machine maps at once (its memory and "
                "swap); the file is whole. Use a machine with more memory, add swap, or let the kernel map it: "
                "sysctl vm.overcommit_memory=1. Chunks (--save-mode chunks) need no such room"
            ) from error
        raise FeatureFileError(f"{path}: truncated, or no feature file ({error}); {_remake(path)}") from error
    if not isinstance(content, dict):
        raise FeatureFileError(f"{path}: expected a dict of utterances, got {type(content).__name__}; {_remake(path)}")
    if set(content) == set(NESTED_FIELDS) and all(isinstance(part, dict) for part in content.values()):
        mid, final = (content[field] for field in NESTED_FIELDS)
        content = {key: {"mid": mid[key], "final": final[key]} for key in mid if final.get(key) is not None}
    return content


def _values(path: Path, known_ids: Iterable[str], converted: Callable[[str, Any], Any]) -> dict[str, Any]:
    """What `converted` makes of each value of an output, file by file: no more than one is held as it was stored."""
    known_ids = frozenset(known_ids)
    if path.suffix == ".chunks":
        path = path.with_suffix(".pt")
    sources = _sources(path)
    if not sources:
        raise FeatureFileError(f"{path}: neither this file nor {chunk_folder(path)} exists; {_remake(path)}")
    values: dict[str, Any] = {}
    for source in sources:
        content = _by_id(source, _load(source), known_ids)
        # the same id in a later file is the same value: a merge was interrupted before the chunks were removed
        values |= {utt_id: converted(utt_id, value) for utt_id, value in content.items() if utt_id not in values}
    return values


def _content(path: Path, mappable: bool) -> Any:
    if mappable:
        with suppress(ValueError):  # it has tensors
            return load_plain(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)


def _by_id(source: Path, content: Mapping[str, Any], known_ids: frozenset[str]) -> dict[str, Any]:
    keys: dict[str, str] = {}
    values = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise FeatureFileError(f"{source}: expected text keys, got {key!r}; {_remake(source)}")
        if value is None or (isinstance(value, Mapping) and any(part is None for part in value.values())):
            continue
        utt_id = normalise_key(key, known_ids)
        if utt_id in keys:
            raise FeatureFileError(f"{source}: the keys {keys[utt_id]!r} and {key!r} are both utterance {utt_id!r}")
        keys[utt_id] = key
        values[utt_id] = _squeezed(value)
    return values


def _squeezed(value: Any) -> Any:
    """[1, A, D] -> [A, D], in a nested value too."""
    if isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[0] == 1:
        return value[0]
    if isinstance(value, dict):
        return {name: _squeezed(part) for name, part in value.items()}
    return value


def _units(path: Path, utt_id: str, value: Any) -> np.ndarray:
    """The units of one utterance, [n] int32."""
    try:
        numbers = np.asarray(value.flatten().tolist() if isinstance(value, torch.Tensor) else value)
        if numbers.ndim == 1 and numbers.dtype.kind in "iuf":
            with np.errstate(invalid="ignore"):  # what is no number becomes some number, and so differs
                units = numbers.astype(np.int32)
            if np.array_equal(units, numbers):
                return units
    except ValueError:  # lists of different lengths in it
        pass
    raise FeatureFileError(f"{path}: the value of {utt_id!r} is no list of S3 units; {_remake(path)}")


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


def _remake(path: Path) -> str:
    stem = (path.parent.stem if path.parent.suffix == ".chunks" else path.stem).rstrip(".")
    maker = next(command for ending, command in MAKERS.items() if stem.endswith(ending))
    return f"remove it if it is there, and make it again with: {maker}"

"""Reads files of values by utterance id, whoever wrote them."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taste.feature_files import NESTED_FIELDS, chunk_folder, stored_files
from taste.safe_pickle import load_plain
from taste.utterance_ids import normalise_key

# A Whisper frames, 50 Hz   S S3 units, 50 Hz   D channels
ZIP_MAGIC = b"PK"
MAKERS = {"_utt2s3": "bash s3.sh", "": "python utt2text_and_feature.py"}  # by the end of the file's stem


class FeatureFileError(ValueError):
    """A feature file cannot be read; the message names it and the command that makes it again."""


class Units(Mapping[str, list[int]]):
    """S3 units by utterance id, kept as int32 arrays; a list is made of them when they are used."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def __getitem__(self, utt_id: str) -> list[int]:
        return self._arrays[utt_id].tolist()

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def open_features(path: str | os.PathLike[str], known_ids: Iterable[str] = ()) -> Mapping[str, Any]:
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
    return _values(Path(path), known_ids, lambda utt_id, value: value)


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


def stored_ids(path: Path) -> set[str]:
    """The utterances of an output; its values are read, and dropped again, file by file.

    Args:
        path: the .pt file.

    Returns:
        utterance ids; none where there is no output yet.

    Raises:
        FeatureFileError: a file is truncated or holds something else, or two keys are one id.
    """
    return set(_values(path, (), lambda utt_id, value: None)) if stored_files(path) else set()


def load_file(path: Path) -> dict[str, Any]:
    """Read one file of an output, with its tensors memory-mapped.

    Args:
        path: the .pt file, or a chunk.

    Returns:
        its values by key, as they are stored; nested values by key too.

    Raises:
        FeatureFileError: it is truncated, holds something else, or is more than the machine can map.
    """
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
    sources = stored_files(path)
    if not sources:
        raise FeatureFileError(f"{path}: neither this file nor {chunk_folder(path)} exists; {_remake(path)}")
    values: dict[str, Any] = {}
    for source in sources:
        content = _by_id(source, load_file(source), known_ids)
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
    """The units of one utterance, [S] int32."""
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


def _remake(path: Path) -> str:
    stem = (path.parent.stem if path.parent.suffix == ".chunks" else path.stem).rstrip(".")
    maker = next(command for ending, command in MAKERS.items() if stem.endswith(ending))
    return f"remove it if it is there, and make it again with: {maker}"

"""Writing a file so that it is either whole or not there, whatever stops the process."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_MARK = ".writing-"


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the same folder; rename it to `path` once the block has ended well.

    The content reaches the disk (fsync) before the name does. Where the block raises, the temporary file is removed and
    what stood at `path` before is untouched. The folder is made if it is missing.

    Args:
        path: the file wanted at the end.

    Yields:
        the path to write to; it keeps the suffix of `path`, because some writers choose their format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}{TEMPORARY_MARK}{os.getpid()}{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text as UTF-8, as `atomic_path` does.

    Args:
        path: the file.
        text: its whole content.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as readable JSON, as `atomic_path` does.

    Args:
        path: the file.
        value: what JSON can hold.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed processes left while writing `path`.

    Only for a caller who holds the right to write `path` (see `cosyvoice.utils.output_lock`).

    Args:
        path: the file that was being written.
    """
    path = Path(path)
    prefix = f".{path.stem}{TEMPORARY_MARK}"
    if path.parent.is_dir():
        for file in path.parent.iterdir():
            if file.name.startswith(prefix) and file.suffix == path.suffix:
                file.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

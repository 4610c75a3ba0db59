"""Puts a finished folder in the place of an old one, so that at no moment both are lost.

`model` is being replaced: `.model.setup-new` is filled beside it, `model` becomes `.model.setup-old`, and the new one
takes its name. A process that dies between the two renames leaves the old folder under its hidden name;
`finish_swap` brings it back.
"""

import shutil
from collections.abc import Callable
from pathlib import Path


class SwapError(RuntimeError):
    """The two folders cannot be exchanged; both still exist."""


def fresh_folder(folder: Path) -> Path:
    """Where the replacement of a folder is made: a hidden sibling, so that it is on the same disk.

    Args:
        folder: the folder that will be replaced.

    Returns:
        the path; an interrupted attempt may have left it partly filled.
    """
    return folder.with_name(f".{folder.name}.setup-new")


def swap(folder: Path, say: Callable[[str], None], leave_behind: str) -> None:
    """Put the finished `fresh_folder(folder)` in the folder's place.

    Files that only the old folder holds move over.

    Args:
        folder: the folder to replace; it may be missing.
        say: told what moves over.
        leave_behind: a name in the old folder that does not.

    Raises:
        SwapError: a folder cannot be renamed (a mount point, a missing right); the old one stays.
    """
    fresh, previous = fresh_folder(folder), _previous_folder(folder)
    try:
        if folder.exists():
            folder.rename(previous)
        fresh.rename(folder)
    except OSError as error:
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        raise SwapError(
            f"the new files are complete in {fresh}, but cannot be put in the place of {folder} ({error}); "
            "nothing is lost: rename the folders by hand"
        ) from error
    finish_swap(folder, say, leave_behind)


def finish_swap(folder: Path, say: Callable[[str], None], leave_behind: str) -> None:
    """Bring a swap to its end, whether it was begun just now or by a process that died in the middle of it.

    Args:
        folder: the folder that is or was being replaced.
        say: told what moves over.
        leave_behind: a name in the old folder that does not.
    """
    previous = _previous_folder(folder)
    if not previous.is_dir():
        return
    if not folder.exists():
        previous.rename(folder)
        return
    for path in sorted(path for path in previous.rglob("*") if path.is_file() or path.is_symlink()):
        name = path.relative_to(previous)
        if name.parts[0] != leave_behind and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(folder / name)
            say(f"{name} is kept from the old folder")
    shutil.rmtree(previous)


def _previous_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.setup-old")

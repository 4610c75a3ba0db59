"""Unpacks a tar archive without letting anything in it reach outside the folder it is unpacked into."""

import os
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from cosyvoice.utils.atomic import atomic_path

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class ArchiveError(ValueError):
    """An archive cannot be unpacked, or must not be; the message lists every reason."""


def is_archive(name: str) -> bool:
    """Whether a file is meant to be unpacked, by its name.

    A `.zip` never is: those of CosyVoice are TorchScript modules, which are read as they are.

    Args:
        name: the file's name or path.

    Returns:
        True for tar archives, compressed or not.
    """
    return name.lower().endswith(TAR_SUFFIXES)


def unpack_archive(archive: Path, folder: Path) -> list[str]:
    """Unpack a tar archive into a folder, or nothing at all if any part of it is unfit.

    Only files and folders are taken, and only under the folder: a link, a device, an absolute name or one that climbs
    out by `..` makes the whole archive unfit, as does a link that already lies in the folder and leads out of it.

    Args:
        archive: the tar file, compressed or not.
        folder: where its content goes; made if missing.

    Returns:
        the paths of the files written, inside the folder, with forward slashes.

    Raises:
        ArchiveError: an unfit entry (all are listed), a file that is no whole tar archive, or too little disk space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            problems = [problem for member in members if (problem := _unfit(member, folder)) is not None]
            if problems:
                raise ArchiveError(f"{archive.name} is not unpacked, because it holds " + "; ".join(problems))
            files = [member for member in members if member.isreg()]
            _check_space(archive, folder, sum(member.size for member in files))
            for member in files:
                _write(tar, member, folder)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ArchiveError(f"{archive.name} cannot be unpacked into {folder}: {error}") from error
    return [str(PurePosixPath(member.name)) for member in files]


def _unfit(member: tarfile.TarInfo, folder: Path) -> str | None:
    """Why an entry must not be unpacked, or None."""
    path = PurePosixPath(member.name)
    if not (member.isreg() or member.isdir()):
        kind = "a link" if member.issym() or member.islnk() else "a special file"
        return f"{kind} ({member.name!r})"
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        return f"a path out of the folder ({member.name!r})"
    if not (folder / path).parent.resolve().is_relative_to(folder.resolve()):
        return f"a path through a link that leads out of the folder ({member.name!r})"
    return None


def _check_space(archive: Path, folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise ArchiveError(f"{archive.name} needs {needed_bytes:,} bytes unpacked; {folder} has {free_bytes:,} free")


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None, "only regular files are written"
    with atomic_path(folder / PurePosixPath(member.name)) as temporary, source, temporary.open("wb") as target:
        shutil.copyfileobj(source, target)
        target.flush()
        os.fsync(target.fileno())

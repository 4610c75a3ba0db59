"""Keeps two processes from writing one output."""

import fcntl
import os
from pathlib import Path


class OutputBusyError(RuntimeError):
    """Another process is writing this output; the message names it."""


class OutputLock:
    """The right to write one output, held through `<output>.lock`, which names the holder's process id.

    It is had once this is made; `with` gives it back at the end of the block.

    The kernel frees the lock when its holder dies, so a file left by a killed process is simply taken over.

    Args:
        output_path: the file that is going to be written.

    Raises:
        OutputBusyError: a living process holds it.
    """

    def __init__(self, output_path: str | os.PathLike[str]) -> None:
        output_path = Path(output_path)
        output_path.parent.mkdir(parents=True, exist_ok=True)
        self.path = output_path.with_name(output_path.name + ".lock")
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(handle, 64).decode(errors="replace").strip() or "unknown"
                os.close(handle)
                raise OutputBusyError(
                    f"{output_path} is being written by process {holder}; wait for it, stop it (kill {holder}), "
                    "or choose another output"
                ) from error
            # a holder that ended between our open and our lock has removed the file we locked
            if _same_file(handle, self.path):
                break
            os.close(handle)
        self._handle: int | None = handle
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())

    def __enter__(self) -> "OutputLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the output free and remove the lock file; a second call does nothing."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False

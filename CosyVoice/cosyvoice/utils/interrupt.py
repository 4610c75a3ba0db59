"""Turns Ctrl-C and SIGTERM into a request that a loop answers when its work is saved."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SOME_FAILED_EXIT_CODE = 3  # a program is done, but for inputs that it could not use and has listed
FIRST_SIGNAL_EXIT_CODE = 128  # shells add the signal's number
REPEAT_SECONDS = 5.0  # after the first signal; more of them are the same request: SLURM and a launcher both pass it on


class StopRequest:
    """While the block runs, the first SIGINT or SIGTERM only sets a flag; a later one acts as it always did.

    What comes within REPEAT_SECONDS of the first is taken for its repetition, and does nothing.

    Outside the main thread, where Python allows no signal handlers, it never sees a signal.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._asked_at = 0.0  # seconds, of time.monotonic()
        self._earlier: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal_number is not None

    @property
    def exit_code(self) -> int:
        """What the process should end with: 130 after Ctrl-C, 143 after SIGTERM, or where another process was asked."""
        return FIRST_SIGNAL_EXIT_CODE + (self.signal_number or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number, self._asked_at = number, time.monotonic()
            told = f"once more, in {REPEAT_SECONDS:.0f} seconds or later, stops at once (what is saved stays saved)"
            # print() is not safe inside a signal handler
            os.write(2, f"\nstopping after this batch; {told}\n".encode())
        elif time.monotonic() - self._asked_at >= REPEAT_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._earlier = {}


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Let STOP_SIGNALS wait until the end of the block; in processes that are started meanwhile they go on waiting.

    Yields:
        nothing.
    """
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def obey_parent_alone(worker: int) -> None:
    """Let a worker process overhear STOP_SIGNALS, unless the process that started it sends them.

    A signal that is sent to all processes of a run would end its workers, and the batch that it is to stop after would
    never be loaded. So the parent decides: a DataLoader's workers end when it has told them to, or is gone.

    Args:
        worker: its number; a DataLoader calls this in each of its workers (`worker_init_fn`).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # the parent's signal too is heard by a thread only: Python's handlers do not tell who sends
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)  # as torch's workers end, which their parent takes for no failure

"""Turns Ctrl-C and SIGTERM into a request that a loop answers when its work is saved."""

import os
import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
FIRST_SIGNAL_EXIT_CODE = 128  # shells add the signal's number


class StopRequest:
    """While the block runs, the first SIGINT or SIGTERM only sets a flag; a second one acts as it always did.

    Outside the main thread, where Python allows no signal handlers, it never sees a signal.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
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
        """What the process should end with: 130 after Ctrl-C, 143 after SIGTERM."""
        assert self.signal_number is not None, "nobody has asked to stop"
        return FIRST_SIGNAL_EXIT_CODE + self.signal_number

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()
        # print() is not safe inside a signal handler
        os.write(2, b"\nstopping after this batch; once more stops at once (what is saved stays saved)\n")

    def _restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._earlier = {}

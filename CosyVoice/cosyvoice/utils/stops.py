"""Why a training ends before its time."""

from __future__ import annotations

from collections.abc import Callable


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient is no number; the message names the step and the utterances."""


class RunStopped(Exception):  # noqa: N818 - nothing went wrong, someone asked for it
    """Somebody asked the run to stop; the message says what was saved."""


def leave_if_asked(stop_requested: Callable[[], bool], message: str) -> None:
    """Leave where somebody asked to.

    Args:
        stop_requested: whether they did.
        message: what was saved.

    Raises:
        RunStopped: they did.
    """
    if stop_requested():
        raise RunStopped(message)

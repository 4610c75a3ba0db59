"""Runs a script that gets a signal in the middle of a write: `python signalled.py SIGTERM 3 SCRIPT WORD ...`.

It comes when the third chunk has been written, but not yet renamed. `group-SIGTERM` goes to the process group of the
parent instead, as `timeout` and Ctrl-C in a terminal do it, and the script waits until its parent has passed it on.
"""

import itertools
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch


def _get_signal(number: signal.Signals, to_group: bool) -> None:
    if not to_group:
        signal.raise_signal(number)
        return
    request = signal.getsignal(number).__self__  # the script's StopRequest
    os.killpg(os.getpgid(os.getppid()), number)
    while not request.requested:
        time.sleep(0.01)


def main() -> None:
    name, when, script, *words = sys.argv[1:]
    save, count = torch.save, itertools.count(1)

    def save_and_get_signal(*arguments: object, **options: object) -> None:
        save(*arguments, **options)
        if next(count) == int(when):
            _get_signal(signal.Signals[name.removeprefix("group-")], name.startswith("group-"))

    torch.save = save_and_get_signal
    sys.argv, sys.path[0] = [script, *words], str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

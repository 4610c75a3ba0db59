"""What the training scripts of this folder share: how they end, a learning rate, and a checkpoint to go on from."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from taste.atomic import atomic_path
from taste.interrupt import StopRequest
from taste.settings import Settings

WARMUP_SHARE = 0.1  # of all steps


def run_to_the_end(run: Callable[[Settings, Callable[[], bool]], bool], settings: Settings) -> int:
    """Run a script, with its errors as one line each and a way to stop it.

    Args:
        run: the script; it is given its settings and asks whether to stop, and gives False where it did.
        settings: with `threads`, of the CPU.

    Returns:
        the exit code.
    """
    torch.set_num_threads(settings.threads)
    with StopRequest() as stop:
        try:
            finished = run(settings, lambda: stop.requested)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0 if finished else stop.exit_code


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rise over a tenth of the steps, then fall along a cosine to zero.

    Args:
        step: from 0.
        steps: of the whole training.
        peak: the highest value.

    Returns:
        the learning rate of that step, above zero.
    """
    warmup = max(1, round(steps * WARMUP_SHARE))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save_checkpoint(path: Path, epoch: int, parts: Mapping[str, Any], deciding: Mapping[str, Any]) -> None:
    """Write everything that the next epoch depends on.

    Args:
        path: the file, written atomically.
        epoch: epochs that are done.
        parts: modules and optimizers by name.
        deciding: the settings that decide the training's course.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    with atomic_path(path) as temporary:
        torch.save({"epoch": epoch, "parts": state, "settings": dict(deciding)}, temporary)


def resume(path: Path, parts: Mapping[str, Any], deciding: Mapping[str, Any]) -> int:
    """Put a checkpoint's state into the parts, where there is one.

    Args:
        path: what `save_checkpoint` wrote; need not be there.
        parts: as they were given to `save_checkpoint`.
        deciding: the settings of now.

    Returns:
        epochs that are done; 0 without a checkpoint.

    Raises:
        ValueError: the checkpoint is of a training with other settings (all are named).
    """
    if not path.is_file():
        return 0
    checkpoint = torch.load(path, weights_only=True)
    changed = [name for name in deciding if checkpoint["settings"].get(name) != deciding[name]]
    if changed:
        raise ValueError(
            f"{path} is of a training with other settings ({', '.join(changed)}); put them back to go on, or remove "
            "that file to start anew"
        )
    for name, part in parts.items():
        part.load_state_dict(checkpoint["parts"][name])
    return checkpoint["epoch"]

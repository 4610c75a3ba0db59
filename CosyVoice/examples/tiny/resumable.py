"""What the training scripts of this folder share: how they end, a learning rate, a checkpoint to go on from, a loop."""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cosyvoice.utils.atomic import atomic_path
from cosyvoice.utils.interrupt import StopRequest
from cosyvoice.utils.settings import Settings

WARMUP_SHARE = 0.1  # of all steps
LOG_EVERY = 20  # steps; a GPU is waited for no more often
_SAY_EVERY = 100  # steps, of a `LoggedTraining`
_SCHEDULE = 10_000  # parts that the schedule of a `LongTraining` is cut into


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


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """What matrix products are computed in.

    Args:
        name: float32 (TF32 on a GPU), bfloat16, or auto: bfloat16 on a CPU that multiplies it by itself (AMX, or
            AVX-512's BF16).
        device: where.

    Returns:
        the type.

    Raises:
        ValueError: there is no such name.
    """
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"DTYPE is {name!r}; expected auto, float32 or bfloat16")
    capable = torch.cpu.get_capabilities()
    fast = device.type == "cpu" and (capable.get("amx_bf16", False) or capable.get("avx512_bf16", False))
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and fast) else torch.float32


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
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # it may be of a machine with a GPU
    changed = [name for name in deciding if checkpoint["settings"].get(name) != deciding[name]]
    if changed:
        raise ValueError(
            f"{path} is of a training with other settings ({', '.join(changed)}); put them back to go on, or remove "
            "that file to start anew"
        )
    for name, part in parts.items():
        part.load_state_dict(checkpoint["parts"][name])
    return checkpoint["epoch"]


class LongTraining(ABC):
    """A training on batches of utterances, until its STEPS are done or its MINUTES over, as far as it has come.

    With more of these than before, a finished training goes on; its learning rate then rises again to where the longer
    schedule has it.

    Args:
        settings: with `steps`, `minutes` (float: train by the clock instead, evaluations included), `check_every`
            (steps), `save_minutes` and `seed`.
        cut: gives the batches of an epoch by its number: utterance numbers of each.
    """

    KEPT: ClassVar[tuple[str, ...]] = ("step", "epoch", "place", "seconds", "measured_at")  # in a checkpoint

    def __init__(self, settings: Settings, cut: Callable[[int], list[list[int]]]) -> None:
        self.settings = settings
        self.step, self.epoch, self.place, self.seconds = 0, 0, 0, 0.0
        self.measured_at = -1  # step
        self._cut = cut
        self._batches: list[list[int]] = []  # of the epoch in work

    @abstractmethod
    def one_step(self, share: float) -> None:
        """Learn from one batch, and count the step.

        Args:
            share: how much of the training is done, from 0 to 1.
        """

    @abstractmethod
    def log(self, share: float) -> None:
        """Note what the steps since the last line cost.

        Args:
            share: as for `one_step`.

        Raises:
            ValueError: a loss is no number.
        """

    @abstractmethod
    def measure(self) -> None:
        """Score what has been learned so far."""

    @abstractmethod
    def save(self) -> None:
        """Write everything that the training depends on, and its results."""

    def state_dict(self) -> dict[str, Any]:
        """Where the training stands, but for weights and optimizer."""
        return {name: getattr(self, name) for name in self.KEPT}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Args:
            state: it.
        """
        for name, value in state.items():
            setattr(self, name, value)

    def until_the_end(self, stop_requested: Callable[[], bool]) -> bool:
        """Train, measure and save.

        Args:
            stop_requested: asked before each step.

        Returns:
            False where it was asked to stop.

        Raises:
            ValueError: a loss is no number; what was saved is from before.
        """
        settings = self.settings
        clock = saved = time.perf_counter()
        while (share := self.share()) < 1:
            if stop_requested():
                self.save()
                return False
            self.one_step(share)
            if self.step % LOG_EVERY == 0:
                self.log(share)
            if self.step % settings.check_every == 0:
                self._measure_now()
            if time.perf_counter() - saved > 60 * settings.save_minutes:
                self.save()
                saved = time.perf_counter()
            self.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
        if self.measured_at != self.step:
            self._measure_now()
        self.save()
        return True

    def share(self) -> float:
        """How much of the training is done."""
        if self.settings.minutes is None:
            return self.step / self.settings.steps
        return self.seconds / (60 * self.settings.minutes)

    def begin_step(self, optimizer: torch.optim.Optimizer, share: float) -> list[int]:
        """Set what is drawn in this step, and the learning rates.

        Args:
            optimizer: each of its groups has its `peak_lr`.
            share: as for `one_step`.

        Returns:
            the utterances of its batch: epoch and place tell which ones, also after a restart.
        """
        seed = np.random.SeedSequence((self.settings.seed, self.step)).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(int(share * _SCHEDULE), _SCHEDULE, group["peak_lr"])
        if not self._batches:
            self._batches = self._cut(self.epoch)
        rows = self._batches[self.place]
        self.place += 1
        if self.place == len(self._batches):
            self._batches, self.epoch, self.place = [], self.epoch + 1, 0
        return rows

    def passes(self) -> float:
        """How often each utterance has been learned from, the epoch in work included."""
        return self.epoch + self.place / max(1, len(self._batches))

    def _measure_now(self) -> None:
        self.measured_at = self.step
        self.measure()


class LoggedTraining(LongTraining):
    """A training that prints the means of what its steps give.

    Args:
        settings: those of `LongTraining`.
        cut: as for `LongTraining`.
        quantities: names of what a step gives, in order.
    """

    def __init__(self, settings: Settings, cut: Callable[[int], list[Any]], quantities: Sequence[str]) -> None:
        super().__init__(settings, cut)
        self.quantities = quantities
        self.unlogged: list[Tensor] = []  # of the steps since the last line

    def log(self, share: float) -> None:
        """Print the means of the steps since the last line, every hundred steps.

        Args:
            share: how much of the training is done, from 0 to 1.

        Raises:
            ValueError: a loss is no number.
        """
        if self.step % _SAY_EVERY == 0 and self.unlogged:
            speed = self.step / max(self.seconds, 1e-9)
            shown = self.shown(self.means())
            print(
                f"step {self.step}  {share:.0%}  {self.passes():.1f} passes  {speed:.1f} steps/s  {shown}", flush=True
            )

    def means(self) -> Tensor:
        """What the steps since the last call gave; nothing may be saved before it was asked for.

        Raises:
            ValueError: a loss is no number.
        """
        means = torch.stack(self.unlogged).mean(dim=0).cpu()
        if not means.isfinite().all():
            raise ValueError(f"no finite loss in the steps up to {self.step}: {self.shown(means)}; lower LR")
        self.unlogged = []
        return means

    def shown(self, means: Tensor) -> str:
        """The quantities by name."""
        return "  ".join(f"{name} {value:.3f}" for name, value in zip(self.quantities, means.tolist(), strict=True))

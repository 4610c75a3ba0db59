"""Learning-rate schedules, each a formula of the step.

A schedule holds no state but the step, so a run that goes on under a changed configuration follows the new formula.
"""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

LAST_LR_SHARE = 0.05  # of the peak, where a cosine ends


class StepSchedule(LRScheduler):
    """The learning rate of step n (from 0) is the configured one times `factor(n)`.

    Args:
        optimizer: its `lr` is the configured one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)

    def factor(self, step: int, lr: float) -> float:
        """The multiple of the configured learning rate to use.

        Args:
            step: steps done so far.
            lr: the configured learning rate.
        """
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of the next step, one for each parameter group."""
        return [lr * self.factor(self.last_epoch, float(lr)) for lr in self.base_lrs]

    def set_step(self, step: int) -> None:
        """Place the schedule.

        Args:
            step: steps done so far.
        """
        self.last_epoch = step
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


class ConstantLR(StepSchedule):
    """The configured learning rate throughout.

    Source: FunAudioLLM/CosyVoice cosyvoice/utils/scheduler.py @ ace7c47.
    """

    def factor(self, step: int, lr: float) -> float:
        """1, always.

        Args:
            step: steps done so far.
            lr: the configured learning rate.
        """
        return 1.0


class WarmupLR(StepSchedule):
    """Rises evenly to the configured learning rate, then falls with the square root of the step.

    Args:
        optimizer: whose learning rate it sets.
        warmup_steps: step of the peak; 0 leaves the rise out.

    Source: FunAudioLLM/CosyVoice cosyvoice/utils/scheduler.py @ ace7c47.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: float = 25000) -> None:
        self.warmup_steps = warmup_steps
        super().__init__(optimizer)

    def factor(self, step: int, lr: float) -> float:
        """Share of the peak.

        Args:
            step: steps done so far.
            lr: the configured learning rate.
        """
        number = step + 1
        if self.warmup_steps == 0:
            return number**-0.5
        return min(number / self.warmup_steps, (self.warmup_steps / number) ** 0.5)


class NoamHoldAnnealing(StepSchedule):
    """Rises to the configured learning rate, holds it, then falls with a power of the step.

    Args:
        optimizer: whose learning rate it sets.
        max_steps: after so many steps it stays at `min_lr`.
        warmup_steps: of the rise; or give `warmup_ratio`.
        warmup_ratio: share of `max_steps`.
        hold_steps: at the peak, after the rise; or give `hold_ratio`.
        hold_ratio: share of `max_steps`.
        decay_rate: the power; .5 as in Noam, 1 as in Squeezeformer.
        min_lr: the fall ends here.

    Raises:
        ValueError: no warm-up, or one given both ways.

    Source: FunAudioLLM/CosyVoice cosyvoice/utils/scheduler.py @ ace7c47.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        max_steps: int,
        warmup_steps: int | None = None,
        warmup_ratio: float | None = None,
        hold_steps: int | None = None,
        hold_ratio: float | None = None,
        decay_rate: float = 0.5,
        min_lr: float = 0.0,
    ) -> None:
        if (warmup_steps is None) == (warmup_ratio is None):
            raise ValueError("NoamHoldAnnealing wants one of warmup_steps and warmup_ratio")
        if hold_steps is not None and hold_ratio is not None:
            raise ValueError("NoamHoldAnnealing wants at most one of hold_steps and hold_ratio")
        self.max_steps, self.decay_rate, self.min_lr = max_steps, decay_rate, min_lr
        self.warmup_steps = int(warmup_ratio * max_steps) if warmup_ratio is not None else warmup_steps or 0
        self.hold_steps = int(hold_ratio * max_steps) if hold_ratio is not None else hold_steps or 0
        if self.warmup_steps < 1:
            raise ValueError(f"NoamHoldAnnealing cannot do without a warm-up, got {self.warmup_steps} steps")
        super().__init__(optimizer)

    def factor(self, step: int, lr: float) -> float:
        """Share of the peak.

        Args:
            step: steps done so far.
            lr: the configured learning rate, which `min_lr` is held against.
        """
        if step <= self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if step < self.warmup_steps + self.hold_steps:
            return 1.0
        if step > self.max_steps:
            return self.min_lr / lr
        fallen = (self.warmup_steps / max(1, step - self.hold_steps)) ** self.decay_rate
        return max(fallen, self.min_lr / lr)


class WarmupCosine(StepSchedule):
    """Rises evenly, then falls along a cosine to a small share of the configured learning rate.

    Args:
        optimizer: whose learning rate it sets.
        total_steps: the fall ends here; None where it goes by the clock, through `share_done`.
        warmup_steps: of the rise.

    Raises:
        ValueError: the warm-up is not shorter than the whole.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int | None, warmup_steps: int = 0) -> None:
        if total_steps is not None and total_steps <= warmup_steps:
            raise ValueError(
                f"warmupcosine: warmup_steps ({warmup_steps}) must be under total_steps ({total_steps}): lower the one "
                "or raise the other, which is --max_steps where the configuration's scheduler_conf does not set it"
            )
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self.share_done = 0.0  # of the training, by the clock
        super().__init__(optimizer)

    def factor(self, step: int, lr: float) -> float:
        """Share of the peak.

        Args:
            step: steps done so far.
            lr: the configured learning rate.
        """
        if self.total_steps is None:
            done = self.share_done
        else:
            done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        wave = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return rise * (LAST_LR_SHARE + (1 - LAST_LR_SHARE) * wave)


def build_scheduler(
    name: str, optimizer: Optimizer, settings: dict[str, Any], max_steps: int | None, by_clock: bool
) -> StepSchedule:
    """Build the schedule that a training configuration names.

    Args:
        name: warmuplr, constantlr, NoamHoldAnnealing, or warmupcosine.
        optimizer: whose learning rate it sets.
        settings: `scheduler_conf`.
        max_steps: of the whole training, where that is limited by steps: the default of warmupcosine's `total_steps`.
        by_clock: the whole training is limited by time.

    Returns:
        the schedule, at step 0.

    Raises:
        ValueError: there is no such schedule, or its settings do not fit.
    """
    if name == "constantlr":
        return ConstantLR(optimizer)  # scheduler_conf may stand there for another schedule, as published
    classes: dict[str, type[StepSchedule]] = {
        "warmuplr": WarmupLR,
        "NoamHoldAnnealing": NoamHoldAnnealing,
        "warmupcosine": WarmupCosine,
    }
    if name not in classes:
        raise ValueError(f"scheduler is {name!r}; there are constantlr, {', '.join(classes)}")
    settings = dict(settings)
    if name == "warmupcosine":
        settings.setdefault("total_steps", max_steps)
        if settings["total_steps"] is None and not by_clock:
            raise ValueError(
                "warmupcosine must know where the training ends: set scheduler_conf.total_steps in the configuration, "
                "or give --max_steps or --total_minutes"
            )
    try:
        return classes[name](optimizer, **settings)
    except TypeError as error:
        raise ValueError(f"scheduler_conf {settings} does not fit {name}: {error}") from error

"""What trainings of a Whisper encoder share, whatever they ask of its frames."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from resumable import LongTraining
from torch import Tensor
from whisper_batches import Batch, Example, Plan, collate, plan_batches

from taste.settings import Settings

_SAY_EVERY = 100  # steps
_MEASURED_FRAMES = 10_000  # of a batch that is measured


class FrameTraining(LongTraining):
    """A training on rows of recordings, as far as it has come.

    Args:
        settings: those of `LongTraining`, with `frames_per_batch` and `joined_share`.
        learned: utterances to learn from.
        measured: utterances to measure.
        quantities: names of what a step gives, in order.
    """

    def __init__(
        self, settings: Settings, learned: Sequence[Example], measured: Sequence[Example], quantities: Sequence[str]
    ) -> None:
        lengths = [len(example.phones) for example in learned]

        @lru_cache(maxsize=2)  # of the epoch in work, and of the next one, which the workers may have begun
        def plan(epoch: int) -> Plan:
            draw = random.Random(f"{settings.seed}/{epoch}")  # an epoch does not depend on earlier ones
            return plan_batches(lengths, settings.frames_per_batch, settings.joined_share, draw)

        super().__init__(settings, plan)
        self.learned, self.measured, self.plan, self.quantities = learned, measured, plan, quantities
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

    def measured_batches(self) -> Iterator[Batch]:
        """The utterances to measure, as they are."""
        lengths = [len(example.phones) for example in self.measured]
        for rows in plan_batches(lengths, _MEASURED_FRAMES, 0.0, random.Random(0)):
            yield collate([[self.measured[i] for i in row] for row in rows])

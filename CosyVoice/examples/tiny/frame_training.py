"""What trainings of a Whisper encoder share, whatever they ask of its frames."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

from resumable import LoggedTraining
from whisper_batches import Batch, Example, Plan, collate, plan_batches

from cosyvoice.utils.settings import Settings

_MEASURED_FRAMES = 10_000  # of a batch that is measured


class FrameTraining(LoggedTraining):
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

        super().__init__(settings, plan, quantities)
        self.learned, self.measured, self.plan = learned, measured, plan

    def measured_batches(self) -> Iterator[Batch]:
        """The utterances to measure, as they are."""
        lengths = [len(example.phones) for example in self.measured]
        for rows in plan_batches(lengths, _MEASURED_FRAMES, 0.0, random.Random(0)):
            yield collate([[self.measured[i] for i in row] for row in rows])

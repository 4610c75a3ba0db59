"""Sums over what a model predicts, from which its loss and its accuracy follow."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# B batch


class Scores(NamedTuple):
    """Sums over the targets of each row, so that any grouping of rows adds up to the same."""

    loss_sums: Tensor  # [B] float32, cross-entropy in nats
    top1_counts: Tensor  # [B] int64, targets that were the best guess
    top5_counts: Tensor  # [B] int64, targets among the five best
    target_counts: Tensor  # [B] int64, units and the one EOS
    commitment_sums: Tensor  # [B] float32, the quantizer's loss of each word; zero in eval mode and without quantizer
    word_counts: Tensor  # [B] int64, words that it is summed over


@dataclass
class Totals:
    """Sums over targets (units, and one EOS an utterance) and over words, and the averages that follow from them."""

    loss_sum: float = 0.0  # nats
    top1_count: float = 0.0
    top5_count: float = 0.0
    target_count: float = 0.0
    commitment_sum: float = 0.0  # the quantizer's loss, in training
    word_count: float = 0.0  # words that it is summed over

    @classmethod
    def of(cls, scores: Scores) -> "Totals":
        """The sums over a batch.

        Args:
            scores: of its rows.

        Returns:
            their sums.
        """
        return cls(*torch.stack([row_sums.double().sum() for row_sums in scores]).tolist())

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*(a + b for a, b in zip(self.as_list(), other.as_list(), strict=True)))

    def as_list(self) -> list[float]:
        """The sums, in order."""
        return list(vars(self).values())

    def averages(self) -> dict[str, float]:
        """`loss` in nats a target, `top1` and `top5` as shares of the targets; `commitment` a word, where there is."""
        sums = {"loss": self.loss_sum, "top1": self.top1_count, "top5": self.top5_count}
        averages = {name: value / self.target_count for name, value in sums.items()}
        return averages | ({"commitment": self.commitment_sum / self.word_count} if self.word_count else {})

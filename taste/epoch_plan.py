"""The order in which training visits the utterances, as a pure function of the seed and the epoch."""

from collections.abc import Sequence

import numpy as np

POOL_BATCHES = 32  # batches are cut from pools of so many, sorted by length: little padding, and still a new mix


class EpochPlan:
    """Batches of utterances of similar length.

    Nothing is remembered from one epoch to the next, so the place in the data is told by two numbers, the epoch and the
    step in it, and a run that goes on from there sees what it would have seen.

    Args:
        lengths: length of each utterance, in any unit.
        batch_size: utterances in a batch; an epoch's last batch may hold fewer.
        seed: another seed gives another order.

    Raises:
        ValueError: the batch size is < 1, or there are no utterances.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"BATCH_SIZE is {batch_size}; expected 1 or more")
        if not lengths:
            raise ValueError("there are no utterances to make batches of")
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of one epoch.

        Args:
            epoch: its number, from 0.

        Returns:
            utterance numbers of each batch; every utterance is in exactly one.
        """
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))
        pool_size = self.batch_size * POOL_BATCHES
        batches = []
        for start in range(0, len(order), pool_size):
            pool = order[start : start + pool_size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [
                pool[first : first + self.batch_size].tolist() for first in range(0, len(pool), self.batch_size)
            ]
        return [batches[index] for index in random.permutation(len(batches))]

    def steps(self, epoch: int, batches_per_step: int, processes: int = 1) -> list[list[list[int]]]:
        """The batches of one epoch, grouped by optimizer step.

        Args:
            epoch: its number, from 0.
            batches_per_step: batches whose gradients are added up by one process.
            processes: processes that work on a step together. Each needs as many batches as the others, so with
                several of them up to `processes - 1` batches are left out, different ones in each epoch.

        Returns:
            batches of each step; process r of n takes every n-th of them from number r on.
        """
        batches = self.batches(epoch)
        usable = len(batches) // processes * processes
        group = batches_per_step * processes
        return [batches[start : min(start + group, usable)] for start in range(0, usable, group)]


def halved(batches: Sequence[Sequence[int]]) -> list[list[int]]:
    """Cut batches in two, for a device whose memory is too small for them.

    Args:
        batches: utterance numbers of each.

    Returns:
        the halves, in order; a batch of one utterance stays whole.
    """
    halves = [half for batch in batches for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :])]
    return [list(half) for half in halves if half]


def most_demanding(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """The batch that needs the most memory: attention grows with the square of the longest row.

    Args:
        batches: utterance numbers of each, at least one.
        lengths: length of each utterance, in any unit.

    Returns:
        utterance numbers of one of them.
    """
    worst = max(batches, key=lambda batch: len(batch) * max(lengths[number] for number in batch) ** 2)
    return list(worst)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Every utterance once, sorted by length: for evaluation and generation, where the order does not matter.

    Args:
        lengths: length of each utterance, in any unit.
        batch_size: utterances in a batch.

    Returns:
        utterance numbers of each batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

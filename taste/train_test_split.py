"""Splits a test set off the training set, for when there is none."""

import hashlib
from collections.abc import Sequence

from taste.data import UtteranceDataset

HELD_OUT_SHARE = 0.1
HELD_OUT_SEED = 0  # one for all runs: what a run has learned from is no other's test set
MOST_HELD_OUT = 0.25  # of the utterances; where whole speakers are more, single utterances are held out


def hold_out(dataset: UtteranceDataset, seed: int) -> tuple[UtteranceDataset, UtteranceDataset, str]:
    """Split about a tenth off, for when there is no test set: whole speakers, or utterances where these are few.

    Whether a speaker (or an utterance) is held out depends on its name, not on the others, unless none would be. So
    data that grows leaves each where it was, and a run that goes on with another's weights is not tested on what that
    one has learned from; but for data that has speakers enough to hold whole ones out only since it has grown.

    Args:
        dataset: the utterances; at least two.
        seed: another seed holds out others.

    Returns:
        the larger part, the part held out, and a sentence that says what was done.

    Raises:
        ValueError: there is only one utterance.
    """
    if len(dataset) < 2:
        raise ValueError("there is no test set, and one training utterance cannot be split; make the TEST_ features")
    speakers = [dataset.info(utt_id).get("speaker") for utt_id in dataset.utt_ids]
    named = [speaker for speaker in speakers if speaker is not None]
    by_speaker = len(named) == len(speakers) and len(set(named)) > 1
    held_out = _draw_groups(named if by_speaker else dataset.utt_ids, seed)
    if by_speaker and sum(speaker in held_out for speaker in speakers) > MOST_HELD_OUT * len(dataset):
        by_speaker = False
        held_out = _draw_groups(dataset.utt_ids, seed)
    group_of = speakers if by_speaker else dataset.utt_ids
    test = [index for index, group in enumerate(group_of) if group in held_out]
    train = [index for index, group in enumerate(group_of) if group not in held_out]
    what = f"{len(held_out)} of {len(set(speakers))} speakers, " if by_speaker else ""
    sentence = f"no test set: {what}{len(test)} of {len(dataset)} training utterances are held out (seed {seed})"
    return dataset.subset(train), dataset.subset(test), sentence


def _draw_groups(group_of: Sequence[str], seed: int) -> set[str]:
    """About a tenth of the groups of utterances, one at least, not all of them."""
    drawn = {group: _between_0_and_1(f"{seed}/{group}") for group in set(group_of)}
    ordered = sorted(drawn, key=drawn.__getitem__)
    count = sum(value < HELD_OUT_SHARE for value in drawn.values())
    return set(ordered[: min(max(count, 1), len(ordered) - 1)])


def _between_0_and_1(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64

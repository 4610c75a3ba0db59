"""The sequence that the language model reads: `[sos] [speaker] [text, T] [task] [unit 0 .. unit n-1]`.

Rows are joined unpadded and padded afterwards, so a row's result does not depend on its neighbours.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosyvoice.utils.common import IGNORE_ID
from taste.lengths import valid_mask

# B batch   T text vectors   S S3 units, 50 Hz   P positions before the units   L positions in all   D channels

SOS_ROW, TASK_ROW = 0, 1  # rows of llm_embedding
EXTRA_POSITIONS = 3  # [sos] [speaker] [task]
MAX_LM_POSITIONS = 5000  # positions the LM's table of relative positions was made for
LENGTH_MULTIPLES = {"cuda": 16}  # of what the LM reads, by device: attention there copies a mask of any other length


class Prefix(NamedTuple):
    """What stands before the units; the position of its last vector predicts unit 0."""

    vectors: Tensor  # [B, P, D], zero behind each row's end
    lengths: Tensor  # [B] int64


class Joined(NamedTuple):
    """What the language model reads of each row."""

    vectors: Tensor  # [B, L, D], zero behind each row's end
    lengths: Tensor  # [B] int64


def join_prefix(special: Tensor, speaker: Tensor, text: Tensor, text_lengths: Tensor) -> Prefix:
    """`[sos] [speaker] [text] [task]` of each row.

    Args:
        special: the language model's vectors of `[sos]` and `[task]`, [>= 2, D]: rows `SOS_ROW` and `TASK_ROW`.
        speaker: [B, 1, D]; [B, 0, D] leaves its position out.
        text: [B, T, D]; anything behind a row's end.
        text_lengths: [B], int64.

    Returns:
        the prefix, of the text's type.
    """
    sos, task = (special[row].to(text.dtype).expand(len(text), 1, -1) for row in (SOS_ROW, TASK_ROW))
    joined = torch.cat([sos, speaker.to(text.dtype), text, task], dim=1)
    ends = (1 + speaker.shape[1] + text_lengths)[:, None]  # where each row's own [task] stands
    place = torch.arange(joined.shape[1], device=text.device)[None]
    joined = torch.where((place == ends)[:, :, None], task, joined)
    return Prefix(joined.masked_fill((place > ends)[:, :, None], 0.0), ends[:, 0] + 1)


def join_units(prefix: Prefix, units: Tensor, unit_lengths: Tensor) -> Joined:
    """Put the units of each row behind its prefix.

    Rows are joined without a gap by one gather: row by row takes longer than the language model itself, and every
    look at a length would let a GPU wait.

    Args:
        prefix: what stands before.
        units: their vectors, [B, S, D]; anything behind a row's end.
        unit_lengths: [B], int64.

    Returns:
        the sequence, of the prefix's type.
    """
    (width, dim), before = prefix.vectors.shape[1:], prefix.lengths[:, None]
    parts = torch.cat([prefix.vectors, units.to(prefix.vectors.dtype)], dim=1)
    parts = F.pad(parts, (0, 0, 0, -parts.shape[1] % LENGTH_MULTIPLES.get(parts.device.type, 1)))
    place = torch.arange(parts.shape[1], device=parts.device)[None]
    source = torch.where(place < before, place, place - before + width).clamp(max=parts.shape[1] - 1)
    joined = parts.gather(1, source[:, :, None].expand(-1, -1, dim))
    lengths = prefix.lengths + unit_lengths
    return Joined(joined.masked_fill((place >= lengths[:, None])[:, :, None], 0.0), lengths)


def at_targets(states: Tensor, prefix_lengths: Tensor, num_targets: int) -> Tensor:
    """The states that predict something: those of `[task]` and of every unit.

    Args:
        states: of all positions, [B, L, D].
        prefix_lengths: [B], int64.
        num_targets: how many of each row, S + 1.

    Returns:
        [B, S+1, D]: place k predicts unit k, place n of a row of n units EOS; places behind that mean nothing.
    """
    place = torch.arange(num_targets, device=states.device)
    positions = (prefix_lengths[:, None] - 1 + place).clamp(max=states.shape[1] - 1)  # [B, S+1]; [task] is first
    return states.gather(1, positions[:, :, None].expand(-1, -1, states.shape[-1]))


def targets_of(units: Tensor, unit_lengths: Tensor, eos: int) -> Tensor:
    """What the states that `at_targets` gives should predict.

    Args:
        units: [B, S], int64; anything behind a row's end.
        unit_lengths: [B], int64.
        eos: the class that ends an utterance.

    Returns:
        [B, S+1], int64: a row's units, then EOS, then IGNORE_ID.
    """
    size = units.shape[1] + 1
    targets = F.pad(units, (0, 1)).masked_fill(~valid_mask(unit_lengths, size), IGNORE_ID)
    return targets.scatter(1, unit_lengths[:, None], eos)

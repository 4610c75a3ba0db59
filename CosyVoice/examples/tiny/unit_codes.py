"""Vectors that stand for S3 units where a word is described by the units it holds.

The mean of such vectors over a word tells which units are in it, as long as they are many channels wide and know
nothing of each other: units that sound alike, between which a language model hesitates that has read the text, are then
as far apart as any others.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODE_WIDTH = 64  # channels of a code: more would not pass two attention heads of the language model
_UNITS = 4096
_SEED = 1986


def unit_codes() -> Tensor:
    """The code of each S3 unit, [4096, CODE_WIDTH], float32; channels of variance 1, everywhere the same."""
    return torch.randn(_UNITS, CODE_WIDTH, generator=torch.Generator().manual_seed(_SEED))

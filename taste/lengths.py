"""Masks made of lengths."""

import torch
from torch import Tensor


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """Mark the positions that hold data in rows padded on the right.

    Args:
        lengths: valid positions of each row, [B], int64.
        size: positions of a padded row.

    Returns:
        [B, size], bool, True where valid.
    """
    return torch.arange(size, device=lengths.device) < lengths[:, None]

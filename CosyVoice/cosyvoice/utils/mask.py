"""Masks over padded batches.

# B batch  L frames
"""

import torch
from torch import Tensor


def make_pad_mask(lengths: Tensor, max_len: int = 0) -> Tensor:
    """Mark the padding of a right-padded batch.

    Args:
        lengths: valid frames of each row, [B], integer.
        max_len: width of the mask in frames; 0 takes the longest row.

    Returns:
        bool [B, L], True at padding (the published sense; negate it for a mask that is True where valid).

    Source: FunAudioLLM/CosyVoice cosyvoice/utils/mask.py @ ace7c47.
    """
    width = max_len if max_len > 0 else int(lengths.max())
    return torch.arange(width, device=lengths.device) >= lengths[:, None]


def causal_mask(frames: int, device: torch.device) -> Tensor:
    """Let every frame see itself and the frames before it.

    Args:
        frames: L, length of the sequence.
        device: where the mask is wanted.

    Returns:
        bool [L, L], True where row (the looking frame) may see column (the frame looked at).
    """
    return torch.ones(frames, frames, dtype=torch.bool, device=device).tril()

"""Stretches hidden states from the rate of S3 tokens to the rate of mel frames.

Axes: B batch  S S3 tokens, 50 Hz  F mel frames, 86.13 Hz  D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.utils.mask import make_pad_mask
from cosyvoice.utils.rates import MEL_FRAMES_PER_SECOND

STREAM_OVERLAP_TOKENS = 20  # what consecutive chunks of a stream share (token_overlap_len in cosyvoice/cli/model.py)


class Regulated(NamedTuple):
    """Hidden states at the mel-frame rate."""

    frames: Tensor  # [B, F, D], zero at positions >= mel_lengths
    mel_lengths: Tensor  # [B], int64


class RegulatedPrompt(NamedTuple):
    """Hidden states of prompt plus speech at the mel-frame rate."""

    frames: Tensor  # [1, F, D]
    mel_length: int  # F


def mel_frames_of_tokens(tokens: int, token_rate_hz: int) -> int:
    """Count the mel frames that a number of S3 tokens lasts, rounded down as published."""
    return int(tokens / token_rate_hz * MEL_FRAMES_PER_SECOND)


class InterpolateRegulator(nn.Module):
    """Linear interpolation in time, then a small convolutional smoother.

    Args:
        channels: input channels D.
        sampling_ratios: one smoothing convolution is built for each; the values themselves are not used (published).
        out_channels: output channels, `channels` if None.
        groups: groups of the group norms.

    Source: FunAudioLLM/CosyVoice cosyvoice/flow/length_regulator.py @ ace7c47.
    """

    def __init__(
        self,
        channels: int,
        sampling_ratios: Sequence[int],
        out_channels: int | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.sampling_ratios = tuple(sampling_ratios)
        layers: list[nn.Module] = []
        for _ in self.sampling_ratios:
            layers += [nn.Conv1d(channels, channels, 3, padding=1), nn.GroupNorm(groups, channels), nn.Mish()]
        layers.append(nn.Conv1d(channels, out_channels or channels, 1))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor, ylens: Tensor) -> Regulated:
        """Stretch a padded batch, all rows by one ratio, to the longest mel of the batch.

        Args:
            x: hidden states, [B, S, D], float32.
            ylens: mel frames of each row, [B], int64, >= 1; on the CPU, a GPU need not be waited for.

        Returns:
            frames [B, max(ylens), D'] that are zero from each row's length on, and the lengths unchanged.
        """
        longest = int(ylens.max())
        frames = self.model(_stretch(x, longest)).transpose(1, 2)
        valid = ~make_pad_mask(ylens.to(x.device), longest)
        return Regulated(frames * valid.unsqueeze(-1), ylens)

    def inference(
        self, x1: Tensor, x2: Tensor, mel_len1: int, mel_len2: int, input_frame_rate: int = 50
    ) -> RegulatedPrompt:
        """Stretch prompt and speech separately, so that the mel can be cut exactly between them.

        Speech of more than twice the stream overlap is stretched in three pieces: its first and last 20 tokens keep the
        exact rate, so the frames that two chunks of a stream share agree whatever the middle is rounded to.

        Args:
            x1: hidden states of the prompt, [1, S1, D]; S1 may be 0.
            x2: hidden states of the speech, [1, S2, D], S2 >= 1.
            mel_len1: mel frames of the prompt.
            mel_len2: mel frames of the speech, >= 1.
            input_frame_rate: S3 tokens a second.

        Returns:
            frames [1, mel_len1 + mel_len2, D'] and their number.
        """
        overlap = STREAM_OVERLAP_TOKENS
        if x2.size(1) > 2 * overlap:
            edge = mel_frames_of_tokens(overlap, input_frame_rate)
            pieces = [
                _stretch(x2[:, :overlap], edge),
                _stretch(x2[:, overlap:-overlap], mel_len2 - 2 * edge),
                _stretch(x2[:, -overlap:], edge),
            ]
        else:
            pieces = [_stretch(x2, mel_len2)]
        if x1.size(1) > 0:
            pieces.insert(0, _stretch(x1, mel_len1))
        frames = self.model(torch.cat(pieces, dim=2)).transpose(1, 2)
        return RegulatedPrompt(frames, mel_len1 + mel_len2)


def _stretch(x: Tensor, frames: int) -> Tensor:
    """Interpolate [B, S, D] in time to [B, D, frames]."""
    return F.interpolate(x.transpose(1, 2), size=frames, mode="linear")

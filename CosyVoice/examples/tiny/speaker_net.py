"""The small speaker encoder that stands where CAM++ does: a time-delay network and the statistics of its channels."""

# B recordings   K fbank frames, 100 Hz   C channels   P pooled channels   N speakers

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FBANK_BINS = 80
EMBEDDING_SIZE = 192
CHANNELS = 96
POOLED_CHANNELS = 128
FIRST_KERNEL = 5
KERNEL = 3
DILATIONS = (2, 3, 4)  # of the residual convolutions: 23 frames, 0.23 s, are seen at once
VARIANCE_FLOOR = 1e-6


class SpeakerNet(nn.Module):
    """Filter bank -> speaker vector, as x-vectors are made, with residual convolutions.

    Every batch normalisation follows a convolution or a linear layer, so that the exported file has none.

    Source: Snyder et al. 2018, "X-vectors: Robust DNN embeddings for speaker recognition"; joining the outputs of all
    blocks before the pooling is ECAPA-TDNN's (arXiv 2005.07143).
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(FBANK_BINS, CHANNELS, FIRST_KERNEL, padding=FIRST_KERNEL // 2)
        self.first_norm = nn.BatchNorm1d(CHANNELS)
        self.blocks = nn.ModuleList(
            nn.Conv1d(CHANNELS, CHANNELS, KERNEL, padding=dilation, dilation=dilation) for dilation in DILATIONS
        )
        self.block_norms = nn.ModuleList(nn.BatchNorm1d(CHANNELS) for _ in DILATIONS)
        self.join = nn.Conv1d(CHANNELS * (1 + len(DILATIONS)), POOLED_CHANNELS, 1)
        self.join_norm = nn.BatchNorm1d(POOLED_CHANNELS)
        self.head = nn.Linear(2 * POOLED_CHANNELS, EMBEDDING_SIZE)
        self.head_norm = nn.BatchNorm1d(EMBEDDING_SIZE, affine=False)  # a vector's norm is about sqrt(192) = 13.9

    def forward(self, fbank: Tensor) -> Tensor:
        """Embed recordings.

        Args:
            fbank: mean-subtracted kaldi filter banks, [B, K, 80], float32, K >= 1, without padding.

        Returns:
            [B, 192], not normalised.
        """
        x = F.relu(self.first_norm(self.first(fbank.transpose(1, 2))))
        outputs = [x]
        for block, norm in zip(self.blocks, self.block_norms, strict=True):
            x = x + F.relu(norm(block(x)))
            outputs.append(x)
        x = F.relu(self.join_norm(self.join(torch.cat(outputs, dim=1))))
        deviation = (x.var(dim=2, correction=0) + VARIANCE_FLOOR).sqrt()
        return self.head_norm(self.head(torch.cat([x.mean(dim=2), deviation], dim=1)))


class MarginClassifier(nn.Module):
    """Tells speakers apart by the angle between vectors, and asks for a margin.

    Args:
        speakers: N.
        margin: radians that are added to the angle to the right speaker.
        scale: factor on the cosines before the softmax.

    Source: Deng et al., "ArcFace", arXiv 1801.07698, equation 3.
    """

    def __init__(self, speakers: int, margin: float, scale: float) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(speakers, EMBEDDING_SIZE))
        self.margin = margin
        self.scale = scale

    def cosines(self, vectors: Tensor) -> Tensor:
        """Compare vectors [B, 192] with every speaker's centre, [B, N]."""
        return F.linear(F.normalize(vectors, dim=1), F.normalize(self.centres, dim=1))

    def forward(self, vectors: Tensor, speakers: Tensor) -> Tensor:
        """Mean cross-entropy of the right speakers.

        Args:
            vectors: [B, 192].
            speakers: [B], int64.

        Returns:
            a scalar, nats.
        """
        cosines = self.cosines(vectors)
        right = cosines.gather(1, speakers[:, None])
        sine = (1.0 - right.square()).clamp(min=0.0).sqrt()
        widened = right * math.cos(self.margin) - sine * math.sin(self.margin)
        return F.cross_entropy(self.scale * cosines.scatter(1, speakers[:, None], widened), speakers)

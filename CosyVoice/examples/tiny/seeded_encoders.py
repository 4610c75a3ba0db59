"""Seed the two audio encoders so that, untrained, their states still follow the sound.

Random weights at the usual scales would drown the sound in the positions: a mel through two random convolutions is much
smaller than Whisper's sinusoids. So each convolution is scaled by what it gives on the demo corpus (data-dependent
initialisation), the blocks add little to what they get, and the S3 codebook is fitted by k-means to the states.
"""

# T mel frames, 100 Hz   S S3 units, 50 Hz   D channels   K codes

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from s3tokenizer.model import ModelConfig, S3Tokenizer
from torch import Tensor, nn

STATE_SCALE = 16.0  # of the S3 encoder's states, so that the positions (scale 0.7) hardly move a unit
WHISPER_STATE_SCALE = 4.0  # Whisper's states may know where they are
SPECTRAL_SMOOTHING_BINS = 9  # random kernels vary smoothly over the mel bins: units follow formants, not harmonics
ATTENTION_GAIN = 0.1  # of an S3 block's attention: units stay local
FEED_FORWARD_GAIN = 0.3
FITTED_CODES = 512  # codes that k-means places; with all 4096 each demo frame would have a code of its own
KMEANS_ROUNDS = 15


@torch.no_grad()
def seed_convolutions(
    conv1: nn.Conv1d, conv2: nn.Conv1d, mels: Sequence[Tensor], scale: float, generator: torch.Generator
) -> None:
    """Fill a Whisper-style front (convolution, GELU, convolution) so that its output is centred, with a given scale.

    Args:
        conv1: kernel 3, from mel bins to D channels; overwritten, keeps its dtype.
        conv2: kernel 3, stride 2, D to D channels; overwritten, keeps its dtype.
        mels: log-mels [128, T] to measure on.
        scale: standard deviation wanted of each channel after conv2; after conv1 it is 1.
        generator: source of the random kernels.
    """
    inputs = [mel[None] for mel in mels]
    for conv, wanted in ((conv1, 1.0), (conv2, scale)):
        kernel = torch.randn(conv.weight.shape, generator=generator)
        if conv is conv1:
            window = torch.hann_window(SPECTRAL_SMOOTHING_BINS + 2)[1:-1].view(1, -1, 1)
            flat = F.conv2d(kernel[:, None], window[None], padding=(SPECTRAL_SMOOTHING_BINS // 2, 0))
            kernel = flat[:, 0]
        outputs = [F.conv1d(x, kernel, stride=conv.stride, padding=conv.padding) for x in inputs]
        frames = torch.cat([output[0] for output in outputs], dim=1)
        gain = wanted / frames.std(dim=1)
        bias = -gain * frames.mean(dim=1)
        conv.weight.copy_(kernel * gain[:, None, None])
        conv.bias.copy_(bias)
        inputs = [F.gelu(output * gain[None, :, None] + bias[None, :, None]) for output in outputs]


@torch.no_grad()
def seed_s3_tokenizer(config: ModelConfig, mels: Sequence[Tensor], seed: int) -> S3Tokenizer:
    """Make an S3 tokenizer whose units depend on what is heard around them.

    Args:
        config: its sizes.
        mels: log-mels [128, T] of the recordings to fit it to.
        seed: of all random numbers.

    Returns:
        the model, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    model = S3Tokenizer("speech_tokenizer_v1", config).eval()
    encoder = model.encoder
    seed_convolutions(encoder.conv1, encoder.conv2, mels, STATE_SCALE, generator)
    for block in encoder.blocks:
        for layer in (module for module in block.modules() if isinstance(module, nn.Linear)):
            layer.weight.normal_(0.0, 1.0 / math.sqrt(layer.in_features), generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
        block.attn.out.weight.mul_(ATTENTION_GAIN)
        block.mlp[2].weight.mul_(FEED_FORWARD_GAIN)
    states = [encoder(mel[None], torch.tensor([mel.shape[1]]))[0][0] for mel in mels]
    directions = F.normalize(torch.cat(states), dim=1)  # as the quantizer does
    model.quantizer._codebook.embed.copy_(fit_codebook(directions, config.n_codebook_size, generator))
    return model


def fit_codebook(directions: Tensor, num_codes: int, generator: torch.Generator, fitted: int = FITTED_CODES) -> Tensor:
    """Place some codes by k-means, the others at random with the states' mean and covariance.

    The random ones are far from everything in a space of many dimensions: the demo corpus does not use them.

    Args:
        directions: states of unit length, [S, D].
        num_codes: K.
        generator: source of the random numbers.
        fitted: codes that k-means places.

    Returns:
        the codebook [K, D].
    """
    num_fitted = min(fitted, num_codes, len(directions))
    codes = directions[torch.randperm(len(directions), generator=generator)[:num_fitted]]
    for _ in range(KMEANS_ROUNDS):
        nearest = (2 * directions @ codes.T - codes.square().sum(dim=1)).argmax(dim=1)
        members = torch.bincount(nearest, minlength=num_fitted)[:, None]
        sums = torch.zeros_like(codes).index_add_(0, nearest, directions)
        codes = torch.where(members > 0, sums / members.clamp(min=1), codes)

    centre = directions.mean(dim=0)
    _, spread, axes = torch.linalg.svd(directions - centre, full_matrices=False)
    noise = torch.randn(num_codes - num_fitted, len(spread), generator=generator)
    others = centre + noise * (spread / math.sqrt(len(directions))) @ axes
    return torch.cat([codes, F.normalize(others, dim=1)])

"""Losses of adversarial vocoder training.

Axes: B batch  N audio samples  P scores of one discriminator, all positions flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MATCHING_SCALE = 2.0  # HiFi-GAN's own weight, which is inside its loss


def generator_loss(generated_scores: Sequence[Tensor]) -> Tensor:
    """Sum over discriminators how far generated speech is from being called real (least squares).

    Args:
        generated_scores: [B, P] of each discriminator.

    Returns:
        a scalar.

    Source: jik876/hifi-gan models.py, as in shivammehta25/Matcha-TTS matcha/hifigan/models.py.
    """
    return torch.stack([(1 - scores).square().mean() for scores in generated_scores]).sum()


def discriminator_loss(real_scores: Sequence[Tensor], generated_scores: Sequence[Tensor]) -> Tensor:
    """Sum over discriminators how far real speech is from 1 and generated speech from 0 (least squares).

    Args:
        real_scores: [B, P] of each discriminator.
        generated_scores: the same of generated speech.

    Returns:
        a scalar.

    Source: jik876/hifi-gan models.py, as in shivammehta25/Matcha-TTS matcha/hifigan/models.py.
    """
    return generator_loss(real_scores) + torch.stack([scores.square().mean() for scores in generated_scores]).sum()


def feature_loss(real_maps: Sequence[Sequence[Tensor]], generated_maps: Sequence[Sequence[Tensor]]) -> Tensor:
    """Sum the mean distances between the feature maps of real and generated speech, times two.

    Args:
        real_maps: of each discriminator, of each layer, tensors of any shape.
        generated_maps: the same shapes.

    Returns:
        a scalar.

    Source: jik876/hifi-gan models.py, as in shivammehta25/Matcha-TTS matcha/hifigan/models.py.
    """
    distances = [
        F.l1_loss(generated.float(), real.float())
        for real_layers, generated_layers in zip(real_maps, generated_maps, strict=True)
        for real, generated in zip(real_layers, generated_layers, strict=True)
    ]
    return FEATURE_MATCHING_SCALE * torch.stack(distances).sum()


def tpr_loss(disc_real_outputs: Sequence[Tensor], disc_generated_outputs: Sequence[Tensor], tau: float) -> Tensor:
    """Truncated pointwise relativistic loss: pulls together score differences that fall below their median.

    Args:
        disc_real_outputs: scores of each discriminator, [B, P]; the side that should be larger.
        disc_generated_outputs: the same shapes; the generator's turn swaps the two.
        tau: largest value one discriminator may add.

    Returns:
        a scalar. Where no difference is below the median (all are equal), that discriminator adds zero; the published
        code gives NaN there.

    Source: FunAudioLLM/CosyVoice cosyvoice/utils/losses.py @ ace7c47, tpr_loss.
    """
    total = []
    for real, generated in zip(disc_real_outputs, disc_generated_outputs, strict=True):
        excess = real - generated - torch.median(real - generated)
        below = excess < 0
        mean_square = (excess.square() * below).sum() / below.sum().clamp(min=1)
        total.append(mean_square.clamp(max=tau))
    return torch.stack(total).sum()


def mel_loss(
    real_speech: Tensor, generated_speech: Tensor, mel_transforms: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """Sum over mel transforms the mean distance between two waveforms' log mels, whatever autocast says in float32.

    Args:
        real_speech: [B, N], float32.
        generated_speech: the same shape.
        mel_transforms: each maps [B, N] to a log mel.

    Returns:
        a scalar.

    Source: FunAudioLLM/CosyVoice cosyvoice/utils/losses.py @ ace7c47, mel_loss.
    """
    with torch.autocast(device_type=real_speech.device.type, enabled=False):
        return torch.stack([F.l1_loss(mel(generated_speech), mel(real_speech)) for mel in mel_transforms]).sum()

"""Trains the vocoder against its discriminators: the losses of each turn.

Axes: B batch  M mel bands  F mel frames, 86.13 Hz  N audio samples, 22,050 Hz, N = 256 F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.utils.losses import discriminator_loss, feature_loss, generator_loss, mel_loss, tpr_loss


class HiFiGan(nn.Module):
    """A vocoder with its discriminators, trained in turns: each batch first the discriminators, then the vocoder.

    Args:
        generator: maps (batch, device) to speech [B, N] and F0 [B, F]; a HiFTGenerator.
        discriminator: maps recordings and generated speech, both [B, N], to scores and feature maps.
        mel_spec_transform: functions from [B, N] to a log mel; their distances are summed.
        multi_mel_spectral_recon_loss_weight: of the mel distance.
        feat_match_loss_weight: of the distance between feature maps.
        tpr_loss_weight: of the relativistic loss; 0 leaves it out.
        tpr_loss_tau: largest relativistic loss of one discriminator.

    Source: FunAudioLLM/CosyVoice cosyvoice/hifigan/hifigan.py @ ace7c47.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        mel_spec_transform: Sequence[Callable[[Tensor], Tensor]],
        multi_mel_spectral_recon_loss_weight: float = 45,
        feat_match_loss_weight: float = 2.0,
        tpr_loss_weight: float = 1.0,
        tpr_loss_tau: float = 0.04,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.mel_spec_transform = list(mel_spec_transform)
        self.multi_mel_spectral_recon_loss_weight = multi_mel_spectral_recon_loss_weight
        self.feat_match_loss_weight = feat_match_loss_weight
        self.tpr_loss_weight = tpr_loss_weight
        self.tpr_loss_tau = tpr_loss_tau

    def forward(self, batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        """Compute the losses of one turn.

        Args:
            batch: `turn`, 'generator' or 'discriminator'; `speech` [B, N] float32 in -1..1; `speech_feat` [B, F, M]
                float32, its log mel; for the generator's turn `pitch_feat` [B, F] float32, F0 in Hz and 0 where
                unvoiced; optionally `adversarial`: False leaves the discriminators out of the generator's turn, for
                the first steps of a training (the mel distance alone teaches a new vocoder faster).
            device: where to compute.

        Returns:
            scalars: `loss`, whose gradient goes to the parameters of that turn's side alone, and its parts without
            their weights: loss_gen, loss_fm, loss_mel, loss_tpr, loss_f0 (loss_mel and loss_f0 where not adversarial)
            or loss_disc, loss_tpr.

        Raises:
            ValueError: another turn, or recordings of another shape than the speech made from their mel.
        """
        if batch["turn"] == "generator":
            return self.forward_generator(batch, device)
        if batch["turn"] == "discriminator":
            return self.forward_discriminator(batch, device)
        raise ValueError(f"batch['turn'] is {batch['turn']!r}, expected 'generator' or 'discriminator'")

    def forward_generator(self, batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        """Compute the vocoder's losses; see `forward`."""
        real = batch["speech"].to(device)
        generated, f0 = self.generator(batch, device)
        _check_shapes("speech", real, generated)
        pitch = batch["pitch_feat"].to(device)
        _check_shapes("pitch_feat", pitch, f0)
        parts = {
            "loss_mel": mel_loss(real, generated, self.mel_spec_transform),
            "loss_f0": F.l1_loss(f0, pitch),
        }
        weights = {"loss_mel": self.multi_mel_spectral_recon_loss_weight, "loss_f0": 1.0}
        if batch.get("adversarial", True):
            with _frozen(self.discriminator):
                judged = self.discriminator(real, generated)
            parts["loss_gen"] = generator_loss(judged.generated_scores)
            parts["loss_fm"] = feature_loss(judged.real_maps, judged.generated_maps)
            weights |= {"loss_gen": 1.0, "loss_fm": self.feat_match_loss_weight}
            if self.tpr_loss_weight != 0:
                parts["loss_tpr"] = tpr_loss(judged.generated_scores, judged.real_scores, self.tpr_loss_tau)
                weights["loss_tpr"] = self.tpr_loss_weight
        return {"loss": _weighted_sum(parts, weights), **parts}

    def forward_discriminator(self, batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        """Compute the discriminators' losses; see `forward`."""
        real = batch["speech"].to(device)
        with torch.no_grad():
            generated = self.generator(batch, device)[0]
        _check_shapes("speech", real, generated)
        judged = self.discriminator(real, generated)
        parts = {"loss_disc": discriminator_loss(judged.real_scores, judged.generated_scores)}
        weights = {"loss_disc": 1.0}
        if self.tpr_loss_weight != 0:
            parts["loss_tpr"] = tpr_loss(judged.real_scores, judged.generated_scores, self.tpr_loss_tau)
            weights["loss_tpr"] = self.tpr_loss_weight
        return {"loss": _weighted_sum(parts, weights), **parts}


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Record no gradients for a module's parameters; gradients still pass through it to its input.

    The published loop computes them in the generator's turn too, and clips the gradients of both sides as one: the
    discriminators' make its step shorter where that norm is over grad_clip, and are thrown away only then. Here each
    side is clipped by its own norm. Without them a generator's turn does half the work in the discriminators, and
    records nothing at all of the recordings.
    """
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _weighted_sum(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    return torch.stack([weights[name] * part for name, part in parts.items()]).sum()


def _check_shapes(name: str, given: Tensor, made: Tensor) -> None:
    if given.shape != made.shape:
        raise ValueError(
            f"batch[{name!r}] has shape {tuple(given.shape)}, but what the vocoder makes of batch['speech_feat'] has "
            f"{tuple(made.shape)}: cut the recordings to a multiple of the mel's hop (truncate_length in the pipeline)"
        )

"""Makes the excitation that HiFT shapes into speech: harmonics of F0 where voiced, noise where not.

Axes: B batch  N audio samples  H harmonics, the fundamental included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Harmonics(NamedTuple):
    """Sine waves at the multiples of F0."""

    waves: Tensor  # [B, H, N]
    voiced: Tensor  # [B, 1, N], float, 1 where F0 is above the threshold


class Excitation(NamedTuple):
    """The source signal."""

    source: Tensor  # [B, 1, N], in -1..1
    voiced: Tensor  # [B, 1, N], float, 1 where F0 is above the threshold


class SineGen(nn.Module):
    """Sine waves at F0 and its overtones, with a random phase for each overtone and a little noise.

    Args:
        samp_rate: in Hz.
        harmonic_num: overtones, so H = harmonic_num + 1.
        sine_amp: amplitude of each sine; noise in unvoiced parts has a third of it as standard deviation.
        noise_std: standard deviation of the noise in voiced parts.
        voiced_threshold: F0 in Hz above which a sample is voiced.
    """

    def __init__(
        self,
        samp_rate: int,
        harmonic_num: int = 0,
        sine_amp: float = 0.1,
        noise_std: float = 0.003,
        voiced_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        self.sampling_rate = samp_rate
        self.harmonic_num = harmonic_num
        self.sine_amp = sine_amp
        self.noise_std = noise_std
        self.voiced_threshold = voiced_threshold

    @torch.no_grad()
    def forward(self, f0: Tensor) -> Harmonics:
        """Generate the waves of F0 [B, 1, N] in Hz; no gradient flows back to F0."""
        multiples = torch.arange(1, self.harmonic_num + 2, device=f0.device, dtype=f0.dtype).view(-1, 1)
        # In float32 and in this order as published: the rounding of the running sum is part of the waveform.
        cycles = torch.cumsum(f0 * multiples / self.sampling_rate, dim=-1) % 1
        phase = torch.empty(f0.size(0), self.harmonic_num + 1, 1, device=f0.device, dtype=f0.dtype)
        phase.uniform_(-torch.pi, torch.pi)
        phase[:, 0] = 0
        sines = self.sine_amp * torch.sin(2 * torch.pi * cycles + phase)

        voiced = (f0 > self.voiced_threshold).to(f0.dtype)
        noise_amp = voiced * self.noise_std + (1 - voiced) * self.sine_amp / 3
        return Harmonics(sines * voiced + noise_amp * torch.randn_like(sines), voiced)


class SourceModuleHnNSF(nn.Module):
    """Harmonics mixed by one learned linear layer and tanh: the source of a neural source-filter model.

    The published module also draws a noise branch, which HiFT discards; it is left out.

    Args:
        sampling_rate: in Hz.
        harmonic_num: overtones.
        sine_amp: amplitude of each sine.
        add_noise_std: standard deviation of the noise in voiced parts.
        voiced_threshold: F0 in Hz above which a sample is voiced.

    Source: FunAudioLLM/CosyVoice cosyvoice/hifigan/generator.py @ ace7c47.
    """

    def __init__(
        self,
        sampling_rate: int,
        harmonic_num: int = 0,
        sine_amp: float = 0.1,
        add_noise_std: float = 0.003,
        voiced_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        self.l_sin_gen = SineGen(sampling_rate, harmonic_num, sine_amp, add_noise_std, voiced_threshold)
        self.l_linear = nn.Linear(harmonic_num + 1, 1)

    def forward(self, f0: Tensor) -> Excitation:
        """Make the source of F0 [B, 1, N] in Hz at the audio rate."""
        harmonics = self.l_sin_gen(f0)
        mixed = torch.tanh(self.l_linear(harmonics.waves.transpose(1, 2)))
        return Excitation(mixed.transpose(1, 2), harmonics.voiced)

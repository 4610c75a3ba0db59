"""Discriminators that tell recordings from vocoded speech.

Axes: B batch  N audio samples  C channels  P scores, all positions flattened  T STFT frames  W rows of one period.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

LRELU_SLOPE = 0.1
PERIOD_KERNEL = 5  # rows seen by a convolution of the period discriminator
PERIOD_STRIDE = 3  # of all of them but the last


class Judgement(NamedTuple):
    """What one discriminator says of one batch."""

    scores: Tensor  # [B, P], 1 for real and 0 for generated once trained
    maps: list[Tensor]  # activations of every layer, [B, C, ...]


class Judgements(NamedTuple):
    """What several discriminators say of recordings and of generated speech; one list item a discriminator."""

    real_scores: list[Tensor]  # [B, P]
    generated_scores: list[Tensor]  # [B, P]
    real_maps: list[list[Tensor]]
    generated_maps: list[list[Tensor]]


class WeightNormConv2d(nn.Module):
    """A weight-normed convolution under the older parameter names `weight_g` and `weight_v`.

    The published period discriminator has these names, its spectral neighbour the names of
    `torch.nn.utils.parametrizations`; PyTorch's own maker of the older ones is deprecated.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: rows and columns.
        stride: rows and columns.
        padding: rows and columns.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        plain = nn.Conv2d(in_channels, out_channels, kernel_size)
        weight = plain.weight.detach()
        self.stride = stride
        self.padding = padding
        self.bias = plain.bias
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True))
        self.weight_v = nn.Parameter(weight)

    @property
    def weight(self) -> Tensor:
        """The weight that convolves, [out, in, rows, columns]."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)


class DiscriminatorP(nn.Module):
    """Looks at every `period`-th sample: the waveform folded into rows of that many samples (HiFi-GAN).

    Args:
        period: samples in a row.
        channels: of the five convolutions.

    Source: shivammehta25/Matcha-TTS matcha/hifigan/models.py.
    """

    def __init__(self, period: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        padding = (PERIOD_KERNEL // 2, 0)
        convs = []
        for layer, (width_in, width_out) in enumerate(zip((1, *channels[:-1]), channels, strict=True)):
            stride = 1 if layer == len(channels) - 1 else PERIOD_STRIDE
            convs.append(WeightNormConv2d(width_in, width_out, (PERIOD_KERNEL, 1), (stride, 1), padding))
        self.convs = cast(Sequence[WeightNormConv2d], nn.ModuleList(convs))
        self.conv_post = WeightNormConv2d(channels[-1], 1, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Judgement:
        """Judge waveforms [B, 1, N]; an end that fills no row is continued by its mirror image."""
        mirrored = F.pad(x, (0, -x.size(2) % self.period), mode="reflect")
        # Rows and columns are exchanged while computing: a CPU convolves along the last axis, and a row is short.
        hidden = mirrored.unflatten(2, (-1, self.period)).transpose(2, 3)
        maps = []
        for conv in self.convs:
            hidden = F.leaky_relu(_convolve(hidden, conv, exchanged=True), LRELU_SLOPE)
            maps.append(hidden.transpose(2, 3))
        scores = _convolve(hidden, self.conv_post, exchanged=True).transpose(2, 3)
        return Judgement(scores.flatten(1).float(), [*maps, scores])


class MultiPeriodDiscriminator(nn.Module):
    """One `DiscriminatorP` a period (HiFi-GAN, arXiv 2010.05646).

    Args:
        periods: samples in a row of each.
        channels: of the five convolutions of each; the default is the published size, 41 million weights in all.

    Source: shivammehta25/Matcha-TTS matcha/hifigan/models.py, which has neither argument.
    """

    def __init__(
        self, periods: Sequence[int] = (2, 3, 5, 7, 11), channels: Sequence[int] = (32, 128, 512, 1024, 1024)
    ) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList([DiscriminatorP(period, channels) for period in periods])

    def forward(self, y: Tensor, y_hat: Tensor) -> Judgements:
        """Judge recordings and generated speech, both [B, 1, N] float32."""
        return _judge(self.discriminators, y, y_hat)


class SpecDiscriminator(nn.Module):
    """Looks at the amplitudes of a short-time Fourier transform (UnivNet, arXiv 2106.07889).

    Args:
        fft_size: in samples.
        shift_size: samples between frames.
        win_length: of the window, in samples, at most `fft_size`.
        window: name of the torch function that makes it.
        channels: of the five convolutions.

    Source: FunAudioLLM/CosyVoice cosyvoice/hifigan/discriminator.py @ ace7c47.
    """

    def __init__(
        self,
        fft_size: int = 1024,
        shift_size: int = 120,
        win_length: int = 600,
        window: str = "hann_window",
        channels: int = 32,
    ) -> None:
        super().__init__()
        self.fft_size = fft_size
        self.shift_size = shift_size
        self.win_length = win_length
        self.make_window = getattr(torch, window)

        def conv(width_in: int, columns: int, stride: int) -> nn.Conv2d:
            return weight_norm(nn.Conv2d(width_in, channels, (3, columns), (1, stride), padding=(1, columns // 2)))

        convs = [conv(1, 9, 1), conv(channels, 9, 2), conv(channels, 9, 2), conv(channels, 9, 2), conv(channels, 3, 1)]
        self.discriminators = cast(Sequence[nn.Conv2d], nn.ModuleList(convs))
        self.out = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, y: Tensor) -> Judgement:
        """Judge waveforms [B, N]."""
        hidden = self._amplitudes(y).unsqueeze(1)
        maps = []
        for conv in self.discriminators:
            hidden = F.leaky_relu(_convolve(hidden, conv), LRELU_SLOPE)
            maps.append(hidden)
        scores = _convolve(hidden, self.out)
        return Judgement(scores.flatten(1).float(), [*maps, scores])

    def _amplitudes(self, y: Tensor) -> Tensor:
        """Transform waveforms [B, N] to [B, T, fft_size / 2 + 1], in float32 whatever autocast says."""
        with torch.autocast(device_type=y.device.type, enabled=False):
            window = self.make_window(self.win_length, device=y.device)
            spectrum = torch.stft(
                y.float(), self.fft_size, self.shift_size, self.win_length, window, return_complex=True
            )
            return spectrum.abs().transpose(1, 2)


class MultiResSpecDiscriminator(nn.Module):
    """One `SpecDiscriminator` a resolution.

    Args:
        fft_sizes: in samples, of each.
        hop_sizes: samples between frames, of each.
        win_lengths: in samples, of each.
        window: name of the torch function that makes the window.
        channels: of the convolutions; 32 as published, which has no such argument.

    Source: FunAudioLLM/CosyVoice cosyvoice/hifigan/discriminator.py @ ace7c47.
    """

    def __init__(
        self,
        fft_sizes: Sequence[int] = (1024, 2048, 512),
        hop_sizes: Sequence[int] = (120, 240, 50),
        win_lengths: Sequence[int] = (600, 1200, 240),
        window: str = "hann_window",
        channels: int = 32,
    ) -> None:
        super().__init__()
        resolutions = zip(fft_sizes, hop_sizes, win_lengths, strict=True)
        self.discriminators = nn.ModuleList([SpecDiscriminator(*sizes, window, channels) for sizes in resolutions])

    def forward(self, y: Tensor, y_hat: Tensor) -> Judgements:
        """Judge recordings and generated speech, both [B, N] float32."""
        return _judge(self.discriminators, y, y_hat)


class MultipleDiscriminator(nn.Module):
    """All discriminators of the vocoder: periods first, then resolutions.

    Args:
        mpd: judges [B, 1, N].
        mrd: judges [B, N].

    Source: FunAudioLLM/CosyVoice cosyvoice/hifigan/discriminator.py @ ace7c47.
    """

    def __init__(self, mpd: nn.Module, mrd: nn.Module) -> None:
        super().__init__()
        self.mpd = mpd
        self.mrd = mrd

    def forward(self, y: Tensor, y_hat: Tensor) -> Judgements:
        """Judge recordings and generated speech, both [B, N] float32."""
        by_period: Judgements = self.mpd(y.unsqueeze(1), y_hat.unsqueeze(1))
        by_resolution: Judgements = self.mrd(y, y_hat)
        return Judgements(
            by_period.real_scores + by_resolution.real_scores,
            by_period.generated_scores + by_resolution.generated_scores,
            by_period.real_maps + by_resolution.real_maps,
            by_period.generated_maps + by_resolution.generated_maps,
        )


def _convolve(x: Tensor, conv: nn.Conv2d | WeightNormConv2d, exchanged: bool = False) -> Tensor:
    """Convolve [B, C, rows, columns] with the channels innermost in memory.

    That layout changes no value, and is two to six times faster on a CPU for maps of few channels.

    Args:
        x: any layout.
        conv: has weight, bias, stride and padding.
        exchanged: `x` has its columns before its rows.
    """
    weight, stride, padding = conv.weight, conv.stride, conv.padding
    if exchanged:
        weight, stride, padding = weight.transpose(2, 3), stride[::-1], padding[::-1]
    return F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), conv.bias, stride, padding)


def _judge(discriminators: nn.ModuleList, y: Tensor, y_hat: Tensor) -> Judgements:
    real: list[Judgement] = [judge(y) for judge in discriminators]
    generated: list[Judgement] = [judge(y_hat) for judge in discriminators]
    return Judgements(
        [one.scores for one in real],
        [one.scores for one in generated],
        [one.maps for one in real],
        [one.maps for one in generated],
    )

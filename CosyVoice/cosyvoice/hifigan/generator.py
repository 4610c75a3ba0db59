"""Turns a mel spectrogram into a waveform: HiFTNet, a neural source filter with an inverse STFT at its end.

Axes: B batch  M mel bands  F mel frames, 86.13 Hz  N audio samples, 22,050 Hz  T STFT frames, N / 4 + 1  C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from cosyvoice.hifigan.source import SourceModuleHnNSF
from cosyvoice.utils.precision import full_precision

SINE_SAMPLE_RATE_HZ = 22_050  # the rate of the 300M models, whose sine generator this is
MAX_MAGNITUDE = 100.0  # of one STFT bin
FINAL_LRELU_SLOPE = 0.01  # before the last convolution: not `lrelu_slope`, as the weights were trained
SNAKE_EPSILON = 1e-9

# The weights keep PyTorch's default initialisation. The published code asks for a normal one of deviation 0.01, which
# weight norm overrides at the first use (here as in HiFi-GAN), so the default is what those models were trained from.


class Spectrum(NamedTuple):
    """Real and imaginary part of a short-time Fourier transform."""

    real: Tensor  # [B, n_fft / 2 + 1, T]
    imag: Tensor  # [B, n_fft / 2 + 1, T]


class TrainingOutput(NamedTuple):
    """What the vocoder's losses compare with the recording."""

    speech: Tensor  # [B, N], in -audio_limit..audio_limit
    f0: Tensor  # [B, F], Hz


class GeneratedSpeech(NamedTuple):
    """A waveform and the source it was made from, whose end starts the next chunk of a stream."""

    speech: Tensor  # [B, N], in -audio_limit..audio_limit
    source: Tensor  # [B, 1, N]


class Snake(nn.Module):
    """The activation x + sin^2(alpha x) / alpha with one learned alpha a channel (arXiv 2006.08195)."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Activate [B, C, T]."""
        return _SnakeFunction.apply(x, self.alpha)


class _SnakeFunction(torch.autograd.Function):
    """Snake with its gradients written out: half the time of PyTorch's own, and a third of the memory it keeps."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, alpha: Tensor) -> Tensor:
        column = alpha.view(1, -1, 1)
        y = torch.sin(column * x).square_().div_(column + SNAKE_EPSILON).add_(x)
        ctx.save_for_backward(x, alpha, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, alpha, y = ctx.saved_tensors  # type: ignore[attr-defined]
        column = alpha.view(1, -1, 1)
        scale = 1 / (column + SNAKE_EPSILON)
        slope = torch.sin(2 * column * x).mul_(grad)  # sin 2a = 2 sin a cos a
        to_alpha = (slope * x).addcmul_(grad, y - x, value=-1)
        return slope.mul_(column * scale).add_(grad), to_alpha.sum((0, 2)) * scale.view(-1)


class ResBlock(nn.Module):
    """Residual pairs of a dilated and a plain convolution, each behind a snake.

    Args:
        channels: in and out.
        kernel_size: of all convolutions, odd.
        dilations: of the first convolution of each pair.
    """

    def __init__(self, channels: int = 512, kernel_size: int = 3, dilations: Sequence[int] = (1, 3, 5)) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Conv1d:
            return weight_norm(nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding="same"))

        self.convs1 = cast(Sequence[nn.Conv1d], nn.ModuleList([conv(dilation) for dilation in dilations]))
        self.convs2 = cast(Sequence[nn.Conv1d], nn.ModuleList([conv(1) for _ in dilations]))
        self.activations1 = nn.ModuleList([Snake(channels) for _ in dilations])
        self.activations2 = nn.ModuleList([Snake(channels) for _ in dilations])

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, T] to the same shape."""
        x = _channels_innermost(x)
        pairs = zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True)
        for snake1, dilated, snake2, plain in pairs:
            x = x + _convolve(snake2(_convolve(snake1(x), dilated)), plain)
        return x


def _channels_innermost(x: Tensor) -> Tensor:
    """Lay [B, C, T] out with its channels innermost on a CPU, which convolves few channels up to twice as fast so."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.device.type == "cpu" else x


def _convolve(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Apply a Conv1d of "same" padding as the convolution of one row: that one keeps the layout of [B, C, T]."""
    reach = conv.dilation[0] * (conv.kernel_size[0] - 1) // 2
    row, weight = x.unsqueeze(2), conv.weight.unsqueeze(2)
    return F.conv2d(row, weight, conv.bias, padding=(0, reach), dilation=(1, conv.dilation[0])).squeeze(2)


class HiFTGenerator(nn.Module):
    """HiFTNet (arXiv 2309.09493).

    Args:
        in_channels: mel bands M.
        base_channels: channels before the first upsampling; each upsampling halves them.
        nb_harmonics: overtones of the source.
        sampling_rate: of the waveform, in Hz; 22,050.
        nsf_alpha: amplitude of the source's sines.
        nsf_sigma: standard deviation of the source's noise where voiced.
        nsf_voiced_threshold: F0 in Hz above which a frame is voiced.
        upsample_rates: of each transposed convolution.
        upsample_kernel_sizes: of each transposed convolution.
        istft_params: `n_fft` and `hop_len` of the source's STFT and of the last inverse STFT.
        resblock_kernel_sizes: of the parallel residual blocks after each upsampling.
        resblock_dilation_sizes: the same blocks' dilations.
        source_resblock_kernel_sizes: of the residual block on the source at each resolution.
        source_resblock_dilation_sizes: the same blocks' dilations.
        lrelu_slope: of the leaky ReLU before each upsampling.
        audio_limit: the waveform is clamped to this.
        f0_predictor: mel [B, M, F] -> F0 [B, F].

    Raises:
        ValueError: another sampling rate than the released 22,050 Hz, or no f0_predictor.

    Source: FunAudioLLM/CosyVoice cosyvoice/hifigan/generator.py @ ace7c47.
    """

    out_channels = 1  # of the waveform

    def __init__(
        self,
        in_channels: int = 80,
        base_channels: int = 512,
        nb_harmonics: int = 8,
        sampling_rate: int = 22_050,
        nsf_alpha: float = 0.1,
        nsf_sigma: float = 0.003,
        nsf_voiced_threshold: float = 10.0,
        upsample_rates: Sequence[int] = (8, 8),
        upsample_kernel_sizes: Sequence[int] = (16, 16),
        istft_params: Mapping[str, int] | None = None,
        resblock_kernel_sizes: Sequence[int] = (3, 7, 11),
        resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5), (1, 3, 5), (1, 3, 5)),
        source_resblock_kernel_sizes: Sequence[int] = (7, 11),
        source_resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5), (1, 3, 5)),
        lrelu_slope: float = 0.1,
        audio_limit: float = 0.99,
        f0_predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if f0_predictor is None:
            raise ValueError("HiFTGenerator needs an f0_predictor, for example a ConvRNNF0Predictor; got None")
        if sampling_rate != SINE_SAMPLE_RATE_HZ:
            raise ValueError(
                f"sampling_rate is {sampling_rate} Hz, expected {SINE_SAMPLE_RATE_HZ}: models of other rates "
                "(CosyVoice2) make their sines another way, which is not implemented"
            )
        istft = {"n_fft": 16, "hop_len": 4} if istft_params is None else istft_params
        self.nb_harmonics = nb_harmonics
        self.sampling_rate = sampling_rate
        self.n_fft: int = istft["n_fft"]
        self.hop_samples: int = istft["hop_len"]
        self.lrelu_slope = lrelu_slope
        self.audio_limit = audio_limit
        self.num_kernels = len(resblock_kernel_sizes)
        self.samples_per_frame = math.prod(upsample_rates) * self.hop_samples
        bins = self.n_fft + 2  # real and imaginary parts, or magnitude and phase, of n_fft / 2 + 1 frequencies

        self.m_source = SourceModuleHnNSF(sampling_rate, nb_harmonics, nsf_alpha, nsf_sigma, nsf_voiced_threshold)
        self.conv_pre = weight_norm(nn.Conv1d(in_channels, base_channels, 7, padding=3))
        self.ups = nn.ModuleList()
        self.source_downs = nn.ModuleList()
        self.source_resblocks = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        stages = zip(
            upsample_rates,
            upsample_kernel_sizes,
            source_resblock_kernel_sizes,
            source_resblock_dilation_sizes,
            strict=True,
        )
        for stage, (rate, kernel, source_kernel, source_dilations) in enumerate(stages):
            channels = base_channels >> (stage + 1)
            up = nn.ConvTranspose1d(2 * channels, channels, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(weight_norm(up))
            stride = math.prod(upsample_rates[stage + 1 :])  # from the STFT's frame rate to this resolution's
            down = (1, 1, 0) if stride == 1 else (2 * stride, stride, stride // 2)
            self.source_downs.append(nn.Conv1d(bins, channels, *down))
            self.source_resblocks.append(ResBlock(channels, source_kernel, source_dilations))
            for block_kernel, dilations in zip(resblock_kernel_sizes, resblock_dilation_sizes, strict=True):
                self.resblocks.append(ResBlock(channels, block_kernel, dilations))
        self.conv_post = weight_norm(nn.Conv1d(channels, bins, 7, padding=3))
        self.f0_predictor = f0_predictor

    @full_precision
    def forward(self, batch: Mapping[str, Tensor], device: torch.device) -> TrainingOutput:
        """Generate speech and F0 with gradients, for adversarial training.

        Args:
            batch: `speech_feat` [B, F, M] float32, log mel.
            device: where to compute.

        Returns:
            waveforms [B, F * 256] and F0 [B, F].
        """
        mel = batch["speech_feat"].transpose(1, 2).to(device)
        f0 = self.f0_predictor(mel)
        return TrainingOutput(self.decode(mel, self._source(f0)), f0)

    @torch.no_grad()
    @full_precision
    def inference(self, speech_feat: Tensor, cache_source: Tensor | None = None) -> GeneratedSpeech:
        """Generate a waveform.

        Args:
            speech_feat: log mel, [B, M, F], F >= 1.
            cache_source: the end of the source of the chunk before, [B, 1, K], which replaces the first K samples so
                that the phase goes on without a click; None or zero samples for a first chunk.

        Returns:
            the waveform [B, F * 256] and its source.

        Raises:
            ValueError: no mel frame, or a cache longer than this chunk.
        """
        if speech_feat.dim() != 3 or speech_feat.size(2) == 0:
            raise ValueError(f"expected a mel of shape [B, M, F] with F >= 1, got {tuple(speech_feat.shape)}")
        mel = speech_feat.to(self.conv_pre.bias.dtype)
        source = self._source(self.f0_predictor(mel))
        if cache_source is not None and cache_source.size(2) > 0:
            kept = cache_source.size(2)
            if kept > source.size(2):
                raise ValueError(f"cache_source has {kept} samples, but this chunk has only {source.size(2)}")
            source = torch.cat([cache_source.to(source), source[:, :, kept:]], dim=2)
        return GeneratedSpeech(self.decode(mel, source), source)

    def decode(self, x: Tensor, s: Tensor) -> Tensor:
        """Shape a source by a mel; deterministic.

        Args:
            x: log mel, [B, M, F].
            s: source, [B, 1, F * 256].

        Returns:
            waveforms, [B, F * 256].
        """
        source = torch.cat(self._stft(s.squeeze(1)), dim=1)  # [B, n_fft + 2, T]
        hidden = self.conv_pre(x)
        for stage, up in enumerate(self.ups):
            hidden = up(F.leaky_relu(hidden, self.lrelu_slope))
            if stage == len(self.ups) - 1:
                hidden = F.pad(hidden, (1, 0), mode="reflect")  # a centred STFT has one frame more than hops
            hidden = _channels_innermost(hidden) + self.source_resblocks[stage](self.source_downs[stage](source))
            blocks = self.resblocks[stage * self.num_kernels : (stage + 1) * self.num_kernels]
            hidden = sum(block(hidden) for block in blocks) / self.num_kernels
        hidden = self.conv_post(F.leaky_relu(hidden, FINAL_LRELU_SLOPE))
        log_magnitude, angle = hidden.chunk(2, dim=1)
        # Limiting the logarithm rather than its exponential keeps the gradient finite where that would overflow.
        magnitude = log_magnitude.clamp(max=math.log(MAX_MAGNITUDE)).exp()
        wave = self._istft(magnitude, torch.sin(angle))
        return wave.clamp(-self.audio_limit, self.audio_limit)

    def remove_weight_norm(self) -> None:
        """Fold the weight norms into plain weights: faster inference, but other state-dict keys."""
        for module in list(self.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")

    def _source(self, f0: Tensor) -> Tensor:
        """Make the source [B, 1, N] of frame-rate F0 [B, F]."""
        return self.m_source(f0.unsqueeze(1).repeat_interleave(self.samples_per_frame, dim=-1)).source

    def _stft(self, x: Tensor) -> Spectrum:
        """Transform waveforms [B, N]."""
        spectrum = torch.stft(x, self.n_fft, self.hop_samples, window=self._window(x), return_complex=True)
        return Spectrum(spectrum.real, spectrum.imag)

    def _istft(self, magnitude: Tensor, phase: Tensor) -> Tensor:
        """Transform [B, n_fft / 2 + 1, T] back to waveforms [B, N]."""
        spectrum = torch.polar(magnitude, phase)
        return torch.istft(spectrum, self.n_fft, self.hop_samples, window=self._window(magnitude))

    def _window(self, like: Tensor) -> Tensor:
        # Sixteen points, made anew: a buffer would be garbage after building the model on the meta device.
        return torch.hann_window(self.n_fft, device=like.device, dtype=like.dtype)

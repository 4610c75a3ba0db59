"""Turns waveforms into the three spectra that CosyVoice's parts read.

Axes: B batch  N samples  F mel frames of the model's own rate (86.13 Hz at 22,050 Hz)  W Whisper frames, 100 Hz
      K kaldi frames, 100 Hz.
"""

from __future__ import annotations

import functools
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.compliance import kaldi
from torchaudio.functional import melscale_fbanks

from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ

WHISPER_FFT_SAMPLES = 400  # 25 ms
WHISPER_HOP_SAMPLES = 160  # 10 ms
WHISPER_DYNAMIC_RANGE = 8.0  # decades of power kept below the loudest bin
SPEAKER_MEL_BINS = 80
SPEAKER_WINDOW_SAMPLES = 400  # 25 ms: kaldi makes no frame of anything shorter
POWER_FLOOR = 1e-9  # keeps the square root differentiable in digital silence
AMPLITUDE_FLOOR = 1e-5  # log(1e-5) = -11.5 is the value of silence
MOST_PHASES = 2_000  # of a resampling filter: ratios of rates that need more are rounded, by 3e-4 at most


def mel_spectrogram(
    y: Tensor,
    n_fft: int,
    num_mels: int,
    sampling_rate: int,
    hop_size: int,
    win_size: int,
    fmin: float,
    fmax: float | None,
    center: bool = False,
) -> Tensor:
    """Compute the natural-log mel amplitudes that flow predicts and HiFT reads; differentiable.

    A waveform too short to be mirrored at its ends (384 samples, 17 ms, at the released settings) is followed by
    silence up to the shortest length that can be.

    Args:
        y: waveforms in -1..1, [B, N], float32.
        n_fft: FFT size in samples.
        num_mels: mel bands.
        sampling_rate: of `y`, in Hz.
        hop_size: samples between frames.
        win_size: Hann window in samples, at most `n_fft`.
        fmin: lower edge of the lowest band, Hz.
        fmax: upper edge of the highest band, Hz; None is half the sampling rate.
        center: also pad each frame's centre, as `torch.stft` does; the released models do not.

    Returns:
        log amplitudes, [B, num_mels, F], F = N // hop_size for the released settings; silence is log(1e-5).

    Raises:
        ValueError: `y` is not [B, N] or holds no sample.

    Source: shivammehta25/Matcha-TTS matcha/utils/audio.py, as FunAudioLLM/CosyVoice @ ace7c47 uses it.
    """
    if y.dim() != 2 or y.size(1) == 0:
        raise ValueError(f"expected waveforms of shape [B, N] with N >= 1, got {tuple(y.shape)}")
    edge = (n_fft - hop_size) // 2
    mirrored = F.pad(_at_least(y, edge + 1).unsqueeze(1), (edge, edge), mode="reflect").squeeze(1)
    window = _hann_window(win_size, y.device)
    spectrum = torch.stft(mirrored, n_fft, hop_size, win_size, window, center=center, return_complex=True)
    amplitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + POWER_FLOOR)
    upper = sampling_rate / 2 if fmax is None else fmax
    filters = _slaney_filters(sampling_rate, n_fft, num_mels, float(fmin), float(upper), y.device)
    return torch.log((filters @ amplitude).clamp(min=AMPLITUDE_FLOOR))


def whisper_log_mel(wave: Tensor, n_mels: int = 128) -> Tensor:
    """Compute Whisper's log-mel spectrum of each waveform at its own length (no padding to 30 s).

    The dynamic range is cut relative to each waveform's own maximum, so a batch equals its rows one by one. Less than
    200 samples are followed by silence.

    Args:
        wave: 16 kHz waveforms in -1..1, [N] or [B, N], float32.
        n_mels: mel bands: 128 for Whisper large-v3 and the S3 tokenizer, 80 for older Whispers.

    Returns:
        normalised log10 power, [n_mels, W] or [B, n_mels, W], W = N // 160.

    Raises:
        ValueError: `wave` is not [N] or [B, N], or holds no sample.

    Source: openai/whisper whisper/audio.py, log_mel_spectrogram.
    """
    if wave.dim() not in (1, 2) or wave.size(-1) == 0:
        raise ValueError(f"expected a waveform of shape [N] or [B, N] with N >= 1, got {tuple(wave.shape)}")
    padded = _at_least(wave, WHISPER_FFT_SAMPLES // 2 + 1)
    window = _hann_window(WHISPER_FFT_SAMPLES, wave.device)
    spectrum = torch.stft(padded, WHISPER_FFT_SAMPLES, WHISPER_HOP_SAMPLES, window=window, return_complex=True)
    power = spectrum[..., :-1].abs().square()
    nyquist_hz = SPEECH_SAMPLE_RATE_HZ / 2
    filters = _slaney_filters(SPEECH_SAMPLE_RATE_HZ, WHISPER_FFT_SAMPLES, n_mels, 0.0, nyquist_hz, wave.device)
    decades = (filters @ power).clamp(min=1e-10).log10()
    decades = torch.maximum(decades, decades.amax(dim=(-2, -1), keepdim=True) - WHISPER_DYNAMIC_RANGE)
    return decades / 4 + 1


def speaker_fbank(wave: Tensor) -> Tensor:
    """Compute the mean-subtracted kaldi filter bank that the speaker encoder (CAM++) reads.

    Args:
        wave: one 16 kHz waveform in -1..1, [N], float32, at least 25 ms.

    Returns:
        log energies, [K, 80], zero mean over time, K = 1 + (N - 400) // 160.

    Raises:
        ValueError: `wave` is not [N], or is shorter than one analysis window, so that it has no frame at all.

    Source: FunAudioLLM/CosyVoice cosyvoice/cli/frontend.py @ ace7c47, _extract_spk_embedding.
    """
    if wave.dim() != 1 or wave.size(0) < SPEAKER_WINDOW_SAMPLES:
        raise ValueError(
            f"expected one waveform of shape [N] with N >= {SPEAKER_WINDOW_SAMPLES} samples (25 ms at 16 kHz), "
            f"got {tuple(wave.shape)}: a speaker vector needs a longer recording"
        )
    energies = kaldi.fbank(
        wave.unsqueeze(0), num_mel_bins=SPEAKER_MEL_BINS, dither=0.0, sample_frequency=SPEECH_SAMPLE_RATE_HZ
    )
    return energies - energies.mean(dim=0, keepdim=True)


def resampling_rates(rate_hz: int, wanted_hz: int) -> tuple[int, int]:
    """Reduce two rates to small numbers of their ratio; 44,099 to 22,050 Hz as it is would take a filter of gigabytes.

    Args:
        rate_hz: of the sound, >= 1.
        wanted_hz: rate wanted, >= 1.

    Returns:
        what torchaudio's resampling takes for them; exact for all usual rates.
    """
    ratio = Fraction(wanted_hz, rate_hz).limit_denominator(MOST_PHASES)
    return ratio.denominator, ratio.numerator


def _at_least(wave: Tensor, samples: int) -> Tensor:
    """Follow waveforms [..., N] by silence where they are shorter than `samples`."""
    return F.pad(wave, (0, max(0, samples - wave.size(-1))))


# Both caches build their tensors outside inference mode: one built inside could not be used in training afterwards.
@functools.lru_cache(maxsize=16)
def _hann_window(samples: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.hann_window(samples, device=device)


@functools.lru_cache(maxsize=16)
def _slaney_filters(
    sample_rate_hz: int, n_fft: int, n_mels: int, low_hz: float, high_hz: float, device: torch.device
) -> Tensor:
    """Build librosa's default mel filters, [n_mels, n_fft // 2 + 1]."""
    with torch.inference_mode(False):
        filters = melscale_fbanks(
            n_fft // 2 + 1, low_hz, high_hz, n_mels, sample_rate_hz, norm="slaney", mel_scale="slaney"
        )
        return filters.T.contiguous().to(device)

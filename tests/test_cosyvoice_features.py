import math

import pytest
import torch
from whisper.audio import mel_filters

from cosyvoice.utils import audio
from cosyvoice.utils.audio import mel_spectrogram, speaker_fbank, whisper_log_mel

RELEASED_MEL = {
    "n_fft": 1024,
    "num_mels": 80,
    "sampling_rate": 22050,
    "hop_size": 256,
    "win_size": 1024,
    "fmin": 0,
    "fmax": 8000,
}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def test_mel_spectrogram_equals_the_reference(golden_cases):
    case = golden_cases["mel_spectrogram"]
    assert relative_error(mel_spectrogram(case["wav"], **RELEASED_MEL), case["mel"]) <= 1e-5


def test_whisper_log_mel_equals_the_reference(golden_cases):
    case = golden_cases["whisper_log_mel"]
    assert relative_error(whisper_log_mel(case["wav"]), case["mel"]) <= 1e-5


def test_speaker_fbank_equals_the_reference_minus_its_mean_over_time(golden_cases):
    case = golden_cases["kaldi_fbank"]
    mean = case["fbank"].mean(dim=0, keepdim=True)
    assert relative_error(speaker_fbank(case["wav"][0]) + mean, case["fbank"]) <= 1e-5


@pytest.mark.parametrize("n_mels", [80, 128])
def test_mel_filters_equal_the_librosa_matrices_in_whispers_package(n_mels):
    ours = audio._slaney_filters(16_000, 400, n_mels, 0.0, 8000.0, torch.device("cpu"))
    assert relative_error(ours, mel_filters("cpu", n_mels)) <= 1e-5


def test_settings_that_share_an_upper_frequency_do_not_share_filters():
    wave = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)) / 10
    mel_spectrogram(wave, **RELEASED_MEL)
    assert mel_spectrogram(wave, **(RELEASED_MEL | {"n_fft": 512, "win_size": 512, "num_mels": 40})).shape[:2] == (
        1,
        40,
    )


@pytest.mark.parametrize("samples", [1, 200, 384, 385, 22_050])
def test_silence_of_any_length_is_the_floor_and_never_nan(samples):
    mel = mel_spectrogram(torch.zeros(1, samples), **RELEASED_MEL)
    assert mel.size(2) >= 1
    torch.testing.assert_close(mel, torch.full_like(mel, math.log(1e-5)))
    whisper = whisper_log_mel(torch.zeros(samples))
    assert whisper.size(1) >= 1
    torch.testing.assert_close(whisper, torch.full_like(whisper, -10 / 4 + 1))


def test_silence_has_a_finite_speaker_spectrum():
    assert torch.equal(speaker_fbank(torch.zeros(400)), torch.zeros(1, 80))


def test_silence_has_a_finite_gradient():
    wave = torch.zeros(1, 2000, requires_grad=True)
    mel_spectrogram(wave, **RELEASED_MEL).sum().backward()
    assert torch.isfinite(wave.grad).all()


def test_a_batch_equals_its_rows_one_by_one():
    waves = torch.randn(3, 8000, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1e-4], [0.01], [0.3]])
    for transform in (lambda wave: mel_spectrogram(wave, **RELEASED_MEL), whisper_log_mel):
        batch = transform(waves)
        for row in range(3):
            torch.testing.assert_close(batch[row : row + 1], transform(waves[row : row + 1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(whisper_log_mel(waves)[0], whisper_log_mel(waves[0]), rtol=0, atol=1e-4)


def test_mel_can_be_trained_through_after_its_first_use_in_inference_mode():
    audio._hann_window.cache_clear()
    audio._slaney_filters.cache_clear()
    with torch.inference_mode():
        mel_spectrogram(torch.zeros(1, 2000), **RELEASED_MEL)
    wave = torch.randn(1, 2000, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mel_spectrogram(wave, **RELEASED_MEL).sum().backward()
    assert wave.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("transform", "wave"),
    [
        (lambda wave: mel_spectrogram(wave, **RELEASED_MEL), torch.zeros(1, 0)),
        (lambda wave: mel_spectrogram(wave, **RELEASED_MEL), torch.zeros(100)),
        (whisper_log_mel, torch.zeros(0)),
        (whisper_log_mel, torch.zeros(1, 1, 500)),
        (speaker_fbank, torch.zeros(399)),
        (speaker_fbank, torch.zeros(1, 16_000)),
    ],
)
def test_a_wave_of_the_wrong_shape_is_refused_with_its_shape(transform, wave):
    with pytest.raises(ValueError, match=r"got \(" + str(wave.shape[0])):
        transform(wave)

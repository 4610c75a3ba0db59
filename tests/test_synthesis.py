import pytest
import soundfile
import torch

from cosyvoice.utils.file_utils import write_wav
from taste.synthesis import LEAST_UNITS, UnitDecoder
from tests.small_model_folder import write_small_model_folder

SPEAKER = torch.randn(192, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, golden_dir) -> UnitDecoder:
    folder = write_small_model_folder(tmp_path_factory.mktemp("model"), golden_dir)
    return UnitDecoder(folder, torch.device("cpu"))


@pytest.mark.parametrize("count", [LEAST_UNITS, 3, 40, 41, 120])
def test_the_sound_is_as_long_as_its_units(decoder, count):
    speech = decoder.decode([5] * count, SPEAKER)
    frames = int(count / 50 * 22_050 / 256)
    assert speech.mel.shape == (80, frames)
    assert speech.waveform.shape == (256 * frames,)
    assert speech.waveform.isfinite().all() and speech.waveform.abs().max() > 0


@pytest.mark.parametrize("count", range(LEAST_UNITS))
def test_too_few_units_are_refused(decoder, count):
    with pytest.raises(ValueError, match=f"{count} units make no sound"):
        decoder.decode([5] * count, SPEAKER)


def test_the_same_seed_gives_the_same_sound_and_leaves_the_global_generator_alone(decoder):
    torch.manual_seed(7)
    expected_next = torch.randn(3)
    torch.manual_seed(7)
    first = decoder.decode(list(range(20)), SPEAKER, seed=1)
    assert torch.equal(torch.randn(3), expected_next)
    assert torch.equal(decoder.decode(list(range(20)), SPEAKER, seed=1).waveform, first.waveform)
    assert not torch.equal(decoder.decode(list(range(20)), SPEAKER, seed=2).waveform, first.waveform)


def test_the_voice_follows_the_speaker_vector(decoder):
    units = list(range(20))
    mels = [decoder.decode(units, speaker).mel for speaker in (SPEAKER, -SPEAKER, None)]
    assert not torch.allclose(mels[0], mels[1])
    assert not torch.allclose(mels[0], mels[2])


def test_the_flow_stays_in_full_precision(decoder):
    assert {parameter.dtype for parameter in decoder.flow.parameters()} == {torch.float32}
    assert not decoder.flow.training and not decoder.hift.training


def test_a_wav_has_the_models_rate(decoder, tmp_path):
    speech = decoder.decode([5] * 10, SPEAKER)
    write_wav(tmp_path / "a.wav", speech.waveform, decoder.sample_rate_hz)
    assert soundfile.info(tmp_path / "a.wav").samplerate == 22_050


def test_the_mel_of_a_recording_has_the_frames_of_its_length(decoder):
    assert decoder.mel(torch.randn(22_050)).shape == (80, 22_050 // 256)

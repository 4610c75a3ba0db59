from pathlib import Path

import onnxruntime
import pytest
import torch
import torchaudio.compliance.kaldi as kaldi
from small_model_folder import write_speaker_model
from sounds import voice_like

from taste.speaker import SPEAKER_WIDTH, SpeakerEncoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speaker") / "campplus.onnx"
    write_speaker_model(path)
    return path


def test_the_vector_is_the_models_output_for_the_mean_subtracted_filter_bank(model: Path) -> None:
    waveform = torch.from_numpy(voice_like(1.3, 16_000)).float()
    found = SpeakerEncoder(model).embed(waveform)
    assert found.shape == (SPEAKER_WIDTH,) and found.dtype == torch.float32

    frames = kaldi.fbank(waveform[None], num_mel_bins=80, dither=0, sample_frequency=16_000)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"feats": (frames - frames.mean(0))[None].numpy()})[0]
    torch.testing.assert_close(found, torch.from_numpy(expected)[0])


def test_the_provider_in_use_is_told(model: Path) -> None:
    assert SpeakerEncoder(model).provider == "CPUExecutionProvider"


def test_a_recording_shorter_than_a_window_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="25 ms"):
        SpeakerEncoder(model).embed(torch.zeros(300))


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="setup_cosyvoice"):
        SpeakerEncoder(tmp_path / "campplus.onnx")
    (tmp_path / "campplus.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="cannot be opened"):
        SpeakerEncoder(tmp_path / "campplus.onnx")

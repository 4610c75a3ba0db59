"""S3 units: one recording, one sequence, whatever the batch, the backend or the length."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cosyvoice.utils.audio import whisper_log_mel
from cosyvoice.utils.file_utils import write_wav
from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ
from taste.audio import AudioError
from taste.manifest import read_manifest
from taste.s3_units import (
    UnitExtractor,
    count_units,
    load_s3_tokenizer,
    open_extractor,
    read_recording,
    split_into_windows,
)

REPOSITORY = Path(__file__).parents[1]
MODEL = REPOSITORY / "CosyVoice-tiny" / "speech_tokenizer_v1.onnx"


@pytest.fixture(scope="module")
def extractor() -> UnitExtractor:
    return open_extractor(MODEL, batch_size=4)


@pytest.fixture(scope="module")
def recordings() -> list[Tensor]:
    """Eight recordings of the demo corpus, of different lengths and levels."""
    return [read_recording(item.audio_path) for item in read_manifest(REPOSITORY / "json" / "test.jsonl")[:8]]


def joined(recordings: list[Tensor], seconds: float) -> Tensor:
    """One long recording out of several short ones."""
    num_samples = round(seconds * SPEECH_SAMPLE_RATE_HZ)
    speech = torch.cat(recordings)
    return speech.repeat(num_samples // len(speech) + 1)[:num_samples]


@given(st.integers(min_value=1, max_value=40_000))
def test_windows_keep_every_unit_of_a_recording_exactly_once(num_frames: int) -> None:
    kept = []
    for window in split_into_windows(num_frames):
        assert window.end_frame - window.first_frame <= 3000
        first = window.first_frame // 2
        kept += range(first + window.first_unit, first + window.end_unit)
    assert kept == list(range(-(-num_frames // 2)))


@pytest.mark.parametrize("num_samples", [160, 319, 320, 479, 480, 16_000, 16_159, 16_160])
def test_a_recording_has_half_as_many_units_as_whole_10_ms_hops_rounded_up(
    extractor: UnitExtractor, num_samples: int
) -> None:
    noise = 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(0))
    assert len(extractor.extract([noise])[0]) == count_units(num_samples) == -(-(num_samples // 160) // 2)


def test_both_backends_give_the_same_units(extractor: UnitExtractor, recordings: list[Tensor]) -> None:
    reference = open_extractor(MODEL, backend="onnxruntime", num_threads=2)
    long = joined(recordings, 33.0)
    assert extractor.extract([*recordings, long]) == reference.extract([*recordings, long])


def test_batch_of_recordings_equals_recordings_one_by_one(extractor: UnitExtractor, recordings: list[Tensor]) -> None:
    quiet = 0.03 * recordings[0]  # its mel is scaled by its own loudest point
    mixed = [*recordings, quiet, recordings[1][:8000], joined(recordings, 33.0)]
    assert extractor.extract(mixed) == [extractor.extract([recording])[0] for recording in mixed]


@pytest.mark.parametrize("seconds", [30.0, 35.0, 45.0])
def test_long_recordings_get_the_units_that_s3tokenizer_gives_them(recordings: list[Tensor], seconds: float) -> None:
    waveform = joined(recordings, seconds)
    mel = whisper_log_mel(waveform)
    codes, lengths = load_s3_tokenizer(MODEL).quantize(mel[None], torch.tensor([mel.shape[1]]))
    units = open_extractor(MODEL).extract([waveform])[0]
    assert units == codes[0, : lengths[0]].tolist()
    assert len(units) == seconds * 50


def test_no_units_are_lost_where_the_last_window_would_lie_inside_the_one_before(
    extractor: UnitExtractor, recordings: list[Tensor]
) -> None:
    # s3tokenizer 0.3.0 starts a third window at 52 s here, and drops the units of the last two seconds.
    assert len(extractor.extract([joined(recordings, 54.0)])[0]) == 54 * 50


def test_units_follow_the_sound(extractor: UnitExtractor, recordings: list[Tensor]) -> None:
    units = extractor.extract(recordings)
    assert len({unit for row in units for unit in row}) > 100
    repeated = [now == before for row in units for before, now in itertools.pairwise(row)]
    assert 0.05 < sum(repeated) / len(repeated) < 0.95  # neighbours share a unit often, but not always
    assert all(0 <= unit < 4096 for row in units for unit in row)


def test_sizes_of_the_model_come_from_the_file() -> None:
    config = load_s3_tokenizer(MODEL).config
    assert (config.n_mels, config.n_audio_ctx, config.n_codebook_size) == (128, 1500, 4096)
    assert config.n_audio_state == config.n_audio_head * 64


def test_a_recording_shorter_than_one_unit_is_refused(tmp_path: Path) -> None:
    write_wav(tmp_path / "click.wav", torch.full((159,), 0.5), SPEECH_SAMPLE_RATE_HZ)
    with pytest.raises(AudioError, match="159 samples at 16 kHz are too few; expected 160"):
        read_recording(tmp_path / "click.wav")


@pytest.mark.parametrize("backend", ["s3tokenizer", "onnxruntime"])
def test_a_missing_or_foreign_model_is_refused_by_name(backend: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no.*setup_cosyvoice\.py"):
        open_extractor(tmp_path / "speech_tokenizer_v1.onnx", backend=backend)
    (tmp_path / "speech_tokenizer_v1.onnx").write_bytes(b"no model at all")
    with pytest.raises(ValueError, match=r"speech_tokenizer_v1\.onnx"):
        open_extractor(tmp_path / "speech_tokenizer_v1.onnx", backend=backend)


def test_another_onnx_model_is_no_speech_tokenizer() -> None:
    with pytest.raises(ValueError, match="not an S3 tokenizer v1"):
        load_s3_tokenizer(MODEL.with_name("campplus.onnx"))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of s3tokenizer, onnxruntime"):
        open_extractor(MODEL, backend="tensorrt")

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sounds import voice_like, write_recording

from cosyvoice.utils.file_utils import write_wav
from taste.audio import AudioError, duration_seconds, read_audio

RATE_HZ = 16_000


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg"])
def test_every_format_gives_the_sound_that_was_written(tmp_path: Path, suffix: str) -> None:
    path = write_recording(tmp_path / f"a{suffix}", seconds=1.5)
    audio = read_audio(path, RATE_HZ)
    expected = torch.from_numpy(voice_like(1.5, RATE_HZ)).float()
    assert audio.waveform.dtype == torch.float32 and audio.sample_rate_hz == RATE_HZ
    assert audio.duration_seconds == pytest.approx(1.5, abs=1e-3) == duration_seconds(path)
    assert audio.waveform.shape == expected.shape
    tolerance = 1e-4 if suffix in (".wav", ".flac") else 0.08  # of lossy coding
    assert (audio.waveform - expected).abs().mean() < tolerance


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 46_721, 48_000])
def test_every_rate_gives_the_same_sound(tmp_path: Path, rate_hz: int) -> None:
    audio = read_audio(write_recording(tmp_path / "a.wav", seconds=1.0, rate_hz=rate_hz), RATE_HZ)
    expected = torch.from_numpy(voice_like(1.0, RATE_HZ)).float()
    assert len(audio.waveform) == RATE_HZ
    assert audio.duration_seconds == pytest.approx(1.0)
    middle = slice(1_000, -1_000)  # the filter's edges ring
    assert (audio.waveform[middle] - expected[middle]).abs().max() < 2e-3


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = voice_like(0.5, RATE_HZ, seed=1), voice_like(0.5, RATE_HZ, seed=2)
    soundfile.write(str(tmp_path / "a.wav"), np.stack([left, right], axis=1), RATE_HZ, subtype="FLOAT")
    audio = read_audio(tmp_path / "a.wav", RATE_HZ)
    torch.testing.assert_close(audio.waveform, torch.from_numpy((left + right) / 2).float())


def test_paths_may_hold_spaces_and_any_script(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "чтение вслух" / "你好 wörld (1).flac")
    assert read_audio(path, RATE_HZ).duration_seconds == pytest.approx(1.0)


def _missing(path: Path) -> None:
    pass


def _no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def _noise_bytes(path: Path) -> None:
    path.write_bytes(os.urandom(5_000))


def _no_samples(path: Path) -> None:
    soundfile.write(str(path), np.zeros(0), RATE_HZ)


def _silence(path: Path) -> None:
    soundfile.write(str(path), np.zeros(RATE_HZ), RATE_HZ)


def _near_silence(path: Path) -> None:
    soundfile.write(str(path), np.random.default_rng(0).integers(-2, 3, RATE_HZ).astype(np.int16), RATE_HZ)


def _not_numbers(path: Path) -> None:
    soundfile.write(str(path), np.full(RATE_HZ, np.nan), RATE_HZ, subtype="FLOAT")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_missing, "no such file"),
        (_no_bytes, "empty"),
        (_noise_bytes, "not a readable"),
        (_no_samples, "0 samples"),
        (_silence, "silent"),
        (_near_silence, "silent"),
        (_not_numbers, "not finite"),
    ],
)
def test_an_unusable_recording_is_refused_with_its_reason(tmp_path: Path, damage, reason: str) -> None:
    path = tmp_path / "bad one.wav"
    damage(path)
    with pytest.raises(AudioError, match=reason) as caught:
        read_audio(path, RATE_HZ)
    assert str(path) in str(caught.value)


def test_a_flac_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "a.flac", seconds=3)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"truncated|not a readable"):
        read_audio(path, RATE_HZ)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_a_wav_cut_short_is_refused(tmp_path: Path, subtype: str) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(str(path), voice_like(3, RATE_HZ), RATE_HZ, subtype=subtype)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"bytes of sound \(truncated"):
        read_audio(path, RATE_HZ)


def test_a_wav_from_a_pipe_promises_more_than_it_has(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "a.wav", seconds=1)
    content = bytearray(path.read_bytes())
    content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(read_audio(path, RATE_HZ).waveform) == RATE_HZ


def test_a_flac_from_a_pipe_does_not_say_how_long_it_is(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "a.flac", seconds=1.5)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the last 36 bits of STREAMINFO's numbers: all samples
    content[22:26] = bytes(4)
    path.write_bytes(content)
    for read in (duration_seconds, lambda path: read_audio(path, RATE_HZ)):
        with pytest.raises(AudioError, match="does not say how long it is"):
            read(path)


def test_a_written_wav_reads_back_clipped_to_full_scale(tmp_path: Path) -> None:
    waveform = torch.tensor([[0.5, -0.25, 3.0, -3.0, 0.0]])
    write_wav(tmp_path / "new" / "a.wav", waveform, 22_050)
    audio = read_audio(tmp_path / "new" / "a.wav", 22_050)
    torch.testing.assert_close(audio.waveform, waveform[0].clamp(-1, 1), atol=1e-4, rtol=0)


def test_a_wav_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_wav(path, torch.full((100,), 0.5), RATE_HZ)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not finite"):
        write_wav(path, torch.tensor([float("nan")]), RATE_HZ)
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        write_wav(path, torch.zeros(2, 5), RATE_HZ)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

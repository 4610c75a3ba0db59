"""Reading a recording as a mono waveform at the rate a model wants, and writing one."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio.functional

from cosyvoice.utils.audio import resampling_rates

# N samples
SILENCE_PEAK = 1e-4  # -80 dB below full scale: three steps of 16-bit sound
UNKNOWN_FRAMES = 2**62  # as many, or more, where a header does not say how many there are (a FLAC from a pipe)
WAV_PROMISE = re.compile(r"^data\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)  # bytes, as libsndfile notes them
HEADER_BYTES = 64  # which some recorders count as sound
STREAMED_BYTES = 0x7FFFF000  # a WAV from a pipe promises as many, or more, or none: it did not know


class AudioError(ValueError):
    """A recording cannot be used; the message names the file and says why."""


class Audio(NamedTuple):
    """A recording, ready for a model."""

    waveform: torch.Tensor  # [N] float32, mono, -1..1
    sample_rate_hz: int
    duration_seconds: float  # of the file as it lies on the disk


def read_audio(path: str | os.PathLike[str], sample_rate_hz: int) -> Audio:
    """Read a wav, flac, mp3 or ogg file, average its channels and resample it.

    Args:
        path: the file.
        sample_rate_hz: the rate wanted.

    Returns:
        the waveform [N] and the duration of the file.

    Raises:
        AudioError: the file is missing, is no sound file, ends too early, holds no samples, holds values that are no
            numbers, or is silent.
    """
    path = Path(path)
    samples, file_rate_hz = _decode(path)
    if len(samples) == 0:
        raise AudioError(f"{path}: the recording is empty (0 samples)")
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: some samples are not finite numbers")
    waveform = torch.from_numpy(samples).mean(dim=1)
    peak = waveform.abs().max().item()
    if peak < SILENCE_PEAK:
        raise AudioError(f"{path}: the recording is silent (its peak is {peak:.1e} of full scale)")
    if file_rate_hz != sample_rate_hz:
        waveform = torchaudio.functional.resample(waveform, *resampling_rates(file_rate_hz, sample_rate_hz))
    return Audio(waveform, sample_rate_hz, len(samples) / file_rate_hz)


def duration_seconds(path: str | os.PathLike[str]) -> float:
    """The length of a recording, from its header alone.

    Args:
        path: the file.

    Returns:
        seconds.

    Raises:
        AudioError: the file is missing or is no sound file.
    """
    path = Path(path)
    _check_present(path)
    try:
        with soundfile.SoundFile(str(path)) as file:
            _check_length(path, file)
            return file.frames / file.samplerate
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(path, error) from error


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """The samples [N, channels] float32, and their rate."""
    _check_present(path)
    try:
        with soundfile.SoundFile(str(path)) as file:
            _check_length(path, file)
            samples = file.read(dtype="float32", always_2d=True)
            promised_frames, rate_hz, kind, notes = file.frames, file.samplerate, file.format, file.extra_info
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(path, error) from error
    # the length of an mp3 is an estimate of the decoder; the other headers state it
    if len(samples) < promised_frames and kind != "MP3":
        raise AudioError(f"{path}: ends after {len(samples)} of {promised_frames} samples (truncated?)")
    if (promise := WAV_PROMISE.search(notes)) and kind in ("WAV", "WAVEX"):
        promised_bytes, found_bytes = map(int, promise.groups())
        if found_bytes + HEADER_BYTES < promised_bytes < STREAMED_BYTES:
            raise AudioError(f"{path}: ends after {found_bytes} of {promised_bytes} bytes of sound (truncated?)")
    return samples, rate_hz


def _check_length(path: Path, file: soundfile.SoundFile) -> None:
    if file.frames >= UNKNOWN_FRAMES:
        raise AudioError(
            f"{path}: its header does not say how long it is, as of a file that was written to a pipe; write it anew: "
            "ffmpeg -i FILE NEW_FILE"
        )


def _check_present(path: Path) -> None:
    if not path.is_file():
        raise AudioError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes)")


def _unreadable(path: Path, error: Exception) -> AudioError:
    return AudioError(f"{path}: not a readable wav, flac, mp3 or ogg file ({error})")

"""Reads and writes recordings."""

import logging  # noqa: F401 - scripts for the published code import it from here
import os
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from cosyvoice.utils.atomic import atomic_path

MIN_SAMPLE_RATE_HZ = 16_000  # below this the S3 tokenizer and the speaker encoder lack half of their spectrum


def load_wav(wav: str | Path | BinaryIO, target_sr: int, min_sr: int = MIN_SAMPLE_RATE_HZ) -> Tensor:
    """Read a recording as one channel at the wanted rate.

    Args:
        wav: a file soundfile can read (wav, flac, ogg, mp3): its path, or an open one, which is read from where it
            stands.
        target_sr: rate wanted, Hz.
        min_sr: lowest rate accepted for a file that has to be resampled, Hz.

    Returns:
        The waveform, [1, N], float32 in -1..1; several channels are averaged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no recording, holds no samples or broken ones, or its rate is below `min_sr`.

    Source: FunAudioLLM/CosyVoice cosyvoice/utils/file_utils.py @ ace7c47, read with soundfile.
    """
    import soundfile
    import torchaudio

    from cosyvoice.utils.audio import resampling_rates

    is_open = hasattr(wav, "read")
    if not hasattr(wav, "read") and not Path(wav).is_file():
        raise FileNotFoundError(f"there is no recording {wav}")
    try:
        samples, sample_rate_hz = soundfile.read(wav if is_open else str(wav), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{wav} cannot be read as a recording: {error}") from error
    waveform = torch.from_numpy(samples).mean(dim=1).unsqueeze(0)
    if waveform.shape[1] == 0 or not torch.isfinite(waveform).all():
        raise ValueError(f"{wav} holds {waveform.shape[1]} samples; wanted at least one, and all of them finite")
    if sample_rate_hz == target_sr:
        return waveform
    if sample_rate_hz < min_sr:
        raise ValueError(f"{wav} has {sample_rate_hz} Hz; prompts need at least {min_sr} Hz")
    return torchaudio.functional.resample(waveform, *resampling_rates(sample_rate_hz, target_sr))


def write_wav(path: str | os.PathLike[str], waveform: Tensor, sample_rate_hz: int) -> None:
    """Write 16-bit mono sound, atomically.

    Args:
        path: the file to write; its folder is made if missing.
        waveform: [N] or [1, N], float; values beyond -1..1 are clipped.
        sample_rate_hz: its rate.

    Raises:
        ValueError: the waveform has more than one channel, or values that are no numbers.
    """
    import soundfile

    samples = waveform.detach().to("cpu", torch.float32)
    if samples.dim() == 2 and samples.shape[0] == 1:
        samples = samples[0]
    if samples.dim() != 1:
        raise ValueError(f"{path}: expected a waveform [N] or [1, N], got {list(waveform.shape)}")
    if not torch.isfinite(samples).all():
        raise ValueError(f"{path}: the waveform holds values that are not finite numbers; nothing is written")
    with atomic_path(path) as temporary:
        soundfile.write(str(temporary), samples.clamp(-1, 1).numpy(), sample_rate_hz, subtype="PCM_16", format="WAV")

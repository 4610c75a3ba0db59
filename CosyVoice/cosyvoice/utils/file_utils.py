"""Reads recordings."""

import logging  # noqa: F401 - scripts for the published code import it from here
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

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
    if not is_open and not Path(wav).is_file():
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

"""The acoustic distance of a sound from its reference, by signal processing at their own rate."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import create_dct

from cosyvoice.dataset.pitch import pitch
from cosyvoice.utils.audio import mel_spectrogram
from cosyvoice.utils.rates import MEL_HOP_SAMPLES, MEL_SAMPLE_RATE_HZ
from taste.listening import SHORTEST_SOUND_SECONDS
from taste.threads import torch_threads_kept

# N samples   F mel frames, 86.13 Hz   M mel bands   C mel cepstra   P steps of an alignment

HOP_SECONDS = MEL_HOP_SAMPLES / MEL_SAMPLE_RATE_HZ  # the model's mel frame, and the one that `pitch` has its costs for
WINDOW_SECONDS = 4 * HOP_SECONDS
MEL_BANDS = 80
HIGHEST_MEL_HZ = 8000.0
CEPSTRA = 24  # of the mel spectrum's shape; the one of its loudness is left out
SILENCE_DB = 60.0  # below the loudest band of the recording: what is softer counts as equal
LEAST_VOICED_FRAMES = 10  # that both sounds must have for a correlation to mean something
LEAST_MELODY_OCTAVES = 0.1 / 12  # standard deviation of F0: a voice that moves less is a monotone to the ear
DB_PER_NEPER = 20 / math.log(10)  # of a natural logarithm of an amplitude


class AcousticMetrics(NamedTuple):
    """One sound against its reference, along the alignment in time that makes their spectra most alike."""

    mcd_db: float  # mel-cepstral distortion: root mean square of the difference of the mel spectra's shapes
    f0_correlation: float | None  # of log F0 where both have a voice; None: hardly ever so, or one is a monotone
    voicing_error: float  # share of the alignment where one has a voice and the other none
    seconds_ratio: float  # length of the sound for each second of the reference


def compare_sounds(reference: Tensor, other: Tensor, rate_hz: int) -> AcousticMetrics:
    """Measure spectrum and melody of a sound against its reference.

    The mel-cepstral distortion is 10 / ln 10 * sqrt(2 * sum of squared differences of cepstra 1..24), which is the root
    mean square, in dB, of the difference of two smoothed mel spectra, whatever their loudness; the cepstra are the
    cosine transform of 80 mel bands, so it compares with values of the same measure only, not with those of others'
    cepstra.

    Args:
        reference: the recording, [N] float, -1..1.
        other: the sound, [N'].
        rate_hz: of both.

    Returns:
        the measures.

    Raises:
        ValueError: one of them is shorter than 50 ms, or is no [N].
    """
    for name, waveform in (("reference", reference), ("other", other)):
        if waveform.dim() != 1 or len(waveform) < SHORTEST_SOUND_SECONDS * rate_hz:
            raise ValueError(
                f"the {name} sound: expected a waveform [N] of {SHORTEST_SOUND_SECONDS:g} s or more, got "
                f"{list(waveform.shape)} at {rate_hz} Hz"
            )
    reference, other = reference.detach().cpu().float(), other.detach().cpu().float()
    ours, theirs = _mel_cepstra(reference, rate_hz), _mel_cepstra(other, rate_hz)
    distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")  # [F, F']
    first, second = _align(distances)
    voiced, other_voiced = (_log_f0(sound, rate_hz) for sound in (reference, other))
    f0, other_f0 = voiced[first], other_voiced[second]
    return AcousticMetrics(
        mcd_db=float(distances[first, second].mean()),
        f0_correlation=_correlation(f0, other_f0),
        voicing_error=float(np.mean(np.isnan(f0) != np.isnan(other_f0))),
        seconds_ratio=len(other) / len(reference),
    )


def shapes_db(mel: Tensor) -> Tensor:
    """Describe the shape of each frame of a mel spectrum, so that a distance of two frames is in dB.

    Args:
        mel: natural logarithm of amplitudes, [M, F].

    Returns:
        mel cepstra 1..24, [F, C]; their Euclidean distance is the root mean square of the difference in dB of the two
        spectra, each without its mean and what changes faster than the cepstra follow.
    """
    cepstra = mel.T @ create_dct(CEPSTRA + 1, mel.shape[0], norm="ortho")
    return cepstra[:, 1:] * (DB_PER_NEPER / math.sqrt(mel.shape[0]))


def _mel_cepstra(waveform: Tensor, rate_hz: int) -> Tensor:
    """Mel cepstra 1..24, [F, C], scaled so that a distance of two frames is in dB."""
    hop, window = round(HOP_SECONDS * rate_hz), 2 * round(WINDOW_SECONDS * rate_hz / 2)
    highest_hz = min(HIGHEST_MEL_HZ, rate_hz / 2)
    mel = mel_spectrogram(waveform[None], window, MEL_BANDS, rate_hz, hop, window, 0.0, highest_hz)[0]  # [M, F]
    return shapes_db(mel.clamp(min=float(mel.max()) - SILENCE_DB / DB_PER_NEPER))


def _align(distances: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Dynamic time warping: the frames [P] of both that belong together, neither ever going back."""
    from whisper.timing import dtw_cpu

    with torch_threads_kept():
        first, second = dtw_cpu(distances.double().numpy()).copy()  # torch takes no reversed arrays
    return first, second


def _log_f0(waveform: Tensor, rate_hz: int) -> np.ndarray:
    """F0 in octaves, [F], no number where there is no voice."""
    f0 = pitch(waveform, rate_hz, round(HOP_SECONDS * rate_hz)).double()
    return torch.where(f0 > 0, f0.log2(), torch.nan).numpy()


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    both = ~np.isnan(first) & ~np.isnan(second)
    if both.sum() < LEAST_VOICED_FRAMES or min(first[both].std(), second[both].std()) < LEAST_MELODY_OCTAVES:
        return None
    return float(np.corrcoef(first[both], second[both])[0, 1])

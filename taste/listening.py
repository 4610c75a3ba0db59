"""What everything that listens to a sound begins with."""

import importlib
from types import ModuleType

import torchaudio.functional
from torch import Tensor

from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ

# N samples
SHORTEST_SOUND_SECONDS = 0.05  # of a sound to be compared
SHORTEST_SPEECH_SECONDS = 0.1  # of sound that a recogniser is given: less holds no word


class ListenerMissingError(ImportError):
    """A package that listens is not installed; the message says how to get it."""


def import_listener(name: str, install: str) -> ModuleType:
    """Import a package that listens.

    Args:
        name: of the module.
        install: the command that gets it.

    Returns:
        the module.

    Raises:
        ListenerMissingError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ListenerMissingError(
            f"measuring needs the package {name} ({error}); install it with: {install}"
        ) from error


def resampled(waveform: Tensor, rate_hz: int) -> Tensor:
    """Bring a waveform to the rate that recognisers and speaker encoders hear.

    Args:
        waveform: [N] float.
        rate_hz: its rate.

    Returns:
        [N'] float32 at 16 kHz, on the CPU.
    """
    waveform = waveform.detach().to("cpu").float()
    if rate_hz == SPEECH_SAMPLE_RATE_HZ:
        return waveform
    return torchaudio.functional.resample(waveform, rate_hz, SPEECH_SAMPLE_RATE_HZ)


def speech_samples(waveform: Tensor, rate_hz: int) -> Tensor:
    """Bring a waveform to the rate of recognisers, if it is long enough to hold a word.

    Args:
        waveform: [N] float.
        rate_hz: its rate.

    Returns:
        [N'] float32 at 16 kHz, on the CPU; no samples at all where the sound is shorter than 0.1 s.
    """
    samples = resampled(waveform, rate_hz)
    return samples if len(samples) >= SHORTEST_SPEECH_SECONDS * SPEECH_SAMPLE_RATE_HZ else samples[:0]

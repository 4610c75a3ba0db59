"""Two judges of speech that are not ours: pocketsphinx writes down what it hears, Resemblyzer compares voices.

Both bring their own weights in their wheels. They are for the makers of the model only: see `requirements.txt` here.
"""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import torch

from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ
from taste.audio import read_audio
from taste.listening import import_listener
from taste.pocketsphinx_recogniser import Pocketsphinx

INSTALL = "pip install -r CosyVoice/examples/tiny/requirements.txt && pip install --no-deps Resemblyzer==0.1.4"


def open_recogniser() -> Pocketsphinx:
    """Open pocketsphinx with its own English model.

    Raises:
        ListenerMissingError: it is not installed.
    """
    return Pocketsphinx(INSTALL)


_RECOGNISERS: list[Pocketsphinx] = []  # of a worker process: the one it has


def start_worker() -> None:
    """Prepare a process that only recognises; Ctrl-C is for the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _RECOGNISERS.append(open_recogniser())


def hear_in_worker(path: str) -> str:
    """Write down one recording in a process that `start_worker` has prepared.

    Args:
        path: an audio file.

    Returns:
        the words; may be none.

    Raises:
        AudioError: the file cannot be read.
    """
    words = _RECOGNISERS[0].words(read_audio(path, SPEECH_SAMPLE_RATE_HZ).waveform, SPEECH_SAMPLE_RATE_HZ)
    return " ".join(word.text for word in words)


class VoiceJudge:
    """Resemblyzer's speaker encoder, on the CPU.

    Raises:
        ListenerMissingError: it is not installed.
    """

    def __init__(self) -> None:
        self._resemblyzer = import_listener("resemblyzer", INSTALL)
        self._encoder: Any = self._resemblyzer.VoiceEncoder("cpu", verbose=False)

    def embed(self, path: str) -> np.ndarray | None:
        """Give the voice of a recording as a vector.

        Args:
            path: an audio file.

        Returns:
            [256], float32, of length 1; None where there is no speech in it.

        Raises:
            AudioError: the file cannot be read.
        """
        waveform = read_audio(path, SPEECH_SAMPLE_RATE_HZ).waveform.numpy()
        if not np.abs(waveform).max() > 0:
            return None
        speech = self._resemblyzer.preprocess_wav(waveform, source_sr=SPEECH_SAMPLE_RATE_HZ)
        return self._encoder.embed_utterance(speech) if len(speech) else None


def similarity(first: np.ndarray | None, second: np.ndarray | None) -> float:
    """Say how alike two voices are.

    Args:
        first: as `VoiceJudge.embed` gives it.
        second: likewise.

    Returns:
        the cosine; 0 where one of them does not speak.
    """
    return float(first @ second) if first is not None and second is not None else 0.0

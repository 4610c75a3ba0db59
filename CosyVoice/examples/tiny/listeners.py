"""Two judges of speech that are not ours: pocketsphinx writes down what it hears, Resemblyzer compares voices.

Both bring their own weights in their wheels. They are for the makers of the model only: see `requirements.txt` here.
"""

from __future__ import annotations

import importlib
import re
import signal
from types import ModuleType
from typing import Any

import numpy as np
import torch

from taste.audio import read_audio

RECOGNISER_RATE_HZ = 16_000
INSTALL = "pip install -r CosyVoice/examples/tiny/requirements.txt && pip install --no-deps Resemblyzer==0.1.4"
SPELLINGS = {"grey": "gray", "harbour": "harbor", "colours": "colors", "mr": "mister", "mrs": "missus"}


class ListenerMissingError(ImportError):
    """A package for measuring is not installed; the message says how to get it."""


def normalise(text: str) -> str:
    """Reduce a text to what can be heard, for counting wrong words.

    Args:
        text: a transcript, or what a recogniser wrote.

    Returns:
        words of small letters and apostrophes, in one spelling, with a blank between two.
    """
    text = re.sub(r"\(\d+\)", "", text.lower().replace("’", "'"))  # a recogniser's mark for a second pronunciation
    words = (word.strip("'") for word in re.sub(r"[^a-z' ]+", " ", text).split())
    return " ".join(SPELLINGS.get(word, word) for word in words if word)


class Recogniser:
    """Pocketsphinx with its own English model.

    Raises:
        ListenerMissingError: it is not installed.
    """

    def __init__(self) -> None:
        self._decoder = _import("pocketsphinx").Decoder(samprate=RECOGNISER_RATE_HZ, loglevel="FATAL")

    def hear(self, path: str) -> str:
        """Write down one recording; what was heard before has no influence.

        Args:
            path: an audio file.

        Returns:
            the words; may be none.

        Raises:
            AudioError: the file cannot be read.
        """
        waveform = read_audio(path, RECOGNISER_RATE_HZ).waveform.clamp(-1, 1)
        samples = (waveform * 32767).round().short().numpy()
        self._decoder.reinit_feat()  # else its estimate of the noise goes from one recording to the next
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
        self._decoder.end_utt()
        heard = self._decoder.hyp()
        return heard.hypstr if heard else ""


_RECOGNISERS: list[Recogniser] = []  # of a worker process: the one it has


def start_worker() -> None:
    """Prepare a process that only recognises; Ctrl-C is for the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _RECOGNISERS.append(Recogniser())


def hear_in_worker(path: str) -> str:
    """Write down one recording, as `Recogniser.hear`, in a process that `start_worker` has prepared."""
    return _RECOGNISERS[0].hear(path)


class VoiceJudge:
    """Resemblyzer's speaker encoder, on the CPU.

    Raises:
        ListenerMissingError: it is not installed.
    """

    def __init__(self) -> None:
        self._resemblyzer = _import("resemblyzer")
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
        waveform = read_audio(path, RECOGNISER_RATE_HZ).waveform.numpy()
        if not np.abs(waveform).max() > 0:
            return None
        speech = self._resemblyzer.preprocess_wav(waveform, source_sr=RECOGNISER_RATE_HZ)
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


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ListenerMissingError(
            f"measuring needs the package {name} ({error}); install it with: {INSTALL}"
        ) from error

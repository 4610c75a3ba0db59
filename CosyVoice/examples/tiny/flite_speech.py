"""One sentence read aloud by Debian's flite, at a pitch and a rate of our choice.

Rate is flite's `duration_stretch`. Pitch is moved by resampling, and flite is asked for speech that is slower or faster
by the same factor: the `rms` voice ignores flite's `int_f0_target_mean`. Where words have rates of their own, or pauses
behind them, flite reads the sentence as SSML. The samples depend on the reading and flite's version only.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import soundfile
import torch
import torchaudio.functional

VOICES = ("kal16", "awb", "rms", "slt")  # flite's 16 kHz voices
SAMPLE_RATE_HZ = 16_000
PITCH_STEP_HZ = 160  # pitch factors are multiples of 160 / 16000 = 0.01, so that resampling is a small ratio
EDGE_SILENCE_SECONDS = 0.08  # what is left of flite's silence before and after the speech
SILENCE_THRESHOLD = 0.01  # relative to the peak
WORD_RATES = (0.6, 1.6)  # of a word read lively, relative to the utterance's rate
PAUSE_SHARE = 0.12  # of the words read lively that a pause follows


class Reading(NamedTuple):
    """One sentence and how it is read."""

    split: str  # of the corpus, such as "train"
    utt_id: str
    voice: str
    text: str
    rate: float  # speaking rate, 1 = the voice's own
    pitch: float  # factor on the voice's own pitch
    peak: float  # absolute peak of the finished waveform
    word_rates: tuple[float, ...] = ()  # of each word, relative to rate; empty: 1 for all
    pauses: tuple[int, ...] = ()  # numbers of the words that a pause follows


class Speech(NamedTuple):
    """A sentence read aloud."""

    waveform: np.ndarray  # [N], float32, 16 kHz, mono
    phones: tuple[tuple[str, float], ...]  # flite's phones and pauses, and where each ends, in seconds of the waveform


def pitch_on_grid(pitch: float) -> float:
    """Round a pitch factor to a multiple of 0.01.

    Args:
        pitch: factor on the voice's own pitch.

    Returns:
        the nearest factor whose resampling is a small ratio.
    """
    return round(pitch * SAMPLE_RATE_HZ / PITCH_STEP_HZ) * PITCH_STEP_HZ / SAMPLE_RATE_HZ


def read_lively(reading: Reading, draw: random.Random) -> Reading:
    """Give each word a rate of its own, and put pauses behind some, as people do and flite does not.

    Flite reads a sentence by one voice always alike, so that a recording would tell nothing that its text does not.

    Args:
        reading: of a sentence.
        draw: what rates and pauses are drawn with.

    Returns:
        the same reading with `word_rates`, spread evenly over the logarithm of WORD_RATES, and `pauses`.
    """
    count = len(reading.text.split())
    slowest, fastest = WORD_RATES
    rates = tuple(round(slowest * (fastest / slowest) ** draw.random(), 2) for _ in range(count))
    pauses = tuple(number for number in range(count - 1) if draw.random() < PAUSE_SHARE)
    return reading._replace(word_rates=rates, pauses=pauses)


def find_flite() -> str:
    """Return flite's path, checking that it has the four voices.

    Raises:
        FileNotFoundError: flite is not installed, or lacks a voice.
    """
    flite = shutil.which("flite")
    install = "install it with: apt-get update && apt-get install -y flite"
    if flite is None:
        raise FileNotFoundError(f"flite is not on PATH; {install}")
    listing = subprocess.run([flite, "-lv"], capture_output=True, text=True, check=True).stdout
    missing = [voice for voice in VOICES if voice not in listing.split()]
    if missing:
        raise FileNotFoundError(f"{flite} has no voice {', '.join(missing)} (it lists: {listing.strip()}); {install}")
    return flite


def synthesise(reading: Reading, flite: str) -> Speech:
    """Read one sentence.

    Args:
        reading: what to read, and how.
        flite: path of the flite program.

    Returns:
        the waveform, with the reading's peak and 0.08 s of silence at either end at most, and its phones.
    """
    with tempfile.TemporaryDirectory() as folder:
        wav_path = Path(folder) / "speech.wav"
        # Playing speech `pitch` times faster raises its pitch; asking for speech that much slower undoes the rate.
        stretch = reading.pitch / reading.rate
        command = [flite, "-voice", reading.voice, "--setf", f"duration_stretch={stretch:.6f}", "-psdur"]
        command += ["-ssml"] if reading.word_rates else []
        command += ["-t", _as_ssml(reading) if reading.word_rates else reading.text, "-o", str(wav_path)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        speech, sample_rate_hz = soundfile.read(wav_path, dtype="float32")
    played_at_hz = round(sample_rate_hz * reading.pitch)
    shifted = torchaudio.functional.resample(torch.from_numpy(speech), played_at_hz, SAMPLE_RATE_HZ).numpy()

    loud = np.flatnonzero(np.abs(shifted) > SILENCE_THRESHOLD * np.abs(shifted).max())
    edge = round(EDGE_SILENCE_SECONDS * SAMPLE_RATE_HZ)
    first, last = max(0, loud[0] - edge), loud[-1] + edge
    trimmed = shifted[first:last]
    waveform = trimmed * (reading.peak / np.abs(trimmed).max())

    seconds = len(waveform) / SAMPLE_RATE_HZ
    phones = []
    for item in printed.split():  # as in dh:0.251, where the phone ends in flite's own recording
        phone, _, end = item.partition(":")
        phones.append((phone, min(max(0.0, float(end) / reading.pitch - first / SAMPLE_RATE_HZ), seconds)))
    return Speech(waveform, tuple(phones))


def _as_ssml(reading: Reading) -> str:
    """The sentence with the rates of its words and its pauses; any break is a pause to flite."""
    said = []
    for number, (word, rate) in enumerate(zip(reading.text.split(), reading.word_rates, strict=True)):
        said.append(f'<prosody rate="{rate:.2f}">{escape(word)}</prosody>')
        said += ['<break strength="medium"/>'] if number in reading.pauses else []
    return f"<speak>{' '.join(said)}</speak>"

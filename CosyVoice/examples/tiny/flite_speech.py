"""One sentence read aloud by Debian's flite, at a pitch and a rate of our choice.

Rate is flite's `duration_stretch`. Pitch is moved by resampling, and flite is asked for speech that is slower or faster
by the same factor: the `rms` voice ignores flite's `int_f0_target_mean`. Where words have rates or vowels of their own,
or pauses behind them, flite reads the sentence as SSML. The samples depend on the reading and flite's version only.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import soundfile
import torch
import torchaudio.functional
from word_times import bare, pronounce_texts

VOICES = ("kal16", "awb", "rms", "slt")  # flite's 16 kHz voices
SAMPLE_RATE_HZ = 16_000
PITCH_STEP_HZ = 160  # pitch factors are multiples of 160 / 16000 = 0.01, so that resampling is a small ratio
EDGE_SILENCE_SECONDS = 0.08  # what is left of flite's silence before and after the speech
SILENCE_THRESHOLD = 0.01  # relative to the peak
WORD_RATES = (0.6, 1.6)  # of a word read lively, relative to the utterance's rate
PAUSE_SHARE = 0.12  # of the words read lively that a pause follows
VOWEL_SHARE = 0.5  # of the vowels read lively that are said as one near them, as people from elsewhere do
NEAR_VOWELS = {  # of flite's US English ones without its schwa: each with those that tongue and lips reach next
    "aa": ("ao", "ah", "ae"),
    "ae": ("eh", "aa", "ey"),
    "ah": ("aa", "uh", "eh"),
    "ao": ("aa", "ow", "uh"),
    "aw": ("ow", "aa", "ao"),
    "ay": ("aa", "ey", "oy"),
    "eh": ("ih", "ae", "ey"),
    "er": ("ah", "ao", "uh"),
    "ey": ("eh", "ay", "iy"),
    "ih": ("iy", "eh", "uh"),
    "iy": ("ih", "ey", "eh"),
    "ow": ("ao", "uh", "aw"),
    "oy": ("ay", "ao", "ow"),
    "uh": ("uw", "ah", "ow"),
    "uw": ("uh", "ow", "iy"),
}


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
    said: tuple[str, ...] = ()  # phones of each word, as in "b eh d"; none, or an empty one: flite's own


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


def enliven(readings: Sequence[Reading], draw: random.Random, flite: str) -> list[Reading]:
    """Have sentences read lively, as people do and flite does not.

    Flite reads a sentence by one voice always alike, so that a recording would tell nothing that its text does not.

    Args:
        readings: of the sentences.
        draw: what rates, pauses and vowels are drawn with.
        flite: path of the flite program, which is asked for the phones of their words.

    Returns:
        the readings, each as `read_lively` makes it.
    """
    lexicon = pronounce_texts((reading.text for reading in readings), flite)
    return [read_lively(reading, draw, lexicon) for reading in readings]


def read_lively(reading: Reading, draw: random.Random, lexicon: Mapping[str, Sequence[str]]) -> Reading:
    """Give each word a rate and vowels of its own, and put pauses behind some.

    Args:
        reading: of a sentence.
        draw: what rates, pauses and vowels are drawn with.
        lexicon: phones of each word, by `bare` text; those of words that it lacks stay as they are.

    Returns:
        the same reading with `word_rates`, spread evenly over the logarithm of WORD_RATES, `pauses`, and `said`, in
        which a VOWEL_SHARE of the vowels are others, see NEAR_VOWELS.
    """
    words = reading.text.split()
    slowest, fastest = WORD_RATES
    rates = tuple(round(slowest * (fastest / slowest) ** draw.random(), 2) for _ in words)
    pauses = tuple(number for number in range(len(words) - 1) if draw.random() < PAUSE_SHARE)
    said = tuple(_with_other_vowels(lexicon.get(bare(word), ()), draw) for word in words)
    return reading._replace(word_rates=rates, pauses=pauses, said=said)


def _with_other_vowels(phones: Sequence[str], draw: random.Random) -> str:
    """The phones as they are said; '' where nothing changed, so that flite keeps to its own way."""
    said = [
        draw.choice(NEAR_VOWELS[phone]) if phone in NEAR_VOWELS and draw.random() < VOWEL_SHARE else phone
        for phone in phones
    ]
    return " ".join(said) if said != list(phones) else ""


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
    """The sentence with the rates and phones of its words and its pauses; any break is a pause to flite."""
    words = reading.text.split()
    said = []
    for number, (word, rate, phones) in enumerate(
        zip(words, reading.word_rates, reading.said or [""] * len(words), strict=True)
    ):
        spoken = f'<phoneme ph="{phones}">{escape(word)}</phoneme>' if phones else escape(word)
        said.append(f'<prosody rate="{rate:.2f}">{spoken}</prosody>')
        said += ['<break strength="medium"/>'] if number in reading.pauses else []
    return f"<speak>{' '.join(said)}</speak>"

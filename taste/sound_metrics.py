"""How close a decoded sound comes to the recording: words, voice, spectrum, melody and the durations of words.

The words are judged by `taste.asr`, the voice by the model folder's campplus.onnx, how natural it is by
`taste.naturalness`, the rest by signal processing at the sound's own rate, on the CPU.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import create_dct

from cosyvoice.dataset.pitch import pitch
from cosyvoice.utils.audio import mel_spectrogram
from cosyvoice.utils.model_dir import SPEAKER_MODEL_FILE
from cosyvoice.utils.stops import leave_if_asked
from taste.asr import RECOGNISER_RATE_HZ, Found, Recogniser, Word, find_recogniser, normalise, resampled
from taste.naturalness import find_utmos
from taste.progress_bar import progress_bar
from taste.speaker import SpeakerEncoder
from taste.threads import torch_threads_kept

# N samples   F mel frames, 86.13 Hz   M mel bands   C mel cepstra   P steps of an alignment   W words

HOP_SECONDS = 256 / 22_050  # the model's mel frame, and the one that `pitch` has its costs for
WINDOW_SECONDS = 1024 / 22_050
MEL_BANDS = 80
HIGHEST_MEL_HZ = 8000.0
CEPSTRA = 24  # of the mel spectrum's shape; the one of its loudness is left out
SILENCE_DB = 60.0  # below the loudest band of the recording: what is softer counts as equal
LEAST_SECONDS = 0.05  # of a sound to be compared
LEAST_VOICED_FRAMES = 10  # that both sounds must have for a correlation to mean something
LEAST_MELODY_OCTAVES = 0.1 / 12  # standard deviation of F0: a voice that moves less is a monotone to the ear
DURATION_TOLERANCE_S = 0.05  # within which a word's duration is kept
DURATION_WINDOW_S = 0.025  # below which it is kept in the published evaluation of TASTE (tools/.local there, @ 301bce2)
ROUNDING_S = 1e-6  # that must not push a difference over an edge: times are multiples of 10 or 20 ms
DB_PER_NEPER = 20 / math.log(10)  # of a natural logarithm of an amplitude


class SoundMetrics(NamedTuple):
    """One sound against its reference, along the alignment in time that makes their spectra most alike."""

    mcd_db: float  # mel-cepstral distortion: root mean square of the difference of the mel spectra's shapes
    f0_correlation: (
        float | None
    )  # of log F0 where both have a voice; None where that is hardly ever, or one is a monotone
    voicing_error: float  # share of the alignment where one has a voice and the other none
    seconds_ratio: float  # length of the sound for each second of the reference


class DurationMetrics(NamedTuple):
    """Durations of the words that two recordings have in common."""

    words: int  # compared
    consistent: int  # of these, whose durations differ by the tolerance at most
    inside_window: int  # of these, whose durations differ by less than DURATION_WINDOW_S
    difference_s: float  # sum of the absolute differences
    reference_s: float  # sum of the durations in the reference


@dataclass(frozen=True)
class UtteranceSounds:
    """What there is to hear of a test utterance."""

    utt_id: str
    text: str
    original: Tensor | None  # [N] float, -1..1; None where the recording is gone
    sounds: Mapping[str, Tensor]  # name of the system -> [N]; one that made no sound is left out
    language: str = "en"


@dataclass(frozen=True)
class SoundEvaluation:
    """A table of systems and measures, and what could not be measured."""

    measures: dict[str, dict[str, float | None]]  # system -> measure -> value; None: not measured, `skipped` says why
    skipped: dict[str, str] = field(default_factory=dict)  # measure -> reason
    notes: tuple[str, ...] = ()  # who listened, how words were timed

    def to_dict(self) -> dict[str, Any]:
        """The parts by name, for JSON."""
        return {"measures": self.measures, "skipped": self.skipped, "notes": list(self.notes)}


def compare_sounds(reference: Tensor, other: Tensor, rate_hz: int) -> SoundMetrics:
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
        if waveform.dim() != 1 or len(waveform) < LEAST_SECONDS * rate_hz:
            raise ValueError(
                f"the {name} sound: expected a waveform [N] of {LEAST_SECONDS:g} s or more, got "
                f"{list(waveform.shape)} at {rate_hz} Hz"
            )
    reference, other = reference.detach().cpu().float(), other.detach().cpu().float()
    ours, theirs = _mel_cepstra(reference, rate_hz), _mel_cepstra(other, rate_hz)
    distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")  # [F, F']
    first, second = _align(distances)
    voiced, other_voiced = (_log_f0(sound, rate_hz) for sound in (reference, other))
    f0, other_f0 = voiced[first], other_voiced[second]
    return SoundMetrics(
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


def speaker_similarity(encoder: SpeakerEncoder, first: Tensor, second: Tensor, rate_hz: int) -> float:
    """Say how alike two voices are.

    Args:
        encoder: of the model folder.
        first: [N] float, -1..1.
        second: [N'].
        rate_hz: of both.

    Returns:
        the cosine of the speaker vectors; 0 where one of the sounds is too short to have one, or is silent.
    """
    vectors = []
    for waveform in (first, second):
        samples = resampled(waveform, rate_hz)
        if len(samples) < LEAST_SECONDS * RECOGNISER_RATE_HZ or not samples.abs().max() > 0:
            return 0.0
        vectors.append(encoder.embed(samples))
    return float(torch.cosine_similarity(vectors[0], vectors[1], dim=0))


def word_error(
    references: Sequence[str], heard: Sequence[str], languages: Sequence[str | None] | None = None
) -> float | None:
    """Count wrong words over a set of utterances.

    English is brought into one spelling as published word errors are: `twenty five` is `25`, `colour` is `color`,
    `it's` is `it is`, and `um` is nothing.

    Args:
        references: what was said.
        heard: what a recogniser wrote.
        languages: of each utterance, as `en`; None: not noted, so nothing is done that English alone allows.

    Returns:
        substitutions, deletions and insertions for each word said; None where no word was said.
    """
    import jiwer

    languages = [None] * len(references) if languages is None else languages
    pairs = [
        (_in_one_spelling(said, language), _in_one_spelling(wrote, language))
        for said, wrote, language in zip(references, heard, languages, strict=True)
    ]
    pairs = [(said, wrote) for said, wrote in pairs if said]
    return jiwer.wer([said for said, _ in pairs], [wrote for _, wrote in pairs]) if pairs else None


def compare_durations(
    reference: Sequence[Word], other: Sequence[Word], tolerance_s: float = DURATION_TOLERANCE_S
) -> DurationMetrics:
    """Compare how long each word lasts, where the words agree.

    Args:
        reference: the words of the recording in order.
        other: those of another sound of the same text.
        tolerance_s: how much a duration may differ and still count as kept.

    Returns:
        counts and sums; of no words where none agree.
    """
    durations = [
        (reference[i].end_s - reference[i].start_s, other[j].end_s - other[j].start_s)
        for i, j in _agreeing([word.text for word in reference], [word.text for word in other])
    ]
    differences = [abs(theirs - ours) for ours, theirs in durations]
    return DurationMetrics(
        words=len(durations),
        consistent=sum(difference <= tolerance_s + ROUNDING_S for difference in differences),
        inside_window=sum(difference < DURATION_WINDOW_S - ROUNDING_S for difference in differences),
        difference_s=sum(differences),
        reference_s=sum(ours for ours, _ in durations),
    )


def evaluate_sounds(
    rows: Sequence[UtteranceSounds],
    rate_hz: int,
    model_dir: str | Path,
    found: Found | None = None,
    device: str = "cpu",
    stop_requested: Callable[[], bool] = lambda: False,
) -> SoundEvaluation:
    """Measure every system's sounds against the recordings.

    A system that made no sound of an utterance misses all its words there and is compared in nothing else. Word error
    is over all words of the set, durations over all words compared, the other measures are means over utterances. The
    recordings themselves are the system `original`, which has a word error and a naturalness only, and as all systems
    the number of utterances with a sound long enough to be compared. Durations are compared of words that the
    recogniser hears in both sounds; where it can look for the transcript, it times them by that.

    Args:
        rows: the utterances.
        rate_hz: of all sounds.
        model_dir: model folder, whose speaker encoder (and Whisper, where it is whole, and UTMOS) judge.
        found: who listens; None looks for one.
        device: where Whisper, if it is the one, and UTMOS compute.
        stop_requested: asked before each utterance.

    Returns:
        the table; empty without utterances.

    Raises:
        RunStopped: it was asked to stop.
    """
    if not rows:
        return SoundEvaluation({})
    found = found or find_recogniser(model_dir, device)
    names = list(dict.fromkeys(name for row in rows for name in row.sounds))
    skipped: dict[str, str] = {}
    encoder = _speaker_encoder(Path(model_dir), skipped)
    utmos, reason = find_utmos(model_dir, device)
    if reason:
        skipped["utmos"] = reason
    results = {name: _Collected() for name in ("original", *names)}
    notes = []
    if found.recogniser:
        notes += _listen(found.recogniser, _each(rows, "listening", stop_requested), names, rate_hz, results)
    else:
        skipped |= dict.fromkeys((*_Collected.HEARD, *_Collected.TIMED), found.reason)
    least_samples = LEAST_SECONDS * rate_hz
    for row in _each(rows, "comparing sounds", stop_requested):
        sounds = row.sounds if row.original is None else {"original": row.original, **row.sounds}
        for name, sound in sounds.items():
            if len(sound) < least_samples:
                continue
            results[name].with_sound += 1
            if utmos:
                results[name].opinions.append(utmos.score(sound, rate_hz))
            if row.original is not None and name != "original":
                _compare(row.original, sound, rate_hz, encoder, results[name])
    measures = {name: collected.measures(name == "original") for name, collected in results.items()}
    if any(row.original is not None for row in rows) and all(
        measures[name]["f0_correlation"] is None for name in names
    ):
        skipped["f0_correlation"] = "none: no system has a voice that moves"
    return SoundEvaluation(measures, skipped, tuple(notes))


@dataclass
class _Collected:
    """What was found out about a system, utterance by utterance."""

    HEARD = ("word_error",)
    TIMED = (
        *("duration_consistency", "duration_consistency_25_ms"),
        *("word_duration_error_ms", "word_duration_error_relative"),
    )

    with_sound: int = 0  # utterances
    said: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)  # of what was said
    durations: list[DurationMetrics] = field(default_factory=list)
    sounds: list[SoundMetrics] = field(default_factory=list)
    voices: list[float] = field(default_factory=list)
    opinions: list[float] = field(default_factory=list)

    def measures(self, of_recordings: bool) -> dict[str, float | None]:
        """The measures by name."""
        measures: dict[str, float | None] = {
            "utterances_with_sound": self.with_sound,
            "word_error": word_error(self.said, self.heard, self.languages),
        }
        if self.opinions:
            measures["utmos"] = _mean(self.opinions)
        if of_recordings:
            return measures
        words = sum(own.words for own in self.durations)
        difference_s = sum(own.difference_s for own in self.durations)
        reference_s = sum(own.reference_s for own in self.durations)
        return measures | {
            "speaker_similarity": _mean(self.voices),
            "mcd_db": _mean([own.mcd_db for own in self.sounds]),
            "f0_correlation": _mean([own.f0_correlation for own in self.sounds if own.f0_correlation is not None]),
            "voicing_error": _mean([own.voicing_error for own in self.sounds]),
            "seconds_ratio": _mean([own.seconds_ratio for own in self.sounds]),
            "duration_consistency": sum(own.consistent for own in self.durations) / words if words else None,
            "duration_consistency_25_ms": sum(own.inside_window for own in self.durations) / words if words else None,
            "word_duration_error_ms": 1000 * difference_s / words if words else None,
            "word_duration_error_relative": difference_s / reference_s if reference_s else None,
            "words_compared": words,
        }


def _each(
    rows: Sequence[UtteranceSounds], description: str, stop_requested: Callable[[], bool]
) -> Iterator[UtteranceSounds]:
    for row in progress_bar(rows, description, "utterances"):
        leave_if_asked(stop_requested, "stopped while listening; what was trained is saved")
        yield row


def _listen(
    recogniser: Recogniser,
    rows: Iterable[UtteranceSounds],
    names: Sequence[str],
    rate_hz: int,
    results: Mapping[str, _Collected],
) -> list[str]:
    """Have everything written down and timed; give what a reader of the table should know about it."""
    understood = count = aligned = compared = 0
    for row in rows:
        count += 1
        if not recogniser.hears(row.language):
            continue
        understood += 1
        sounds = {name: row.sounds.get(name) for name in names}
        if row.original is not None:
            sounds["original"] = row.original
        heard = {
            name: [] if sound is None else recogniser.words(sound, rate_hz, row.language)
            for name, sound in sounds.items()
        }
        for name, words in heard.items():
            results[name].said.append(row.text)
            results[name].heard.append(" ".join(word.text for word in words))
            results[name].languages.append(row.language)
        if row.original is None:
            continue
        expected = recogniser.align(row.original, rate_hz, row.text)
        for name in row.sounds:
            there = recogniser.align(row.sounds[name], rate_hz, row.text) if expected else None
            pair = heard["original"], heard[name]
            if expected and there:  # an alignment has every word of the transcript, whatever was said
                said = _understood(expected, heard["original"]) & _understood(there, heard[name])
                pair = [expected[place] for place in sorted(said)], [there[place] for place in sorted(said)]
            results[name].durations.append(compare_durations(*pair))
            aligned, compared = aligned + bool(there), compared + 1
    notes = [f"words written down by {recogniser.name}: {understood} of {count} utterances"]
    if compared:
        notes.append(
            f"words timed by looking for the transcript in {aligned} of {compared} sounds, else by what was heard; "
            "compared where they were heard in the recording and in the sound"
        )
    return notes


def _in_one_spelling(text: str, language: str | None) -> str:
    """A text reduced to what can be heard, whichever way its words and numbers are spelled."""
    if language != "en":
        return normalise(text)
    # what was heard has been normalised before, with no sign of a currency: those that numbers bring along go again
    return normalise(_english_normaliser()(normalise(text)))


@cache
def _english_normaliser() -> Callable[[str], str]:
    from whisper.normalizers import EnglishTextNormalizer

    return EnglishTextNormalizer()


def _understood(transcript: Sequence[Word], heard: Sequence[Word]) -> set[int]:
    """Places of the transcript's words that were heard."""
    return {place for place, _ in _agreeing([word.text for word in transcript], [word.text for word in heard])}


def _compare(
    original: Tensor, sound: Tensor, rate_hz: int, encoder: SpeakerEncoder | None, collected: _Collected
) -> None:
    collected.sounds.append(compare_sounds(original, sound, rate_hz))
    if encoder:
        collected.voices.append(speaker_similarity(encoder, original, sound, rate_hz))


def _speaker_encoder(model_dir: Path, skipped: dict[str, str]) -> SpeakerEncoder | None:
    path = model_dir / SPEAKER_MODEL_FILE
    if path.is_file():
        return SpeakerEncoder(path)
    skipped["speaker_similarity"] = f"skipped: needs {path}"
    return None


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


def _agreeing(reference: Sequence[str], other: Sequence[str]) -> list[tuple[int, int]]:
    """Places of the words that a best alignment of two rows of words finds equal."""
    import jiwer

    if not reference or not other:
        return []
    numbers = {word: str(number) for number, word in enumerate({*reference, *other})}  # jiwer divides at blanks
    ours, theirs = (" ".join(numbers[word] for word in row) for row in (reference, other))
    pieces = jiwer.process_words(ours, theirs).alignments[0]
    return [
        pair
        for piece in pieces
        if piece.type == "equal"
        for pair in zip(
            range(piece.ref_start_idx, piece.ref_end_idx), range(piece.hyp_start_idx, piece.hyp_end_idx), strict=True
        )
    ]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None

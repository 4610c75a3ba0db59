"""The table of how close each system's sounds come to the recordings.

Words are judged by the recogniser that `taste.asr` finds, the voice by the model folder's campplus.onnx, how natural it
is by `taste.naturalness`, the rest by signal processing on the CPU.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from cosyvoice.utils.model_dir import SPEAKER_MODEL_FILE
from cosyvoice.utils.stops import leave_if_asked
from taste.acoustic_metrics import AcousticMetrics, compare_sounds
from taste.asr import Found, Recogniser, find_recogniser
from taste.listening import SHORTEST_SOUND_SECONDS
from taste.naturalness import Utmos, find_utmos
from taste.progress_bar import progress_bar
from taste.speaker import SpeakerEncoder
from taste.speaker_similarity import speaker_similarity
from taste.word_durations import DurationMetrics, agreeing_words, compare_durations
from taste.word_error_rate import word_error_rate
from taste.word_timing import Word

# N samples
HEARD_MEASURES = (  # that take a recogniser
    "word_error",
    "duration_consistency",
    "duration_consistency_25_ms",
    "word_duration_error_ms",
    "word_duration_error_relative",
)


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
    speaker_model = Path(model_dir) / SPEAKER_MODEL_FILE
    encoder = SpeakerEncoder(speaker_model) if speaker_model.is_file() else None
    if not encoder:
        skipped["speaker_similarity"] = f"skipped: needs {speaker_model}"
    utmos, reason = find_utmos(model_dir, device)
    if reason:
        skipped["utmos"] = reason
    results = {name: _Collected() for name in ("original", *names)}
    notes: list[str] = []
    if found.recogniser:
        notes = _listen(found.recogniser, _each(rows, "listening", stop_requested), names, rate_hz, results)
    else:
        skipped |= dict.fromkeys(HEARD_MEASURES, found.reason)
    _compare(_each(rows, "comparing sounds", stop_requested), rate_hz, encoder, utmos, results)
    measures = {name: collected.measures(name == "original") for name, collected in results.items()}
    has_recordings = any(row.original is not None for row in rows)
    if has_recordings and all(measures[name]["f0_correlation"] is None for name in names):
        skipped["f0_correlation"] = "none: no system has a voice that moves"
    return SoundEvaluation(measures, skipped, tuple(notes))


@dataclass
class _Collected:
    """What was found out about a system, utterance by utterance."""

    with_sound: int = 0  # utterances
    said: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)  # of what was said
    durations: list[DurationMetrics] = field(default_factory=list)
    sounds: list[AcousticMetrics] = field(default_factory=list)
    voices: list[float] = field(default_factory=list)
    opinions: list[float] = field(default_factory=list)

    def measures(self, of_recordings: bool) -> dict[str, float | None]:
        """The measures by name."""
        measures: dict[str, float | None] = {
            "utterances_with_sound": self.with_sound,
            "word_error": word_error_rate(self.said, self.heard, self.languages),
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
            "duration_consistency": _ratio(sum(own.consistent for own in self.durations), words),
            "duration_consistency_25_ms": _ratio(sum(own.inside_window for own in self.durations), words),
            "word_duration_error_ms": _ratio(1000 * difference_s, words),
            "word_duration_error_relative": _ratio(difference_s, reference_s),
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


def _understood(transcript: Sequence[Word], heard: Sequence[Word]) -> set[int]:
    """Places of the transcript's words that were heard."""
    return {place for place, _ in agreeing_words(transcript, heard)}


def _compare(
    rows: Iterable[UtteranceSounds],
    rate_hz: int,
    encoder: SpeakerEncoder | None,
    utmos: Utmos | None,
    results: Mapping[str, _Collected],
) -> None:
    """Have every sound that is long enough judged, and compared with the recording."""
    for row in rows:
        sounds = row.sounds if row.original is None else {"original": row.original, **row.sounds}
        for name, sound in sounds.items():
            if len(sound) < SHORTEST_SOUND_SECONDS * rate_hz:
                continue
            results[name].with_sound += 1
            if utmos:
                results[name].opinions.append(utmos.score(sound, rate_hz))
            if row.original is None or name == "original":
                continue
            results[name].sounds.append(compare_sounds(row.original, sound, rate_hz))
            if encoder:
                results[name].voices.append(speaker_similarity(encoder, row.original, sound, rate_hz))


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _ratio(total: float, whole: float) -> float | None:
    return total / whole if whole else None

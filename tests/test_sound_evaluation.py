"""Measures of decoded sound say what they promise, on sounds and words whose answer is known."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
import torchaudio

from cosyvoice.utils.stops import RunStopped
from taste.acoustic_metrics import compare_sounds, shapes_db
from taste.asr import Found
from taste.audio import read_audio
from taste.sound_evaluation import UtteranceSounds, evaluate_sounds
from taste.speaker import SpeakerEncoder
from taste.speaker_similarity import speaker_similarity
from taste.text_normalisation import normalise
from taste.word_durations import compare_durations
from taste.word_error_rate import word_error_rate
from taste.word_timing import Word

ROOT = Path(__file__).parents[1]
MODEL_DIR = ROOT / "CosyVoice-tiny"
RATE_HZ = 22_050


@pytest.fixture(scope="module")
def recordings() -> dict[str, torch.Tensor]:
    """A recording of each of the demo corpus's voices."""
    rows = [json.loads(line) for line in (ROOT / "json" / "test.jsonl").read_text().splitlines()[:4]]
    return {row["speaker"]: read_audio(ROOT / "json" / row["audio_path"], RATE_HZ).waveform for row in rows}


def glide(f0_hz: list[float], seconds: float = 1.0, rate_hz: int = RATE_HZ) -> torch.Tensor:
    """A voice-like tone of ten harmonics whose pitch goes evenly, in octaves, through the given values."""
    samples = int(seconds * rate_hz)
    at = np.linspace(0, len(f0_hz) - 1, samples)
    octaves = np.interp(at, range(len(f0_hz)), np.log2(f0_hz))
    phase = 2 * np.pi * np.cumsum(2**octaves) / rate_hz
    return torch.tensor(sum(np.sin(k * phase) / k for k in range(1, 11)) * 0.1, dtype=torch.float32)


def stretched(waveform: torch.Tensor, factor: float) -> torch.Tensor:
    """The same speech at another pace, with its pitch."""
    window = torch.hann_window(1024)
    spectrum = torch.stft(waveform, 1024, 256, window=window, return_complex=True)
    advance = torch.linspace(0, math.pi * 256, 513)[:, None]
    slower = torchaudio.functional.phase_vocoder(spectrum, 1 / factor, advance)
    return torch.istft(slower, 1024, 256, window=window)


def test_a_sound_is_no_distance_from_itself(recordings):
    for sound in recordings.values():
        found = compare_sounds(sound, sound, RATE_HZ)
        assert found.mcd_db == 0
        assert found.f0_correlation == pytest.approx(1)
        assert found.voicing_error == 0
        assert found.seconds_ratio == 1


def test_loudness_is_no_distortion(recordings):
    sound = recordings["slt"]
    assert compare_sounds(sound, sound / 2, RATE_HZ).mcd_db < 0.1


def test_another_pace_is_less_distortion_than_another_voice(recordings):
    sound = recordings["slt"]
    slower, other = stretched(sound, 1.4), recordings["rms"]
    found = compare_sounds(sound, slower, RATE_HZ)
    assert found.seconds_ratio == pytest.approx(1.4, abs=0.02)
    assert found.mcd_db < 0.5 * compare_sounds(sound, other, RATE_HZ).mcd_db
    assert found.f0_correlation > 0.9
    assert found.voicing_error < 0.1


def test_a_difference_of_known_size_is_measured_in_decibels():
    tilt_db = 6 * torch.cos(torch.pi * (torch.arange(80) + 0.5) / 80)
    flat = torch.zeros(80, 1)
    tilted = flat + 3 + (tilt_db / (20 / math.log(10)))[:, None]  # and louder, which does not count
    distance = (shapes_db(flat) - shapes_db(tilted)).norm()
    assert float(distance) == pytest.approx(6 / math.sqrt(2), rel=1e-4)  # a cosine's root mean square


def test_melodies_of_known_direction_correlate():
    rising, falling = glide([120, 180]), glide([180, 120])
    assert compare_sounds(rising, glide([200, 300]), RATE_HZ).f0_correlation > 0.95  # a third higher, the same melody
    assert compare_sounds(rising, falling, RATE_HZ).f0_correlation < -0.5
    assert compare_sounds(rising, glide([150, 150.5]), RATE_HZ).f0_correlation is None  # nobody hears it move


def test_a_monotone_has_no_correlation_and_noise_has_no_voice():
    torch.manual_seed(0)
    tone, noise = glide([150, 150]), 0.05 * torch.randn(RATE_HZ)
    found = compare_sounds(tone, noise, RATE_HZ)
    assert found.f0_correlation is None
    assert found.voicing_error > 0.9


@pytest.mark.parametrize("rate_hz", [16_000, 22_050, 24_000])
def test_any_rate_will_do(rate_hz):
    sound = glide([120, 180, 140], rate_hz=rate_hz)
    assert compare_sounds(sound, sound, rate_hz).f0_correlation == pytest.approx(1)


def test_a_click_is_refused():
    with pytest.raises(ValueError, match=r"other sound: expected a waveform \[N\] of 0.05 s or more, got \[9\]"):
        compare_sounds(glide([100, 120]), torch.zeros(9), RATE_HZ)


def test_torch_keeps_its_number_of_threads():
    """In a process of its own, since numba changes only what nobody has set before."""
    script = (
        "import torch\n"
        "from taste.acoustic_metrics import compare_sounds\n"
        "before = torch.get_num_threads()\n"
        "compare_sounds(torch.randn(4000), torch.randn(3000), 22050)\n"
        "print(before, torch.get_num_threads())\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "2",
    }
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.split() == ["1", "1"]


def test_the_voice_of_one_speaker_is_nearer_than_anothers(recordings):
    encoder = SpeakerEncoder(MODEL_DIR / "campplus.onnx")
    first, second = recordings["slt"].chunk(2)
    same = speaker_similarity(encoder, first, second, RATE_HZ)
    assert speaker_similarity(encoder, first, first, RATE_HZ) == pytest.approx(1, abs=1e-5)
    assert same > speaker_similarity(encoder, first, recordings["rms"], RATE_HZ)
    assert speaker_similarity(encoder, first, torch.zeros(RATE_HZ), RATE_HZ) == 0


def words(*rows: tuple[str, float, float]) -> list[Word]:
    return [Word(*row) for row in rows]


REFERENCE = words(("the", 0.0, 0.2), ("old", 0.2, 0.5), ("house", 0.6, 1.0))


def test_durations_within_the_tolerance_are_kept_wherever_the_words_lie():
    later = words(("the", 1.0, 1.25), ("old", 1.25, 1.5), ("house", 2.0, 2.3))
    compared = compare_durations(REFERENCE, later)
    assert (compared.words, compared.consistent) == (3, 2)  # 50 and 50 ms off, 100 ms off
    assert compared.difference_s == pytest.approx(0.2)
    assert compared.reference_s == pytest.approx(0.9)


@pytest.mark.parametrize(("seconds_off", "kept"), [(0.049, 3), (-0.049, 3), (0.051, 2), (-0.051, 2)])
def test_a_duration_is_kept_just_inside_the_tolerance_and_no_more_just_outside(seconds_off, kept):
    other = words(("the", 0.0, 0.2), ("old", 0.2, 0.5), ("house", 0.6, 1.0 + seconds_off))
    assert compare_durations(REFERENCE, other).consistent == kept


def test_the_published_window_leaves_out_its_edge():
    other = words(("the", 0.0, 0.22), ("old", 0.2, 0.525), ("house", 0.6, 1.03))  # 20, 25 and 30 ms longer
    compared = compare_durations(REFERENCE, other)
    assert (compared.words, compared.inside_window, compared.consistent) == (3, 1, 3)


def test_only_words_that_agree_are_compared():
    heard = words(("the", 0.0, 0.2), ("gold", 0.2, 0.9), ("in", 0.9, 1.0), ("house", 1.0, 1.4))
    compared = compare_durations(REFERENCE, heard)
    assert (compared.words, compared.consistent) == (2, 2)


@pytest.mark.parametrize("text", ["twenty one", ""])
def test_whatever_a_recogniser_calls_a_word_counts_as_one(text):
    heard = words(("the", 0.0, 0.2), (text, 0.2, 0.9), ("house", 1.0, 1.4))
    compared = compare_durations(heard, heard)
    assert (compared.words, compared.difference_s, compared.reference_s) == (3, 0, pytest.approx(1.3))
    assert compare_durations(REFERENCE, heard).words == 2  # the, house


def test_nothing_heard_is_no_consistency_at_all():
    for others in ((REFERENCE, []), ([], REFERENCE), (REFERENCE, words(("cat", 0.0, 0.2)))):
        assert compare_durations(*others).words == 0


@pytest.mark.parametrize(
    ("said", "wrote"),
    [
        ("TWENTY FIVE MEN", "25 men"),
        ("THE COLOUR", "the color"),
        ("TWENTY DOLLARS", normalise("$20")),
        ("IT'S THREE THOUSAND", normalise("it is 3,000")),
        ("WELL UM YES", "well, yes"),
    ],
)
def test_english_is_held_against_what_was_heard_in_one_spelling(said, wrote):
    assert word_error_rate([said], [wrote], ["en"]) == 0
    assert word_error_rate([said], [wrote], ["de"]) > 0
    assert word_error_rate([said], [wrote]) > 0


def test_characters_of_a_language_without_blanks_are_its_words():
    assert word_error_rate(["二十五。", "one two"], ["二十", "one"], ["zh", "en"]) == (1 + 1) / (3 + 1)  # 12, 1


def test_a_spelling_of_numbers_changes_no_word_that_is_timed(recordings):
    heard = {30_000: words(("twenty", 0.0, 0.2), ("five", 0.2, 0.5)), 20_000: words(("25", 0.0, 0.5))}
    row = UtteranceSounds("a", "Twenty five", recordings["slt"][:30_000], {"good": recordings["slt"][:20_000]})
    result = evaluate_sounds([row], RATE_HZ, MODEL_DIR, Found(ScriptedRecogniser(heard, None), "script"))
    assert result.measures["original"]["word_error"] == result.measures["good"]["word_error"] == 0
    assert result.measures["good"]["words_compared"] == 0


def test_word_error_is_that_of_the_set():
    expected = jiwer.wer("a b c d", "a x c d e")
    assert word_error_rate(["The old house.", "One"], ["the gold house", "one two"]) == expected
    assert word_error_rate([], []) is None


class ScriptedRecogniser:
    """Hears what it was told by the length of the sound, since what is tested here is the counting."""

    name = "script"

    def __init__(self, heard: dict[int, list[Word]], aligned: dict[int, list[Word]] | None) -> None:
        self.heard, self.aligned = heard, aligned

    def hears(self, language):
        return language == "en"

    def words(self, waveform, rate_hz, language="en"):
        return self.heard[len(waveform)]

    def align(self, waveform, rate_hz, text):
        return self.aligned[len(waveform)] if self.aligned else None


def test_listening_stops_when_asked_to(recordings):
    asked = iter([False, False, True])
    rows = [UtteranceSounds(name, "", recordings["slt"], {"good": recordings["slt"]}) for name in "abcd"]
    with pytest.raises(RunStopped, match="stopped while listening; what was trained is saved"):
        evaluate_sounds(rows, RATE_HZ, MODEL_DIR, Found(None, "nobody"), stop_requested=lambda: next(asked))


def test_a_system_without_a_sound_misses_all_words_and_is_compared_in_nothing(recordings):
    original, shorter = recordings["slt"][:30_000], recordings["slt"][:20_000]
    heard = {30_000: REFERENCE, 20_000: words(("the", 0.0, 0.2), ("old", 0.3, 0.4))}
    aligned = heard | {20_000: [*heard[20_000], *words(("house", 0.5, 1.9))]}  # the whole text, whatever was said
    rows = [
        UtteranceSounds("a", "The old house", original, {"good": original, "poor": shorter}),
        UtteranceSounds("b", "The old house", original, {"good": original}),
        UtteranceSounds("zh", "你好", original, {"good": original}, language="zh"),
    ]
    for times in (aligned, None):
        found = Found(ScriptedRecogniser(heard, times), "script")
        result = evaluate_sounds(rows, RATE_HZ, MODEL_DIR, found)
        assert result.measures["original"] == {"utterances_with_sound": 3, "word_error": 0}
        assert result.measures["good"]["utterances_with_sound"] == 3
        assert result.measures["poor"]["utterances_with_sound"] == 1
        assert result.measures["good"]["word_error"] == 0
        assert result.measures["good"]["mcd_db"] == 0
        assert result.measures["good"]["speaker_similarity"] == pytest.approx(1)
        poor = result.measures["poor"]
        assert poor["word_error"] == pytest.approx(4 / 6)  # one of three missing, and all three of the other
        assert poor["words_compared"] == 2
        assert poor["duration_consistency"] == poor["duration_consistency_25_ms"] == 0.5  # 0 and 200 ms
        assert poor["word_duration_error_ms"] == pytest.approx(100)
        assert poor["word_duration_error_relative"] == pytest.approx(0.2 / 0.5)
        assert result.notes[0] == "words written down by script: 2 of 3 utterances"
        assert f"{'3' if times else '0'} of 3 sounds" in result.notes[1]
        json.dumps(result.to_dict())


def test_what_nobody_can_judge_is_skipped_with_its_reason(recordings, tmp_path):
    row = UtteranceSounds("a", "The old house", recordings["slt"], {"good": recordings["slt"]})
    result = evaluate_sounds([row], RATE_HZ, tmp_path, Found(None, "skipped: needs ears"))
    assert result.measures["good"]["word_error"] is None
    assert result.measures["good"]["duration_consistency"] is None
    assert result.measures["good"]["duration_consistency_25_ms"] is None
    assert result.measures["good"]["mcd_db"] == 0
    assert result.skipped["word_error"] == "skipped: needs ears"
    assert "campplus.onnx" in result.skipped["speaker_similarity"]
    assert evaluate_sounds([], RATE_HZ, tmp_path).measures == {}


def test_a_melody_that_nobody_has_is_explained():
    monotone, melody = glide([150, 150]), glide([120, 180, 140])
    for sound, explained in ((monotone, True), (melody, False)):
        row = UtteranceSounds("a", "The old house", melody, {"taste": sound, "true_units": monotone})
        result = evaluate_sounds([row], RATE_HZ, MODEL_DIR, Found(None, "skipped"))
        assert ("f0_correlation" in result.skipped) == explained
        assert result.measures["true_units"]["f0_correlation"] is None


def test_a_recording_that_is_gone_costs_the_comparison_only(recordings):
    row = UtteranceSounds("a", "The old house", None, {"good": recordings["slt"][:30_000]})
    result = evaluate_sounds([row], RATE_HZ, MODEL_DIR, Found(ScriptedRecogniser({30_000: REFERENCE}, None), "script"))
    assert result.measures["good"]["word_error"] == 0
    assert result.measures["good"]["mcd_db"] is None
    assert result.measures["original"]["word_error"] is None

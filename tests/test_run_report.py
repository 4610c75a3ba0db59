"""A report is gathered from what runs left in their folders, each figure and sound from where it belongs."""

import base64
import json
import re
from pathlib import Path

import pytest
import torch

from cosyvoice.utils.file_utils import write_wav
from taste.asr import Found
from taste.audio import read_audio
from taste.run_report import language_of, measure_run, measures_of, note_shown, word_times, write_run_report
from taste.word_timing import Word

ROOT = Path(__file__).parents[1]
MODEL_DIR = ROOT / "CosyVoice-tiny"
RATE_HZ = 22_050
UTT_ID = "demo-test-slt-003"
NOBODY = Found(None, "skipped: needs ears")
METRICS = {
    "test": {"loss": 2.0, "top1": 0.3, "top5": 0.6, "targets": 9},
    "controls": {"shuffled": {"loss": 3.0, "top1": 0.1, "top5": 0.4}, "silenced": "skipped: no Whisper"},
    "generation": {"utterances": 1, "bleu": 2.5},
    "codes": {
        "words": 32,
        "usage": [1.0, 0.5],
        "perplexity": [30.0, 10.0],
        "words_per_second": 3.0,
        "bits_per_second": 108.0,
    },
    "history": [{"epoch": 0, "train": {}, "test": {"loss": 2.0, "top1": 0.3, "top5": 0.6}}],
}


class Letters:
    """A tokenizer whose tokens are letters; 0 is a blank."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(" abcdefghijklmnopqrstuvwxyz"[token] for token in tokens)


class Shown:
    """The part of a data set that is asked for."""

    utt_ids = (UTT_ID,)

    def info(self, utt_id: str) -> dict:
        tokens = torch.tensor([1, 2, 0, 3])  # "ab" and "c"
        return {"text": "ab c", "text_token": tokens, "word_id": torch.tensor([0, 0, 1, 1])}


class Aligner:
    """Finds every word in half a second each."""

    name = "aligner"

    def hears(self, language: str) -> bool:
        return language == "en"

    def align(self, waveform, rate_hz, text):
        words = text.replace("-", " ").split()
        return [Word(word, 0.5 * number, 0.5 * (number + 1)) for number, word in enumerate(words)]


@pytest.fixture(scope="module")
def recording() -> torch.Tensor:
    return read_audio(ROOT / "json" / "demo_audio" / "slt" / f"{UTT_ID}.flac", RATE_HZ).waveform


def write_run(folder: Path, recording: torch.Tensor, predicted: torch.Tensor) -> Path:
    """A run whose folder has the name of its variant."""
    hears, has_codes = folder.name != "text_only", folder.name == "taste"
    sounds = {"original": recording, "true_units": recording, "predicted": predicted}
    for name, sound in sounds.items():
        write_wav(folder / "wavs" / f"{UTT_ID}_{name}.wav", sound, RATE_HZ)
    write_wav(folder / "wavs" / "an-earlier-run_predicted.wav", recording, RATE_HZ)
    attention = [torch.softmax(torch.randn(4, 12 if has_codes else 9), dim=1)] if hears else []
    note_shown(folder, Shown(), Letters(), attention, [torch.tensor([[1, 2], [3, 4]])] if has_codes else [])
    metrics = METRICS if has_codes else {"test": METRICS["test"], "history": METRICS["history"]}
    sounds = measure_run(folder, folder.name, MODEL_DIR, NOBODY)
    (folder / "metrics.json").write_text(json.dumps({**metrics, "sounds": sounds}))
    (folder / "settings.json").write_text(json.dumps({"variant": folder.name}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, recording) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exp")
    return {
        "text_only": write_run(folder / "text_only", recording, recording[: RATE_HZ // 2]),
        "taste_novq": write_run(folder / "taste_novq", recording, recording),
        "taste": write_run(folder / "taste", recording, recording),
    }


def test_each_run_is_measured_by_its_own_sounds(runs):
    sounds = {system: json.loads((path / "metrics.json").read_text())["sounds"] for system, path in runs.items()}
    assert set(sounds["taste"]["measures"]) == {"original", "true_units", "taste"}
    assert sounds["taste"]["measures"]["taste"]["mcd_db"] == pytest.approx(0, abs=0.2)  # 16-bit files
    assert sounds["text_only"]["measures"]["text_only"]["seconds_ratio"] < 0.3
    assert sounds["taste"]["skipped"]["word_error"] == "skipped: needs ears"


def test_a_report_of_several_runs_sets_their_sounds_and_figures_side_by_side(runs, tmp_path):
    page = write_run_report(tmp_path, runs, MODEL_DIR, "all", Found(Aligner(), "aligner")).read_text()
    for title in ("original recording", "true S3 units", "text only", "TASTE without quantizer", "TASTE"):
        assert page.count(f'aria-label="{title}: ab c"') == 1
    assert "an-earlier-run" not in page
    assert "Attention below: TASTE." in page and "Codes below: TASTE." in page
    (png,) = re.findall(r'<img src="data:image/png;base64,([^"]+)"[^>]+alt="Attention of 4 text tokens', page)
    assert int.from_bytes(base64.b64decode(png)[16:20], "big") == 12  # a PNG's width: the frames of that run
    assert 'aria-hidden="true">ab</div>' in page  # the word, over its place in the recording
    table = (tmp_path / "table.md").read_text()
    assert "| bit rate | – | – | 108 bit/s (paper 150 bit/s†) | – | – |" in table
    assert "| top-5 accuracy, shuffled audio (control) | – | – | 0.400 | – | – |" in table
    assert "| utterances generated | – | – | 1 | – | – |" in table
    assert "| utterances with sound | 1 | 1 | 1 | 1 | 1 |" in table
    assert "| words whose codes were counted | – | – | 32 | – | – |" in table
    assert table.count("skipped: needs ears") == 5


def test_runs_of_any_name_have_their_sounds_measures_in_their_own_column(runs, tmp_path):
    named = {"first": runs["taste"], "second": runs["taste_novq"]}
    write_run_report(tmp_path, named, MODEL_DIR, "both", Found(Aligner(), "aligner"))
    table = (tmp_path / "table.md").read_text()
    assert "TASTE" not in table.splitlines()[0] and "first | second |" in table.splitlines()[0]
    assert "| utterances with sound | 1 | 1 | 1 | 1 |" in table


def test_a_page_shows_some_of_many_utterances_and_says_so(tmp_path, recording):
    run = write_run(tmp_path / "taste", recording, recording)
    (noted,) = torch.load(run / "shown.pt", weights_only=True).values()
    many = [f"utt-{number:02d}" for number in range(30)]
    torch.save(dict.fromkeys(many, noted), run / "shown.pt")
    for utt_id in many:
        write_wav(run / "wavs" / f"{utt_id}_predicted.wav", recording[:RATE_HZ], RATE_HZ)
    page = write_run_report(tmp_path, {"taste": run}, MODEL_DIR, "taste", NOBODY).read_text()
    assert "12 of the 30 that were decoded" in page and page.count("<audio") == 12
    assert [utt_id for utt_id in many if utt_id in page][::11] == ["utt-01", "utt-28"]  # from all of them


def test_an_unfinished_run_is_reported_with_what_it_has(tmp_path):
    page = write_run_report(tmp_path, {"taste": tmp_path / "nothing"}, MODEL_DIR, "none", NOBODY).read_text()
    assert "There are no test utterances in this report" in page
    assert "Nothing was measured" in page


def test_a_silent_sound_is_left_out(tmp_path, recording, capsys):
    run = write_run(tmp_path / "taste", recording, torch.zeros(RATE_HZ))
    page = write_run_report(tmp_path, {"taste": run}, MODEL_DIR, "one", NOBODY).read_text()
    assert page.count("<audio") == 2
    assert "silent" in capsys.readouterr().out


def test_features_without_words_are_shown_without_them(tmp_path):
    class Foreign(Shown):
        def info(self, utt_id):
            return {}

    note_shown(tmp_path, Foreign(), Letters(), [torch.rand(4, 9)], [torch.zeros(2, 2)])
    noted = torch.load(tmp_path / "shown.pt", weights_only=True)[UTT_ID]
    assert noted == {
        "text": "",
        "language": "en",
        "labels": [],
        "spans": [],
        "words": [],
        "attention": None,
        "codes": None,
    }


def test_measures_have_their_names_in_the_table():
    assert measures_of(METRICS) == {
        "loss": 2.0,
        "top1": 0.3,
        "top5": 0.6,
        "top5_shuffled": 0.4,
        "utterances_generated": 1,
        "bleu": 2.5,
        "words_coded": 32,
        "code_usage": 0.75,
        "perplexity": 20.0,
        "words_per_second": 3.0,
        "bits_per_second": 108.0,
    }
    assert measures_of({}) == {}


def test_a_word_is_timed_by_all_that_is_heard_of_it():
    times = word_times(["well-known", "—", "words."], torch.zeros(9), RATE_HZ, Found(Aligner(), ""))
    assert times is None  # the aligner said the dash, so the counts differ: no times rather than wrong ones
    times = word_times(["well-known", "words."], torch.zeros(9), RATE_HZ, Found(Aligner(), ""))
    assert times == [(0.0, 1.0), (1.0, 1.5)]
    assert word_times(["words"], torch.zeros(9), RATE_HZ, NOBODY) is None


def test_a_language_without_spaces_is_told_from_its_letters():
    assert [language_of(text) for text in ("Hello 12", "三百零五", "これは")] == ["en", "zh", "ja"]

"""The measuring of a model counts words, voices, codes and speed as it says."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cosyvoice.utils.settings import Settings, parse_settings

TINY = Path(__file__).parents[1] / "CosyVoice" / "examples" / "tiny"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    sys.path.insert(0, str(TINY))
    try:
        import evaluation_table
    finally:
        sys.path.remove(str(TINY))
    return evaluation_table


@pytest.fixture(scope="module")
def evaluate(table: ModuleType) -> ModuleType:
    earlier = list(sys.path)
    sys.path.insert(0, str(TINY))
    try:
        import evaluate as module
    finally:
        sys.path[:] = earlier
    return module


def settings_of(evaluate: ModuleType, words: list[str]) -> Settings:
    return parse_settings(evaluate.__file__, vars(evaluate), words)


def utterance(speaker: str = "slt-01", **changes: Any) -> dict[str, Any]:
    item = {
        "id": "a",
        "speaker": speaker,
        "text": "The grey heron waited.",
        "language": "en",
        "units": [1, 2, 2, 3],
        "units_differing": 1,
        "seconds": {"original": 2.0, "true_units": 2.0, "text": 4.0},
        "spent": {"true_units": {"flow": 0.2, "hift": 0.1}, "text": {"lm": 2.0, "flow": 0.4, "hift": 0.2}},
        "heard": {"original": "the gray heron waited", "true_units": "the heron waited", "text": "a b c d"},
        "similarity": {"true_units": 0.9, "text": 0.5},
    }
    return item | changes


def test_words_count_over_the_set_in_one_spelling(table: ModuleType) -> None:
    said, heard = ["The grey heron.", "It's six o'clock!"], ["the gray heron", "it's six clock(2)"]
    assert table.word_error_rate(said, heard) == 1 / 6
    assert table.word_error_rate(["One two."], [""]) == 1
    assert table.word_error_rate([], []) is None


def test_measures_of_a_set(table: ModuleType) -> None:
    other = utterance("awb-02", units=[4, 5], units_differing=0, similarity={"true_units": 0.7, "text": 0.3})
    results = table.summarise([utterance(), other])
    assert results["word_error"]["original"] == {"all": 0, "awb": 0, "slt": 0}
    assert results["word_error"]["true_units"]["slt"] == 0.25
    assert results["word_error"]["text"]["all"] == 1
    assert results["speaker_similarity"]["true_units"] == pytest.approx({"all": 0.8, "awb": 0.7, "slt": 0.9})
    assert results["codes_in_use"] == 5
    assert results["token_agreement"] == pytest.approx(5 / 6)
    assert results["real_time_factor"] == pytest.approx({"lm": 0.5, "flow": 0.1, "hift": 0.05, "flow_and_hift": 0.15})
    assert results["length_ratio"] == pytest.approx({"true_units": 1.0, "text": 2.0})


def test_only_english_counts_for_words_but_all_for_voices(table: ModuleType) -> None:
    results = table.summarise(
        [utterance(), utterance("zh-1", language="zh", similarity={"true_units": 0.1, "text": 0.1})]
    )
    assert results["utterances_with_word_error"] == 1
    assert set(results["word_error"]["text"]) == {"all", "slt"}
    assert results["speaker_similarity"]["true_units"]["all"] == pytest.approx(0.5)


def test_the_table_names_targets_only_where_they_apply(table: ModuleType) -> None:
    results = {**table.summarise([utterance()]), "s3_tokenizer": {"character_error_rate": 0.08}}
    markdown = table.to_markdown(table.table_rows(results, with_targets=True), "model")
    assert "| S3 tokenizer: character error of its CTC | 8.0 % | ≤ 10 % |" in markdown
    assert "+25.0 points | ≤ 15 points" in markdown
    assert "≤" not in table.to_text(table.table_rows(results, with_targets=False))


def test_notes_survive_a_kill_in_the_middle_of_a_line(evaluate: ModuleType, tmp_path: Path) -> None:
    notes = evaluate.Notes(tmp_path / "notes.jsonl")
    notes.add("a", heard="one")
    with notes.path.open("a") as file:
        file.write('{"id": "b", "hea')
    again = evaluate.Notes(notes.path)
    again.add("c", heard="three")
    assert list(evaluate.Notes(notes.path).by_id) == ["a", "c"]


def test_utterances_come_from_a_folder_or_a_manifest(evaluate: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_text("a-1 /x/a.flac\nb-1 /x/b.flac\n")
    (tmp_path / "text").write_text("a-1 One two.\nb-1 Three.\n")
    (tmp_path / "utt2spk").write_text("a-1 a\nb-1 b\n")
    items = evaluate.read_items(tmp_path, None, None)
    assert items[0] == evaluate.Item("a-1", Path("/x/a.flac"), "One two.", "a", "en")
    assert [item.utt_id for item in evaluate.read_items(tmp_path, None, 1)] == ["a-1"]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"audio_path": "/x/c.wav", "text": "你好", "speaker": "s", "language": "zh"}) + "\n")
    assert evaluate.read_items(None, manifest, None)[0].language == "zh"
    (tmp_path / "utt2spk").write_text("a-1 a\n")
    with pytest.raises(ValueError, match="no text or no speaker for b-1"):
        evaluate.read_items(tmp_path, None, None)


def test_another_models_measurements_are_not_mixed(evaluate: ModuleType, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in evaluate._MODEL_FILES:
        (model / name).write_text(name)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("{}")
    arguments = ["--model-dir", str(model), "--manifest", str(manifest), "--output", str(tmp_path / "out")]
    evaluate.prepare_output(settings_of(evaluate, arguments))
    evaluate.prepare_output(settings_of(evaluate, arguments))
    heard = evaluate.Notes(tmp_path / "out" / "heard.jsonl")
    heard.add("a/original", heard="one")
    heard.add("a/text", heard="two")
    evaluate.Notes(tmp_path / "out" / "spoken.jsonl").add("a")
    (model / "flow.pt").write_text("another")
    with pytest.raises(ValueError, match="--overwrite"):
        evaluate.prepare_output(settings_of(evaluate, arguments))
    evaluate.prepare_output(settings_of(evaluate, [*arguments, "--overwrite"]))
    assert list(evaluate.Notes(heard.path).by_id) == ["a/original"]
    assert not (tmp_path / "out" / "spoken.jsonl").exists()
    manifest.write_text("{} ")  # other recordings under the same name
    evaluate.prepare_output(settings_of(evaluate, [*arguments, "--overwrite"]))
    assert not evaluate.Notes(heard.path).by_id


def test_another_tokenizers_error_is_not_the_models(evaluate: ModuleType, tmp_path: Path) -> None:
    model, theirs = tmp_path / "model", tmp_path / "work" / "s3_tokenizer"
    for folder in (model, theirs):
        folder.mkdir(parents=True)
        (folder / "speech_tokenizer_v1.onnx").write_text("one")
    (theirs / "metrics.json").write_text('{"test": {"character_error_rate": 0.1}}')
    arguments = ["--model-dir", str(model), "--data-dir", str(tmp_path / "work/corpus/test"), "--output", "out"]
    assert evaluate.find_tokenizer_metrics(settings_of(evaluate, arguments)) == {"character_error_rate": 0.1}
    (model / "speech_tokenizer_v1.onnx").write_text("another")
    assert evaluate.find_tokenizer_metrics(settings_of(evaluate, arguments)) is None


def test_wrong_usage_is_named_before_anything_is_done(
    evaluate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data-dir", str(tmp_path), "--output", str(tmp_path / "out")]
    for words, told in (
        (data[:2], "give --output"),
        (data[2:], "give either --data-dir or --manifest"),
        ([*data, "--manifest", "m.jsonl"], "give either --data-dir or --manifest"),
        ([*data, "--limit", "0"], "--limit is 0, expected at least 1"),
        ([*data, "--num-threads", "0", "--mels", "-1"], "--num-threads is 0, expected at least 1; --mels is -1"),
    ):
        assert evaluate.main(words) == 2
        assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_listener_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    for name in ("wav.scp", "text", "utt2spk"):
        (tmp_path / name).write_text("a b\n")
    code = "import sys; sys.modules['pocketsphinx'] = None; import evaluate; sys.exit(evaluate.main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "--data-dir", str(tmp_path), "--output", str(tmp_path / "out")],
        cwd=TINY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install -r CosyVoice/examples/tiny/requirements.txt" in done.stderr
    assert "Traceback" not in done.stderr

import json
import runpy
from pathlib import Path

import pytest

from taste.manifest import read_manifest

SCRIPT = Path(__file__).parents[1] / "json" / "make_manifest.py"
SCRIPT_NAMES = runpy.run_path(str(SCRIPT))
main, as_sentence = SCRIPT_NAMES["main"], SCRIPT_NAMES["as_sentence"]


@pytest.fixture
def librispeech(tmp_path: Path) -> Path:
    chapter = tmp_path / "test clean" / "61" / "70968"
    chapter.mkdir(parents=True)
    (chapter / "61-70968.trans.txt").write_text("61-70968-0001 SECOND ONE\n61-70968-0000 HE BEGAN\n")
    for number in (0, 1):
        (chapter / f"61-70968-{number:04d}.flac").write_bytes(b"not looked at")
    return tmp_path / "test clean"


def test_every_transcribed_utterance_becomes_a_manifest_line(librispeech: Path, tmp_path: Path) -> None:
    output = tmp_path / "test.jsonl"
    assert main(["--librispeech", str(librispeech), "--output", str(output)]) == 0
    utterances = read_manifest(output)
    assert [(item.utt_id, item.text, item.speaker, item.language) for item in utterances] == [
        ("61-70968-0000", "He began.", "61", "en"),
        ("61-70968-0001", "Second one.", "61", "en"),
    ]
    assert all(item.audio_path.is_file() for item in utterances)


def test_several_folders_make_one_manifest(librispeech: Path, tmp_path: Path) -> None:
    chapter = tmp_path / "train" / "103" / "1240"
    chapter.mkdir(parents=True)
    (chapter / "103-1240.trans.txt").write_text("103-1240-0000 CHAPTER ONE\n")
    (chapter / "103-1240-0000.flac").write_bytes(b"not looked at")
    output = tmp_path / "train.jsonl"
    assert main(["--librispeech", f"{librispeech}, {tmp_path / 'train'}", "--output", str(output)]) == 0
    found = [(item.utt_id, item.speaker) for item in read_manifest(output)]
    assert found == [("103-1240-0000", "103"), ("61-70968-0000", "61"), ("61-70968-0001", "61")]
    assert all(item.audio_path.is_file() for item in read_manifest(output))


def test_folders_that_share_utterances_are_refused(
    librispeech: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "train.jsonl"
    assert main(["--librispeech", f"{librispeech},{librispeech / '61'}", "--output", str(output)]) == 1
    told = capsys.readouterr().err
    first = librispeech / "61" / "70968" / "61-70968-0000.flac"
    assert "2 recordings have the utterance id of another one" in told
    assert f"{first} and {first} would both be 61-70968-0000" in told and "Give each folder once" in told
    assert not output.exists()
    assert main(["--librispeech", "", "--output", str(output)]) == 1
    assert "no folder to read" in capsys.readouterr().err


@pytest.mark.parametrize("constant", ["{0}", "{0},{1}"])
def test_a_constant_that_was_edited_to_plain_text_is_split_too(
    librispeech: Path, tmp_path: Path, constant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "7-1.trans.txt").write_text("7-1-0000 SO WHAT\n")
    (tmp_path / "other" / "7-1-0000.flac").write_bytes(b"not looked at")
    monkeypatch.setitem(main.__globals__, "LIBRISPEECH", constant.format(librispeech, tmp_path / "other"))
    assert main(["--output", str(tmp_path / "train.jsonl")]) == 0
    assert len(read_manifest(tmp_path / "train.jsonl")) == 2 + ("{1}" in constant)


def test_an_existing_manifest_is_kept_unless_told_otherwise(librispeech: Path, tmp_path: Path) -> None:
    output = tmp_path / "test.jsonl"
    output.write_text("mine\n")
    arguments = ["--librispeech", str(librispeech), "--output", str(output)]
    assert main(arguments) == 1
    assert output.read_text() == "mine\n"
    assert main([*arguments, "--overwrite"]) == 0
    assert json.loads(output.read_text().splitlines()[0])["utt_id"] == "61-70968-0000"


def test_a_missing_recording_or_folder_is_named(
    librispeech: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (librispeech / "61" / "70968" / "61-70968-0001.flac").unlink()
    assert main(["--librispeech", str(librispeech), "--output", str(tmp_path / "a.jsonl")]) == 1
    assert "61-70968-0001.flac" in capsys.readouterr().err
    assert main(["--librispeech", str(tmp_path / "nowhere"), "--output", str(tmp_path / "a.jsonl")]) == 1
    assert "no *.trans.txt" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("I SAID HE'D COME IF I'D LET HIM", "I said he'd come if I'd let him."),
        ("SO WHAT?", "So what?"),
        ("NASA", "NASA"),
        ("Already a sentence", "Already a sentence"),
        ("那很不明智", "那很不明智"),
        ("我用 PYTHON", "我用 PYTHON"),
    ],
)
def test_capitals_become_a_sentence(text: str, sentence: str) -> None:
    assert as_sentence(text) == sentence


def test_capitals_stay_where_asked(librispeech: Path, tmp_path: Path) -> None:
    output = tmp_path / "test.jsonl"
    assert main(["--librispeech", str(librispeech), "--output", str(output), "--sentence-case", "false"]) == 0
    assert read_manifest(output)[0].text == "HE BEGAN"


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    for name, text in (("anna/001", "Hello,\n world."), ("ben/001", "Good morning.")):
        (folder / name).parent.mkdir(parents=True)
        (folder / f"{name}.wav").write_bytes(b"not looked at")
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_a_folder_of_recordings_with_texts_becomes_a_manifest(recordings: Path, tmp_path: Path) -> None:
    output = tmp_path / "train.jsonl"
    assert main(["--folder", str(recordings), "--output", str(output)]) == 0
    found = [(item.utt_id, item.text, item.speaker, item.audio_path.name) for item in read_manifest(output)]
    assert found == [
        ("anna-001", "Hello, world.", "anna", "001.wav"),
        ("ben-001", "Good morning.", "ben", "001.wav"),
    ]


def test_several_folders_of_recordings_share_their_speakers_but_no_ids(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more = tmp_path / "more" / "anna"
    more.mkdir(parents=True)
    (more / "001.wav").write_bytes(b"not looked at")
    (more / "001.txt").write_text("Good evening.")
    arguments = ["--folder", f"{recordings},{more.parent}", "--output", str(tmp_path / "train.jsonl")]
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert f"{recordings / 'anna' / '001.wav'} and {more / '001.wav'} would both be anna-001" in told
    for suffix in (".wav", ".txt"):
        (more / f"001{suffix}").rename(more / f"002{suffix}")
    assert main(arguments) == 0
    found = [(item.utt_id, item.speaker) for item in read_manifest(tmp_path / "train.jsonl")]
    assert found == [("anna-001", "anna"), ("anna-002", "anna"), ("ben-001", "ben")]
    assert "3 utterances of 2 speakers" in capsys.readouterr().out


def test_a_folder_names_a_language_only_where_told(recordings: Path, tmp_path: Path) -> None:
    (recordings / "ben" / "001.txt").write_text("那很 OK", encoding="utf-8")
    arguments = ["--folder", str(recordings), "--output", str(tmp_path / "train.jsonl"), "--overwrite"]
    assert main(arguments) == 0
    entries = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["text"] for entry in entries] == ["Hello, world.", "那很 OK"]
    assert not any("language" in entry for entry in entries)
    assert main([*arguments, "--language", "zh"]) == 0
    assert {item.language for item in read_manifest(tmp_path / "train.jsonl")} == {"zh"}


def test_a_recording_without_text_is_named(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--folder", str(recordings), "--output", str(tmp_path / "train.jsonl")]
    (recordings / "ben" / "001.txt").write_text(" ")
    assert main(arguments) == 1
    assert "the file is empty" in capsys.readouterr().err
    (recordings / "ben" / "001.txt").unlink()
    assert main(arguments) == 1
    assert "1 of 2 recordings have no text" in capsys.readouterr().err
    assert not (tmp_path / "train.jsonl").exists()


def test_two_recordings_of_one_id_are_named(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (recordings / "anna-001.flac").write_bytes(b"")
    (recordings / "anna-001.txt").write_text("Again.")
    assert main(["--folder", str(recordings), "--output", str(tmp_path / "train.jsonl")]) == 1
    assert "would both be anna-001" in capsys.readouterr().err

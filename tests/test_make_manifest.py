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

import json
import runpy
from pathlib import Path

import pytest

from taste.manifest import read_manifest

SCRIPT = Path(__file__).parents[1] / "json" / "make_manifest.py"
main = runpy.run_path(str(SCRIPT))["main"]


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
        ("61-70968-0000", "HE BEGAN", "61", "en"),
        ("61-70968-0001", "SECOND ONE", "61", "en"),
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

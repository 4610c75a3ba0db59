import json
from pathlib import Path

import pytest
from sounds import write_manifest

from taste.manifest import ManifestError, read_manifest


def test_every_field_is_read_and_the_id_defaults_to_the_file_stem(tmp_path: Path) -> None:
    entries = [
        {"audio_path": "/a/b.flac", "text": "Hello", "utt_id": "one", "speaker": "s", "language": "en", "extra": 1},
        {"audio_path": "/a/103-1240-0000.flac", "text": ""},
        {"audio_path": "/a/c.wav", "text": "你好 ", "utt_id": 7},
    ]
    first, second, third = read_manifest(write_manifest(tmp_path / "m.jsonl", entries))
    assert first == ("one", Path("/a/b.flac"), "Hello", "s", "en", 1)
    assert second == ("103-1240-0000", Path("/a/103-1240-0000.flac"), "", None, None, 2)
    assert (third.utt_id, third.text) == ("7", "你好 ")


def test_a_relative_path_is_tried_from_here_and_then_from_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.wav").touch()
    monkeypatch.chdir(tmp_path / "here")
    entries = [{"audio_path": "a.wav", "text": "x"}, {"audio_path": "b.wav", "text": "x"}]
    manifest = write_manifest(tmp_path / "there" / "m.jsonl", entries)
    assert [item.audio_path for item in read_manifest(manifest)] == [Path("a.wav"), tmp_path / "there" / "b.wav"]


def test_every_malformed_line_is_reported_with_its_number_and_text(tmp_path: Path) -> None:
    good = json.dumps({"audio_path": "a.wav", "text": "fine"})
    lines = [
        good,
        '{"audio_path": "b.wav", "text": "cut off',
        "",
        '["a", "list"]',
        '{"text": "no recording"}',
        '{"audio_path": "c.wav"}',
        '{"audio_path": "d.wav", "text": 5}',
        '{"audio_path": "e.wav", "text": "slash", "utt_id": "x/e"}',
        '{"audio_path": "other/a.wav", "text": "same id"}',
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    message = str(caught.value)
    for expected in (
        "7 problems",
        'line 2: not JSON (Unterminated string starting at, column 33): {"audio_path": "b.wav", "text": "cut off',
        'line 4: expected an object, got list: ["a", "list"]',
        "line 5: audio_path is missing",
        "line 6: text is missing",
        "line 7: text must be text, got int",
        "line 8: utt_id must not hold a slash",
        "lines 1 and 9 have one id, 'a'",
    ):
        assert expected in message
    assert good in message and '{"audio_path": "other/a.wav", "text": "same id"}' in message


def test_a_line_without_a_text_is_taken_where_none_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"audio_path": "a.wav"}\n{"audio_path": "b.wav", "text": "said"}\n', encoding="utf-8")
    assert [item.text for item in read_manifest(path, needs_text=False)] == ["", "said"]


def test_unusual_line_breaks_and_a_byte_order_mark_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    line = '{"audio_path": "%s.wav", "text": "one\u2028two"}\r\n'
    path.write_bytes(("\ufeff" + line % "a" + "\r\n" + line % "b").encode())
    assert [(item.utt_id, item.text, item.line_number) for item in read_manifest(path)] == [
        ("a", "one\u2028two", 1),
        ("b", "one\u2028two", 3),
    ]


def test_a_manifest_without_utterances_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such manifest"):
        read_manifest(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ManifestError, match="holds no utterance"):
        read_manifest(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"audio_path": "ä.wav"}'.encode("latin-1"))
    with pytest.raises(ManifestError, match="not UTF-8"):
        read_manifest(tmp_path / "latin.jsonl")

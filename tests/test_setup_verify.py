"""What can be told of a file without knowing its hash, and that outcomes read as promised."""

from pathlib import Path

import pytest
import torch
from published_model import published
from small_model_folder import deflate

from cosyvoice.utils.model_dir import read_weights
from taste.verify import (
    Check,
    ExpectedFile,
    ModelPart,
    check_part,
    difference,
    format_problem,
    hash_file,
    human_bytes,
    read_records,
)

REPOSITORY = Path(__file__).resolve().parent.parent
WHOLE = {name: content for files in published("ModelScope").values() for name, content in files.items()}
PART = ModelPart("CosyVoice", "", {}, "", ("llm.pt", "cosyvoice.yaml"), ("spk2info.pt",))


@pytest.mark.parametrize("name", [name for name in WHOLE if not name.startswith("asset")])
def test_a_whole_file_has_no_problem(tmp_path, name):
    (tmp_path / name).write_bytes(WHOLE[name])

    assert format_problem(tmp_path / name) is None


@pytest.mark.parametrize("name", ["llm.pt", "llm.llm.fp16.zip", "campplus.onnx", "model.safetensors", "config.json"])
@pytest.mark.parametrize("kept", [0, 1, 9, 0.5, -1])
def test_a_file_that_was_cut_off_anywhere_has_one(tmp_path, name, kept):
    content = WHOLE[name].rstrip()
    (tmp_path / name).write_bytes(content[: int(len(content) * kept) if 0 < kept < 1 else kept])

    assert format_problem(tmp_path / name) is not None


@pytest.mark.parametrize("name", ["llm.pt", "campplus.onnx", "cosyvoice.yaml", "model.safetensors"])
@pytest.mark.parametrize(
    "content, told",
    [
        (
            b"version https://git-lfs.example/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 1240000000\n",
            "git-lfs pointer",
        ),
        (b"<!DOCTYPE html>\n<html><body>sign in</body></html>", "web page"),
        (b"\n<HTML><body>sign in</body></html>", "web page"),
    ],
    ids=["pointer", "page", "old page"],
)
def test_a_stand_in_for_a_file_is_told_by_its_kind(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)

    assert told in format_problem(tmp_path / name)


def test_files_that_pytorch_wrote_in_either_format_have_no_problem(tmp_path):
    weights = {"weight": torch.arange(1000.0)}
    torch.save(weights, tmp_path / "new.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)

    assert format_problem(tmp_path / "new.pt") is None
    assert format_problem(tmp_path / "old.pt") is None


@pytest.mark.parametrize("name", ["campplus.onnx", "speech_tokenizer_v1.onnx", "llm.pt", "whisper/model.safetensors"])
def test_the_embedded_model_s_files_have_no_problem_and_their_halves_have(tmp_path, name):
    path = REPOSITORY / "CosyVoice-tiny" / name
    half = tmp_path / path.name
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    assert format_problem(path) is None
    assert format_problem(half) is not None


def test_a_compressed_file_of_weights_has_no_problem_loads_and_its_half_has_one(tmp_path):
    """The embedded language model may be stored so."""
    whole, part = tmp_path / "llm.pt", REPOSITORY / "CosyVoice-tiny" / "llm.pt"
    deflate(part, whole)
    weights = read_weights(whole)

    assert format_problem(whole) is None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in torch.load(part, weights_only=True).items())
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert format_problem(whole) is not None


def test_hashes_are_those_of_sha256sum_and_git(tmp_path):
    (tmp_path / "hello").write_bytes(b"hello\n")

    assert hash_file(tmp_path / "hello") == (
        6,
        "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
        "ce013625030ba8dba906f756967f9e9ca394464a",
    )


def test_the_strongest_known_hash_decides():
    got = hash_file(Path(__file__))
    right = ExpectedFile("x", got.size_bytes, got.sha256, got.git_sha1)

    assert difference(got, right) is None
    assert difference(got, right._replace(sha256=got.sha256.upper(), git_sha1="0" * 40)) is None
    assert difference(got, right._replace(sha256=None)) is None
    assert difference(got, right._replace(sha256=None, git_sha1=None)) is None
    assert "expected 00000" in difference(got, right._replace(sha256="0" * 64))
    assert "expected 00000" in difference(got, right._replace(sha256=None, git_sha1="0" * 40))
    assert "bytes, expected 7" in difference(got, right._replace(size_bytes=7))


def test_a_missing_or_broken_manifest_is_none(tmp_path):
    assert read_records(tmp_path) == {}
    for text in (
        "",
        "[]",
        "{}",
        '{"version": 99, "parts": {}}',
        '{"version": 1, "parts": {"CosyVoice": {"files": 1}}}',
    ):
        (tmp_path / ".verified.json").write_text(text)
        assert read_records(tmp_path) == {}


def test_a_part_s_checks_name_required_recorded_and_present_files_once(tmp_path):
    (tmp_path / "llm.pt").write_bytes(WHOLE["llm.pt"])
    got = hash_file(tmp_path / "llm.pt")
    recorded = {
        "llm.pt": ExpectedFile("llm.pt", got.size_bytes, got.sha256),
        "gone.onnx": ExpectedFile("gone.onnx", 1, "0"),
    }

    checks = check_part(tmp_path, PART, recorded, "do this")
    assert [(check.name, check.passed) for check in checks] == [
        ("llm.pt", True),
        ("cosyvoice.yaml", False),
        ("gone.onnx", False),
    ]
    assert checks[1].line() == f"FAILED  cosyvoice.yaml: there is no such file in {tmp_path}; next: do this"


def test_only_a_file_that_its_owner_may_edit_may_have_changed(tmp_path):
    recorded = {}
    for name in ("llm.pt", "cosyvoice.yaml", "spk2info.pt"):
        content = WHOLE.get(name, WHOLE["hift.pt"])
        (tmp_path / name).write_bytes(content)
        recorded[name] = ExpectedFile(name, len(content), "0" * 64)

    checks = {check.name: check for check in check_part(tmp_path, PART, recorded, "do this")}
    assert {name: check.passed for name, check in checks.items()} == {
        "llm.pt": False,
        "cosyvoice.yaml": True,
        "spk2info.pt": True,
    }
    assert "changed since it was recorded" in checks["cosyvoice.yaml"].detail
    assert "changed since it was recorded: got sha256" in checks["llm.pt"].detail


def test_an_outcome_is_one_line():
    assert Check("llm.pt", True, "fine").line() == "ok      llm.pt: fine"
    assert Check("llm.pt", None, "needs x").line() == "skipped llm.pt: needs x"


@pytest.mark.parametrize(
    "size_bytes, text",
    [(0, "0 bytes"), (999, "999 bytes"), (4700, "4.7 kB"), (28_303_423, "28.3 MB"), (3 * 10**9, "3.00 GB")],
)
def test_sizes_are_told_in_decimal_units(size_bytes, text):
    assert human_bytes(size_bytes) == text

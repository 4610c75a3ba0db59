"""The extraction tools and s3.sh: published command lines, resuming, bad input."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sounds import write_manifest

from taste.manifest import read_manifest
from taste.recordings import Recording, plan_batches

REPOSITORY = Path(__file__).parents[1]
TOOLS = REPOSITORY / "CosyVoice" / "tools"
TOKENIZER = REPOSITORY / "CosyVoice-tiny" / "speech_tokenizer_v1.onnx"
SPEAKER_MODEL = REPOSITORY / "CosyVoice-tiny" / "campplus.onnx"
SIGNALLED = Path(__file__).with_name("signalled.py")
DEADLINE_SECONDS = 120


def start(command: list[str | Path], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        start_new_session=True,  # a process group of its own, as under a terminal
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    return process.returncode, output


def run_tool(name: str, *words: str | Path) -> int:
    """Run a tool inside this process, which has torch loaded already; returns its exit code."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    try:
        return tool.main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def run_s3_sh(*words: str | Path, cwd: Path, **environment: str) -> tuple[int, str]:
    script = f'cd "$0" && exec bash "{REPOSITORY}/s3.sh" "$@"'
    return finish(start(["bash", "-c", script, cwd, *words], PYTHON=sys.executable, **environment))


def demo_entries(count: int) -> list[dict[str, str]]:
    """The first utterances of the demo corpus, with absolute paths."""
    utterances = read_manifest(REPOSITORY / "json" / "test.jsonl")[:count]
    return [
        {"utt_id": item.utt_id, "audio_path": str(item.audio_path), "text": item.text, "speaker": item.speaker or ""}
        for item in utterances
    ]


@pytest.fixture
def kaldi_folder(tmp_path: Path) -> Path:
    """Four utterances of the demo corpus, as wav.scp and utt2spk; one path holds a space and an umlaut."""
    folder = tmp_path / "data"
    folder.mkdir()
    entries = demo_entries(4)
    moved = tmp_path / "mit Umläuten.flac"
    moved.write_bytes(Path(entries[0]["audio_path"]).read_bytes())
    entries[0]["audio_path"] = str(moved)
    (folder / "wav.scp").write_text("".join(f"{entry['utt_id']} {entry['audio_path']}\n" for entry in entries))
    (folder / "utt2spk").write_text("".join(f"{entry['utt_id']} {entry['utt_id'][:10]}\n" for entry in entries))
    return folder


def words_for(manifest: Path, output: Path) -> list[str | Path]:
    return [
        "--manifest",
        manifest,
        "--output",
        output,
        "--onnx_path",
        TOKENIZER,
        "--batch_size",
        "4",
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="module")
def many_short_recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 500 recordings of a fifth of a second: more than two chunks."""
    folder = tmp_path_factory.mktemp("many")
    noise = np.random.default_rng(0)
    entries = []
    for number in range(500):
        path = folder / f"{number:04d}.wav"
        soundfile.write(path, 0.1 * noise.standard_normal(3200 + 16 * number), 16_000)
        entries.append({"audio_path": path.name, "text": "noise"})
    return write_manifest(folder / "train.jsonl", entries)


@pytest.fixture(scope="module")
def units_of_many(many_short_recordings: Path) -> dict[str, list[int]]:
    """What an uninterrupted run gives."""
    output = many_short_recordings.parent / "whole" / "train_utt2s3.pt"
    assert run_tool("extract_speech_token", *words_for(many_short_recordings, output)) == 0
    return torch.load(output, weights_only=True)


# ---- the published command lines


def test_published_token_command_reads_wav_scp_and_writes_lists_of_units(kaldi_folder: Path) -> None:
    words = ("--dir", kaldi_folder, "--onnx_path", TOKENIZER, "--num_thread", "2")
    assert run_tool("extract_speech_token", *words) == 0
    units = torch.load(kaldi_folder / "utt2speech_token.pt", weights_only=True)
    assert list(units) != [] and set(units) == {entry["utt_id"] for entry in demo_entries(4)}
    for entry in demo_entries(4):
        row = units[entry["utt_id"]]
        assert len(row) == -(-(soundfile.info(entry["audio_path"]).frames // 160) // 2)
        assert all(type(unit) is int and 0 <= unit < 4096 for unit in row)


def test_published_embedding_command_writes_vectors_of_utterances_and_speakers(kaldi_folder: Path) -> None:
    words = ("--dir", kaldi_folder, "--onnx_path", SPEAKER_MODEL, "--num_thread", "2")
    assert run_tool("extract_embedding", *words) == 0
    utterances = torch.load(kaldi_folder / "utt2embedding.pt", weights_only=True)
    speakers = torch.load(kaldi_folder / "spk2embedding.pt", weights_only=True)
    assert all(len(vector) == 192 for vector in utterances.values())
    speaker_of = dict(line.split() for line in (kaldi_folder / "utt2spk").read_text().splitlines())
    for name, vector in speakers.items():
        rows = [utterances[utt_id] for utt_id, speaker in speaker_of.items() if speaker == name]
        torch.testing.assert_close(torch.tensor(vector), torch.tensor(rows).mean(dim=0))


def test_manifest_and_folder_give_the_same_units(kaldi_folder: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "test.jsonl", demo_entries(4))
    output = tmp_path / "out" / "test_utt2s3.pt"
    assert run_tool("extract_speech_token", *words_for(manifest, output)) == 0
    by_folder = ("--dir", kaldi_folder, "--onnx-path", TOKENIZER, "--backend", "onnxruntime", "--device", "cpu")
    assert run_tool("extract_speech_token", *by_folder) == 0
    units = torch.load(output, weights_only=True)
    assert units == torch.load(kaldi_folder / "utt2speech_token.pt", weights_only=True)


# ---- bad input


def test_bad_recordings_are_listed_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("taste.progress_bar.LINE_SECONDS", 0.0)
    (tmp_path / "corrupt.wav").write_bytes(b"RIFF, but no sound")
    entries = demo_entries(2)
    entries.append({"utt_id": "missing", "audio_path": str(tmp_path / "nowhere.wav"), "text": "a"})
    entries.append({"utt_id": "corrupt", "audio_path": str(tmp_path / "corrupt.wav"), "text": "b"})
    manifest = write_manifest(tmp_path / "train.jsonl", entries)
    output = tmp_path / "out" / "train_utt2s3.pt"
    assert run_tool("extract_speech_token", *words_for(manifest, output)) == 3
    told = capsys.readouterr().err
    assert "extracting: 4 of 4 recordings, " in told and "\r" not in told  # no bar where no terminal is
    units = torch.load(output, weights_only=True)
    assert set(units) == {entry["utt_id"] for entry in demo_entries(2)}
    failures_path = output.with_suffix(".failures.jsonl")
    failures = [json.loads(line) for line in failures_path.read_text().splitlines()]
    assert {failure["utt_id"] for failure in failures} == {"missing", "corrupt"}
    assert all(set(failure) == {"utt_id", "audio_path", "reason"} for failure in failures)

    (tmp_path / "nowhere.wav").write_bytes(Path(entries[0]["audio_path"]).read_bytes())
    write_manifest(manifest, entries[:3])
    assert run_tool("extract_speech_token", *words_for(manifest, output)) == 0
    assert not failures_path.exists()
    mended = torch.load(output, weights_only=True)
    assert mended["missing"] == units[entries[0]["utt_id"]]


@pytest.mark.parametrize("name", ["extract_speech_token", "extract_embedding"])
def test_a_list_of_nothing_but_bad_recordings_ends_with_exit_code_3(name: str, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "train.jsonl", [{"audio_path": "nowhere.wav", "text": "a", "speaker": "b"}])
    onnx_path = TOKENIZER if name == "extract_speech_token" else SPEAKER_MODEL
    words = ("--manifest", manifest, "--output", tmp_path / "out.pt", "--onnx_path", onnx_path)
    assert run_tool(name, *words) == 3
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--no-such-flag", "1"), 2, "--no-such-flag"),
        (("--num_thread", "many"), 2, "--num-thread"),
        ((), 1, "--manifest FILE"),
        (("--dir", "/nowhere"), 1, "wav.scp"),
        (("--manifest", "/nowhere.jsonl", "--output", "/tmp/x.pt"), 1, "no such manifest"),
    ],
)
def test_wrong_usage_says_what_is_wrong(
    words: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("extract_speech_token", *words) == code
    assert message in capsys.readouterr().err


def test_a_line_of_wav_scp_that_asks_for_a_command_is_refused(
    kaldi_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    witness = kaldi_folder / "ran"
    (kaldi_folder / "wav.scp").write_text(f"a touch {witness} |\n")
    assert run_tool("extract_speech_token", "--dir", kaldi_folder) == 1
    assert "commands are not run" in capsys.readouterr().err
    assert not witness.exists()


def test_an_utterance_without_a_speaker_is_refused_by_name(
    kaldi_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (kaldi_folder / "utt2spk").read_text().splitlines()
    (kaldi_folder / "utt2spk").write_text("\n".join(lines[:-1]) + "\n")
    assert run_tool("extract_embedding", "--dir", kaldi_folder, "--onnx_path", SPEAKER_MODEL) == 1
    assert lines[-1].split()[0] in capsys.readouterr().err


def test_units_of_another_tokenizer_are_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_manifest(tmp_path / "train.jsonl", demo_entries(1))
    output = tmp_path / "train_utt2s3.pt"
    torch.save({"other": [1, 2, 3]}, output)
    output.with_suffix(".made_with.json").write_text('{"speech_tokenizer": "another"}')
    assert run_tool("extract_speech_token", *words_for(manifest, output)) == 1
    assert "made differently" in capsys.readouterr().err
    assert torch.load(output, weights_only=True) == {"other": [1, 2, 3]}


# ---- s3.sh


def test_s3_sh_works_from_another_folder_with_spaces_and_umlauts(tmp_path: Path) -> None:
    place = tmp_path / "ein Ordner mit Größe; $(touch ran)"
    place.mkdir()
    entries = demo_entries(3)
    (place / "ton & töne.flac").write_bytes(Path(entries[0]["audio_path"]).read_bytes())
    entries[0]["audio_path"] = "ton & töne.flac"
    missing = {"audio_path": "nowhere.wav", "text": "nobody"}
    write_manifest(place / "train.jsonl", [*entries, missing])
    write_manifest(place / "test.jsonl", entries[:1])
    code, text = run_s3_sh("--json-dir=.", "--output-dir", "aus gabe", BATCH_SIZE="2", cwd=place)
    assert code == 3, text  # of the train split; the test split is done all the same
    units = torch.load(place / "aus gabe" / "train_utt2s3.pt", weights_only=True)
    test_units = torch.load(place / "aus gabe" / "test_utt2s3.pt", weights_only=True)
    assert len(units) == 3
    assert test_units == {entries[0]["utt_id"]: units[entries[0]["utt_id"]]}
    assert not list(tmp_path.rglob("ran"))


def test_s3_sh_goes_without_a_test_manifest_but_not_without_a_train_manifest(tmp_path: Path) -> None:
    code, text = run_s3_sh("--json-dir", tmp_path, "--output-dir", tmp_path, cwd=tmp_path)
    assert code == 1
    assert "train.jsonl; write it" in text
    write_manifest(tmp_path / "train.jsonl", demo_entries(1))
    code, text = run_s3_sh("--json-dir", tmp_path, "--output-dir", tmp_path, cwd=tmp_path)
    assert code == 0, text
    assert "out of the training set" in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--no-such-flag", "1"), 2, "there is no flag --no-such-flag"),
        (("--here", "/tmp"), 2, "there is no flag --here"),
        (("--batch-size",), 2, "--batch-size needs a value"),
        (("train",), 2, "unexpected argument 'train'"),
        (("--model-dir", "/nowhere"), 1, "setup_cosyvoice.py --model-dir /nowhere"),
        (("--python", "/nowhere/python"), 1, "there is no interpreter /nowhere/python"),
        (("--help",), 0, "--num-thread"),
    ],
)
def test_s3_sh_says_what_is_wrong(words: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    got_code, text = run_s3_sh(*words, cwd=tmp_path)
    assert got_code == code, text
    assert message in text


# ---- resuming


@pytest.mark.slow
def test_a_run_killed_and_resumed_gives_the_units_of_one_never_killed(
    many_short_recordings: Path,
    units_of_many: dict[str, list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "train_utt2s3.pt"
    words = words_for(many_short_recordings, output)
    killed = start([sys.executable, SIGNALLED, "SIGKILL", "2", TOOLS / "extract_speech_token.py", *words])
    code, text = finish(killed)
    assert code == -signal.SIGKILL, text
    assert not output.exists()

    assert run_tool("extract_speech_token", *words) == 0
    assert "500 recordings, 0 of them" not in capsys.readouterr().out
    assert torch.load(output, weights_only=True) == units_of_many
    assert not (tmp_path / "train_utt2s3.chunks").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_s3_sh_cleanly_and_its_work_goes_on(
    many_short_recordings: Path,
    units_of_many: dict[str, list[int]],
    tmp_path: Path,
    number: signal.Signals,
    expected: int,
) -> None:
    command = ["bash", REPOSITORY / "s3.sh", "--json-dir", many_short_recordings.parent, "--splits", "train"]
    command += ["--output-dir", tmp_path, "--batch-size", "4"]
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SIGNALLED}" group-{number.name} 1 "$@"\n')
    python.chmod(0o755)
    code, text = finish(start(command, PYTHON=str(python)))
    assert code == expected, text
    saved = re.search(r"with (\d+) recordings saved; run the same again", text)
    assert saved is not None, text
    assert 0 < int(saved[1]) < 500

    output = tmp_path / "train_utt2s3.pt"
    assert run_tool("extract_speech_token", *words_for(many_short_recordings, output)) == 0
    assert torch.load(output, weights_only=True) == units_of_many


# ---- batches


def test_batches_hold_every_recording_once_and_not_too_much_sound(many_short_recordings: Path, tmp_path: Path) -> None:
    recordings = [Recording(item.utt_id, item.audio_path, None) for item in read_manifest(many_short_recordings)]
    long_path = tmp_path / "long.wav"
    soundfile.write(long_path, np.zeros(16_000 * 70), 16_000)
    recordings[3:3] = [Recording(f"long-{number}", long_path, None) for number in range(3)]
    batches = plan_batches(recordings, batch_size=4, num_threads=2)
    assert sorted(item.utt_id for batch in batches for item in batch) == sorted(item.utt_id for item in recordings)
    assert max(map(len, batches)) == 4
    assert sum(any(item.utt_id.startswith("long") for item in batch) for batch in batches) == 3  # 4 x 30 s a batch

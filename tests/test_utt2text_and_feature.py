import itertools
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from small_model_folder import TEXT_WIDTH, write_small_model_folder
from small_whisper import WIDTH, write_small_whisper
from sounds import write_manifest, write_recording

import utt2text_and_feature
from cosyvoice.utils.model_dir import get_tokenizer, text_embedding_table
from taste.feature_files import chunk_folder
from taste.feature_reader import open_features
from taste.feature_writer import FeatureWriter
from taste.manifest import read_manifest
from taste.whisper_encoder import WhisperEncoder

REPOSITORY = Path(__file__).parent.parent
SCRIPT = "utt2text_and_feature.py"
SIGNALLED = Path(__file__).with_name("signalled.py")
OUTPUTS = ("text_emb", "whisper_feats", "utt2info")
TEXTS = ("Hello, world.", "那很不明智", "CHAPTER ONE", "Python 编程 3", "a", "It's only a test of a longer sentence.")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, golden_dir: Path) -> Path:
    folder = write_small_model_folder(tmp_path_factory.mktemp("models") / "small model", golden_dir)
    write_small_whisper(folder / "whisper")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 22 good recordings, 0.3 to 2.9 s, of several rates and formats."""
    folder = tmp_path_factory.mktemp("corpus")
    formats = [(".wav", 16_000), (".flac", 44_100), (".ogg", 48_000), (".mp3", 22_050), (".flac", 8_000)]
    entries = []
    for number in range(22):
        suffix, rate_hz = formats[number % len(formats)]
        name = f"录音 {number}{suffix}"
        write_recording(folder / "recordings" / name, 0.3 + 0.12 * number, rate_hz, seed=number)
        entries.append({"utt_id": f"u{number}", "audio_path": f"recordings/{name}", "text": TEXTS[number % len(TEXTS)]})
    return write_manifest(folder / "train.jsonl", entries)


def _words(manifest: Path, model_dir: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--jsonl", str(manifest), "--model_dir", str(model_dir)),
        *("--output_text", str(output / "{split}_text_emb.pt")),
        *("--output-whisper", str(output / "{split}_whisper_feats.pt")),
        *("--max-duration", "3", "--mid-layer", "2", "--batch-size", "4", "--num-workers", "2", "--device", "cpu"),
        *more,
    ]


def _run(manifest: Path, model_dir: Path, output: Path, *more: str) -> int:
    return utt2text_and_feature.main(_words(manifest, model_dir, output, *more))


def _start(words: list[str], *wrapper: str | Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *wrapper, SCRIPT, *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def _rows(corpus: Path) -> list[dict[str, Any]]:
    """Lines of a manifest, with paths that are good anywhere."""
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    return [row | {"audio_path": str(corpus.parent / row["audio_path"])} for row in rows]


def _features(output: Path, split: str = "train") -> dict[str, Any]:
    return {name: dict(open_features(output / f"{split}_{name}.pt")) for name in OUTPUTS}


def _assert_equal(found: Any, expected: Any) -> None:
    """Equal to the last bit, through dicts."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in expected:
            _assert_equal(found[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory, corpus: Path, model_dir: Path) -> Path:
    """The outputs of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("never stopped")
    assert _run(corpus, model_dir, output, "--save-mode", "single") == 0
    return output


def test_the_three_files_hold_what_the_next_stage_expects(never_stopped: Path, corpus: Path, model_dir: Path) -> None:
    features = _features(never_stopped)
    table, tokenizer = text_embedding_table(model_dir), get_tokenizer(model_dir)
    utterances = read_manifest(corpus)
    assert len(utterances) == 22
    for utterance in utterances:
        text, whisper, info = (features[name][utterance.utt_id] for name in OUTPUTS)
        tokens = tokenizer.encode(utterance.text, allowed_special="all")
        assert info["text"] == utterance.text and info["audio_path"] == str(utterance.audio_path)
        assert info["text_token"].tolist() == tokens
        assert info["word_id"].shape == (len(tokens),) and info["spk_embedding"].shape == (192,)
        assert text.shape == (len(tokens), TEXT_WIDTH) and torch.equal(text, table[tokens])
        assert info["duration_s"] == pytest.approx(0.3 + 0.12 * int(utterance.utt_id[1:]), abs=0.06)
        for part in whisper.values():
            assert part.dtype == torch.float16 and part.shape[1] == WIDTH
            assert abs(len(part) - info["duration_s"] * 50) <= 1
    assert not torch.equal(features["whisper_feats"]["u0"]["mid"], features["whisper_feats"]["u0"]["final"])
    names = sorted(file.name for file in never_stopped.iterdir())
    assert names == [
        "train_text_emb.pt",
        "train_utt2info.made_with.json",
        "train_utt2info.pt",
        "train_utt2info.settings.json",
        "train_whisper_feats.pt",
    ]
    assert json.loads((never_stopped / names[3]).read_text())["mid_layer"] == 2


def test_bad_recordings_are_listed_and_the_others_go_on(
    tmp_path: Path, corpus: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corrupt.flac").write_bytes(b"fLaC" + bytes(500))
    (tmp_path / "empty.wav").touch()
    soundfile.write(str(tmp_path / "silent.wav"), np.zeros(16_000), 16_000)
    soundfile.write(str(tmp_path / "blip.wav"), np.ones(200), 16_000)
    write_recording(tmp_path / "long.wav", 3.2)
    stereo = np.random.default_rng(0).uniform(-0.5, 0.5, (16_000, 2))
    soundfile.write(str(tmp_path / "stereo.wav"), stereo, 16_000)
    reasons = {
        "missing": "no such file",
        "corrupt": "not a readable",
        "empty": "0 bytes",
        "silent": "silent",
        "blip": "25 ms",
        "long": "lasts 3.200 s, over MAX_DURATION (3 s)",
        "wordless": "transcript is empty",
    }
    good = write_recording(tmp_path / "wordless.wav")
    entries = [
        {
            "audio_path": f"{name}.{'flac' if name == 'corrupt' else 'wav'}",
            "text": " " if name == "wordless" else "some words",
        }
        for name in [*reasons, "stereo"]
    ] + [{"utt_id": "fine", "audio_path": str(good), "text": "fine"}]
    manifest = write_manifest(tmp_path / "mixed.jsonl", entries)
    assert _run(manifest, model_dir, tmp_path / "out") == 3
    listed = [json.loads(line) for line in (tmp_path / "out/mixed_utt2info.failures.jsonl").read_text().splitlines()]
    assert {entry["utt_id"] for entry in listed} == set(reasons)
    for entry in listed:
        assert reasons[entry["utt_id"]] in entry["reason"] and entry["utt_id"] in entry["audio_path"]
    for values in _features(tmp_path / "out", "mixed").values():
        assert set(values) == {"stereo", "fine"}
    assert "7 utterances failed" in capsys.readouterr().out

    # once the recordings are repaired, the same command completes the output and drops the list
    for name in reasons:
        write_recording(tmp_path / f"{name}.wav", seed=5)
    shutil.copy(tmp_path / "missing.wav", tmp_path / "corrupt.flac")
    entries[6]["text"] = "words at last"
    write_manifest(manifest, entries)
    assert _run(manifest, model_dir, tmp_path / "out") == 0
    assert len(_features(tmp_path / "out", "mixed")["utt2info"]) == 9
    assert not (tmp_path / "out/mixed_utt2info.failures.jsonl").exists()


@pytest.mark.slow
def test_killed_in_the_middle_of_writes_and_resumed_it_writes_the_same_values(
    tmp_path: Path, corpus: Path, model_dir: Path
) -> None:
    twice = [entry | {"utt_id": f"{entry['utt_id']}{again}"} for again in ("", " again") for entry in _rows(corpus)]
    manifest = write_manifest(tmp_path / "train.jsonl", twice)
    small_chunks = ("--save-mode", "single", "--batch-size", "2", "--chunk-utterances", "2")
    assert _run(manifest, model_dir, tmp_path / "never killed", *small_chunks) == 0
    output = tmp_path / "killed"
    # of a batch the info is written first, then the features, then the text; at last the three files, text first
    for write, with_info in ((2, 2), (5, 4), (8, 8), (56, 44)):  # features; text; info; the merged features
        process = _start(_words(manifest, model_dir, output, *small_chunks), SIGNALLED, "SIGKILL", str(write))
        text, _ = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, text
        assert len(open_features(output / "train_utt2info.pt")) == with_info
    assert _run(manifest, model_dir, output, *small_chunks) == 0
    _assert_equal(_features(output), _features(tmp_path / "never killed"))
    assert not list(output.glob(".*")) and not list(output.glob("*.chunks")) and not list(output.glob("*.lock"))


@pytest.mark.slow
def test_a_stop_signal_saves_everything_and_says_how_to_go_on(
    tmp_path: Path, corpus: Path, model_dir: Path, never_stopped: Path
) -> None:
    words = _words(corpus, model_dir, tmp_path, "--save-mode", "single", "--chunk-utterances", "4")
    process = _start(words, SIGNALLED, "SIGTERM", "1")
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 143, text
    assert "stopping after this batch" in text and "stopped by a signal; everything so far is saved" in text
    saved = _features(tmp_path)
    assert len(saved["utt2info"]) in (4, 8)  # the first batch was being written, the second perhaps in work
    assert set(saved["utt2info"]) == set(saved["text_emb"]) == set(saved["whisper_feats"])
    assert utt2text_and_feature.main(shlex.split(text.strip().splitlines()[-1])[2:]) == 0
    _assert_equal(_features(tmp_path), _features(never_stopped))


def test_where_no_terminal_shows_a_bar_a_line_tells_how_far_it_is(
    tmp_path: Path, corpus: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taste.progress_bar.LINE_SECONDS", 0.0)
    assert _run(corpus, model_dir, tmp_path, "--subset-ratio", "0.3") == 0
    told = capsys.readouterr().err
    first, second = (line for line in told.splitlines() if line.startswith("extracting"))
    assert first.startswith("extracting: 4 of 7 utterances, ") and second.startswith("extracting: 7 of 7 utterances, ")
    assert first.endswith(" x real time") and "\r" not in told


def test_the_memory_guard_stops_saved_and_its_command_goes_on(
    tmp_path: Path, corpus: Path, model_dir: Path, never_stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(corpus, model_dir, tmp_path, "--memory-limit-percent", "0.1") == 75
    text = capsys.readouterr().out
    assert "stopped by the memory guard" in text and "over MEMORY_LIMIT_PERCENT" in text
    assert len(_features(tmp_path)["utt2info"]) == 20
    command = shlex.split(text.strip().splitlines()[-1])
    assert command[:2] == ["python", SCRIPT]
    assert utt2text_and_feature.main([*command[2:], "--memory-limit-percent", "100"]) == 0
    _assert_equal(_features(tmp_path), _features(never_stopped))


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_written(
    tmp_path: Path, corpus: Path, model_dir: Path, never_stopped: Path
) -> None:
    limit_bytes = 60_000  # a chunk of the later, longer recordings is larger, one of the first is not
    words = _words(corpus, model_dir, tmp_path, "--save-mode", "chunks", "--chunk-utterances", "4")
    process = _start(words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: cannot write" in text and "File too large" in text and "Traceback" not in text
    written = len(open_features(tmp_path / "train_whisper_feats.pt"))
    assert 0 < written < 22 and f"the {written} utterances written before are safe" in text
    assert not list(tmp_path.rglob(".*"))
    assert utt2text_and_feature.main(words) == 0
    _assert_equal(_features(tmp_path), _features(never_stopped))


def test_a_full_device_saves_what_was_done(
    tmp_path: Path,
    corpus: Path,
    model_dir: Path,
    never_stopped: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("--save-mode", "single", "--chunk-utterances", "8")
    encode, batches = WhisperEncoder.encode, itertools.count(1)

    def encode_three_batches(self: WhisperEncoder, waveforms: list[torch.Tensor]) -> Any:
        if next(batches) > 3:
            raise torch.OutOfMemoryError("no room")
        return encode(self, waveforms)

    with monkeypatch.context() as small_device:
        small_device.setattr(WhisperEncoder, "encode", encode_three_batches)
        assert _run(corpus, model_dir, tmp_path, *words) == 1
    assert "all before is saved" in capsys.readouterr().err
    assert all(len(values) == 12 for values in _features(tmp_path).values())
    assert _run(corpus, model_dir, tmp_path, *words) == 0
    _assert_equal(_features(tmp_path), _features(never_stopped))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_an_output_that_the_disk_cannot_hold_is_refused_at_the_start(
    tmp_path: Path, corpus: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine mounts no tmpfs")
    try:
        assert _run(corpus, model_dir, disk) == 1
        error = capsys.readouterr().err
        assert "cannot hold the output" in error and "0.00 GB free" in error and "--subset-ratio" in error
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_grown_manifest_computes_only_its_new_lines(
    tmp_path: Path, corpus: Path, model_dir: Path, never_stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    manifest = tmp_path / "train.jsonl"
    absolute = [line.replace("recordings/", f"{corpus.parent}/recordings/") for line in lines]
    manifest.write_text("".join(absolute[:12]), encoding="utf-8")
    assert _run(manifest, model_dir, tmp_path / "out", "--save-mode", "single") == 0
    manifest.write_text("".join(absolute), encoding="utf-8")
    capsys.readouterr()
    assert _run(manifest, model_dir, tmp_path / "out", "--save-mode", "single") == 0
    text = capsys.readouterr().out
    assert "22 utterances, 12 of them done before" in text and "this run: 10 utterances" in text
    _assert_equal(_features(tmp_path / "out"), _features(never_stopped))

    assert _run(manifest, model_dir, tmp_path / "out") == 0
    assert "this run: 0 utterances" in capsys.readouterr().out


def test_a_corrected_transcript_is_done_again_and_another_corpus_is_refused(
    tmp_path: Path, corpus: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, manifest, output = _rows(corpus)[:4], tmp_path / "train.jsonl", tmp_path / "out"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert _run(manifest, model_dir, output) == 0
    before = _features(output)
    rows[2]["text"] = "something else was said"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert _run(manifest, model_dir, output) == 0
    assert "1 transcripts have changed, u2 first" in capsys.readouterr().out
    after = _features(output)
    assert after["utt2info"].pop("u2")["text"] == "something else was said"
    assert not torch.equal(after["text_emb"].pop("u2"), before["text_emb"].pop("u2"))
    before["utt2info"].pop("u2")
    _assert_equal(after, before)

    rows[0]["text"] = "and this again"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    forget = FeatureWriter.forget
    with monkeypatch.context() as dying:  # between the two files

        def forget_text_only(self, utt_ids):
            if "utt2info" in self.output_path.name:
                raise OSError("killed here")
            forget(self, utt_ids)

        dying.setattr(FeatureWriter, "forget", forget_text_only)
        assert _run(manifest, model_dir, output) == 1
    assert _run(manifest, model_dir, output) == 0
    again, table = _features(output), text_embedding_table(model_dir)
    assert again["utt2info"]["u0"]["text"] == "and this again"
    assert torch.equal(again["text_emb"]["u0"], table[again["utt2info"]["u0"]["text_token"]])

    rows[1] |= {"text": "this is another corpus", "audio_path": rows[3]["audio_path"]}
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert _run(manifest, model_dir, output) == 1
    told = capsys.readouterr().err
    assert "1 utterances were done with another recording; u1 was" in told and "rm -r" in told and "_utt2s3" in told


def test_recordings_may_move_but_not_be_others(
    tmp_path: Path, corpus: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, manifest, output = _rows(corpus)[:4], tmp_path / "train.jsonl", tmp_path / "out"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert _run(manifest, model_dir, output) == 0
    moved = tmp_path / "moved.wav"
    moved.write_bytes(Path(rows[1]["audio_path"]).read_bytes())
    rows[1]["audio_path"] = str(moved)
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert _run(manifest, model_dir, output) == 0
    samples, rate = soundfile.read(moved)
    soundfile.write(moved, samples[: len(samples) // 2], rate)
    assert _run(manifest, model_dir, output) == 1
    assert "1 utterances were done with another recording; u1 was" in capsys.readouterr().err


def test_a_subset_is_taken_evenly(tmp_path: Path, corpus: Path, model_dir: Path, never_stopped: Path) -> None:
    assert _run(corpus, model_dir, tmp_path, "--subset_ratio", "0.2", "--save_mode", "chunks") == 0
    assert list(_features(tmp_path)["utt2info"]) == ["u0", "u5", "u11", "u16"]
    assert chunk_folder(tmp_path / "train_text_emb.pt").is_dir() and not (tmp_path / "train_text_emb.pt").exists()
    everything = _features(never_stopped)["text_emb"]
    for utt_id, value in _features(tmp_path)["text_emb"].items():
        assert torch.equal(value, everything[utt_id])


def test_features_of_other_models_are_never_mixed_in(
    tmp_path: Path, corpus: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(corpus, model_dir, tmp_path, "--subset-ratio", "0.1") == 0
    for change in (["--mid-layer", "3"], ["--feature-dtype", "float32"]):
        assert _run(corpus, model_dir, tmp_path, *change) == 1
        error = capsys.readouterr().err
        assert "made differently" in error and change[0][2:].replace("-", "_") in error and "rm -r" in error
    other = write_small_whisper(tmp_path / "other", seed=1)
    assert _run(corpus, model_dir, tmp_path, "--whisper-dir", str(other)) == 1
    assert "whisper: " in capsys.readouterr().err
    (tmp_path / "train_utt2info.made_with.json").unlink()
    assert _run(corpus, model_dir, tmp_path) == 1
    assert "which says what made them" in capsys.readouterr().err


def test_a_truncated_output_is_refused(
    tmp_path: Path, corpus: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(corpus, model_dir, tmp_path, "--subset-ratio", "0.1") == 0
    path = tmp_path / "train_whisper_feats.pt"
    path.write_bytes(path.read_bytes()[:-200])
    assert _run(corpus, model_dir, tmp_path) == 1
    assert f"{path}: truncated" in capsys.readouterr().err


def test_a_second_process_on_the_same_output_is_refused(
    tmp_path: Path, corpus: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FeatureWriter(tmp_path / "train_whisper_feats.pt"):
        assert _run(corpus, model_dir, tmp_path) == 1
    assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.lock"))


def test_wrong_usage_and_wrong_folders_say_what_to_do(
    tmp_path: Path, corpus: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        _run(corpus, model_dir, tmp_path, "--jsnl", "x")
    assert caught.value.code == 2

    def error_of(manifest: Path = corpus, folder: Path = model_dir, *more: str) -> str:
        capsys.readouterr()
        assert _run(manifest, folder, tmp_path, *more) == 1
        return capsys.readouterr().err

    assert "no such manifest" in error_of(tmp_path / "none.jsonl")
    assert "does not exist" in error_of(corpus, tmp_path / "nowhere")
    assert "setup_cosyvoice.py" in error_of(corpus, corpus.parent)
    assert "no Whisper folder" in error_of(corpus, model_dir, "--whisper-dir", str(corpus.parent))
    assert "choose 1 to 3" in error_of(corpus, model_dir, "--mid-layer", "6")
    assert "Whisper hears only 3 s" in error_of(corpus, model_dir, "--max-duration", "30")
    assert "SUBSET_RATIO is 2.0" in error_of(corpus, model_dir, "--subset-ratio", "2")
    assert "SAVE_MODE is 'zip'" in error_of(corpus, model_dir, "--save-mode", "zip")
    problems = error_of(corpus, model_dir, "--feature-dtype", "int8", "--batch-size", "0")
    assert "FEATURE_DTYPE" in problems and "BATCH_SIZE" in problems
    malformed = tmp_path / "bad.jsonl"
    malformed.write_text('{"audio_path": "a.wav"}\nnonsense\n')
    listed = error_of(malformed)
    assert "line 1: text is missing" in listed and "line 2: not JSON" in listed and "nonsense" in listed

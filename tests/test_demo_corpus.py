"""The demo corpus keeps the promises of its manifests."""

import json
import random
import runpy
import subprocess
from pathlib import Path

import pytest
import soundfile

from taste.manifest import Utterance, read_manifest

REPOSITORY = Path(__file__).parents[1]
CORPUS = REPOSITORY / "json"
MAKER = REPOSITORY / "CosyVoice" / "examples" / "tiny" / "make_demo_corpus.py"
VOICES = {"kal16", "awb", "rms", "slt"}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Utterance]]:
    return {split: read_manifest(CORPUS / f"{split}.jsonl") for split in ("train", "test")}


def test_every_recording_is_there_once_and_none_is_left_over(splits: dict[str, list[Utterance]]) -> None:
    listed = [item.audio_path.resolve() for items in splits.values() for item in items]
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.resolve() for path in (CORPUS / "demo_audio").rglob("*.flac")}


def test_recordings_are_16_khz_16_bit_mono_flac_of_one_to_six_seconds(splits: dict[str, list[Utterance]]) -> None:
    for item in (item for items in splits.values() for item in items):
        info = soundfile.info(item.audio_path)
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
        assert 1.3 <= info.duration <= 6.0, item.utt_id


def test_corpus_is_no_larger_than_its_script_allows() -> None:
    size_bytes = sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file())
    assert size_bytes <= runpy.run_path(str(MAKER))["_MAX_CORPUS_BYTES"]


def test_no_test_sentence_is_in_train(splits: dict[str, list[Utterance]]) -> None:
    train = {item.text.casefold().strip(" .?!") for item in splits["train"]}
    test = {item.text.casefold().strip(" .?!") for item in splits["test"]}
    assert (len(train), len(test)) == (60, 15)
    assert not train & test


def test_every_voice_reads_in_both_splits(splits: dict[str, list[Utterance]]) -> None:
    for items in splits.values():
        assert {item.speaker for item in items} == VOICES
        assert {item.language for item in items} == {"en"}


def test_manifests_are_those_of_the_script_and_its_default_seed() -> None:
    maker = runpy.run_path(str(MAKER))
    planned = {reading.utt_id: (reading.text, reading.voice) for reading in maker["plan_readings"](7)}
    lines = [line for split in ("train", "test") for line in (CORPUS / f"{split}.jsonl").read_text().splitlines()]
    entries = [json.loads(line) for line in lines]
    assert {entry["utt_id"]: (entry["text"], entry["speaker"]) for entry in entries} == planned


def test_a_machine_without_flite_is_told_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runpy.run_path(str(MAKER))["main"](["--output-dir", str(tmp_path)]) == 1
    assert "apt-get install -y flite" in capsys.readouterr().err


def test_making_one_recording_again_gives_the_committed_samples() -> None:
    maker = runpy.run_path(str(MAKER))
    try:
        flite = maker["find_flite"]()
    except FileNotFoundError:
        pytest.skip("flite is not installed")
    version = subprocess.run([flite, "--version"], capture_output=True, text=True, check=False).stdout
    if "flite-2.2" not in version:
        pytest.skip("another version of flite: the samples depend on it")
    lively = maker["enliven"](maker["plan_readings"](7), random.Random("7-words"), flite)
    reading = lively[2]
    committed, _ = soundfile.read(CORPUS / "demo_audio" / reading.voice / f"{reading.utt_id}.flac", dtype="float32")
    made = maker["synthesise"](reading, flite).waveform
    assert made.shape == committed.shape
    assert abs(made - committed).max() < 2 / 32768  # 16-bit rounding

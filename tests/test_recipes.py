"""The recipes: flags, marks, missing input, interruption, download, lists of LibriTTS, the assembled model."""

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch

from taste.manifest import read_manifest
from taste.recordings import read_table

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "CosyVoice" / "examples"
LIBRITTS = EXAMPLES / "libritts" / "cosyvoice"
TINY = EXAMPLES / "tiny"
DEADLINE_SECONDS = 120
SHARED = REPOSITORY / "CosyVoice" / "cosyvoice" / "utils" / "settings.sh"
SHELL_SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), SHARED, REPOSITORY / "s3.sh"])

SMALL_RECIPE = """#!/usr/bin/env bash
# A recipe of three steps.
set -euo pipefail
source "{repository}/CosyVoice/cosyvoice/utils/settings.sh"
source "{repository}/CosyVoice/examples/recipe_lib.sh"

STAGE="${{STAGE:-0}}"            # first stage
STOP_STAGE="${{STOP_STAGE:-2}}"  # last stage
FORCE="${{FORCE:-false}}"        # again
WORK_DIR="${{WORK_DIR:-work}}"   # folder
WORDS="${{WORDS:-one}}"          # what the first file says

say() {{ needs 0 "$WORK_DIR/first"; gives "$WORK_DIR/$1"; step "stage2-$1" bash "$WORK_DIR/job.sh" "$WORK_DIR/$1"; }}

begin_recipe "$@"
if stage 0 "first"; then
    gives "$WORK_DIR/first"
    clears "$WORK_DIR/first"
    step stage0 bash -c 'echo "$0" >>"$1"' "$WORDS" "$WORK_DIR/first"
fi
if stage 1 "second"; then
    needs 0 "$WORK_DIR/first"
    gives "$WORK_DIR/second"
    step stage1 cp "$WORK_DIR/first" "$WORK_DIR/second"
fi
if stage 2 "side by side"; then together 2 say a b c; fi
end_recipe
"""


def start(*words: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHON": sys.executable} | environment,
        start_new_session=True,  # a process group of its own, as under a terminal
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    text, _ = process.communicate(timeout=DEADLINE_SECONDS)
    return process.returncode, text


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs a small recipe with these words; its side-by-side jobs write a file each."""
    script = tmp_path / "run.sh"
    script.write_text(SMALL_RECIPE.format(repository=REPOSITORY))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "job.sh").write_text('echo "$1" >"$1"\n')
    return lambda *words: finish(start("bash", script, "--work-dir", tmp_path / "work", *words))


# ---- marks


def test_steps_are_skipped_until_their_command_or_an_input_changes(
    recipe: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    assert recipe()[0] == 0
    assert (tmp_path / "work" / "second").read_text() == "one\n"
    _, text = recipe()
    assert text.count("done before") == 2  # and three more in the logs of the jobs
    assert (tmp_path / "work" / "log" / "say-a.log").read_text().count("done before") == 1

    _, text = recipe("--words", "two", "--stop-stage", "1")  # another command, and so another input of the next step
    assert text.count("done before") == 0
    assert (tmp_path / "work" / "second").read_text() == "one\ntwo\n"


def test_force_removes_the_result_and_makes_it_again(recipe: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    recipe("--stop-stage", "0")
    recipe("--stop-stage", "0", "--force")
    assert (tmp_path / "work" / "first").read_text() == "one\n"


def test_a_step_whose_result_is_gone_is_done_again(recipe: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    recipe("--stop-stage", "1")
    (tmp_path / "work" / "second").unlink()
    assert recipe("--stop-stage", "1")[0] == 0
    assert (tmp_path / "work" / "second").exists()


def test_a_missing_input_names_the_stage_that_makes_it(recipe: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, text = recipe("--stage", "1", "--words", "a b")
    assert code == 1
    assert f"{tmp_path}/work/first (stage 0 makes it)" in text
    assert text.rstrip().endswith("--stage 1 --words a\\ b --stage 0")


def test_a_failed_job_does_not_stop_the_others_but_the_recipe(
    recipe: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "work" / "job.sh").write_text('[[ "$1" != */a ]] || { echo "no luck"; exit 7; }\necho >"$1"\n')
    code, text = recipe()
    assert code == 7
    assert "a failed with exit code 7" in text and "no luck" in text
    assert (tmp_path / "work" / "b").exists() and (tmp_path / "work" / "c").exists()
    assert not (tmp_path / "work" / ".done" / "stage2-a.done").exists()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_jobs_side_by_side_and_the_same_command_goes_on(
    recipe: Callable[..., tuple[int, str]], tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    job = (
        "import signal, sys, time, pathlib\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "def stop(number, frame):\n"
        "    path.with_suffix('.saved').touch()\n"
        "    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "path.with_suffix('.begun').touch()\n"
        "time.sleep(100)\n"
    )
    work = tmp_path / "work"
    (work / "job.py").write_text(job)
    (work / "job.sh").write_text(f'exec "{sys.executable}" "{work}/job.py" "$1"\n')
    process = start("bash", tmp_path / "run.sh", "--work-dir", work)
    wait_for(lambda: (work / "a.begun").exists() and (work / "b.begun").exists(), process)
    os.killpg(process.pid, number)
    code, text = finish(process)
    assert code == expected, text
    assert (work / "a.saved").exists() and (work / "b.saved").exists()
    assert not (work / "c.begun").exists()

    (work / "job.sh").write_text('echo >"$1"\n')
    assert recipe()[0] == 0
    assert (work / "c").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_launcher_that_ends_with_1_when_it_is_stopped_was_stopped(tmp_path: Path, number: int, code: int) -> None:
    launcher = "import signal, sys, time; signal.signal(signal.SIGINT, stop := lambda *_: sys.exit(1)); "
    launcher += "signal.signal(signal.SIGTERM, stop); print('ready', flush=True); time.sleep(60)"
    script = tmp_path / "run.sh"
    script.write_text(
        f'set -euo pipefail\nsource {REPOSITORY}/CosyVoice/cosyvoice/utils/settings.sh\nrun_stoppable "$1" -c "$2"\n'
    )
    process = subprocess.Popen(["bash", script, sys.executable, launcher], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.wait(20)
    assert process.returncode == code


def test_two_recipes_do_not_work_in_one_folder(recipe: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "job.sh").write_text('touch "$1.begun"; sleep 100 & wait $!\n')
    process = start("bash", tmp_path / "run.sh", "--work-dir", work)
    wait_for(lambda: (work / "a.begun").exists(), process)
    code, text = recipe()
    os.killpg(process.pid, signal.SIGTERM)
    finish(process)
    assert code == 1
    assert "another run.sh works in" in text


# ---- the two recipes' own words


@pytest.mark.parametrize(
    ("script", "words", "code", "message"),
    [
        (LIBRITTS, ("--no-such-flag", "1"), 2, "there is no flag --no-such-flag"),
        (LIBRITTS, ("--stage", "two"), 2, "STAGE is 'two'"),
        (LIBRITTS, ("--stage", "5", "--stop-stage", "4"), 2, "--stage 5 comes after --stop-stage 4"),
        (LIBRITTS, ("--parts", "train-clean-7"), 2, "PARTS has 'train-clean-7'"),
        (LIBRITTS, ("--models", "vocoder"), 2, "MODELS has 'vocoder'"),
        (LIBRITTS, ("--num-processes", "0"), 2, "NUM_PROCESSES is '0'"),
        (LIBRITTS, ("--stage", "0"), 1, "(stage -1 makes it)"),
        (LIBRITTS, ("--stage", "3"), 1, "(stage 0 makes it)"),
        (LIBRITTS, ("--stage", "5"), 1, "(stage 3 makes it)"),
        (LIBRITTS, ("--stage", "6"), 1, "(stage 5 makes it)"),
        (LIBRITTS, ("--help",), 0, "--stop-stage"),
        (LIBRITTS, ("--num-workers", "some"), 2, "NUM_WORKERS is 'some'"),
        (LIBRITTS, ("--batch-size", "0"), 2, "BATCH_SIZE is '0'"),
        (TINY, ("--jobs", "none"), 2, "JOBS is 'none'"),
        (TINY, ("--lively-hours", "some"), 2, "LIVELY_HOURS is 'some'"),
        (TINY, ("--stage", "1", "--device", "cpu"), 1, "(stage 0 makes it)"),
        (TINY, ("--stage", "3"), 1, "(stage 2 makes it)"),
        (TINY, ("--stage", "6"), 1, "stage6"),
        (TINY, ("--stage", "8"), 1, "(stage 7 makes it)"),
        (TINY, ("--help",), 0, "--minutes-flow"),
    ],
)
def test_recipes_say_what_is_wrong(
    script: Path, words: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    folders = () if "--help" in words else ("--work-dir", tmp_path / "work")
    if script == LIBRITTS and folders:
        folders += ("--corpus-dir", tmp_path / "corpus", "--model-dir", tmp_path / "model")
    got_code, text = finish(start("bash", script / "run.sh", *folders, *words))
    if words == ("--stage", "6") and script == TINY:
        text += (tmp_path / "work" / "log" / "train_model-llm.log").read_text()
    assert got_code == code, text
    assert message in text


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_have_no_mistakes(path: Path) -> None:
    try:
        check = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed")
    assert check.returncode == 0, check.stdout


# ---- download


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A server's folder with one part of LibriTTS, and its checksum beside it."""
    wav = tmp_path / "made" / "LibriTTS" / "dev-clean" / "84" / "121123" / "84_121123_000007_000001.wav"
    wav.parent.mkdir(parents=True)
    wav.write_bytes(np.random.default_rng(0).bytes(50_000))
    (tmp_path / "server").mkdir()
    path = tmp_path / "server" / "dev-clean.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(tmp_path / "made" / "LibriTTS", "LibriTTS")
    (tmp_path / "sums").write_text(f"{hashlib.md5(path.read_bytes()).hexdigest()}  dev-clean.tar.gz\n")
    return path


def fetch(archive: Path, corpus: Path) -> tuple[int, str]:
    words = (LIBRITTS / "local" / "download_and_untar.sh", corpus, f"file://{archive.parent}", "dev-clean")
    return finish(start("bash", *words, MD5SUMS=str(archive.parents[1] / "sums")))


def test_a_broken_off_download_goes_on_and_is_complete_only_when_checked(archive: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "dev-clean.tar.gz.part").write_bytes(archive.read_bytes()[:20_000])
    code, text = fetch(archive, corpus)
    assert code == 0, text
    assert "byte position 20000" in text
    unpacked = corpus / "LibriTTS" / "dev-clean"
    assert sorted(path.name for path in unpacked.iterdir()) == [".complete", "84"]
    assert sorted(path.name for path in corpus.iterdir()) == ["LibriTTS", "dev-clean.tar.gz"]
    assert "is there already" in fetch(archive, corpus)[1]


def test_a_download_with_another_checksum_is_refused_and_removed(archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    code, text = fetch(archive, tmp_path / "corpus")
    assert code == 1
    assert "another checksum" in text
    assert not list((tmp_path / "corpus").glob("*.gz*"))
    assert not (tmp_path / "corpus" / "LibriTTS" / "dev-clean").exists()


def test_a_folder_from_elsewhere_is_not_replaced(archive: Path, tmp_path: Path) -> None:
    mine = tmp_path / "corpus" / "LibriTTS" / "dev-clean" / "mine.wav"
    mine.parent.mkdir(parents=True)
    mine.touch()
    code, text = fetch(archive, tmp_path / "corpus")
    assert code == 1 and "comes from elsewhere" in text
    assert mine.exists()


def test_checksums_of_all_seven_parts_are_there() -> None:
    lines = [line.split() for line in (LIBRITTS / "local" / "md5sums.txt").read_text().splitlines()]
    assert all(len(checksum) == 32 and int(checksum, 16) >= 0 for checksum, _ in lines)
    defaults = next(line for line in (LIBRITTS / "run.sh").read_text().splitlines() if line.startswith("PARTS="))
    assert all(name.removesuffix(".tar.gz") in defaults for _, name in lines) and len(lines) == 7


# ---- LibriTTS' layout


def test_a_manifest_laid_out_as_libritts_is_listed_with_its_texts_and_speakers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out = load_script(LIBRITTS / "local" / "manifest_to_libritts.py")
    prepare = load_script(LIBRITTS / "local" / "prepare_data.py")
    manifest = REPOSITORY / "json" / "test.jsonl"
    assert (
        lay_out.main(["--manifest", str(manifest), "--root", str(tmp_path), "--part", "dev-clean", "--stop", "5"]) == 0
    )
    part, lists = tmp_path / "LibriTTS" / "dev-clean", tmp_path / "data"
    assert prepare.main(["--src_dir", str(part), "--des_dir", str(lists)]) == 0

    utterances = read_manifest(manifest)[:5]
    texts, speakers, wavs = (read_table(lists / name) for name in ("text", "utt2spk", "wav.scp"))
    assert sorted(texts.values()) == sorted(utterance.text for utterance in utterances)
    assert set(speakers.values()) == {utterance.speaker for utterance in utterances}
    assert list(texts) == list(wavs) == list(speakers) == sorted(texts)
    joined = {utt: speaker for speaker, utts in read_table(lists / "spk2utt").items() for utt in utts.split()}
    assert joined == speakers
    for utt_id, path in wavs.items():
        original = next(item for item in utterances if utt_id.endswith(item.utt_id.replace("_", "-")))
        assert np.array_equal(soundfile.read(path)[0], soundfile.read(original.audio_path)[0])


def test_a_recording_without_text_is_listed_and_left_out(tmp_path: Path) -> None:
    prepare = load_script(LIBRITTS / "local" / "prepare_data.py")
    folder = tmp_path / "part" / "84" / "1"
    folder.mkdir(parents=True)
    for name in ("84_1_0", "84_1_1", "84_1_2"):
        (folder / f"{name}.wav").touch()
    (folder / "84_1_0.normalized.txt").write_text("Text of two\nlines.\n")
    (folder / "84_1_1.normalized.txt").write_text("\n")
    assert prepare.main(["--src_dir", str(tmp_path / "part"), "--des_dir", str(tmp_path / "data")]) == 3
    assert read_table(tmp_path / "data" / "text") == {"84_1_0": "Text of two lines."}
    unusable = [json.loads(line) for line in (tmp_path / "data" / "unusable.jsonl").read_text().splitlines()]
    assert [Path(entry["audio_path"]).stem for entry in unusable] == ["84_1_1", "84_1_2"]


# ---- the assembled model


def test_speakers_are_the_voices_then_everyone(tmp_path: Path) -> None:
    assemble = load_script(TINY / "assemble.py")
    (tmp_path / "utt2spk").write_text("a slt-01\nb slt-00\nc awb-00\nd awb-00\ne awb-00\n")
    vectors = {name: [float(number)] * 192 for number, name in enumerate("abcd")}  # e failed
    torch.save(vectors, tmp_path / "utt2embedding.pt")
    assemble.write_speakers(tmp_path / "spk2info.pt", tmp_path)
    speakers = torch.load(tmp_path / "spk2info.pt", weights_only=True)
    means = {name: value["embedding"][0, 0].item() for name, value in speakers.items()}
    assert list(means.items()) == [("slt", 0.5), ("awb", 2.5), ("awb-00", 2.5), ("slt-00", 1.0), ("slt-01", 0.0)]
    assert {value["embedding"].shape for value in speakers.values()} == {(1, 192)}


def test_a_model_that_is_too_large_is_refused(tmp_path: Path) -> None:
    assemble = load_script(TINY / "assemble.py")
    (tmp_path / "llm.pt").write_bytes(bytes(1_500_000))
    assert assemble.check_sizes(tmp_path, 2.0, 1.6) == pytest.approx(1.5)
    for limits in ((1.0, 2.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match=r"1\.50 MB  llm\.pt"):
            assemble.check_sizes(tmp_path, *limits)


def test_weights_that_do_not_fit_float16_are_refused(tmp_path: Path) -> None:
    assemble = load_script(TINY / "assemble.py")
    from cosyvoice.utils.config import load_config

    config = TINY / "conf" / "cosyvoice.yaml"
    weights = load_config(config, ["hift"])["hift"].state_dict()
    torch.save({f"generator.{key}": value for key, value in weights.items()}, tmp_path / "hifigan.pt")
    assemble.write_half(tmp_path / "hift.pt", config, "hift", tmp_path / "hifigan.pt")
    halves = torch.load(tmp_path / "hift.pt", weights_only=True)
    assert halves.keys() == weights.keys()
    assert {value.dtype for value in halves.values() if value.is_floating_point()} == {torch.float16}

    weights["conv_post.bias"][0] = 1e6
    torch.save(weights, tmp_path / "hifigan.pt")
    with pytest.raises(ValueError, match=r"conv_post\.bias"):
        assemble.write_half(tmp_path / "hift.pt", config, "hift", tmp_path / "hifigan.pt")


def test_assembly_without_the_stages_names_them_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assemble = load_script(TINY / "assemble.py")
    assert assemble.main(["--work-dir", str(tmp_path), "--output", str(tmp_path / "model")]) == 1
    text = capsys.readouterr().err
    assert "taste.pt" not in text
    assert all(f"(stage {number})" in text for number in (1, 2, 3, 6, 7))
    assert not list(tmp_path.iterdir())


def test_compressed_weights_are_read_as_others_are_and_are_smaller(tmp_path: Path) -> None:
    assemble = load_script(TINY / "assemble.py")
    from cosyvoice.utils.model_dir import read_torch_file

    state = {"signs": torch.randn(2000, 64).sign().half(), "steps": torch.tensor(3), "rows": torch.randn(4, 6)[:, ::2]}
    for name in ("a.pt", "b.pt"):
        assemble.save_compressed(state, tmp_path / name)
    torch.save(state, tmp_path / "plain.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert (tmp_path / "a.pt").stat().st_size < 0.2 * (tmp_path / "plain.pt").stat().st_size
    for read in (read_torch_file, lambda path: torch.load(path, weights_only=True)):
        found = read(tmp_path / "a.pt")
        assert found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("trained", [True, False])
def test_the_parts_that_hear_a_recording_are_taken_where_they_were_trained(tmp_path: Path, trained: bool) -> None:
    assemble = load_script(TINY / "assemble.py")
    from cosyvoice.utils.config import load_config

    work, config = tmp_path / "work", TINY / "conf" / "cosyvoice.yaml"
    others = ("s3_tokenizer/speech_tokenizer_v1.onnx", "speaker_encoder/campplus.onnx", "corpus/train/utt2spk")
    for name in (*others, *(f"whisper/{name}" for name in assemble._WHISPER_FILES)):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("a slt-00\n")
    torch.save({"a": [1.0] * 192}, work / "corpus/train/utt2embedding.pt")
    for name, part in (("llm", "llm"), ("flow", "flow"), ("hifigan", "hift")):
        (work / "exp" / name).mkdir(parents=True)
        torch.save(load_config(config, [part])[part].state_dict(), work / "exp" / name / f"{name}.pt")
    if trained:
        torch.save({"parts": torch.zeros(1000)}, work / "taste.pt")
    (tmp_path / "model").mkdir()
    assemble.build_folder(tmp_path / "model", work, config)
    assert (tmp_path / "model" / "llm.pt").is_file()
    assert (tmp_path / "model" / "taste.pt").exists() == trained
    if trained:
        written = [torch.load(folder / "taste.pt", weights_only=True)["parts"] for folder in (work, tmp_path / "model")]
        assert torch.equal(*written)
        assert 4 * (tmp_path / "model" / "taste.pt").stat().st_size < (work / "taste.pt").stat().st_size


def test_the_readme_says_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    assemble = load_script(TINY / "assemble.py")
    report = tmp_path / "work" / "evaluation" / "test" / "report.md"
    report.parent.mkdir(parents=True)
    report.write_text(
        "# title\n\n| measure | value | wanted |\n| --- | --- | --- |\n| word error | 12 % | 15 |\n\n    command\n"
    )
    log = tmp_path / "work" / "exp" / "llm" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    entries = [{"tag": "TRAIN", "epoch": 0, "step": 5, "loss": 1.0}]
    entries += [
        {"tag": "CV", "epoch": epoch, "step": 10 * epoch, "loss": loss, "loss_with_wrong_text": loss + 1}
        for epoch, loss in enumerate((3, 2, 2.5))
    ]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (tmp_path / "model").mkdir()
    assemble.write_readme(tmp_path / "model", tmp_path / "work", "CosyVoice-tiny")
    text = (tmp_path / "model" / "README.md").read_text()
    assert "| word error | 12 % | 15 |" in text
    assert "| llm | 3 | 20 | 2.0000 | 3.0000 |" in text
    assert "| flow | not measured yet |" in text
    assert "vowels of its own" not in text
    split = {"hours": 1.5, "utterances": 9, "vocabulary": 7}
    counts = {"speakers": 3, "voices": ["slt"], "train": split, "test": split, "lively": split}
    (tmp_path / "work" / "corpus").mkdir()
    (tmp_path / "work" / "corpus" / "corpus.json").write_text(json.dumps(counts))
    assemble.write_readme(tmp_path / "model", tmp_path / "work", "CosyVoice-tiny")
    assert (
        "1.50 hours in which each word has a rate and vowels of its own"
        in (tmp_path / "model" / "README.md").read_text()
    )


# ---- the words that the recipes give their tools


class Understood(Exception):  # noqa: N818  (no error)
    """The tool's parser took every word."""


def words_of_recipe(run_sh: Path, tmp_path: Path, outputs: str, *words: str | Path) -> list[list[str]]:
    """Run a recipe with an interpreter that notes its words and makes empty files; gives the words of each call."""
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'printf "%s\\0" "$@" >>"{tmp_path}/words" && printf "\\n\\0" >>"{tmp_path}/words"\n'
        f'cd "{tmp_path}/work" && mkdir -p $(dirname {outputs}) && touch {outputs}\n'
    )
    python.chmod(0o755)
    code, text = finish(start("bash", run_sh, "--work-dir", tmp_path / "work", "--python", python, *words))
    assert code == 0, text
    calls = (tmp_path / "words").read_text().split("\n\0")
    return [call.rstrip("\0").split("\0") for call in calls if call]


def expect_understood(calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each script its words; its parser must take them all."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(self: argparse.ArgumentParser, *words: object) -> None:
        parse(self, *words)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    for script, *words in calls:
        with pytest.raises(Understood):
            load_script(Path(script)).main(words)


def test_libritts_gives_its_tools_words_they_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train-clean-100", "dev-clean", "test-clean"):
        (tmp_path / "corpus" / "LibriTTS" / part).mkdir(parents=True)
    model = tmp_path / "model"
    model.mkdir()
    for name in ("campplus.onnx", "speech_tokenizer_v1.onnx", "llm.pt", "flow.pt", "hift.pt"):
        (model / name).touch()
    outputs = (
        "data/{train-clean-100,dev-clean,test-clean}/{wav.scp,text,utt2spk,spk2utt,utt2embedding.pt,spk2embedding.pt,"
        "utt2speech_token.pt,parquet/data.list,parquet/utt2data.list} exp/inference/{sft,zero_shot}/wav.scp "
        "exp/{llm/llm,flow/flow,hifigan/hifigan}.pt exp/{llm,flow,hifigan}/metrics.jsonl"
    )
    words = ("--parts", "train-clean-100 dev-clean test-clean", "--max-steps", "3", "--max-epoch", "2", "--stage", "0")
    folders = ("--corpus-dir", tmp_path / "corpus", "--model-dir", model, "--skip-incomplete", "--batch-size", "5")
    calls = words_of_recipe(LIBRITTS / "run.sh", tmp_path, outputs, *words, *folders)
    assert [Path(call[0]).name for call in calls] == [
        *["prepare_data.py"] * 3,
        *["extract_embedding.py"] * 3,
        *["extract_speech_token.py"] * 3,
        *["make_parquet_list.py"] * 3,
        *["inference.py"] * 2,
        *["train.py"] * 3,
        *["average_model.py"] * 3,
        "export_jit.py",
        "export_onnx.py",
    ]
    assert {path.name for path in (tmp_path / "work" / "exp" / "model").iterdir()} >= {"cosyvoice.yaml", "hift.pt"}
    for tool, flag, value in (("extract_speech_token.py", "--batch_size", "5"), ("train.py", "--num_workers", "2")):
        for call in calls:
            if call[0].endswith(tool):
                assert call[call.index(flag) + 1] == value
    expect_understood(calls, monkeypatch)


def test_libritts_starts_several_processes_through_torchrun(tmp_path: Path) -> None:
    parts = ("train-clean-100", "dev-clean")
    for part in parts:
        shards = tmp_path / "work" / "data" / part / "parquet"
        shards.mkdir(parents=True)
        (shards / "data.list").write_text(f"{part}.tar\n")
    words = ("--parts", " ".join(parts), "--models", "llm", "--from-scratch", "--num-processes", "4")
    outputs = "exp/llm/metrics.jsonl"
    (call,) = words_of_recipe(LIBRITTS / "run.sh", tmp_path, outputs, *words, "--stage", "5", "--stop-stage", "5")
    assert call[:7] == ["-m", "torch.distributed.run", "--standalone", "--nnodes", "1", "--nproc_per_node", "4"]
    assert call[7].endswith("bin/train.py") and "--checkpoint" not in call
    assert (tmp_path / "work" / "data" / "train.data.list").read_text() == "train-clean-100.tar\n"


@pytest.mark.parametrize("lively_hours", ["0.5", "0.0"])
def test_the_tiny_recipe_gives_its_tools_words_they_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lively_hours: str
) -> None:
    (tmp_path / "flite").write_text("#!/bin/sh\n")
    (tmp_path / "flite").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    outputs = (
        "corpus/{train,phrases,lively,dev,test,lively_dev}/{wav.scp,text,utt2spk,spk2utt,phones,utt2embedding.pt,"
        "spk2embedding.pt,utt2speech_token.pt,parquet/data.list} s3_tokenizer/speech_tokenizer_v1.onnx "
        "speaker_encoder/campplus.onnx exp/{llm/llm,flow/flow,hifigan/hifigan}.pt exp/{flow,hifigan}/metrics.jsonl "
        "llm_start/llm.pt flow_start/flow.pt whisper/model.safetensors "
        "CosyVoice-tiny/{README.md,spk2info.pt,llm.pt,flow.pt,hift.pt} evaluation/{test,real}/report.md"
    )
    (tmp_path / "real.jsonl").touch()
    words = ("--device", "cpu", "--tokenizer-epochs", "2", "--open-epochs", "1", "--speaker-epochs", "1", "--jobs", "1")
    words += ("--evaluated", "2", "--max-epoch", "2", "--max-steps", "3")
    words += ("--lively-hours", lively_hours)
    manifest = ("--real-manifest", tmp_path / "real.jsonl")
    calls = words_of_recipe(TINY / "run.sh", tmp_path, outputs, *words, *manifest)
    lively = float(lively_hours) > 0
    assert [Path(call[0]).name for call in calls] == [
        "make_corpus.py",
        "train_s3_tokenizer.py",
        "train_speaker_encoder.py",
        *["extract_embedding.py"] * (6 if lively else 4),
        *["extract_speech_token.py"] * (6 if lively else 4),
        *["make_parquet_list.py"] * (3 if lively else 2),
        *["start_llm.py", "teach_reading.py"],
        *["train.py", "average_model.py"],
        *["start_flow.py", "train.py", "average_model.py"],
        "train_whisper.py",
        "assemble.py",
        *["evaluate.py"] * 2,
        "assemble.py",
    ]
    (teaching,) = (call for call in calls if call[0].endswith("teach_reading.py"))
    splits = teaching[teaching.index("--splits") + 1]
    assert splits == ("train,phrases,lively" if lively else "train,phrases")
    assert teaching[teaching.index("--steps") + 1] == "3" and "--minutes" not in teaching
    (flow,) = (call for call in calls if call[0].endswith("train.py") and "flow" in call)
    data = Path(flow[flow.index("--train_data") + 1])
    assert data == tmp_path / "work" / ("flow_data.list" if lively else "corpus/train/parquet/data.list")
    assert flow[flow.index("--checkpoint") + 1] == str(tmp_path / "work" / "flow_start" / "flow.pt")
    expect_understood(calls, monkeypatch)


def test_flow_learns_from_lively_speech_too_and_the_minutes_of_the_language_model_are_its_own(tmp_path: Path) -> None:
    corpus = tmp_path / "work" / "corpus"
    for split in ("train", "phrases", "lively", "dev"):
        (corpus / split / "parquet").mkdir(parents=True)
        (corpus / split / "parquet" / "data.list").write_text(f"{split}.tar\n")
        for name in ("wav.scp", "text", "utt2spk", "phones", "utt2embedding.pt", "utt2speech_token.pt"):
            (corpus / split / name).touch()
    (tmp_path / "work" / "s3_tokenizer").mkdir()
    (tmp_path / "work" / "s3_tokenizer" / "speech_tokenizer_v1.onnx").touch()
    outputs = (
        "exp/{llm/llm,flow/flow,hifigan/hifigan}.pt exp/{flow,hifigan}/metrics.jsonl {llm_start/llm,flow_start/flow}.pt"
    )
    words = ("--stage", "6", "--stop-stage", "6", "--jobs", "1", "--minutes-llm", "7", "--batch-factor", "4")
    calls = words_of_recipe(TINY / "run.sh", tmp_path, outputs, *words)
    assert (tmp_path / "work" / "flow_data.list").read_text() == "train.tar\nlively.tar\n"
    (teaching,) = (call for call in calls if call[0].endswith("teach_reading.py"))
    assert teaching[teaching.index("--minutes") + 1] == "7" and "--steps" not in teaching
    assert teaching[teaching.index("--batch-positions") + 1] == "8000"


@pytest.mark.parametrize(("epochs", "averaged"), [(0, 5), (1, 1), (4, 1), (5, 2), (16, 4), (17, 5), (200, 5)])
def test_the_first_epochs_are_not_averaged_in(tmp_path: Path, epochs: int, averaged: int) -> None:
    for number in range(epochs):
        (tmp_path / f"epoch_{number}.yaml").touch()
    (tmp_path / "epoch_0_step_10.yaml").touch()
    script = f'set -euo pipefail; source "{EXAMPLES / "recipe_lib.sh"}"; at_most_epochs "{tmp_path}" 5'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{averaged}\n"

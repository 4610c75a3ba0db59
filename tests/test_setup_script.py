"""setup_cosyvoice.py as its users run it: what it prints, what it leaves, how it ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import Fault, HubServer
from published_model import COSYVOICE_REPOSITORIES, WHISPER_REPOSITORIES, published, write_folder

import setup_cosyvoice

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "setup_cosyvoice.py"
TINY = REPOSITORY / "CosyVoice-tiny"
CLOSED_ADDRESS = "http://127.0.0.1:9"


def environment(tmp_path: Path, modelscope: str = CLOSED_ADDRESS, hugging_face: str = CLOSED_ADDRESS) -> dict[str, str]:
    """The user's environment, but for where the hubs are and where their clients keep their own files."""
    return {
        **os.environ,
        "HF_ENDPOINT": hugging_face,
        "HF_HOME": str(tmp_path / "home"),
        "MODELSCOPE_ENDPOINT": modelscope,
        "MODELSCOPE_HOME": str(tmp_path / "home"),
        "MODELSCOPE_CACHE": str(tmp_path / "home"),
    }


def run(*flags: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def place_all(folder: Path) -> None:
    repositories = published("ModelScope")
    write_folder(folder, repositories[COSYVOICE_REPOSITORIES["ModelScope"]])
    write_folder(folder / "whisper", repositories[WHISPER_REPOSITORIES["ModelScope"]])


def test_without_arguments_it_fills_cosyvoice_300m_in_the_working_directory(tmp_path):
    with HubServer(published("ModelScope")) as modelscope, HubServer(published("Hugging Face")) as hugging_face:
        done = run(env=environment(tmp_path, modelscope.address, hugging_face.address), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CosyVoice-300M is complete" in done.stdout
    assert (tmp_path / "CosyVoice-300M" / "llm.pt").is_file()
    assert (tmp_path / "CosyVoice-300M" / "whisper" / "model.safetensors").is_file()

    again = run(env=environment(tmp_path), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "no hub is asked" in again.stdout


def test_without_a_network_it_ends_soon_with_the_steps_to_take_by_hand(tmp_path):
    started = time.monotonic()
    done = run(env=environment(tmp_path), cwd=tmp_path)
    assert time.monotonic() - started < 15  # 1 s here; the machine may be busy
    assert done.returncode == 1
    for step in (
        "modelscope download iic/CosyVoice-300M cosyvoice.yaml llm.pt",
        "hf download FunAudioLLM/CosyVoice-300M cosyvoice.yaml llm.pt",
        "modelscope download AI-ModelScope/whisper-large-v3 config.json model.safetensors",
        "hf download openai/whisper-large-v3 config.json model.safetensors",
        "git lfs install",
        "CosyVoice-300M/whisper/model.safetensors",
        "python setup_cosyvoice.py --verify-only --deep-verify --model-dir CosyVoice-300M",
    ):
        assert step in done.stderr
    assert "Traceback" not in done.stderr
    assert "://" not in done.stdout + done.stderr
    assert not (tmp_path / "CosyVoice-300M").exists()


@pytest.mark.slow
@pytest.mark.parametrize("hub, client", [("ModelScope", "modelscope"), ("Hugging Face", "hf")])
def test_the_commands_it_prints_for_doing_it_by_hand_work(tmp_path, hub, client):
    printed = run(env=environment(tmp_path), cwd=tmp_path).stderr
    commands = [line.split() for line in printed.splitlines() if line.strip().startswith(f"{client} download ")]
    assert len(commands) == 2

    with HubServer(published(hub)) as server:
        for words in commands:
            program = Path(sys.executable).with_name(words[0])
            env = environment(tmp_path, server.address, server.address)
            done = subprocess.run(
                [str(program), *words[1:]],
                env=env,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr
    checked = run("--verify-only", env=environment(tmp_path), cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout


def test_a_run_that_was_killed_in_the_middle_of_a_file_goes_on_there(tmp_path):
    repositories = published("Hugging Face", llm_bytes=25_000_000)
    env_of = lambda server: environment(tmp_path, hugging_face=server.address)  # noqa: E731 - one line, used twice
    with HubServer(repositories) as server:
        server.faults["llm.pt"] = Fault(stall_after_bytes=15_000_000)
        with subprocess.Popen(
            [sys.executable, str(SCRIPT), "--no-whisper"],
            env=env_of(server),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as first:
            assert server.stalled.wait(60)
            time.sleep(0.5)  # let the client write what it has
            first.send_signal(signal.SIGKILL)
        assert not (tmp_path / "CosyVoice-300M" / "llm.pt").exists()

        second = run("--no-whisper", env=env_of(server), cwd=tmp_path)
        assert second.returncode == 0, second.stderr
        assert [request.range for request in server.fetches_of("llm.pt")] == [None, "bytes=10485760-"]
    expected = repositories[COSYVOICE_REPOSITORIES["Hugging Face"]]["llm.pt"]
    assert (tmp_path / "CosyVoice-300M" / "llm.pt").read_bytes() == expected
    assert not (tmp_path / "CosyVoice-300M" / ".download").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop_says_how_to_go_on(tmp_path, number, code):
    with HubServer(published("Hugging Face", llm_bytes=25_000_000)) as server:
        server.faults["llm.pt"] = Fault(stall_after_bytes=15_000_000)
        with subprocess.Popen(
            [sys.executable, str(SCRIPT), "--no-whisper"],
            env=environment(tmp_path, hugging_face=server.address),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert server.stalled.wait(60)
            process.send_signal(number)
            _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert told.rstrip().endswith("stopped; the same command goes on where this run was") and "Traceback" not in told


def test_verify_only_uses_no_network_and_writes_nothing(tmp_path, no_network, capsys):
    place_all(tmp_path / "model")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    assert setup_cosyvoice.main(["--verify-only", "--model-dir", str(tmp_path / "model")]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "ok      llm.pt: 40.1 kB, whole by its format (no hash is recorded for it)" in capsys.readouterr().out


def test_verify_only_lists_every_problem_once(tmp_path, no_network, capsys):
    folder = tmp_path / "model"
    place_all(folder)
    (folder / "llm.pt").write_bytes((folder / "llm.pt").read_bytes()[:-10])
    (folder / "hift.pt").unlink()
    (folder / "taste.pt").write_bytes((folder / "flow.pt").read_bytes()[:-10])
    (folder / "whisper" / "config.json").write_bytes(b"")

    assert setup_cosyvoice.main(["--verify-only", "--model-dir", str(folder)]) == 1
    out = capsys.readouterr().out
    failed = [line.split(":")[0] for line in out.splitlines() if line.startswith("FAILED")]
    assert failed == ["FAILED  llm.pt", "FAILED  hift.pt", "FAILED  taste.pt", "FAILED  whisper/config.json"]
    assert out.count(f"next: python setup_cosyvoice.py --model-dir {folder}") == 4
    assert "4 of " in out


def test_a_folder_with_another_model_is_told_apart_from_a_missing_network(tmp_path):
    shutil.copytree(TINY, tmp_path / "CosyVoice-300M")
    with HubServer(published("ModelScope")) as modelscope, HubServer(published("Hugging Face")) as hugging_face:
        done = run(env=environment(tmp_path, modelscope.address, hugging_face.address), cwd=tmp_path)
    assert done.returncode == 1
    assert "this seems to be another model, and nothing was touched" in done.stderr
    assert done.stderr.startswith("error: ")
    assert "hf download" not in done.stderr


def test_a_client_that_is_switched_to_offline_says_so(tmp_path):
    with HubServer(published("Hugging Face")) as server:
        env = {**environment(tmp_path, hugging_face=server.address), "HF_HUB_OFFLINE": "1"}
        done = run(env=env, cwd=tmp_path)
    assert done.returncode == 1
    assert "Hugging Face is switched off by HF_HUB_OFFLINE" in done.stderr
    assert server.requests == []


@pytest.mark.parametrize("flags", [["--surce", "auto"], ["--source", "elsewhere"]])
def test_wrong_usage_ends_with_code_2(flags):
    try:
        code = setup_cosyvoice.main(flags)
    except SystemExit as ended:
        code = ended.code
    assert code == 2


def test_what_it_requires_is_what_the_model_folder_requires():
    from cosyvoice.utils.model_dir import REQUIRED_FILES
    from cosyvoice.utils.settings import parse_settings

    settings = parse_settings(str(SCRIPT), vars(setup_cosyvoice), [])
    assert set(setup_cosyvoice.model_parts(settings)[0].required) == set(REQUIRED_FILES)


def test_deep_verify_passes_on_the_embedded_model_without_a_network(no_network, capsys):
    assert setup_cosyvoice.main(["--verify-only", "--deep-verify", "--model-dir", str(TINY), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    deep = out[out.index("running each part on cpu") :]
    assert [line.split(":")[0] for line in deep.splitlines() if line.startswith("ok ")] == [
        "ok      llm.pt",
        "ok      flow.pt",
        "ok      hift.pt",
        "ok      speech_tokenizer_v1.onnx",
        "ok      campplus.onnx",
        "ok      a sentence through LM, flow and HiFT",
        "ok      whisper",
    ]
    for word in ("parameters", "CPUExecutionProvider", "real-time factor", "codes", "vector [192]", "[1, "):
        assert word in deep


def test_deep_verify_lists_each_fault_once_and_skips_what_hangs_on_it(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "llm.pt").write_bytes((folder / "llm.pt").read_bytes()[:1_000_000])
    (folder / "campplus.onnx").unlink()

    assert setup_cosyvoice.main(["--verify-only", "--deep-verify", "--model-dir", str(folder), "--device", "cpu"]) == 1
    outcomes = [
        line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line[:7] in ("FAILED ", "skipped")
    ]
    assert outcomes == [
        "FAILED  llm.pt",
        "FAILED  campplus.onnx",
        "skipped llm.pt",
        "skipped campplus.onnx",
        "skipped a sentence through LM, flow and HiFT",
    ]


def test_deep_verify_finds_weights_of_another_size_and_numbers_that_are_none(tmp_path, capsys):
    import torch

    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    hift = torch.load(folder / "hift.pt", weights_only=True)
    torch.save({name: tensor for name, tensor in hift.items() if not name.startswith("conv_pre")}, folder / "hift.pt")
    flow = torch.load(folder / "flow.pt", weights_only=True)
    next(iter(flow.values()))[0] = float("nan")
    torch.save(flow, folder / "flow.pt")

    assert setup_cosyvoice.main(["--verify-only", "--deep-verify", "--model-dir", str(folder), "--device", "cpu"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert [line.split(":")[0] for line in lines] == ["FAILED  flow.pt", "FAILED  hift.pt"]
    assert "no finite numbers in 1 tensors" in lines[0]
    assert "missing" in lines[1]


def test_a_synthesised_tone_stands_in_where_there_is_no_demo_corpus(tmp_path):
    from taste.deep_verify import load_recording

    recording = load_recording(None, tmp_path)
    assert recording.waveform.shape == (64_000,)
    assert 0.1 < recording.waveform.abs().max() < 1
    assert "tone" in recording.name

"""No tensor stays behind on the CPU: what runs on a GPU, run on a simulated one (`simulated_gpu.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten_with_path

from tests.small_shards import make_folder, make_shards

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MODEL_DIR = ROOT / "CosyVoice-tiny"
TINY_CONFIG = ROOT / "CosyVoice" / "examples" / "tiny" / "conf" / "cosyvoice.yaml"


def on_gpu(script: Path | str, *flags: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / "tests" / "simulated_gpu.py"), str(script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def succeeds(script: Path | str, *flags: object) -> str:
    done = on_gpu(script, *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the demo's recordings, with the features and units that stages 1 and 2 make on the device."""
    folder = tmp_path_factory.mktemp("gpu")
    for split, wanted in (("train", 4), ("test", 2)):
        lines = (ROOT / "json" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:wanted]
        entries = [json.loads(line) for line in lines]
        for entry in entries:
            entry["audio_path"] = str(ROOT / "json" / entry["audio_path"])
        manifest = folder / f"{split}.jsonl"
        manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        names = {name: folder / f"{{split}}_{name}.pt" for name in ("text_emb", "whisper_feats")}
        said = succeeds(
            *("utt2text_and_feature.py", "--device", "gpu", "--jsonl", manifest, "--batch-size", 2),
            *("--output-text", names["text_emb"], "--output-whisper", names["whisper_feats"]),
        )
        assert "Whisper on gpu" in said
        succeeds(
            *("CosyVoice/tools/extract_speech_token.py", "--device", "gpu", "--manifest", manifest, "--batch_size", 2),
            *("--output", folder / f"{split}_utt2s3.pt", "--onnx_path", MODEL_DIR / "speech_tokenizer_v1.onnx"),
        )
    return folder


def tensors_of(content: dict) -> dict[str, torch.Tensor]:
    """The tensors of nested dictionaries, by their paths."""
    return {
        "/".join(str(key.key) for key in path): leaf
        for path, leaf in tree_flatten_with_path(content)[0]
        if isinstance(leaf, torch.Tensor)
    }


def stage_3(work: Path, *flags: object) -> str:
    inputs = ("utt2_s3", "utt2s3"), ("utt2_text_emb", "text_emb"), ("utt2_whisper", "whisper_feats")
    paths: list[object] = []
    for split in ("train", "test"):
        for setting, name in (*inputs, ("utt2info", "utt2info")):
            paths += [f"--{split}-{setting}-path".replace("_", "-"), work / f"{split}_{name}.pt"]
    where = ("--exp-dir", work / "exp", "--loss-curve-path", work / "loss_curve.png", "--tensorboard", "false")
    return succeeds("model_code.py", "--device", "gpu", "--batch-size", 2, *where, *paths, *flags)


def test_features_made_on_a_gpu_are_those_made_on_a_cpu(work, tmp_path):
    names = {name: tmp_path / f"{{split}}_{name}.pt" for name in ("text_emb", "whisper_feats")}
    done = subprocess.run(
        [
            *(sys.executable, "utt2text_and_feature.py", "--device", "cpu", "--jsonl", work / "test.jsonl"),
            *("--batch-size", "2", "--output-text", names["text_emb"], "--output-whisper", names["whisper_feats"]),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("text_emb", "whisper_feats", "utt2info"):
        here, there = (torch.load(folder / f"test_{name}.pt", weights_only=True) for folder in (tmp_path, work))
        torch.testing.assert_close(tensors_of(there), tensors_of(here), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def compared(work: Path) -> Path:
    """The same folder, with all variants trained on the device."""
    stage_3(work, "--variant", "all", "--num-epochs", 1, "--generate-utterances", 2, "--decode-wavs", 1)
    return work


def test_every_variant_is_trained_and_evaluated_on_a_gpu(compared):
    for variant in ("text_only", "simple", "taste_novq", "taste"):
        run = compared / "exp" / "all" / variant
        assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["test"]["loss"] > 0
        assert len(list((run / "wavs").glob("*.wav"))) == 3


def test_the_tokenizer_encodes_and_decodes_on_a_gpu(compared):
    flags = ("--variant", "taste", "--run-name", "all/taste")
    stage_3(compared, *flags, "--mode", "encode", "--encode-jsonl", compared / "test.jsonl")
    stage_3(compared, *flags, "--mode", "decode")
    assert len(list((compared / "exp" / "all" / "taste" / "decoded").glob("*.wav"))) == 2


def test_a_run_goes_on_on_a_gpu(work):
    for epochs in (1, 2):
        said = stage_3(work, "--variant", "simple", "--num-epochs", epochs, "--generate-utterances", 0)
    assert "epoch   1 " not in said and "epoch   2 " in said


def test_adapters_learn_on_a_gpu(work):
    stage_3(
        *(work, "--variant", "simple", "--freeze-llm", "true", "--lora-rank", 2, "--accumulation-steps", 2),
        *("--run-name", "adapters", "--num-epochs", 1, "--generate-utterances", 0),
    )


def test_cosyvoice_speaks_on_a_gpu_whole_and_streamed(tmp_path):
    script = tmp_path / "speak.py"
    script.write_text(
        f"""
from cosyvoice.cli.cosyvoice import CosyVoice

ROOT = {str(ROOT)!r}
PROMPT = ROOT + "/json/demo_audio/kal16/demo-test-kal16-000.flac"
PROMPT_TEXT = "The old doctor lives in the house near the bridge."


def main(argv):
    cosyvoice = CosyVoice(ROOT + "/CosyVoice-tiny", device="gpu")
    for stream in (False, True):
        for pieces in (
            cosyvoice.inference_zero_shot("The garden wall is old.", PROMPT_TEXT, PROMPT, stream=stream),
            cosyvoice.inference_cross_lingual("The garden wall is old.", PROMPT, stream=stream),
            cosyvoice.inference_vc(PROMPT, PROMPT, stream=stream),
        ):
            sounds = [piece["tts_speech"] for piece in pieces]
            assert all(sound.device.type == "cpu" for sound in sounds)
            print("seconds", sum(sound.shape[1] for sound in sounds) / cosyvoice.sample_rate)
    return 0
""",
        encoding="utf-8",
    )
    seconds = [float(line.split()[1]) for line in succeeds(script).splitlines() if line.startswith("seconds")]
    assert len(seconds) == 6 and min(seconds) > 0.5


@pytest.mark.parametrize("part", ["llm", "flow", "hifigan"])
def test_a_part_of_cosyvoice_is_trained_on_a_gpu(part, tmp_path):
    data = make_shards(make_folder(tmp_path / "data", 4), 4)
    config = tmp_path / "cosyvoice.yaml"
    content = TINY_CONFIG.read_text(encoding="utf-8")
    config.write_text(content.replace("warmup_steps: 100", "warmup_steps: 1"), encoding="utf-8")
    assert config.read_text(encoding="utf-8") != content
    for steps in (2, 3):
        said = succeeds(
            *("CosyVoice/cosyvoice/bin/train.py", "--device", "gpu", "--model", part, "--config", config),
            *("--train_data", data, "--cv_data", data, "--model_dir", tmp_path / "out", "--max_steps", steps),
        )
        assert f"{steps} steps are done" in said


MIXTURES = {
    "operation": "torch.zeros(2, device='gpu') + torch.zeros(2)",
    "layer": "torch.nn.Linear(2, 2).to('gpu')(torch.zeros(1, 2))",
    "index": "torch.zeros(2)[torch.zeros(1, dtype=torch.int64, device='gpu')]",
    "values": "torch.zeros(2, device='gpu').index_put_([torch.tensor([0, 1])], torch.ones(2))",
    "numpy": "torch.zeros(2, device='gpu').numpy()",
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_simulated_gpu_refuses_what_a_gpu_refuses(mixture, tmp_path):
    script = tmp_path / "mix.py"
    script.write_text(f"import torch\n\n\ndef main(argv):\n    {MIXTURES[mixture]}\n    return 0\n", encoding="utf-8")
    done = on_gpu(script)
    assert done.returncode == 1 and ("Error" in done.stderr), done.stderr
    assert "device" in done.stderr.splitlines()[-1] or "cpu" in done.stderr.splitlines()[-1]


def test_the_simulated_gpu_allows_what_a_gpu_allows(tmp_path):
    script = tmp_path / "allowed.py"
    script.write_text(
        """
import torch


def main(argv):
    there = torch.arange(4.0, device="gpu")
    assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert there[torch.tensor([1, 2])].device.type == "gpu"
    here = torch.zeros(4)
    here.copy_(there)
    assert here.device.type == "cpu" and here.tolist() == [0, 1, 2, 3]
    layer = torch.nn.Linear(4, 1).to("gpu")
    layer(there).sum().backward()
    assert layer.weight.grad.device.type == "gpu"
    return 0
""",
        encoding="utf-8",
    )
    succeeds(script)

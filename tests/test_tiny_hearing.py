"""A Whisper encoder that learns, with the parts that listen to it, what the language model wants to hear."""

import json
import shutil
from pathlib import Path

import hear_words
import pytest
import torch
import train_taste
import whisper_start
from corpus_reader import read_split
from joint_taste import JointModel, start_codebooks
from small_recordings import RATE_HZ, write_corpus
from train_whisper import write_whisper

from cosyvoice.utils.model_dir import load_part
from cosyvoice.utils.settings import parse_settings
from taste.audio import read_audio
from taste.batch import Example
from taste.build import build_together
from taste.pretrained_parts import PARTS_FILE, write_parts
from taste.threads import torch_threads_kept
from taste.whisper_encoder import WhisperEncoder
from tests.small_model_folder import write_small_model_folder
from tests.small_stage3 import TASTE_SIZES, random_examples, write_features

FRAMES = 50  # of each recording
QUICK = {"steps": 6, "batch_units": 200, "check_every": 3, "device": "cpu", "dtype": "float32", "threads": 1}


@pytest.fixture(scope="module", autouse=True)
def small():
    with torch_threads_kept(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_taste, "_TASTE_SIZES", TASTE_SIZES)
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory, golden_dir) -> Path:
    """A corpus, a model folder with a Whisper and taste.pt, and features of both splits by that Whisper."""
    work = write_corpus(tmp_path_factory.mktemp("hearing"))
    model_dir = write_small_model_folder(work / "model", golden_dir)
    torch.manual_seed(0)
    shutil.rmtree(model_dir / "whisper", ignore_errors=True)
    write_whisper(whisper_start.build_whisper(), model_dir / "whisper")
    llm = load_part(model_dir, "llm")
    models = build_together(
        llm, ("simple", "taste_novq", "taste"), speech_width=whisper_start.WIDTH, taste_sizes=TASTE_SIZES
    )
    encoder = WhisperEncoder(model_dir / "whisper", whisper_start.MID_LAYER)
    examples: list[Example] = []
    for split in ("train", "dev"):
        spoken = read_split(work / "corpus", split)
        heard = encoder.encode([read_audio(row.audio_path, RATE_HZ).waveform for row in spoken])
        rows = zip(random_examples([(4, FRAMES)] * len(spoken)), spoken, heard, strict=True)
        examples = [
            example._replace(
                utt_id=row.utt_id,
                text=llm.text_embedding.weight.detach()[example.text_tokens],
                speech_mid=features.mid,
                speech_final=features.final,
            )
            for example, row, features in rows
        ]
        write_features(work / "features", split, examples)
    start_codebooks(JointModel(models), examples)
    write_parts(model_dir / PARTS_FILE, models)
    return work


def arguments(work: Path, out: Path, **options) -> list[str]:
    values = {"corpus": work / "corpus", "model_dir": work / "model", "parts": work / "model", "out": out}
    values |= {"train": f"train={work}/features/train", "dev": f"dev={work}/features/dev"} | QUICK | options
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / PARTS_FILE, weights_only=True)


def measured(out: str, name: str) -> list[float]:
    lines = [line for line in out.splitlines() if line.startswith("-- ")]
    return [float(line.split(f"{name} ")[1].split()[0]) for line in lines]


def test_it_begins_with_the_states_that_the_features_have(work, tmp_path, capsys):
    assert hear_words.main(arguments(work, tmp_path / "out", steps=1, sampled_frames=1500)) == 0
    assert measured(capsys.readouterr().out, "moved")[0] < 0.01  # but for float16


def test_the_loss_falls(work, tmp_path, capsys):
    options = {"dev": f"train={work}/features/train", "whisper_lr": 2e-3, "aggregator_lr": 1e-2, "branch_lr": 1e-2}
    assert hear_words.main(arguments(work, tmp_path / "out", steps=60, check_every=30, **options)) == 0
    out, metrics = capsys.readouterr().out, json.loads((tmp_path / "out" / "metrics.json").read_text())
    for variant in ("taste_novq", "taste"):
        losses = measured(out, f"{variant} loss")
        assert losses[-1] < losses[0] - 0.05
        assert metrics[f"{variant} loss"] == losses[-1]


@pytest.mark.parametrize(
    ("variants", "learning"),
    [("taste_novq,taste", {"aggregator", "audio_branch", "quantizer"}), ("taste_novq", {"aggregator", "audio_branch"})],
)
def test_encoder_and_listeners_learn_and_nothing_else(work, tmp_path, variants, learning):
    assert hear_words.main(arguments(work, tmp_path / "out", variants=variants)) == 0
    before, after = weights(work / "model"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {".".join(name.split(".")[:2]) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"taste.{part}" for part in learning}
    encoders = [WhisperEncoder(folder, 6) for folder in (work / "model" / "whisper", tmp_path / "out")]
    first, second = (encoder.encode([torch.randn(16_000, generator=torch.manual_seed(0))])[0] for encoder in encoders)
    assert first.mid.shape == second.mid.shape and not torch.allclose(first.mid, second.mid, atol=1e-3)


def test_the_commitment_moves_the_quantizer(work, tmp_path):
    for weight in (0.0, 100.0):
        assert (
            hear_words.main(arguments(work, tmp_path / str(weight), steps=1, commitment_weight=weight, grad_clip=1e9))
            == 0
        )
    without, strong = (weights(tmp_path / name) for name in ("0.0", "100.0"))
    changed = {name.split(".")[1] for name in without if not torch.equal(without[name], strong[name])}
    assert changed == {"quantizer"}


def test_a_stopped_training_goes_on_to_the_same_weights(work, tmp_path, capsys):
    assert hear_words.main(arguments(work, tmp_path / "straight")) == 0
    asked = iter([False] * 4)
    settings = parse_settings(hear_words.__file__, vars(hear_words), arguments(work, tmp_path / "stopped"))
    assert not hear_words.run(settings, lambda: next(asked, True))
    assert hear_words.main(arguments(work, tmp_path / "stopped")) == 0
    assert "resuming from step 4" in capsys.readouterr().out
    for name in (PARTS_FILE, "model.safetensors"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    assert hear_words.main(arguments(work, tmp_path / "straight", whisper_lr=1e-3)) == 1
    assert "other settings (whisper_lr)" in capsys.readouterr().err


def test_features_of_other_recordings_are_refused(work, tmp_path, capsys):
    broken = shutil.copytree(work / "features", tmp_path / "features")
    options = {"train": f"train={broken}/train"}
    path = broken / "train_whisper_feats.pt"
    features = torch.load(path)
    first = next(iter(features["mid"]))
    torch.save({name: {**rows, first: rows[first][:-3]} for name, rows in features.items()}, path)
    assert hear_words.main(arguments(work, tmp_path / "out", **options)) == 1
    assert f"{first}: features of 47 frames, a recording of 50; make the features again" in capsys.readouterr().err
    assert hear_words.main(arguments(work, tmp_path / "out", variants="taste,simple")) == 1
    assert "VARIANTS is ('taste', 'simple'); expected one or both of taste_novq, taste" in capsys.readouterr().err
    assert hear_words.main(arguments(work, tmp_path / "out", train=f"test={work}/features/train")) == 1
    assert "has features, but is in none of test" in capsys.readouterr().err

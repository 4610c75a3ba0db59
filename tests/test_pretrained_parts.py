import json
from pathlib import Path

import pytest
import torch

import model_code
from taste.build import build_model
from taste.checkpoint import load_checkpoint
from taste.pretrained_parts import PARTS_FILE, take_parts, write_parts
from taste.size_defaults import SMALL
from taste.variants import VARIANTS
from tests.small_model_folder import write_small_model_folder
from tests.small_stage3 import SPEECH_WIDTH, TASTE_SIZES, random_batch, random_examples, small_model, write_features

LENGTHS = [(2 + number % 4, 5 + 3 * (number % 5)) for number in range(10)]
OPTIONS = {"speech_width": SPEECH_WIDTH, "freeze_llm": False, "use_speaker": True, "taste_sizes": TASTE_SIZES}
TASTE_PARTS = ("aggregator", "audio_branch", "fusion", "quantizer")
QUICK = {"num_epochs": 1, "batch_size": 4, "warmup_steps": 2, "generate_utterances": 0, "negative_controls": False}
SIZES = {name: value for name, value in vars(TASTE_SIZES).items() if name != "aggregator_from_whisper"}


def trained(variant: str):
    """A model whose own parts are not where any beginning would place them."""
    model = small_model(variant)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("llm."):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def models():
    return {"simple": trained("simple"), "taste": trained("taste")}


@pytest.fixture
def folder(tmp_path, golden_dir, models) -> Path:
    folder = write_small_model_folder(tmp_path / "model", golden_dir)
    write_parts(folder / PARTS_FILE, models)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_speaks_with_the_folders_parts_as_it_was_trained(folder, models, variant):
    model = build_model(folder, variant, **OPTIONS)
    taken = take_parts(model, folder)
    if variant == "text_only":
        assert taken is None
        return
    source = models["simple" if variant == "simple" else "taste"]
    own, theirs = model.state_dict(), source.state_dict()
    for name, value in own.items():
        if not name.startswith("llm."):
            assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name].half().to(value.dtype)), name
    assert not taken.left and set(taken.parts) == {name.partition(".")[0] for name in own} - {"llm"}
    if variant != "taste_novq":
        batch = random_batch(LENGTHS)
        torch.testing.assert_close(model.eval()(batch).loss_sums, source(batch).loss_sums, rtol=5e-3, atol=5e-3)


def test_the_file_is_flat_and_half_as_large(folder):
    state = torch.load(folder / PARTS_FILE, weights_only=True)
    assert {".".join(name.split(".")[:2]) for name in state} == {
        *(f"taste.{part}" for part in TASTE_PARTS),
        *(f"simple.{part}" for part in ("aggregator", "text_norm", "speech_norm", "input_proj")),
    }
    for name, value in state.items():
        assert value.dtype == (torch.bool if name.endswith(".initted") else torch.float16), name


@pytest.mark.parametrize(
    ("changed", "parts", "reason"),
    [
        ({"codebook_size": 16}, ("aggregator", "audio_branch", "fusion"), "there, [1, 16] with these settings"),
        ({"audio_ffn_dim": 8}, ("aggregator", "quantizer"), "with these settings"),
        ({"aggregator_layers": 1}, (), "this model has none"),
    ],
)
def test_a_part_of_another_size_is_left_and_so_is_what_reads_from_it(folder, changed, parts, reason):
    sizes = type(TASTE_SIZES)(**vars(TASTE_SIZES) | changed)
    torch.manual_seed(0)
    model = build_model(folder, "taste", **OPTIONS | {"taste_sizes": sizes})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taken = take_parts(model, folder)
    assert taken.parts == parts and set(taken.left) == set(TASTE_PARTS) - set(parts)
    assert reason in taken.describe()
    for name, value in model.state_dict().items():
        if name.partition(".")[0] not in parts:
            assert torch.equal(value, before[name]), name


def test_a_wrong_width_is_told_before_a_weight_too_many(folder):
    state = torch.load(folder / PARTS_FILE, weights_only=True)
    state["simple.input_proj.bias"] = torch.zeros(5)
    state["simple.input_proj.surplus"] = torch.zeros(1)
    torch.save(state, folder / PARTS_FILE)
    model = build_model(folder, "simple", **OPTIONS)
    reason = f"input_proj.bias is [5] there, [{len(model.input_proj.bias)}] with these settings"
    assert take_parts(model, folder).left["input_proj"] == reason


def test_a_quantizer_is_taken_only_beside_an_aggregator_that_began_in_the_same_file(folder):
    model = build_model(folder, "taste", **OPTIONS)
    assert take_parts(model, folder, ["quantizer"]).left == {"quantizer": "it goes with another aggregator"}
    note = take_parts(build_model(folder, "taste_novq", **OPTIONS), folder).as_note()
    assert take_parts(model, folder, ["quantizer"], note).parts == ("quantizer",)
    assert take_parts(model, folder, ["quantizer"], note | {"weights": "0"}).parts == ()


def test_of_simple_all_parts_are_taken_or_none(folder):
    state = torch.load(folder / PARTS_FILE, weights_only=True)
    del state["simple.input_proj.bias"]
    torch.save(state, folder / PARTS_FILE)
    model = build_model(folder, "simple", **OPTIONS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taken = take_parts(model, folder)
    assert taken.parts == () and taken.left["input_proj"] == "taste.pt has no input_proj.bias"
    assert taken.left["aggregator"] == "it goes with another input_proj"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_too_large_for_half_precision_are_refused(tmp_path):
    model = small_model("simple")
    torch.nn.init.constant_(model.input_proj.bias, 1e6)
    with pytest.raises(ValueError, match=r"not finite in float16, simple\.input_proj\.bias first"):
        write_parts(tmp_path / PARTS_FILE, {"simple": model})
    assert not list(tmp_path.iterdir())


class Runs:
    """model_code.py on a folder with parts."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        self.folder, self.model_dir = folder, model_dir
        self.paths = {
            "train": write_features(folder, "train", random_examples(LENGTHS)),
            "test": write_features(folder, "test", random_examples(LENGTHS[:3], seed=1)),
        }

    def __call__(self, **options) -> int:
        values = {"cosyvoice_model_dir": self.model_dir, "exp_dir": self.folder / "exp", "device": "cpu"}
        values |= {"loss_curve_path": self.folder / "curve.png", "evaluate_audio": False, "tensorboard": False}
        for split, paths in self.paths.items():
            values |= {f"{split}_utt2_s3_path": paths.units, f"{split}_utt2_text_emb_path": paths.text}
            values |= {f"{split}_utt2_whisper_path": paths.speech, f"{split}_utt2info_path": paths.info}
        words = values | QUICK | SIZES | options
        return model_code.main([word for name, value in words.items() for word in (f"--{name}", str(value))])

    def metrics(self, run: str) -> dict:
        return json.loads((self.folder / "exp" / run / "metrics.json").read_text())


def test_a_run_starts_from_the_folders_parts_says_so_and_goes_on_with_that_choice(tmp_path, folder, capsys):
    run = Runs(tmp_path, folder)
    assert run(variant="taste") == 0
    assert "modules loaded from taste.pt: aggregator, audio_branch, fusion, quantizer" in capsys.readouterr().out
    metrics = run.metrics("taste")
    assert metrics["fitted"] is None and metrics["pretrained"]["parts"] == list(TASTE_PARTS)
    groups = load_checkpoint(tmp_path / "exp" / "taste" / "checkpoints" / "last.pt").optimizer["param_groups"]
    assert {group["peak_lr"] for group in groups} == {SMALL["lr"]}  # what was trained is to be changed with care
    assert run(variant="taste", num_epochs=2, load_pretrained_modules=False) == 1
    assert "LOAD_PRETRAINED_MODULES was True, is False" in capsys.readouterr().err
    assert run(variant="taste", num_epochs=2) == 0
    assert run.metrics("taste")["pretrained"] == metrics["pretrained"]
    assert run(variant="taste", run_name="fitted", load_pretrained_modules=False) == 0
    assert run.metrics("fitted")["pretrained"] is None and run.metrics("fitted")["fitted"]
    groups = load_checkpoint(tmp_path / "exp" / "fitted" / "checkpoints" / "last.pt").optimizer["param_groups"]
    assert {group["peak_lr"] for group in groups} == {SMALL["lr"], SMALL["new_modules_lr"]}


def test_what_does_not_fit_is_fitted(tmp_path, folder, capsys):
    run = Runs(tmp_path, folder)
    assert run(variant="taste", codebook_size=16) == 0
    assert "  not quantizer: " in capsys.readouterr().out
    assert run.metrics("taste")["fitted"].keys() == {"utterances", "code_usage"}


def test_stages_bring_their_weights_and_the_folder_what_is_new(tmp_path, folder):
    run = Runs(tmp_path, folder)
    assert run(variant="all") == 0
    assert run.metrics("all/text_only")["pretrained"] is None
    for variant, parts in {"simple": 4, "taste_novq": 3, "taste": 4}.items():
        metrics = run.metrics(f"all/{variant}")
        assert len(metrics["pretrained"]["parts"]) == parts and metrics["fitted"] is None
        assert metrics["started_from"]["variant"] == ("taste_novq" if variant == "taste" else "text_only")

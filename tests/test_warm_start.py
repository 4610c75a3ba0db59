import itertools
from pathlib import Path

import pytest
import torch

from taste.checkpoint import Checkpoint, frozen_fingerprint, save_checkpoint
from taste.learned_state import learned_state, load_learned_state
from taste.model import CosyVoiceS3Model
from taste.warm_start import find_start, start_from
from tests.small_stage3 import random_batch, small_model

BATCH = random_batch([(4, 9), (2, 6), (5, 12)])
NEW_PARTS = ["aggregator", "input_proj", "speech_norm", "text_norm"]


def trained(model: CosyVoiceS3Model, seed: int = 5) -> CosyVoiceS3Model:
    """The model with its learning weights moved, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(path: Path, model: CosyVoiceS3Model) -> Path:
    """A checkpoint as a run writes it."""
    learned = learned_state(model)
    notes = {
        "settings": {"variant": model.variant},
        "progress": {"epoch": 3},
        "commit": None,
        "frozen_weights": frozen_fingerprint(model, learned),
    }
    save_checkpoint(path, Checkpoint(learned, None, notes))
    return path


def test_shared_parts_are_the_other_runs_and_new_parts_keep_their_beginning(tmp_path):
    source, model, untouched = trained(small_model("text_only")), small_model("simple"), small_model("simple")
    notes = start_from(model, saved(tmp_path / "best.pt", source))
    theirs, mine, before = source.state_dict(), model.state_dict(), untouched.state_dict()
    for name, value in mine.items():
        idle = name.startswith(("llm.text_encoder.", "llm.text_encoder_affine_layer.", "llm.text_embedding."))
        expected = theirs[name] if name.startswith("llm.") and not idle else before[name]
        assert torch.equal(value, expected), name
    assert any(not torch.equal(mine[name], before[name]) for name in mine)
    assert notes | {"weights": ""} == {
        "checkpoint": str(tmp_path / "best.pt"),
        "variant": "text_only",
        "epoch": 3,
        "commit": None,
        "weights": "",
        "new_parts": NEW_PARTS,
        "pretrained": None,
    }


def test_each_stage_starts_from_the_one_before(tmp_path):
    stages = ["text_only", "taste_novq", "taste"]
    new_parts = [["aggregator", "audio_branch", "fusion"], ["quantizer"]]
    for (before, after), new in zip(itertools.pairwise(stages), new_parts, strict=True):
        source, model, untouched = trained(small_model(before)), small_model(after), small_model(after).state_dict()
        assert start_from(model, saved(tmp_path / f"{before}.pt", source))["new_parts"] == new
        theirs = source.state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(value, theirs.get(name, untouched[name])), name


def test_a_deaf_stage_speaks_as_the_one_before(tmp_path):
    source, model = trained(small_model("text_only")), small_model("taste_novq")
    start_from(model, saved(tmp_path / "best.pt", source))
    with torch.no_grad():
        model.fusion.weights.copy_(torch.tensor([-50.0, 50.0]))  # speech, text
    torch.testing.assert_close(model(BATCH).loss_sums, source(BATCH).loss_sums)


def test_adapters_are_new_to_a_run_that_starts_without(tmp_path):
    pytest.importorskip("peft")
    source = trained(small_model("text_only"))
    model = small_model("taste_novq", freeze_llm=True, lora_rank=2)
    start_from(model, saved(tmp_path / "best.pt", source))
    assert torch.equal(model.llm.llm_decoder.weight, source.llm.llm_decoder.weight)
    trained(model, seed=6)
    again = small_model("taste_novq", freeze_llm=True, lora_rank=2)
    start_from(again, saved(tmp_path / "adapted.pt", model))
    assert torch.equal(again(BATCH).loss_sums, model(BATCH).loss_sums)
    with pytest.raises(ValueError, match=r"only in the checkpoint: llm.*lora_A"):
        start_from(small_model("taste_novq"), tmp_path / "adapted.pt")


@pytest.mark.parametrize("variant", ["text_only", "simple", "taste_novq", "taste"])
def test_the_same_variant_starts_as_the_other_run_ended(tmp_path, variant):
    source, model = trained(small_model(variant)), small_model(variant)
    assert start_from(model, saved(tmp_path / "best.pt", source))["new_parts"] == []
    assert torch.equal(model(BATCH).loss_sums, source(BATCH).loss_sums)


def test_a_language_model_that_another_run_trained_can_be_frozen_and_its_weights_are_carried_on(tmp_path):
    model = small_model("simple", freeze_llm=True)
    start_from(model, saved(tmp_path / "best.pt", trained(small_model("text_only"))))
    trained(model, seed=6)
    again = small_model("simple", freeze_llm=True)
    load_learned_state(again, learned_state(model))
    assert torch.equal(again(BATCH).loss_sums, model(BATCH).loss_sums)
    third = small_model("simple", freeze_llm=True)  # and a third run can start from it
    start_from(third, saved(tmp_path / "second.pt", again))
    assert torch.equal(third(BATCH).loss_sums, model(BATCH).loss_sums)


def test_what_was_left_to_the_model_folder_must_be_the_same_there(tmp_path):
    source = small_model("text_only")
    with torch.no_grad():
        source.llm.text_embedding.weight[7, 7] += 1  # of another folder
    with pytest.raises(ValueError, match=r"left to its model folder: .* then, .* in this folder"):
        start_from(small_model("simple"), saved(tmp_path / "best.pt", source))


def test_half_a_match_is_refused_with_all_differences_and_nothing_changes(tmp_path):
    source = trained(small_model("simple"))
    source.input_proj = torch.nn.Linear(24, 33)
    source.aggregator.extra = torch.nn.Linear(1, 1)
    del source.text_norm.bias
    source.other = torch.nn.Linear(1, 1)
    model, before = small_model("simple"), small_model("simple").state_dict()
    with pytest.raises(ValueError) as caught:
        start_from(model, saved(tmp_path / "best.pt", source))
    for part in (
        "only in the checkpoint: other\n",
        "only in the checkpoint: aggregator.extra.weight",
        "only in this model: text_norm.bias",
        "input_proj.bias is [33], this model has [32]",
        "COSYVOICE_MODEL_DIR",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_hears_cannot_start_what_does_not(tmp_path):
    path = saved(tmp_path / "best.pt", small_model("simple"))
    with pytest.raises(ValueError, match="only in the checkpoint: aggregator"):
        start_from(small_model("text_only"), path)


def test_a_run_is_found_by_its_name_its_folder_or_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = saved(tmp_path / "exp" / "first" / "checkpoints" / "best.pt", small_model("simple", freeze_llm=True))
    for name in ("first", "exp/first", str(best), "exp/first/checkpoints/best.pt"):
        assert find_start(name, Path("exp")).samefile(best)
    with pytest.raises(FileNotFoundError, match=r"INIT_FROM is 'second'.*exp/second/checkpoints/best\.pt"):
        find_start("second", Path("exp"))

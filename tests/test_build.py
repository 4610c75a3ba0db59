import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import WhisperConfig, WhisperForConditionalGeneration

from taste.batch import collate
from taste.build import TasteSizes, build_model
from taste.learned_state import learned_state
from tests.small_model_folder import TEXT_TOKENS, write_small_model_folder
from tests.small_stage3 import TASTE_SIZES, random_examples
from tests.small_whisper import write_small_whisper

WIDTH = 16
FROM_WHISPER = replace(TASTE_SIZES, aggregator_from_whisper=True)
OPTIONS = {"speech_width": WIDTH, "freeze_llm": False, "use_speaker": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden_dir) -> Path:
    """A model folder whose Whisper shares the text's tokens, as large-v3 does."""
    folder = write_small_model_folder(tmp_path_factory.mktemp("model"), golden_dir)
    sizes = {"d_model": WIDTH, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 16}
    counts = {"encoder_layers": 1, "decoder_layers": 3, "max_source_positions": 20, "max_target_positions": 30}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    whisper = WhisperForConditionalGeneration(WhisperConfig(vocab_size=TEXT_TOKENS, **sizes, **counts, **heads))
    whisper.save_pretrained(folder / "whisper")
    return folder


def test_an_aggregator_may_start_from_whispers_decoder(folder):
    model = build_model(folder, "taste_novq", taste_sizes=FROM_WHISPER, **OPTIONS)
    theirs = load_file(folder / "whisper" / "model.safetensors")
    assert torch.equal(model.aggregator.embed_tokens.weight, theirs["model.decoder.embed_tokens.weight"])
    assert torch.equal(model.aggregator.layers[1].fc1.weight, theirs["model.decoder.layers.2.fc1.weight"])
    examples = [
        example._replace(speech_final=torch.randn(units, WIDTH), speech_mid=torch.randn(units, WIDTH))
        for example, units in zip(random_examples([(4, 11), (7, 6)]), (11, 6), strict=True)
    ]
    together = model.eval()(collate(examples)).loss_sums
    for row, example in enumerate(examples):
        torch.testing.assert_close(together[[row]], model(collate([example])).loss_sums, rtol=1e-5, atol=1e-5)


def test_the_bottom_of_an_aggregator_from_whisper_may_stay_as_it_is(folder):
    model = build_model(
        folder, "taste_novq", taste_sizes=FROM_WHISPER, freeze_aggregator_bottom=True, **OPTIONS
    ).train()
    (example,) = random_examples([(4, 11)])
    heard = example._replace(speech_final=torch.randn(11, WIDTH), speech_mid=torch.randn(11, WIDTH))
    model(collate([heard])).loss_sums.sum().backward()
    still = {name for name, parameter in model.aggregator.named_parameters() if parameter.grad is None}
    bottom = ("embed_tokens.", "embed_positions.", "layers.0.")
    assert still == {name for name, _ in model.aggregator.named_parameters() if name.startswith(bottom)}
    assert "aggregator.layers.0.fc1.weight" in learned_state(model)  # the model folder has it under another name
    with pytest.raises(ValueError, match="none of Whisper's: set AGGREGATOR_FROM_WHISPER = True"):
        build_model(folder, "taste_novq", taste_sizes=TASTE_SIZES, freeze_aggregator_bottom=True, **OPTIONS)


def test_another_whisper_folder_can_be_named(folder, tmp_path):
    write_small_whisper(tmp_path / "other")
    with pytest.raises(ValueError, match=f"knows 50 tokens, the text has {TEXT_TOKENS}"):
        build_model(folder, "taste_novq", taste_sizes=FROM_WHISPER, whisper_dir=tmp_path / "other", **OPTIONS)
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere/config\.json"):
        build_model(folder, "taste_novq", taste_sizes=FROM_WHISPER, whisper_dir=tmp_path / "nowhere", **OPTIONS)


def test_sizes_come_back_from_what_a_run_noted():
    noted = json.loads(json.dumps(vars(TASTE_SIZES) | {"another_setting": 1}))
    assert TasteSizes.from_dict(noted) == TASTE_SIZES


def test_hearing_variants_need_whisper_features(folder):
    with pytest.raises(ValueError, match="'taste' needs Whisper features"):
        build_model(folder, "taste", speech_width=None, freeze_llm=False, use_speaker=True)

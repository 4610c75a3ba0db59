import dataclasses
import sys

import pytest
import torch

from taste.batch import Batch, collate
from taste.generation import Sampling, generate
from taste.learned_state import learned_state, load_learned_state
from taste.lora import add_adapters, is_adapter
from taste.model import CosyVoiceS3Model
from taste.quantizer import NO_CODE
from taste.words import word_spans
from tests.small_stage3 import TASTE_SIZES, random_batch, random_examples, small_model

LENGTHS = [(4, 11), (7, 6), (2, 15), (1, 1)]  # text tokens, units: neither sorted nor alike
FUSIONS = ["weighted_sum", "sum", "concat", "concat_with_sep"]


@pytest.fixture
def batch() -> Batch:
    return random_batch(LENGTHS)


@pytest.fixture(scope="module")
def model() -> CosyVoiceS3Model:
    return small_model("taste")


def test_codes_do_not_depend_on_the_batch(model, batch):
    together = model.encode(batch)
    assert together.shape == (4, 7, TASTE_SIZES.num_quantizers)
    for row, example in enumerate(random_examples(LENGTHS)):
        alone = model.encode(collate([example]))[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert together[row, len(alone) :].eq(NO_CODE).all()


def test_all_tokens_of_a_word_have_its_codes_and_words_differ(model, batch):
    codes = model.encode(batch)
    firsts = []
    for row, example in enumerate(random_examples(LENGTHS)):
        for start, end in word_spans(example.word_ids):
            assert codes[row, start:end].eq(codes[row, start]).all()
            firsts.append(tuple(codes[row, start].tolist()))
    assert len(set(firsts)) > len(firsts) / 2


def test_all_tokens_of_a_word_have_the_mean_of_what_is_heard_of_them(batch):
    model = small_model("taste_novq")
    heard = model.aggregate(batch)
    inputs = (batch.text, batch.speech_final, batch.speech_mid, batch.text_lengths, batch.speech_lengths)
    by_token = model.aggregator(*inputs)
    for row, example in enumerate(random_examples(LENGTHS)):
        for start, end in word_spans(example.word_ids):
            mean = by_token[row, start:end].mean(dim=0).expand(end - start, -1)
            torch.testing.assert_close(heard[row, start:end], mean)


def test_codes_tell_the_language_model_all_that_the_recording_does(model, batch):
    with_codes = dataclasses.replace(batch, codes=model.encode(batch), speech_final=None, speech_mid=None)
    torch.testing.assert_close(model(with_codes).loss_sums, model(batch).loss_sums, rtol=1e-5, atol=1e-5)
    greedy = Sampling("greedy", max_units_per_token=6)
    assert generate(model, with_codes, greedy) == generate(model, batch, greedy)
    other_codes = (with_codes.codes + 1).clamp(min=0) % TASTE_SIZES.codebook_size
    changed = model(dataclasses.replace(with_codes, codes=other_codes)).loss_sums
    assert not torch.allclose(changed, model(batch).loss_sums, rtol=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_with_each_fusion_a_batch_of_rows_equals_rows_one_by_one(fusion, batch):
    model = small_model("taste_novq", sizes={"fusion": fusion})
    together = model(batch)
    lengths = model.prefix(batch).lengths
    for row, example in enumerate(random_examples(LENGTHS)):
        torch.testing.assert_close(together.loss_sums[[row]], model(collate([example])).loss_sums, rtol=1e-5, atol=1e-5)
        tokens = len(example.text)
        expected = {"concat": 2 * tokens, "concat_with_sep": 2 * tokens + 1}.get(fusion, tokens)
        assert lengths[row] == expected + 3


def test_a_deaf_fusion_leaves_the_pretrained_text_path_alone(batch):
    model, text_only = small_model("taste_novq"), small_model("text_only")
    with torch.no_grad():
        model.fusion.weights.copy_(torch.tensor([-50.0, 50.0]))  # speech, text
    torch.testing.assert_close(model(batch).loss_sums, text_only(batch).loss_sums)


def test_the_speech_of_one_word_moves_that_word_and_what_follows_only(batch):
    model = small_model("taste_novq")
    (example,) = random_examples([(6, 20)])
    before = model.aggregate(collate([example]))
    after = model.aggregate(collate([example._replace(speech_mid=-example.speech_mid)]))
    assert not torch.allclose(before, after)  # the recording is heard
    prefix = model.prefix(collate([example])).vectors[0]
    shorter = example._replace(
        text=example.text[:4], text_tokens=example.text_tokens[:4], word_ids=example.word_ids[:4]
    )
    words_alike = model.prefix(collate([shorter])).vectors[0]
    torch.testing.assert_close(prefix[: 2 + 3], words_alike[: 2 + 3])  # [sos] [speaker] and two words: 2 + 1 tokens


def test_the_commitment_is_a_mean_over_words_and_only_training_has_it(batch):
    model = small_model("taste", dropout=0.0)
    scores = model(batch)
    assert scores.commitment_sums.tolist() == [0.0] * 4 and scores.word_counts.tolist() == [0] * 4
    scores = model.train()(batch)
    words = [len(word_spans(example.word_ids)) for example in random_examples(LENGTHS)]
    assert scores.word_counts.tolist() == words
    each = scores.commitment_sums / scores.word_counts
    assert each.min() > 0 and torch.allclose(each, each[:1])
    scores.commitment_sums.sum().backward()
    assert model.aggregator.layers[1].encoder_attn.out_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("field", ["word_ids", "text_tokens"])
def test_a_batch_without_words_is_refused(model, field, batch):
    with pytest.raises(ValueError, match="needs the words of the text"):
        model(dataclasses.replace(batch, **{field: None}))


@pytest.mark.parametrize("variant", ["text_only", "simple", "taste_novq"])
def test_only_a_model_with_a_quantizer_has_codes(variant, batch):
    other = small_model(variant)
    with pytest.raises(ValueError, match="has no codes"):
        other.encode(batch)
    if variant != "text_only":
        with pytest.raises(ValueError, match="reads no codes"):
            other(dataclasses.replace(batch, codes=torch.zeros(4, 7, 3, dtype=torch.int64)))


def test_a_variant_with_the_parts_of_another_is_refused(model):
    parts = {name: getattr(model, name) for name in ("aggregator", "audio_branch", "fusion")}
    with pytest.raises(ValueError, match="'taste' needs: quantizer"):
        CosyVoiceS3Model(model.llm, variant="taste", **parts)
    with pytest.raises(ValueError, match="'simple' takes no: audio_branch, fusion"):
        CosyVoiceS3Model(model.llm, variant="simple", **parts)


# --- adapters


def test_adapters_begin_without_effect_and_are_all_that_learns_in_a_frozen_model(batch):
    pytest.importorskip("peft")
    plain, adapted = small_model("taste_novq", freeze_llm=True), small_model("taste_novq", freeze_llm=True, lora_rank=3)
    torch.testing.assert_close(adapted(batch).loss_sums, plain(batch).loss_sums)
    adapted.train()(batch).loss_sums.sum().backward()
    for name, parameter in adapted.named_parameters():
        learns = is_adapter(name) or not name.startswith("llm.")
        assert parameter.requires_grad == learns == (parameter.grad is not None), name
        assert (name in learned_state(adapted)) == learns, name


def test_adapters_change_no_weights_name_and_come_back_with_the_learned_state(batch):
    pytest.importorskip("peft")
    plain, adapted = small_model("text_only", freeze_llm=True), small_model("text_only", freeze_llm=True, lora_rank=3)
    names = {name for name in adapted.state_dict() if not is_adapter(name)}
    assert names == plain.state_dict().keys()
    adapted.load_state_dict(adapted.state_dict())  # what it gives it takes
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if is_adapter(name):
                parameter.add_(0.3)
    assert not torch.allclose(adapted(batch).loss_sums, plain(batch).loss_sums)
    fresh = small_model("text_only", freeze_llm=True, lora_rank=3)
    load_learned_state(fresh, learned_state(adapted))
    assert torch.equal(fresh(batch).loss_sums, adapted(batch).loss_sums)


def test_adapters_want_a_frozen_model_a_rank_and_peft(monkeypatch):
    with pytest.raises(ValueError, match="LORA_RANK is 2 and FREEZE_LLM False"):
        small_model("text_only", lora_rank=2)
    with pytest.raises(ValueError, match="LORA_RANK is -1; expected 1 or more"):
        add_adapters(torch.nn.Linear(2, 2), -1)
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(ValueError, match="pip install peft"):
        small_model("text_only", freeze_llm=True, lora_rank=2)

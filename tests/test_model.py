import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cosyvoice.utils.common import IGNORE_ID
from taste.aggregator import SimpleTextSpeechAggregator
from taste.batch import Batch, collate
from taste.learned_state import learned_state, load_learned_state
from taste.model import CosyVoiceS3Model
from tests.small_stage3 import SIZES, SPEECH_WIDTH, random_batch, random_examples, small_model

LENGTHS = [(4, 11), (7, 6), (2, 15), (1, 1)]  # text tokens, units: neither sorted nor alike
VARIANTS = ["text_only", "simple", "taste_novq", "taste"]
CONFIGURATIONS = [(variant, speaker) for variant in VARIANTS for speaker in (True, False)]


@pytest.fixture
def batch() -> Batch:
    return random_batch(LENGTHS)


def replaced(batch: Batch, **changes) -> Batch:
    return dataclasses.replace(batch, **changes)


def test_text_only_is_cosyvoices_own_language_model(golden_cases):
    case, model = golden_cases["llm_loss"], small_model("text_only")
    published = Batch(
        utt_ids=tuple(map(str, range(len(case["text_token"])))),
        text=model.llm.text_embedding(case["text_token"]).detach(),
        text_lengths=case["text_token_len"].long(),
        speech_final=None,
        speech_mid=None,
        speech_lengths=None,
        speaker=case["embedding"],
        units=case["speech_token"].long(),
        unit_lengths=case["speech_token_len"].long(),
    )
    scores = model(published)
    torch.testing.assert_close(scores.loss_sums.sum() / scores.target_counts.sum(), case["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.top1_counts.sum() / scores.target_counts.sum(), case["acc"])


@pytest.mark.parametrize(("variant", "use_speaker"), CONFIGURATIONS)
def test_no_position_sees_its_own_target(variant, use_speaker):
    model, batch = small_model(variant, use_speaker=use_speaker), random_batch([(3, 8)])
    with torch.no_grad():
        before = model.predict(batch)
        for place in range(8):
            units = batch.units.clone()
            units[0, place] = (units[0, place] + 1) % SIZES.speech_vocab
            after = model.predict(replaced(batch, units=units))
            torch.testing.assert_close(after[:, : place + 1], before[:, : place + 1], rtol=0, atol=1e-6)
            assert (after[:, place + 1] - before[:, place + 1]).abs().max() > 1e-3  # but the next one does see it


@pytest.mark.parametrize(("variant", "use_speaker"), CONFIGURATIONS)
def test_the_task_position_predicts_the_first_unit_and_the_last_unit_predicts_the_end(variant, use_speaker):
    model, batch = small_model(variant, use_speaker=use_speaker), random_batch([(3, 5)])
    vectors, lengths = model.prefix(batch)
    assert lengths.tolist() == [1 + use_speaker + 3 + 1]
    torch.testing.assert_close(vectors[0, 0], model.llm.llm_embedding.weight[0])
    torch.testing.assert_close(vectors[0, -1], model.llm.llm_embedding.weight[1])
    sequence = torch.cat([vectors, model.llm.speech_embedding(batch.units)], dim=1)
    hidden, _ = model.llm.llm(sequence, torch.tensor([sequence.shape[1]]))
    expected = model.llm.llm_decoder(hidden[:, vectors.shape[1] - 1 :])  # from [task] to the last unit
    torch.testing.assert_close(model.predict(batch), expected, rtol=1e-5, atol=1e-6)
    assert model.targets(batch).tolist() == [[*batch.units[0].tolist(), SIZES.speech_vocab]]


@pytest.mark.parametrize(("variant", "use_speaker"), CONFIGURATIONS)
def test_batch_of_rows_equals_rows_one_by_one(variant, use_speaker, batch):
    model = small_model(variant, use_speaker=use_speaker)
    together, logits = model(batch), model.predict(batch)
    for row, example in enumerate(random_examples(LENGTHS)):
        single = collate([example])
        for all_rows, alone in zip(together, model(single), strict=True):
            torch.testing.assert_close(all_rows[row : row + 1], alone, rtol=1e-5, atol=1e-5)
        targets = len(example.units) + 1
        torch.testing.assert_close(logits[row, :targets], model.predict(single)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("unit", [0, 7, IGNORE_ID])
def test_what_stands_in_the_padding_never_matters(variant, unit, batch):
    model = small_model(variant)

    def refill(values: torch.Tensor, lengths: torch.Tensor, value: float) -> torch.Tensor:
        padding = torch.arange(values.shape[1]) >= lengths[:, None]
        return values.masked_fill(padding.reshape(*padding.shape, *[1] * (values.dim() - 2)), value)

    refilled = replaced(
        batch,
        text=refill(batch.text, batch.text_lengths, 50.0),
        speech_final=refill(batch.speech_final, batch.speech_lengths, 50.0),
        speech_mid=refill(batch.speech_mid, batch.speech_lengths, -50.0),
        units=refill(batch.units, batch.unit_lengths, unit),
    )
    for expected, got in zip(model(batch), model(refilled), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_a_batch_further_changes_nothing(variant, batch):
    model = small_model(variant)
    wider = replaced(
        batch,
        **{name: F.pad(getattr(batch, name), (0, 0, 0, 3)) for name in ("text", "speech_final", "speech_mid")},
        **{name: F.pad(getattr(batch, name), (0, 3), value=IGNORE_ID) for name in ("units", "word_ids")},
        text_tokens=F.pad(batch.text_tokens, (0, 3)),
    )
    for expected, got in zip(model(batch), model(wider), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sequence_of_a_length_that_a_gpu_likes_gives_the_same(variant, batch, monkeypatch):
    model, lengths = small_model(variant), []
    model.llm.llm.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    expected, scores = model.predict(batch), model(batch)
    monkeypatch.setattr("taste.unit_sequence.LENGTH_MULTIPLES", {"cpu": 16})
    for all_rows, padded in zip((expected, *scores), (model.predict(batch), *model(batch)), strict=True):
        torch.testing.assert_close(padded, all_rows, rtol=1e-5, atol=1e-5)
    alone = [model.predict(collate([example]))[0] for example in random_examples(LENGTHS)]
    for row, logits in enumerate(alone):
        torch.testing.assert_close(expected[row, : len(logits)], logits, rtol=1e-5, atol=1e-5)
    assert lengths[0] % 16 and not any(length % 16 for length in lengths[2:])
    assert lengths[2] - lengths[0] < 16


def test_a_hidden_unit_is_read_as_zeros_and_still_predicted(batch):
    model = small_model("text_only")
    prefix = model.prefix(batch)
    hidden = torch.zeros_like(batch.units, dtype=torch.bool)
    hidden[:, 0] = True
    told = model.predict_after(prefix, batch.units, batch.unit_lengths, hidden)
    other = model.predict_after(prefix, batch.units.index_fill(1, torch.tensor(0), 5), batch.unit_lengths, hidden)
    torch.testing.assert_close(told, other)
    full = model.predict(batch)
    torch.testing.assert_close(told[:, 0], full[:, 0])
    assert not torch.allclose(told[:, 1], full[:, 1])


def test_unit_zero_is_a_unit_like_any_other(batch):
    model = small_model("text_only")
    scores = model(replaced(batch, units=torch.zeros_like(batch.units)))
    assert scores.target_counts.tolist() == [units + 1 for _, units in LENGTHS]
    log_probs = model.predict(replaced(batch, units=torch.zeros_like(batch.units)))[1].log_softmax(dim=-1)
    expected = -(log_probs[:6, 0].sum() + log_probs[6, SIZES.speech_vocab])
    torch.testing.assert_close(scores.loss_sums[1], expected, rtol=1e-5, atol=1e-5)


def test_counts_are_of_the_best_guess_and_of_the_five_best(batch):
    model = small_model("simple")
    logits, targets, scores = model.predict(batch), model.targets(batch), model(batch)
    for row, (_, units) in enumerate(LENGTHS):
        ranks = [
            int((logits[row, place] > logits[row, place, targets[row, place]]).sum()) for place in range(units + 1)
        ]
        assert scores.top1_counts[row] == sum(rank == 0 for rank in ranks)
        assert scores.top5_counts[row] == sum(rank < 5 for rank in ranks)


def test_only_a_model_with_an_aggregator_hears_the_recording(batch):
    louder = replaced(batch, speech_mid=batch.speech_mid * 3 + 1)
    assert torch.equal(small_model("text_only")(louder).loss_sums, small_model("text_only")(batch).loss_sums)
    assert not torch.allclose(small_model("simple")(louder).loss_sums, small_model("simple")(batch).loss_sums)


def test_a_model_without_the_speaker_position_ignores_the_speaker(batch):
    other_voice = replaced(batch, speaker=-batch.speaker)
    model = small_model("simple", use_speaker=False)
    assert torch.equal(model(other_voice).loss_sums, model(batch).loss_sums)
    assert torch.equal(model(replaced(batch, speaker=None)).loss_sums, model(batch).loss_sums)
    model = small_model("simple")
    assert not torch.allclose(model(other_voice).loss_sums, model(batch).loss_sums)


@pytest.mark.parametrize(
    ("variant", "options", "learning"),
    [
        ("simple", {"freeze_llm": True}, {"aggregator", "text_norm", "speech_norm", "input_proj"}),
        (
            "simple",
            {"freeze_llm": False},
            {"aggregator", "text_norm", "speech_norm", "input_proj"}
            | {
                f"llm.{n}"
                for n in ("llm", "llm_embedding", "llm_decoder", "speech_embedding", "spk_embed_affine_layer")
            },
        ),
        (
            "text_only",
            {"freeze_llm": False, "use_speaker": False},
            {f"llm.{n}" for n in ("text_encoder", "text_encoder_affine_layer", "llm", "llm_embedding", "llm_decoder")}
            | {"llm.speech_embedding"},
        ),
        ("text_only", {"freeze_llm": True}, set()),
        ("taste_novq", {"freeze_llm": True}, {"aggregator", "audio_branch", "fusion"}),
        (
            "taste",
            {"freeze_llm": False},
            {"aggregator", "audio_branch", "fusion", "quantizer"}
            | {f"llm.{n}" for n in ("text_encoder", "text_encoder_affine_layer", "llm", "llm_embedding", "llm_decoder")}
            | {"llm.speech_embedding", "llm.spk_embed_affine_layer"},
        ),
    ],
)
def test_exactly_the_learning_parts_get_gradients_and_leave_eval_mode(variant, options, learning, batch):
    model = small_model(variant, **options).train()
    if learning:
        model(batch).loss_sums.sum().backward()
    for name, parameter in model.named_parameters():
        expected = any(name.startswith(f"{part}.") for part in learning)
        assert (parameter.grad is not None) == expected, name
        assert parameter.requires_grad == expected, name
        assert any(name == key for key in learned_state(model)) == expected, name
    for name, part in model.named_modules():
        learns = any(f"{name}.".startswith(f"{root}.") for root in learning)
        if learns or (name.startswith("llm.") and (isinstance(part, torch.nn.Dropout) or list(part.parameters()))):
            assert part.training == learns, name


def test_frozen_parts_are_in_eval_mode_from_the_start():
    llm = small_model("text_only").llm.train()
    model = CosyVoiceS3Model(llm, variant="text_only", freeze_llm=True)
    assert model.training and not llm.training and not llm.llm.training


def test_a_frozen_language_model_drops_nothing_out_in_training(batch):
    model = small_model("simple", freeze_llm=True).train()
    assert torch.equal(model(batch).loss_sums, model(batch).loss_sums)
    model = small_model("simple", freeze_llm=False).train()
    assert not torch.equal(model(batch).loss_sums, model(batch).loss_sums)


def test_learned_weights_alone_bring_a_model_back(batch):
    trained, fresh = small_model("simple", freeze_llm=True), small_model("simple", freeze_llm=True)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.equal(fresh(batch).loss_sums, trained(batch).loss_sums)
    load_learned_state(fresh, learned_state(trained))
    assert torch.equal(fresh(batch).loss_sums, trained(batch).loss_sums)
    assert not any(name.startswith("llm.") for name in learned_state(trained))


def test_weights_of_another_model_are_refused_with_all_differences():
    state = learned_state(small_model("simple", freeze_llm=True))
    state["input_proj.bias"] = torch.zeros(5)
    state["no_such.weight"] = torch.zeros(1)
    del state["text_norm.weight"]
    with pytest.raises(ValueError) as caught:
        load_learned_state(small_model("simple", freeze_llm=True), state)
    for part in (
        "text_norm.weight is missing",
        "no_such.weight is unknown",
        "input_proj.bias is [5], expected [32]",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(("variant", "with_aggregator"), [("simple", False), ("text_only", True), ("taste_99", False)])
def test_a_variant_that_does_not_go_with_its_parts_is_refused(variant, with_aggregator):
    aggregator = SimpleTextSpeechAggregator(SIZES.text_width, SPEECH_WIDTH) if with_aggregator else None
    with pytest.raises(ValueError, match=variant):
        CosyVoiceS3Model(small_model("text_only").llm, aggregator, variant=variant)


@pytest.mark.parametrize("field", ["speaker", "speech_mid"])
def test_a_batch_without_what_the_variant_reads_is_refused(field, batch):
    with pytest.raises(ValueError, match="speaker" if field == "speaker" else "Whisper"):
        small_model("simple")(replaced(batch, **{field: None}))


def test_a_row_looks_at_its_recording_as_it_does_alone(batch):
    model = small_model("simple")
    together = model.attention(batch)
    assert together.shape == (len(batch.utt_ids), batch.text.shape[1], batch.speech_final.shape[1])
    for row, (tokens, frames) in enumerate(zip(batch.text_lengths, batch.speech_lengths, strict=True)):
        alone = model.aggregator.attention(
            batch.text[[row], :tokens], batch.speech_final[[row], :frames], batch.speech_lengths[[row]]
        )
        torch.testing.assert_close(together[[row], :tokens, :frames], alone)


def test_a_model_without_an_aggregator_looks_at_nothing(batch):
    with pytest.raises(ValueError, match="'text_only' looks at no recording"):
        small_model("text_only").attention(batch)

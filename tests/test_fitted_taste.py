import copy

import pytest
import torch

from taste.batch import collate
from taste.data import UtteranceDataset
from taste.fitted_start import SPEECH_GAIN, fit_new_parts
from taste.lengths import valid_mask
from taste.words import word_starts
from tests.small_stage3 import TASTE_SIZES, small_model
from tests.test_fitted_start import FRAMES_A_TOKEN, TOKENS, spoken

NEW_PARTS = ("aggregator.", "audio_branch.", "fusion.", "quantizer.")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> UtteranceDataset:
    return spoken(tmp_path_factory.mktemp("spoken"))


@pytest.fixture(scope="module")
def fitted(dataset):
    model = small_model("taste", started=False)
    return model, fit_new_parts(model, dataset)


def test_every_head_looks_where_tokens_are_spoken(dataset, fitted):
    model, notes = fitted
    batch = collate([dataset[0]])
    inputs = (batch.text, batch.speech_final, batch.speech_mid, batch.text_lengths, batch.speech_lengths)
    for layer in range(TASTE_SIZES.aggregator_layers):
        weights = model.aggregator.attention(*inputs, layer=layer, by_head=True)[0]  # [H, T, A]
        own = weights.unflatten(2, (TOKENS, FRAMES_A_TOKEN)).sum(dim=3).diagonal(dim1=1, dim2=2)  # [H, T]
        assert own.mean() > 0.6 and bool((own > 0.3).all())
    assert notes["attention_on_token"] > 0.6
    assert notes["attention_on_token_evenly"] == pytest.approx(1 / TOKENS, rel=0.2)


def test_what_is_heard_differs_from_word_to_word_more_than_what_is_read(dataset, fitted):
    model, _ = fitted
    batch = collate([dataset[0]])
    heard = model.aggregate(batch)
    other_voice = collate([dataset[0]._replace(speech_mid=dataset[1].speech_mid)])
    moved = (model.aggregate(other_voice) - heard).norm()
    assert moved > 0.5 * (heard - heard.mean(dim=1, keepdim=True)).norm()


def test_speech_begins_as_a_hint_beside_the_text(dataset, fitted):
    model, _ = fitted
    batch = collate([dataset[index] for index in range(len(dataset))])
    valid = valid_mask(batch.text_lengths, batch.text.shape[1])
    with torch.no_grad():
        speech = model.audio_branch(model.aggregate(batch), batch.text_lengths)[valid]
        text = model.llm.encode(batch.text, batch.text_lengths)[0][valid]
    assert speech.std(dim=0).norm() / text.std(dim=0).norm() == pytest.approx(SPEECH_GAIN, rel=0.05)
    assert speech.mean(dim=0).abs().max() < 1e-3


def test_the_quantizer_begins_close_to_the_words_it_was_started_with(dataset, fitted):
    model, notes = fitted
    batch = collate([dataset[index] for index in range(len(dataset))])
    starts = word_starts(batch.word_ids, batch.text_lengths)
    words = model.aggregate(batch)[starts]
    rounded = model.quantizer.decode(model.encode(batch))[starts]
    left_over = (rounded - words).square().sum() / (words - words.mean(dim=0)).square().sum()
    assert left_over < 0.6  # three codes of eight for as many channels as these words have
    assert len(notes["code_usage"]) == TASTE_SIZES.num_quantizers and notes["code_usage"][0] == 1.0


def test_every_process_of_a_run_starts_the_codebooks_by_itself(dataset, fitted, monkeypatch):
    def no_backend(*args, **kwargs):
        raise RuntimeError("No backend type associated with device type cpu")  # NCCL alone

    for name in ("all_reduce", "all_gather", "broadcast", "barrier"):
        monkeypatch.setattr(torch.distributed, name, no_backend)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr("vector_quantize_pytorch.vector_quantize_pytorch.is_distributed", lambda: True)
    model = small_model("taste", started=False)
    assert fit_new_parts(model, dataset) == fitted[1]
    for name, value in fitted[0].quantizer.state_dict().items():
        assert torch.equal(model.quantizer.state_dict()[name], value), name
    with pytest.raises(RuntimeError, match="No backend"):  # in training they exchange again
        model.quantizer.train()(torch.randn(1, 9, model.aggregator.speech_width), torch.ones(1, 9, dtype=torch.bool))


def test_nothing_is_drawn_and_the_pretrained_parts_are_left_alone(dataset, fitted):
    model, notes = fitted
    again, before = small_model("taste", started=False), small_model("taste", started=False)
    state = torch.get_rng_state()
    assert fit_new_parts(again, dataset) == notes
    assert torch.equal(torch.get_rng_state(), state)
    theirs, old = again.state_dict(), before.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
        assert name.startswith(NEW_PARTS) or torch.equal(value, old[name]), name


def test_only_the_parts_that_are_named_are_fitted(dataset):
    model, before = small_model("taste", started=False), small_model("taste", started=False).state_dict()
    notes = fit_new_parts(model, dataset, {"quantizer"})
    changed = {
        name.partition(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"quantizer"}
    assert notes.keys() == {"utterances", "code_usage"}


def test_fitted_parts_still_learn(dataset, fitted):
    model = copy.deepcopy(fitted[0]).train()
    assert all(value.grad is None for value in fitted[0].parameters())  # the first step would follow them
    scores = model(collate([dataset[index] for index in range(8)]))
    (scores.loss_sums.sum() + scores.commitment_sums.sum()).backward()
    silent = ("q_proj", "k_proj", "v_proj", "self_attn_layer_norm", "final_layer_norm", "fc1")  # of what is silent yet
    silent += ("layers.0.encoder_attn_layer_norm",)
    for name, value in model.named_parameters():
        if name.startswith(NEW_PARTS) and not any(part in name for part in silent):
            assert value.grad is not None and bool(value.grad.abs().sum() > 0), name
    model.zero_grad()
    model.eval()


def test_codebooks_start_from_some_utterances_of_a_large_training_set(dataset, monkeypatch):
    read = []

    class Counted(UtteranceDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    counted = Counted(dataset.features, dataset.selection)
    monkeypatch.setattr("taste.fitted_start.MOST_UTTERANCES", 2)
    monkeypatch.setattr("taste.fitted_start.QUANTIZER_UTTERANCES", 6)
    notes = fit_new_parts(small_model("taste", started=False), counted, {"quantizer"})
    assert notes["utterances"] == 2
    assert read == [6, 18, *range(2, 24, 4)]

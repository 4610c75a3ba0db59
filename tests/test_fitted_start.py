import os

import pytest
import torch

from taste import fitted_start
from taste.batch import collate
from taste.data import UtteranceDataset, open_dataset
from taste.fitted_start import SPEECH_GAIN, fit_new_parts
from tests.small_stage3 import SIZES, random_examples, small_model, write_features

NEW_PARTS = ("aggregator.", "text_norm.", "speech_norm.", "input_proj.")
TOKENS, FRAMES_A_TOKEN = 6, 5
UNITS = TOKENS * FRAMES_A_TOKEN


def spoken(folder) -> UtteranceDataset:
    """Utterances whose last states name the token of each frame, and whose middle ones say how it is spoken."""
    generator = torch.Generator().manual_seed(4)
    words = torch.randn(12, SIZES.text_width, generator=generator)
    examples = []
    for example in random_examples([(TOKENS, UNITS)] * 24, seed=4):
        chosen = torch.randperm(len(words), generator=generator)[:TOKENS]
        width = example.speech_final.shape[1]
        final = words[chosen, :width].repeat_interleave(FRAMES_A_TOKEN, dim=0)
        examples.append(example._replace(text=words[chosen], speech_final=final + 0.1 * example.speech_final))
    return open_dataset(write_features(folder, "train", examples), SIZES)


@pytest.fixture
def dataset(tmp_path) -> UtteranceDataset:
    return spoken(tmp_path)


def quiet(model):
    """The model with its speech switched off, so that only the text path counts."""
    torch.nn.init.zeros_(model.speech_norm.weight)
    torch.nn.init.zeros_(model.speech_norm.bias)
    return model


def test_the_projection_says_what_the_pretrained_text_encoder_says(dataset):
    reference, random_start, fitted = small_model("text_only"), small_model(), small_model()
    notes = fit_new_parts(fitted, dataset)
    batch = collate([dataset[index] for index in range(4)])

    @torch.no_grad()
    def distance(model) -> float:
        return float((quiet(model).prefix(batch).vectors - reference.prefix(batch).vectors).square().mean())

    assert distance(fitted) < 0.2 * distance(random_start)
    assert 0.5 < notes["text_explained"] <= 1


@pytest.mark.parametrize(("processes", "threads"), [("2", 3), ("1", 1), (None, 1), ("16", 1)])
def test_processes_of_a_launcher_share_the_cores_while_they_fit(dataset, monkeypatch, processes, threads):
    seen = []
    fit_text_path = fitted_start._fit_text_path

    def noted(*args):
        seen.append(torch.get_num_threads())
        return fit_text_path(*args)

    monkeypatch.setattr(fitted_start, "_fit_text_path", noted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 does
    try:
        fit_new_parts(small_model(), dataset)
        assert seen == [threads] and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_tokens_look_where_they_are_spoken(dataset):
    model = small_model()
    notes = fit_new_parts(model, dataset)
    weights = model.attention(collate([dataset[0]]))[0]  # [T, A]
    own = weights.unflatten(1, (TOKENS, FRAMES_A_TOKEN)).sum(dim=2).diagonal()
    assert bool((own > 0.8).all())
    assert notes["attention_on_token"] > 0.8
    assert notes["attention_on_token_evenly"] == pytest.approx(1 / TOKENS, rel=0.2)


def test_speech_begins_quiet_and_differs_from_token_to_token(dataset):
    model = small_model()
    fit_new_parts(model, dataset)
    batch = collate([dataset[index] for index in range(len(dataset))])
    vectors = model.aggregate(batch).flatten(0, 1)
    heard = vectors.std(dim=0)  # the channels that have anything to say: as many as the speech has
    assert bool((heard[: model.aggregator.speech_width] > 0.5).all())
    assert vectors.mean(dim=0).abs().max() < 1e-3
    assert model.speech_norm.weight.unique().tolist() == pytest.approx([SPEECH_GAIN])


def test_nothing_is_drawn_and_the_pretrained_parts_are_left_alone(dataset):
    one, two, before = small_model(), small_model(), small_model()
    for parameter in two.aggregator.parameters():
        torch.nn.init.ones_(parameter)
    state = torch.get_rng_state()
    assert fit_new_parts(one, dataset) == fit_new_parts(two, dataset)
    assert torch.equal(torch.get_rng_state(), state)
    theirs, old = two.state_dict(), before.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, theirs[name]), name
        assert name.startswith(NEW_PARTS) or torch.equal(value, old[name]), name


def test_fitted_parts_still_learn(dataset):
    model = small_model().train()
    fit_new_parts(model, dataset)
    model(collate([dataset[0]])).loss_sums.sum().backward()
    learning = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name, value in learning.items():
        if name.startswith(NEW_PARTS):
            assert value.grad is not None and bool(value.grad.abs().sum() > 0), name

import dataclasses
import math
from functools import partial

import pytest
import torch

from taste.batch import collate
from taste.generation import Sampling, generate
from tests.small_stage3 import SIZES, random_batch, random_examples, small_model

LENGTHS = [(3, 9), (6, 14), (1, 4)]
GREEDY = Sampling("greedy")
VARIANTS = ["text_only", "simple", "taste_novq", "taste"]


def lean_towards(model, unit: int, by: float) -> None:
    with torch.no_grad():
        model.llm.llm_decoder.bias[unit] += by


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_greedy_generation_equals_the_best_guesses_of_the_full_forward(variant):
    model, batch = small_model(variant), random_batch(LENGTHS)
    lean_towards(model, model.eos, 1.5)  # so that rows end at different places
    made = generate(model, batch, GREEDY)
    for row, units in enumerate(made.units):
        example = random_examples(LENGTHS)[row]._replace(units=torch.tensor(units))
        logits = model.predict(collate([example]))[0]
        logits[: 3 * LENGTHS[row][0], model.eos] = -math.inf
        best = logits.argmax(dim=-1).tolist()
        assert best[: len(units)] == units
        assert (best[len(units)] == model.eos) == made.ended[row] or len(units) == 30 * LENGTHS[row][0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_greedy_rows_equals_rows_one_by_one(variant):
    model = small_model(variant)
    lean_towards(model, model.eos, 1.5)
    together = generate(model, random_batch(LENGTHS), GREEDY)
    alone = [generate(model, collate([example]), GREEDY) for example in random_examples(LENGTHS)]
    assert together.units == [made.units[0] for made in alone]
    assert together.ended == [made.ended[0] for made in alone]
    assert len({len(units) for units in together.units}) == 3


@pytest.mark.parametrize("method", ["greedy", "top_k", "ras"])
def test_a_model_that_wants_to_end_says_three_units_a_text_token(method):
    model = small_model()
    lean_towards(model, model.eos, 1000.0)
    made = generate(model, random_batch(LENGTHS), Sampling(method))
    assert [len(units) for units in made.units] == [9, 18, 3]
    assert made.ended == [True, True, True]


@pytest.mark.parametrize("method", ["greedy", "top_k", "ras"])
def test_a_model_that_never_ends_is_stopped_at_thirty_units_a_text_token(method):
    model = small_model()
    lean_towards(model, model.eos, -1000.0)
    made = generate(model, random_batch(LENGTHS), Sampling(method))
    assert [len(units) for units in made.units] == [90, 180, 30]
    assert made.ended == [False, False, False]
    assert all(0 <= unit < SIZES.speech_vocab for units in made.units for unit in units)


def test_the_window_can_be_set():
    model = small_model()
    lean_towards(model, model.eos, -1000.0)
    window = Sampling("greedy", min_units_per_token=0, max_units_per_token=2.5)
    assert [len(units) for units in generate(model, random_batch(LENGTHS), window).units] == [7, 15, 2]


def test_generation_never_reads_the_true_units():
    model, batch = small_model(), random_batch(LENGTHS)
    other = dataclasses.replace(batch, units=torch.zeros_like(batch.units))
    assert generate(model, batch, GREEDY) == generate(model, other, GREEDY)


def test_top_1_is_greedy():
    model, batch = small_model(), random_batch(LENGTHS)
    assert generate(model, batch, Sampling("top_k", top_k=1)) == generate(model, batch, GREEDY)


@pytest.mark.parametrize("method", ["top_k", "ras"])
def test_sampling_repeats_with_the_seed_and_differs_without(method):
    model, batch = small_model(), random_batch(LENGTHS)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(generate(model, batch, Sampling(method)).units)
    assert drawn[0] == drawn[1] != drawn[2]


def test_top_k_draws_only_from_the_k_best():
    model = small_model()
    lean_towards(model, 11, 1000.0)
    lean_towards(model, 12, 1000.0)
    torch.manual_seed(0)
    made = generate(model, random_batch(LENGTHS), Sampling("top_k", top_k=2))
    assert {unit for units in made.units for unit in units} == {11, 12}


def test_repetition_aware_sampling_leaves_a_loop():
    model = small_model()
    lean_towards(model, 11, 8.0)  # all but certain
    torch.manual_seed(0)
    looping = generate(model, random_batch(LENGTHS), Sampling("top_k", top_k=5)).units[1]
    aware = generate(model, random_batch(LENGTHS), Sampling("ras")).units[1]
    assert looping.count(11) > 0.9 * len(looping)
    assert aware.count(11) < 0.5 * len(aware)


def repetitions(variant: str, **options) -> int:
    """How often a unit that is all but certain is drawn."""
    model = small_model(variant)
    lean_towards(model, 11, 8.0)
    torch.manual_seed(0)
    return sum(units.count(11) for units in generate(model, random_batch(LENGTHS), Sampling("ras", **options)).units)


@pytest.mark.parametrize(("variant", "same_as"), [("text_only", 0.1), ("simple", 0.4), ("taste", 0.4)])
def test_a_variant_that_hears_may_hold_a_unit_longer(variant, same_as):
    assert repetitions(variant) == repetitions(variant, tau_r=same_as)
    assert repetitions(variant, tau_r=0.1) < repetitions(variant, tau_r=0.4) < repetitions(variant, tau_r=0.8)


def test_a_folders_sampler_without_repetitions_is_left_as_it_is():
    model = small_model()
    lean_towards(model, 11, 8.0)
    model.llm.sampling = partial(drawn_by, 11)
    made = generate(model, random_batch(LENGTHS), Sampling("ras", tau_r=0.1))
    assert {unit for units in made.units for unit in units} == {11}


def drawn_by(unit: int, log_probs: torch.Tensor, so_far: list[int], top_k: int) -> int:
    return unit


def test_the_positions_of_the_language_model_are_a_limit_too(monkeypatch):
    monkeypatch.setattr("taste.generation.MAX_LM_POSITIONS", 40)
    model = small_model()
    lean_towards(model, model.eos, -1000.0)
    made = generate(model, random_batch(LENGTHS), GREEDY)
    assert [len(units) for units in made.units] == [34, 31, 30]  # 40 less [sos] [speaker] [task] and the text


@pytest.mark.parametrize(
    "options",
    [
        {"method": "beam"},
        {"top_k": 0},
        {"tau_r": 0.0},
        {"min_units_per_token": 5, "max_units_per_token": 4},
        {"min_units_per_token": 0, "max_units_per_token": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError):
        Sampling(**options)

import pytest
import torch

from taste.metrics import compare_units, describe_attention


def test_perfect_units_have_no_errors():
    true = [[5, 7, 7, 9, 1, 2], [3, 3, 4, 8]]
    measured = compare_units(true, true, [True, True])
    assert measured.unit_error_rate == 0
    assert measured.length_ratio == measured.eos_rate == measured.unigram_f1 == 1
    assert measured.bleu == pytest.approx(100)


def test_errors_are_counted_over_the_whole_set():
    # one substitution, one deletion; then two insertions: 4 errors over 7 true units
    measured = compare_units([[1, 2, 3, 4], [5, 6, 7]], [[1, 9, 3], [5, 6, 8, 8, 7]], [True, False])
    assert measured.unit_error_rate == pytest.approx(4 / 7)
    assert measured.length_ratio == pytest.approx(8 / 7)
    assert measured.eos_rate == 0.5
    assert measured.unigram_f1 == pytest.approx(2 * 5 / (7 + 8))
    assert measured.utterances == 2


def test_order_matters_to_bleu_but_not_to_the_unigrams():
    measured = compare_units([[1, 2, 3, 4, 5, 6, 7, 8]], [[8, 7, 6, 5, 4, 3, 2, 1]], [True])
    assert measured.unigram_f1 == 1
    assert measured.bleu < 15


def test_a_unit_counts_as_often_as_it_is_true():
    assert compare_units([[1, 2, 3]], [[1, 1, 1]], [True]).unigram_f1 == pytest.approx(1 / 3)


def test_an_empty_prediction_misses_everything():
    measured = compare_units([[1, 2, 3]], [[]], [True])
    assert (measured.unit_error_rate, measured.length_ratio, measured.unigram_f1, measured.bleu) == (1, 0, 0, 0)


@pytest.mark.parametrize(
    ("true", "predicted", "ended"), [([], [], []), ([[1]], [], [True]), ([[]], [[1]], [True]), ([[1]], [[1]], [])]
)
def test_nothing_to_compare_is_refused(true, predicted, ended):
    with pytest.raises(ValueError):
        compare_units(true, predicted, ended)


def test_tokens_that_look_at_one_frame_each_in_order_rise_and_have_no_width():
    in_order = torch.zeros(3, 30)
    in_order[[0, 1, 2], [2, 9, 28]] = 1
    described = describe_attention([in_order, in_order.flip(0)])
    assert described["monotonicity"] == 0.5
    assert describe_attention([in_order])["monotonicity"] == 1
    assert described["width_seconds"] == pytest.approx(0, abs=1e-6)


def test_attention_to_all_frames_alike_is_as_wide_as_chance():
    described = describe_attention([torch.full((4, 50), 1 / 50), torch.full((2, 20), 1 / 20)])
    assert described["width_seconds"] == pytest.approx(described["chance_width_seconds"], rel=1e-4)
    assert described["chance_width_seconds"] == pytest.approx((4 * 50 + 2 * 20) / 6 / 50 / 12**0.5, rel=1e-2)

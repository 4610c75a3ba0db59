import random
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from cosyvoice.utils.common import (
    fade_in_out,
    nucleus_sampling,
    random_sampling,
    ras_sampling,
    set_all_random_seed,
    th_accuracy,
)
from cosyvoice.utils.config import load_config


def as_before_striking(log_prob: Tensor) -> Tensor:
    """The published sampler strikes a repeated token out of its argument, which was stored afterwards: put it back."""
    struck = log_prob.isinf()
    assert struck.sum() <= 1
    missing = torch.log1p(-log_prob.double().exp().sum()).float()
    return torch.where(struck, missing, log_prob)


@pytest.mark.parametrize("index", range(12))
def test_sampled_tokens_are_those_of_the_reference(golden_cases, index):
    case = golden_cases["sampling"][index]
    torch.manual_seed(case["seed"])
    assert nucleus_sampling(case["logp"].clone()) == case["nucleus"]
    torch.manual_seed(case["seed"])
    assert ras_sampling(as_before_striking(case["logp"]), case["history"].tolist(), 25) == case["ras"]


def test_the_reference_cases_hold_repeated_tokens(golden_cases):
    assert sum(bool(case["logp"].isinf().any()) for case in golden_cases["sampling"]) >= 3


def test_a_file_without_sampling_draws_as_one_that_names_it_and_says_so(golden_dir, tmp_path, caplog):
    text = (golden_dir / "small_cosyvoice.yaml").read_text()
    without, count = re.subn(r"    sampling: !name:(.*\n)+?\n", "\n", text)
    assert count == 1
    tokens = []
    for name, content in (("with", text), ("without", without)):
        assert not caplog.records
        (tmp_path / name).write_text(content)
        lm = load_config(tmp_path / name, ["llm"])["llm"]
        torch.manual_seed(0)
        tokens.append([])
        for _ in range(200):
            tokens[-1].append(lm.sampling(torch.randn(30), tokens[-1], 25))
    assert tokens[0] == tokens[1]
    assert [record.getMessage()[:25] for record in caplog.records] == ["llm has no `sampling`, as"]


def test_a_nucleus_is_the_shortest_run_that_holds_top_p_and_at_most_top_k():
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    torch.manual_seed(0)
    for options, tokens in (
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.65}, {1, 3}),
        ({"top_p": 0.75}, {1, 3, 2}),
        ({"top_p": 1.5}, {0, 1, 2, 3}),
        ({"top_p": 1.5, "top_k": 2}, {1, 3}),
        ({"top_k": 1}, {1}),
    ):
        assert {nucleus_sampling(scores, **options) for _ in range(100)} == tokens


def test_tokens_are_drawn_by_their_probability():
    torch.manual_seed(0)
    scores = torch.tensor([0.25, 0.75]).log()
    for sample in (lambda: random_sampling(scores, [], 25), lambda: nucleus_sampling(scores, top_p=1.0)):
        assert np.mean([sample() for _ in range(2000)]) == pytest.approx(0.75, abs=0.04)


def test_a_repeated_token_is_drawn_again_from_the_others_and_the_scores_stay():
    scores = torch.tensor([0.9, 0.05, 0.05]).log()
    before = scores.clone()
    torch.manual_seed(0)
    assert {ras_sampling(scores, [0], 25, top_k=1) for _ in range(50)} == {1, 2}
    assert {ras_sampling(scores, [0, *[1] * 10], 25, top_k=1) for _ in range(5)} == {0}  # out of the window
    assert {ras_sampling(scores, [0, 1, 2], 25, top_k=1, tau_r=0.2) for _ in range(5)} == {0}  # once is allowed
    assert torch.equal(scores, before)


def test_a_struck_token_is_never_drawn():
    scores = torch.tensor([0.5, 0.5, 0.0]).log()
    scores[0] = -torch.inf
    torch.manual_seed(0)
    assert {nucleus_sampling(scores) for _ in range(50)} == {1}


def test_the_same_seed_gives_the_same_numbers_everywhere():
    drawn = []
    for _ in range(2):
        set_all_random_seed(7)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_accuracy_counts_the_positions_that_have_a_target():
    scores = torch.eye(4)[torch.tensor([[0, 1, 2], [3, 0, 0]])].reshape(6, 4)
    targets = torch.tensor([[0, 1, 1], [3, -1, -1]])
    assert float(th_accuracy(scores, targets, ignore_label=-1)) == 0.75
    assert float(th_accuracy(scores, targets, ignore_label=1)) == 0.5  # a class may be the one that does not count


@pytest.mark.parametrize("shape", [(1, 80, 30), (1, 400)])
def test_a_cross_fade_is_the_weighted_sum_over_the_overlap_and_the_next_piece_after_it(shape):
    window = np.hamming(20)
    following, before = torch.randn(shape), torch.randn(shape)
    kept = following.clone()
    faded = fade_in_out(following, before, window)
    weights = torch.from_numpy(window).float()
    expected = following[..., :10] * weights[:10] + before[..., -10:] * weights[10:]
    assert torch.allclose(faded[..., :10], expected)
    assert torch.equal(faded[..., 10:], following[..., 10:])
    assert torch.equal(following, kept)


def test_pieces_shorter_than_the_overlap_are_refused():
    with pytest.raises(ValueError, match=r"over 10 values: the pieces hold 9 \(before\) and 40"):
        fade_in_out(torch.zeros(1, 40), torch.zeros(1, 9), np.hamming(20))

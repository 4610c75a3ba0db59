import itertools

import pytest

from taste.lr_schedule import share_of_peak


def test_the_learning_rate_rises_straight_and_falls_as_a_cosine():
    rates = [share_of_peak(step, 104, warmup_steps=4) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[54] == pytest.approx((1 + 0.05) / 2)
    assert rates[104] == pytest.approx(0.05)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))

"""The learning rates of the published schedules, and of our own."""

import math

import pytest
import torch

from cosyvoice.utils.prefetch import prefetched
from cosyvoice.utils.scheduler import build_scheduler

LR = 0.002


def rates(name: str, steps: list[int], settings: dict, max_steps: int | None = None) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = build_scheduler(name, optimizer, settings, max_steps, by_clock=False)
    seen = {0: optimizer.param_groups[0]["lr"]}
    for step in range(1, max(steps) + 1):
        optimizer.step()
        scheduler.step()
        seen[step] = optimizer.param_groups[0]["lr"]
    for step in steps:
        scheduler.set_step(step)  # resuming from a checkpoint gives what counting there gives
        assert optimizer.param_groups[0]["lr"] == seen[step]
    return [seen[step] for step in steps]


def test_warmuplr_rises_to_the_configured_rate_and_falls_with_the_root_of_the_step() -> None:
    # lr * warmup ** .5 * min(n ** -.5, n * warmup ** -1.5) with n = step + 1, as published
    wanted = [LR * 10**0.5 * min(n**-0.5, n * 10**-1.5) for n in (1, 10, 40)]
    assert rates("warmuplr", [0, 9, 39], {"warmup_steps": 10}) == pytest.approx(wanted)


def test_constantlr_stays_whatever_settings_stand_beside_it() -> None:
    assert rates("constantlr", [0, 7], {"warmup_steps": 10}) == [LR, LR]


def test_noam_hold_annealing_rises_holds_and_falls() -> None:
    settings = {"max_steps": 100, "warmup_steps": 4, "hold_steps": 6, "decay_rate": 0.5, "min_lr": 0.0001}
    wanted = [LR / 5, LR, LR, LR * (4 / (40 - 6)) ** 0.5, 0.0001]
    assert rates("NoamHoldAnnealing", [0, 4, 9, 40, 101], settings) == pytest.approx(wanted)


def test_warmupcosine_ends_at_a_twentieth_where_the_training_ends() -> None:
    wanted = [LR / 4, LR, LR * (0.05 + 0.95 / 2), LR * 0.05]
    assert rates("warmupcosine", [0, 4, 12, 20], {"warmup_steps": 4}, max_steps=20) == pytest.approx(wanted)
    assert math.isclose(rates("warmupcosine", [9], {"total_steps": 5})[0], LR * 0.05)


def test_warmupcosine_falls_with_the_share_of_time_where_the_clock_ends_the_training() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = build_scheduler("warmupcosine", optimizer, {"warmup_steps": 4}, None, by_clock=True)
    seen = []
    for step, share in ((0, 0.0), (4, 0.0), (100, 0.5), (200, 1.0), (300, 1.2)):
        scheduler.share_done = share
        scheduler.set_step(step)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([LR / 4, LR, LR * (0.05 + 0.95 / 2), LR * 0.05, LR * 0.05])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cosine", {}, "there are constantlr, warmuplr"),
        ("warmuplr", {"warm": 3}, "does not fit warmuplr"),
        ("warmupcosine", {"warmup_steps": 4}, "must know where the training ends"),
        ("warmupcosine", {"warmup_steps": 4, "total_steps": 4}, "must be under total_steps"),
        ("NoamHoldAnnealing", {"max_steps": 9}, "one of warmup_steps and warmup_ratio"),
    ],
)
def test_a_schedule_that_cannot_be_is_named(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates(name, [0], settings)


def test_prefetching_keeps_order_errors_and_ends_its_thread() -> None:
    def items():
        yield from range(3)
        raise KeyError("broken")

    got = []
    with pytest.raises(KeyError, match="broken"):
        for item in prefetched(items(), 2):
            got.append(item)
    assert got == [0, 1, 2]
    endless = prefetched(iter(int, 1), 2)
    assert next(endless) == 0
    endless.close()

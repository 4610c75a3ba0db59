import pytest

from taste.epoch_plan import POOL_BATCHES, EpochPlan, batches_by_length, halved, most_demanding

LENGTHS = [(number * 37) % 101 + 1 for number in range(203)]


@pytest.mark.parametrize("batch_size", [1, 4, 8, 500])
def test_every_utterance_is_in_exactly_one_batch_of_an_epoch(batch_size):
    batches = EpochPlan(LENGTHS, batch_size, seed=0).batches(epoch=3)
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)


def test_the_order_follows_from_seed_and_epoch_alone():
    plan = EpochPlan(LENGTHS, 8, seed=5)
    later = plan.batches(2)
    assert later == EpochPlan(LENGTHS, 8, seed=5).batches(2)
    assert later != plan.batches(1)
    assert later != EpochPlan(LENGTHS, 8, seed=6).batches(2)


def test_utterances_of_a_batch_are_of_similar_length():
    batches = EpochPlan(LENGTHS, 4, seed=0).batches(0)
    padding = sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in batches)
    assert padding < 0.1 * sum(LENGTHS)
    # and still an epoch does not go from short to long
    firsts = [LENGTHS[batch[0]] for batch in batches]
    assert firsts != sorted(firsts)
    assert POOL_BATCHES * 4 < len(LENGTHS)  # several pools are in play here


@pytest.mark.parametrize(("batches_per_step", "processes"), [(1, 1), (3, 1), (2, 2), (1, 4)])
def test_steps_hold_all_batches_that_the_processes_can_share_evenly(batches_per_step, processes):
    plan = EpochPlan(LENGTHS, 8, seed=1)
    batches = plan.batches(0)
    steps = plan.steps(0, batches_per_step, processes)
    assert [batch for step in steps for batch in step] == batches[: len(batches) // processes * processes]
    assert all(len(step) <= batches_per_step * processes for step in steps)
    shares = [[step[rank::processes] for step in steps] for rank in range(processes)]
    assert all([len(share) for share in rank] == [len(share) for share in shares[0]] for rank in shares)


def test_two_processes_do_the_steps_of_one_that_accumulates_twice_as_much():
    plan = EpochPlan(LENGTHS[:64], 8, seed=1)
    assert plan.steps(0, 2, 1) == plan.steps(0, 1, 2)


def test_halves_hold_each_utterance_in_its_order():
    batches = [[4, 1, 7], [2], [5, 3]]
    assert halved(batches) == [[4], [1, 7], [2], [5], [3]]
    assert halved(halved(batches)) == [[4], [1], [7], [2], [5], [3]]


def test_the_most_demanding_batch_has_many_rows_and_a_long_one():
    lengths = [5, 5, 9, 10, 1]
    assert most_demanding([[0, 1], [2, 4], [3]], lengths) == [2, 4]
    assert most_demanding([[0, 1, 4], [3]], lengths) == [3]


def test_evaluation_goes_by_length():
    batches = batches_by_length(LENGTHS, 6)
    ordered = [LENGTHS[index] for batch in batches for index in batch]
    assert ordered == sorted(LENGTHS)
    assert [len(batch) for batch in batches] == [6] * 33 + [5]


@pytest.mark.parametrize(("lengths", "batch_size"), [([], 4), ([3, 4], 0)])
def test_nothing_to_batch_is_refused(lengths, batch_size):
    with pytest.raises(ValueError):
        EpochPlan(lengths, batch_size, seed=0)

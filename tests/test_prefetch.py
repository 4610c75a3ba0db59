import threading
import time

import pytest

from taste.prefetch import prefetched


def test_results_come_in_order_whatever_finishes_first() -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * 10

    batches = [[0, 1, 2], [3], [4, 5], [6, 7, 8]]
    assert list(prefetched(batches, work, workers=3)) == [[0, 10, 20], [30], [40, 50], [60, 70, 80]]
    assert list(prefetched([], work, workers=3)) == []


def test_only_a_few_batches_are_begun_ahead_and_the_rest_is_dropped_on_an_early_end() -> None:
    begun = []
    results = prefetched([[number] for number in range(100)], begun.append, workers=2)
    next(results)
    time.sleep(0.05)
    assert 1 <= len(begun) <= 5
    results.close()
    assert len(begun) <= 5


def test_an_error_comes_with_its_batch() -> None:
    def work(number: int) -> int:
        return 1 // number

    before = set(threading.enumerate())
    results = prefetched([[1], [0], [1]], work, workers=1)
    assert next(results) == [1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert set(threading.enumerate()) <= before

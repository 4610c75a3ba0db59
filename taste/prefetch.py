"""Works on the coming batches in threads while the caller works on the present one."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCHES_AHEAD = 2  # at least; more where small batches would leave workers idle


def prefetched(
    batches: Sequence[Sequence[Item]], work: Callable[[Item], Result], workers: int
) -> Iterator[list[Result]]:
    """Do the work of each item in a thread, batch after batch, only a few batches ahead of the caller.

    Args:
        batches: the items of each batch.
        work: what to do with an item; what it raises is raised here when its batch's turn comes.
        workers: threads, at least 1.

    Yields:
        the results of each batch, in order. Where the caller stops early, work that has not begun is dropped.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[list[Future[Result]]] = deque()
        try:
            for batch in batches:
                waiting.append([pool.submit(work, item) for item in batch])
                items_ahead = sum(map(len, waiting)) - len(waiting[0])
                if len(waiting) > BATCHES_AHEAD and items_ahead >= workers:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

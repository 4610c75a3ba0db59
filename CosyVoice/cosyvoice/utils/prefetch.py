"""Makes the coming items of an iterable in a thread, while the caller works on the present one."""

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

Item = TypeVar("Item")

_LOOK_SECONDS = 0.1  # between two looks of a waiting thread at whether it is still wanted
_END = object()


def prefetched(items: Iterable[Item], ahead: int) -> Iterator[Item]:
    """Iterate in a background thread, at most `ahead` items before the caller.

    Args:
        items: what to iterate over; what it raises is raised here, in its place.
        ahead: items held ready, at least 1.

    Yields:
        the items, in order. The thread has ended when this generator is exhausted or closed.
    """
    ready: queue.Queue[object] = queue.Queue(maxsize=ahead)
    unwanted = threading.Event()
    failure: list[BaseException] = []

    def put(item: object) -> bool:
        while not unwanted.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=_LOOK_SECONDS)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:  # noqa: BLE001 - handed over and raised in the caller's thread
            failure.append(error)
        put(_END)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            yield item  # type: ignore[misc]
        if failure:
            raise failure[0]
    finally:
        unwanted.set()
        thread.join()

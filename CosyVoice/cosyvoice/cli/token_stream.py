"""Hands S3 tokens from the thread that writes them to the one that turns them into sound."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

Emit = Callable[[int], None]


class StreamClosed(Exception):  # noqa: N818 - a signal to the writing thread, not an error
    """Raised inside the writer's `emit` once nobody reads any more."""


class TokenStream:
    """Runs a writer of tokens in a thread of its own for as long as the `with` block lasts.

    Leaving the block, for whatever reason, stops the writer at its next token and waits for it.

    Args:
        write: called in the thread with an `emit` function that takes one token at a time.
    """

    def __init__(self, write: Callable[[Emit], None]) -> None:
        self._write = write
        self._tokens: list[int] = []
        self._ended = self._closed = False
        self._changed = threading.Condition()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cosyvoice-llm")
        self._result = self._executor.submit(self._run)

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
        self._executor.shutdown(wait=True)

    def has(self, count: int) -> bool:
        """Wait until there are `count` tokens, or until the writer has ended with fewer.

        Args:
            count: tokens wanted since the beginning.

        Returns:
            Whether there are as many.

        Raises:
            Exception: whatever the writer raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(self._tokens) >= count)
        if self._ended:
            self._result.result()
        return len(self._tokens) >= count

    def __getitem__(self, window: slice) -> list[int]:
        return self._tokens[window]

    def _run(self) -> None:
        try:
            self._write(self._emit)
        except StreamClosed:
            pass
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _emit(self, token: int) -> None:
        with self._changed:
            if self._closed:
                raise StreamClosed
            self._tokens.append(token)
            self._changed.notify_all()

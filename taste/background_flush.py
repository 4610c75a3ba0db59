"""Writes the chunks of feature files while the next ones are computed."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from taste.feature_writer import FeatureWriter


class BackgroundFlush:
    """Flushes writers in a thread, so that the caller can compute the next chunk meanwhile.

    At most one chunk of each writer is in writing. The end of the block waits for it; before, the writers may be added
    to, but neither flushed, finished nor closed, except after `wait`.

    Args:
        writers: in the order in which their chunks are written; one that cannot be written keeps those behind it back.
    """

    def __init__(self, writers: Sequence[FeatureWriter]) -> None:
        self._writers = tuple(writers)
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "BackgroundFlush":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *error: object) -> None:
        self._pool.shutdown(wait=True)
        if error_type is None:
            self.wait()

    def start(self) -> None:
        """Begin to write the chunks in work, once those before are written; call it where a batch has ended.

        Raises:
            FeatureWriteError: those before could not be written, as `FeatureWriter.flush` says it.
        """
        self.wait()
        for writer in self._writers:
            writer.close_chunk()
        self._writing = self._pool.submit(self._write)

    def wait(self) -> None:
        """Wait until what `start` began is written.

        Raises:
            FeatureWriteError: it could not be written, as `FeatureWriter.flush` says it; told once.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self) -> None:
        for writer in self._writers:
            writer.write_closed_chunk()

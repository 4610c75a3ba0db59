"""Chains the configured steps into the batches of one epoch, in an order that can be repeated."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from cosyvoice.dataset import processor
from cosyvoice.dataset.sample import REMAKE_SHARDS, DataError, Sample

log = logging.getLogger(__name__)

READERS = min(8, os.cpu_count() or 1)  # shards read at the same time to be kept in memory
SEED = 1986  # the released configuration's
# What these give depends on the epoch or is a batch; what comes before the first of them can be kept.
STEPS_OF_EACH_EPOCH = (
    processor.truncate,
    processor.shuffle,
    processor.sort,
    processor.batch,
    processor.padding,
)

Step = Callable[..., Iterator[Any]]


class Dataset(IterableDataset):
    """The batches of a list of Parquet shards.

    The order and content of an epoch follow from (seed, epoch, rank, world size) alone, so a run resumes by
    `set_epoch(epoch)` and skipping the batches it has done. With DataLoader workers each takes its share of the
    shards, and the number of workers matters too.

    With `cache`, what the steps before the first truncate, shuffle, sort, batch or padding give is kept in memory, and
    later epochs decode, resample, and compute mel and F0 no more. An hour of speech takes 100 MB, with `gan` 420 MB
    (the mel of 80 float32 values 86 times a second; the waveform). A process keeps the shards it has met: with several
    processes, in time all of them. Use no DataLoader workers then: each epoch starts new ones, with nothing kept.

    Args:
        data_list_file: one path of a Parquet shard a line (tools/make_parquet_list.py writes it as data.list).
        data_pipeline: steps of `cosyvoice.dataset.processor` with their arguments bound, parquet_opener first.
        mode: handed to every step.
        gan: batches carry the waveform and the pitch.
        shuffle: another order of shards and utterances, and other crops, each epoch; False repeats those of epoch 0.
        partition: each process takes its own shards; False gives all of them to each (validation).
        seed: of every order and crop.
        cache: keep what does not change from epoch to epoch in memory.
        rank: this process; None asks torch.distributed, at each epoch.
        world_size: number of processes; None asks torch.distributed.

    Raises:
        FileNotFoundError: there is no such list.
        DataError: the list is empty.

    Source: FunAudioLLM/CosyVoice cosyvoice/dataset/dataset.py @ ace7c47.
    """

    def __init__(
        self,
        data_list_file: str | Path,
        data_pipeline: Sequence[Step],
        mode: str = "train",
        gan: bool = False,
        shuffle: bool = True,
        partition: bool = True,
        seed: int = SEED,
        cache: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        self.data_list_file = Path(data_list_file)
        self.shards = read_data_list(self.data_list_file)
        self.steps = list(data_pipeline)
        self.mode = mode
        self.gan = gan
        self.shuffle = shuffle
        self.partition = partition
        self.seed = seed
        self.cache = cache
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.dropped: Counter[str] = Counter()  # of the present epoch, by reason; with cache, of what is new in it
        self._kept: dict[str, list[Sample]] = {}
        self._kept_dropped: dict[str, Counter[str]] = {}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives.

        Args:
            epoch: counted from 0.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Give the batches of the epoch; see `cosyvoice.dataset.processor.padding` for what is in one.

        Raises:
            DataError: a shard or an utterance cannot be used, or no utterance is left.
        """
        dropped: Counter[str] = Counter()
        self.dropped = dropped
        first_of_each_epoch = next(
            (place for place, step in enumerate(self.steps) if _function(step) in STEPS_OF_EACH_EPOCH), len(self.steps)
        )
        once, each_epoch = self.steps[:first_of_each_epoch], self.steps[first_of_each_epoch:]
        shards = self._shards_of_this_process()
        if self.cache:
            utterances = self._kept_or_new(once, shards, dropped)
        else:
            utterances = self._chained(once, ({"src": shard} for shard in shards), dropped)
        counted = _Counted(utterances)
        yield from self._chained(each_epoch, counted, dropped)
        self._report(counted.count, dropped)

    def _chained(self, steps: Sequence[Step], data: Iterable[Any], dropped: Counter[str]) -> Iterator[Any]:
        """Put the steps one behind the other, giving each those of the common arguments that it has."""
        epoch = self.epoch if self.shuffle else 0
        common = {"mode": self.mode, "gan": self.gan, "seed": f"{self.seed}/{epoch}", "dropped": dropped}
        for step in steps:
            takes = inspect.signature(_function(step)).parameters
            data = step(data, **{name: value for name, value in common.items() if name in takes})
        return iter(data)

    def _kept_or_new(self, once: Sequence[Step], shards: Sequence[str], dropped: Counter[str]) -> Iterator[Sample]:
        """Give the utterances of each shard, from memory where it has been read before; coming ones are read ahead."""
        missing = iter([shard for shard in shards if shard not in self._kept])
        with ThreadPoolExecutor(READERS, thread_name_prefix="shard") as pool:
            coming = {shard: pool.submit(self._read_shard, once, shard) for shard in itertools.islice(missing, READERS)}
            try:
                for shard in shards:
                    if shard in coming:
                        self._kept[shard], self._kept_dropped[shard] = coming.pop(shard).result()
                        for following in itertools.islice(missing, 1):
                            coming[following] = pool.submit(self._read_shard, once, following)
                    yield from map(dict, self._kept[shard])
                    dropped.update(self._kept_dropped[shard])
            finally:
                pool.shutdown(cancel_futures=True)

    def _read_shard(self, once: Sequence[Step], shard: str) -> tuple[list[Sample], Counter[str]]:
        """The utterances of a shard as far as they are the same in each epoch, and what was dropped of it."""
        dropped: Counter[str] = Counter()
        utterances = list(self._chained(once, [{"src": shard}], dropped))
        if not self.gan:
            for sample in utterances:
                sample.pop("speech", None)
        return utterances, dropped

    def _shards_of_this_process(self) -> list[str]:
        """The shards that this process reads in this epoch, in order."""
        rank, world_size = self._place()
        shards = list(self.shards)
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}/shards").shuffle(shards)
        if self.partition:
            shards = self._share(shards, rank, world_size, "processes")
        worker = get_worker_info()
        return shards if worker is None else self._share(shards, worker.id, worker.num_workers, "DataLoader workers")

    def _share(self, shards: list[str], number: int, sharers: int, name: str) -> list[str]:
        if len(shards) < sharers:
            log.warning(
                "%s: %d shards for %d %s, so some are read by several; for shards of their own, rerun stage 3 with a "
                "smaller --num_utts_per_parquet",
                self.data_list_file,
                len(shards),
                sharers,
                name,
            )
            shards = (shards * math.ceil(sharers / len(shards)))[:sharers]
        return shards[number::sharers]

    def _place(self) -> tuple[int, int]:
        """The rank of this process, and the number of processes."""
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = self.rank if self.rank is not None else (torch.distributed.get_rank() if running else 0)
        sharers = self.world_size if self.world_size is not None else 0
        sharers = sharers or (torch.distributed.get_world_size() if running else 1)
        if not 0 <= rank < sharers:
            raise ValueError(f"rank is {rank}; expected 0..{sharers - 1} with {sharers} processes")
        return rank, sharers

    def _report(self, utterances: int, dropped: Counter[str]) -> None:
        """Say once an epoch what was dropped, and what is kept in memory."""
        reasons = ", ".join(f"{count} with {reason}" for reason, count in sorted(dropped.items())) or "none"
        total = utterances + dropped.total()
        if utterances == 0:
            raise DataError(
                f"{self.data_list_file}: none of its {total} utterances is left to train on; dropped: {reasons}; "
                f"change the limits of `filter` in the configuration, or {REMAKE_SHARDS}"
            )
        if dropped:
            text = "%s, epoch %d: %d of %d utterances; dropped: %s"
            log.warning(text, self.data_list_file, self.epoch, utterances, total, reasons)
        if self.cache:
            held = list(itertools.chain.from_iterable(self._kept.values()))
            kept_bytes = sum(map(_tensor_bytes, held))
            log.info("%s: %d utterances in memory, %.0f MB", self.data_list_file, len(held), kept_bytes / 1e6)


def read_data_list(path: str | Path) -> list[str]:
    """Read a list of shards.

    Args:
        path: one shard a line.

    Returns:
        the paths as they stand there, which the steps take relative to the working directory.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it names no shard, or one twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such list of shards; {REMAKE_SHARDS}")
    shards = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not shards:
        raise DataError(f"{path}: the list names no shard; {REMAKE_SHARDS}")
    twice = [shard for shard, count in Counter(shards).items() if count > 1]
    if twice:
        raise DataError(f"{path}: the list names {twice[0]} more than once; {REMAKE_SHARDS}")
    return shards


class _Counted:
    """Passes items on and counts them."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            self.count += 1
            yield item


def _function(step: Step) -> Step:
    """The step itself, without the arguments bound to it."""
    return step.func if isinstance(step, functools.partial) else step


def _tensor_bytes(sample: Sample) -> int:
    return sum(value.numel() * value.element_size() for value in sample.values() if isinstance(value, Tensor))

"""Teacher-forced scores of a whole data set."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cosyvoice.utils.abridge import abridge
from cosyvoice.utils.interrupt import obey_parent_alone, signals_held_back
from cosyvoice.utils.stops import NonFiniteLossError
from taste.batch import Batch, Example, collate
from taste.data import UtteranceDataset
from taste.epoch_plan import batches_by_length
from taste.model import CosyVoiceS3Model
from taste.progress_bar import progress_bar
from taste.scores import Scores, Totals

if TYPE_CHECKING:
    from torch.utils.data.dataloader import _BaseDataLoaderIter

BATCHES_AHEAD = 2  # at least, by each process that loads features
SHOWN_UTTERANCES = 8  # of a list


def evaluate(
    model: CosyVoiceS3Model,
    dataset: UtteranceDataset,
    batch_size: int,
    accelerator: Accelerator,
    *,
    num_workers: int = 0,
    before_batch: Callable[[], None] = lambda: None,
) -> Totals:
    """Score every utterance of a data set, the work shared by all processes.

    Utterances whose features are no numbers are left out, and named on stderr: one would make the sum none.

    Args:
        model: the model itself, on the accelerator's device; it is left in eval mode.
        dataset: the utterances.
        batch_size: utterances a process scores together; it changes nothing but rounding.
        accelerator: device and processes.
        num_workers: processes that load features.
        before_batch: called equally often in each process; what it raises ends the evaluation.

    Returns:
        the sums over all utterances, the same in each process.

    Raises:
        NonFiniteLossError: no utterance is left, or the loss of one is no number though its features are.
    """
    model.eval()
    batches = batches_by_length(dataset.lengths, batch_size)
    own_batches = batches[accelerator.process_index :: accelerator.num_processes]
    loader = iter(feature_loader(dataset, own_batches, num_workers))
    totals, spoiled, failed = Totals(), [], []
    rounds = range(0, len(batches), accelerator.num_processes)
    for first in progress_bar(rounds, "evaluating", "batches", active=accelerator.is_main_process):
        before_batch()
        if first + accelerator.process_index < len(batches):
            with torch.inference_mode(), precision_of(accelerator.device):
                batch = next(loader).to(accelerator.device)
                scores = model(batch)
                whole = batch.finite_rows  # not told from the loss: a quantizer makes numbers of anything
                totals += Totals.of(Scores(*(values[whole] for values in scores)))
                spoiled += _those(batch.utt_ids, ~whole)
                failed += _those(batch.utt_ids, whole & ~scores.loss_sums.isfinite())
    totals = Totals(*sum_over_processes(accelerator, totals.as_list()))
    spoiled, failed = gather_object(spoiled), gather_object(failed)
    if failed:
        raise NonFiniteLossError(
            f"the loss of {some_of(failed, dataset)} is no number, though their features are: the model has failed; "
            "begin another run with a lower LR, or with other weights"
        )
    if spoiled and not totals.target_count:
        raise NonFiniteLossError(f"the features of {some_of(spoiled, dataset)} are no numbers; make them again")
    if spoiled and accelerator.is_main_process:
        told = f"the features of {some_of(spoiled, dataset)} are no numbers; they are left out of the scores"
        tqdm.write(f"warning: {told}", file=sys.stderr)
    return totals


def some_of(utt_ids: Sequence[str], dataset: UtteranceDataset) -> str:
    """Name a few of some utterances of a data set, behind how many they are.

    Args:
        utt_ids: the utterances.
        dataset: where they are from.

    Returns:
        such as `2 of 15 utterances (a, b)`.
    """
    return f"{len(utt_ids)} of {len(dataset)} utterances ({abridge(utt_ids, SHOWN_UTTERANCES)})"


def _those(utt_ids: Sequence[str], chosen: Tensor) -> list[str]:
    return [utt_id for utt_id, is_one in zip(utt_ids, chosen.tolist(), strict=True) if is_one]


def precision_of(device: torch.device) -> torch.autocast:
    """The arithmetic of a device: bfloat16 where a GPU has units for it, float32 elsewhere.

    GPUs before compute capability 8.0 only emulate bfloat16: slower than float32, in more memory.

    Args:
        device: where the model is.

    Returns:
        a context for forward passes.
    """
    gains = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=gains)


def feature_loader(
    dataset: UtteranceDataset, batches: Sequence[list[int]], num_workers: int = 0, together: int = 1
) -> Iterable[Batch]:
    """Load batches in a given order.

    Args:
        dataset: the utterances.
        batches: utterance numbers of each.
        num_workers: processes that load features; 0 loads in this one.
        together: batches that are asked for at a time; so many are loaded ahead.

    Returns:
        the loader; it leaves torch's global random generator alone.
    """
    return _FeatureLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        prefetch_factor=max(BATCHES_AHEAD, math.ceil(together / num_workers) + 1) if num_workers else None,
        worker_init_fn=obey_parent_alone,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


class _FeatureLoader(DataLoader[Example]):
    def __iter__(self) -> "_BaseDataLoaderIter":
        with signals_held_back():  # they would end a worker that does not obey its parent alone yet
            return super().__iter__()


def sum_over_processes(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Add up numbers that each process has its own part of.

    Args:
        accelerator: the processes.
        values: this process's numbers.

    Returns:
        the sums, the same in each process.
    """
    return accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum").tolist()

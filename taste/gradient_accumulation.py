"""The gradient of one step of the optimizer, added up over batches that fit in the device's memory."""

import math
import sys
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from taste.batch import Batch, collate
from taste.data import UtteranceDataset
from taste.epoch_plan import halved
from taste.evaluation import precision_of, sum_over_processes
from taste.scores import Scores, Totals


class GradientAccumulator:
    """Adds up the gradients of a step's batches; then the step is taken, or forgotten.

    The loss is averaged over all targets of all batches in all processes: how utterances are spread over batches and
    processes changes nothing but rounding. The quantizer's own loss, averaged over all words, is added; its codebooks
    follow each batch in turn, so there the spreading does change something.

    A batch that does not fit in the device's memory is computed in parts, by one process alone: of several, the others
    would wait for its gradients.

    Args:
        model: as the accelerator has wrapped it.
        quantizer: of the model, if it has one: what a step changes beside the gradients.
        optimizer: of the model's parameters.
        dataset: where the utterances are from.
        accelerator: device and processes.
        seed: of the dropout.
    """

    def __init__(
        self,
        model: nn.Module,
        quantizer: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        dataset: UtteranceDataset,
        accelerator: Accelerator,
        seed: int,
    ) -> None:
        self.model, self.quantizer, self.optimizer = model, quantizer, optimizer
        self.dataset, self.accelerator, self.seed = dataset, accelerator, seed
        self._codebooks: dict[str, Tensor] | None = None  # as they were before the step; None: no step is open
        self._told_of_parts = False

    def load(self, batch: list[int]) -> Batch:
        """Read a batch.

        Args:
            batch: numbers of its utterances.

        Returns:
            the utterances, on the CPU.
        """
        return collate([self.dataset[number] for number in batch])

    def add_up(self, batches: list[Batch], numbers: list[list[int]], step: int) -> tuple[Totals, list[str]]:
        """Compute the gradient of the loss of a target, and of a word, over a step's targets and words.

        This opens a step, which `take_step` or `forget` ends before the next.

        What does not fit in memory is tried again in smaller and smaller batches. The result is that of whole batches
        but for rounding, dropout and the moving averages of codebooks.

        Args:
            batches: of this process, emptied on the way.
            numbers: of the utterances in each.
            step: its number, which decides the dropout.

        Returns:
            the sums over this process's batches, and the utterances whose loss is no number.

        Raises:
            ValueError: not even one utterance fits in the device's memory.
            torch.OutOfMemoryError: a batch does not fit, and there are several processes.
        """
        assert self._codebooks is None, "the step before was neither taken nor forgotten"
        self.model.train()
        whole = rows = max(map(len, numbers))
        longest = max(self.dataset.lengths[number] for batch in numbers for number in batch)
        while True:
            state = {} if self.quantizer is None else self.quantizer.state_dict()
            self._codebooks = {name: values.clone() for name, values in state.items()}
            _seed_step(self.seed, step, self.accelerator.process_index)
            try:
                found = self._add_up_whole(batches)
                break
            except torch.OutOfMemoryError as error:
                if self.accelerator.num_processes > 1:
                    raise
                if rows == 1:
                    raise ValueError(
                        f"the device is out of memory ({error}), even with one utterance at a time, of up to {longest} "
                        "positions (text tokens and S3 units). Leave the longest recordings out, or, where that is "
                        "not so yet, let the new modules alone learn: --freeze-llm true --run-name <another>"
                    ) from error
            # only here, where the error keeps nothing of the attempt any more
            batches.clear()
            self.forget()
            torch.cuda.empty_cache()
            numbers = halved(numbers)
            rows = max(map(len, numbers))
            batches.extend(self.load(batch) for batch in numbers)
        if rows < whole and not self._told_of_parts:
            self._told_of_parts = True
            tqdm.write(
                f"warning: {whole} utterances of up to {longest} positions do not fit in the device's memory together: "
                f"steps with such batches are computed {rows} at a time, which takes longer (not told again)",
                file=sys.stderr,
            )
        return found

    def take_step(self) -> None:
        """Let the weights follow what was added up, once after `add_up`."""
        assert self._codebooks is not None, "no step is open: what was added up has been taken or forgotten"
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._codebooks = None

    def forget(self) -> None:
        """Leave nothing of what was added up, neither gradients nor what the codebooks followed.

        Once after `add_up`, in place of `take_step`.
        """
        assert self._codebooks is not None, "no step is open: what was added up has been taken or forgotten"
        self.optimizer.zero_grad()
        if self.quantizer is not None:
            self.quantizer.load_state_dict(self._codebooks)
        self._codebooks = None

    def try_memory(self, batch: list[int], step: int, accumulates: bool) -> None:
        """Compute a batch and forget it: what does not fit is told now, not after hours. Nothing of the run changes.

        Args:
            batch: numbers of its utterances.
            step: the number of the next step.
            accumulates: whether a step has several batches.

        Raises:
            ValueError: not even one utterance fits in the device's memory.
        """
        device = self.accelerator.device
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # what a later step finds in memory: AdamW's two moments, and the gradients of the batches before
        moments = [torch.empty_like(values) for values in 2 * learning] if not self.optimizer.state else []
        if accumulates:
            for parameter in learning:
                parameter.grad = torch.zeros_like(parameter)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.add_up([self.load(batch)], [batch], step)
        del moments
        self.forget()

    def _add_up_whole(self, batches: list[Batch]) -> tuple[Totals, list[str]]:
        """Run each batch as a whole; it is taken out of the list, so that its memory is free once it is done."""
        accelerator, totals, spoiled = self.accelerator, Totals(), []
        # read when all are done: a GPU need not be waited for after each (but for a quantizer, whose library does)
        done: list[tuple[tuple[str, ...], Scores]] = []
        counts = [sum(batch.target_count for batch in batches), sum(batch.word_count for batch in batches)]
        all_targets, all_words = sum_over_processes(accelerator, counts)
        while batches:
            batch = batches.pop(0)
            # the processes exchange gradients once a step, while the last batch runs backwards
            with accelerator.no_sync(self.model) if batches else nullcontext():
                with precision_of(accelerator.device):
                    scores = self.model(batch.to(accelerator.device))
                loss = scores.loss_sums.sum() / all_targets + scores.commitment_sums.sum() / max(1, all_words)
                # the exchange averages over processes, the loss is a sum over them: undo the division
                accelerator.backward(loss * accelerator.num_processes)
            done.append((batch.utt_ids, Scores(*(values.detach() for values in scores))))
        for utt_ids, scores in done:
            totals += Totals.of(scores)
            losses = zip(utt_ids, scores.loss_sums.tolist(), strict=True)
            spoiled += [utt_id for utt_id, loss in losses if not math.isfinite(loss)]
        return totals, spoiled


def _seed_step(seed: int, step: int, process: int) -> None:
    """Make the dropout of a step a function of where it stands, so that a resumed run draws the same."""
    (number,) = np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)
    torch.manual_seed(int(number))

"""The training loop: from a model and two data sets to checkpoints and a record of every step."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from cosyvoice.utils.provenance import changed_models
from cosyvoice.utils.stops import NonFiniteLossError, RunStopped
from taste.batch import Batch, collate
from taste.checkpoint import Checkpoint, frozen_fingerprint, save_checkpoint
from taste.data import UtteranceDataset
from taste.epoch_plan import EpochPlan, halved, most_demanding
from taste.model import CosyVoiceS3Model, Scores
from taste.progress_bar import progress_bar
from taste.scoring import SHOWN_UTTERANCES, Totals, evaluate, feature_loader, precision_of, sum_over_processes
from taste.train_state import Progress, StepRecord

ADAM_BETAS = (0.9, 0.98)
LAST_LR_SHARE = 0.05  # of the peak, where the cosine ends
MOST_SKIPPED_STEPS = 5  # in a row, whose loss or gradient is no number; at so many the training has failed


@dataclass(frozen=True)
class TrainingConfig:
    """How to train."""

    num_epochs: int
    batch_size: int  # utterances that a process looks at together
    lr: float  # peak of the schedule, of the parts that the model folder holds
    new_modules_lr: float  # the same of all others, which have everything to learn
    warmup_steps: int
    weight_decay: float
    grad_clip: float  # largest norm of the gradient
    accumulation_steps: int  # batches whose gradients make one step
    seed: int
    checkpoint_every: int = 0  # steps; 0: none by their number
    checkpoint_minutes: float = 0  # since the last one; 0: none by the clock. One is written after each epoch anyway
    num_workers: int = 0  # processes that load features

    def __post_init__(self) -> None:
        least = {"num_epochs": 0, "batch_size": 1, "warmup_steps": 0, "weight_decay": 0, "accumulation_steps": 1}
        least |= {"checkpoint_every": 0, "checkpoint_minutes": 0, "num_workers": 0}
        problems = [
            f"{name.upper()} is {vars(self)[name]}, expected {low} or more"
            for name, low in least.items()
            if vars(self)[name] < low
        ]
        problems += [
            f"{name.upper()} is {vars(self)[name]}, expected more than 0"
            for name in ("lr", "new_modules_lr", "grad_clip")
            if vars(self)[name] <= 0
        ]
        if problems:
            raise ValueError("; ".join(problems))


class Trainer:
    """Trains a model, evaluates it after each epoch, and saves it so that a run can go on exactly.

    The loss of a step is averaged over all targets of all its batches in all processes: how utterances are spread over
    batches, accumulated batches and processes changes nothing but rounding. The quantizer's own loss, averaged over all
    words, is added; its codebooks follow each batch in turn, so there the spreading does change something.

    A step whose loss or gradient is no number is left out. A batch that does not fit in the device's memory is computed
    in parts, by one process alone: of several, the others would wait for its gradients.

    Args:
        model: the model; it is moved to the accelerator's device.
        train_set: utterances to learn from.
        test_set: utterances to evaluate on.
        config: how to train.
        run_folder: `checkpoints/` and `metrics.jsonl` are written here.
        accelerator: device and processes.
        notes: what each checkpoint shall say about the run (settings, commit), as JSON knows values.
        stop_requested: asked before every batch; where it says True, the trainer saves and raises `RunStopped`.
        on_epoch: called in the main process with the history before training and after each epoch.
        on_minute: called in the main process with the history, once a minute within an epoch.
        clock: gives seconds, for `checkpoint_minutes`.

    Raises:
        ValueError: the model has nothing to learn, or there are more processes than batches.
    """

    def __init__(
        self,
        model: CosyVoiceS3Model,
        train_set: UtteranceDataset,
        test_set: UtteranceDataset,
        config: TrainingConfig,
        run_folder: Path,
        accelerator: Accelerator,
        notes: dict[str, Any],
        stop_requested: Callable[[], bool] = lambda: False,
        on_epoch: Callable[[list[dict[str, Any]]], None] = lambda history: None,
        on_minute: Callable[[list[dict[str, Any]]], None] = lambda history: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.train_set, self.test_set = train_set, test_set
        self.stop_requested, self.on_epoch, self.on_minute = stop_requested, on_epoch, on_minute
        self.last_path = run_folder / "checkpoints" / "last.pt"
        self.best_path = run_folder / "checkpoints" / "best.pt"
        self.record = StepRecord(run_folder / "metrics.jsonl")
        self.plan = EpochPlan(train_set.lengths, config.batch_size, config.seed)
        self.progress = Progress()
        self._clock, self._saved_at = clock, clock()
        self._told_of_parts = False
        self.model = model.to(accelerator.device)
        optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=ADAM_BETAS)
        self.wrapped_model, self.optimizer = accelerator.prepare(model, optimizer)
        self.steps_per_epoch = len(self._steps_of(0))
        if not self.steps_per_epoch:
            raise ValueError(
                f"{accelerator.num_processes} processes, but fewer batches; start fewer, or lower BATCH_SIZE"
            )
        self.notes = {
            **notes,
            "train_set": train_set.fingerprint(),
            "test_set": test_set.fingerprint(),
            "frozen_weights": frozen_fingerprint(model, model.learned_state()),
            "processes": accelerator.num_processes,
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, exactly as if the run had never stopped.

        Args:
            checkpoint: what a `last.pt` holds.

        Raises:
            ValueError: it holds weights only, or what it was trained with has changed.
        """
        if checkpoint.optimizer is None:
            raise ValueError("this checkpoint holds weights only (for --num-epochs 0); training goes on from a last.pt")
        same = {
            "train_set": "the training utterances",
            "test_set": "the test utterances",
            "frozen_weights": "the frozen weights (of the model folder)",
            "processes": "the number of processes",
        }
        # of what this checkpoint leaves to the folder: weights that it carries from another run are in it
        now = self.notes | {"frozen_weights": frozen_fingerprint(self.model, checkpoint.weights)}
        changed = [
            f"{what} ({checkpoint.notes[name]} then, {now[name]} now)"
            for name, what in same.items()
            if checkpoint.notes.get(name) is not None and checkpoint.notes[name] != now[name]
        ]
        if models := changed_models(checkpoint.notes.get("features_made_with"), now.get("features_made_with")):
            changed.append(f"what made the features ({models})")
        if changed:
            raise ValueError(
                f"the run cannot go on, because something has changed: {'; '.join(changed)}. "
                f"Put it back; or keep this run, and begin another with its weights: --init-from {self.last_path} "
                "--run-name <another>; or start anew over it: --resume never"
            )
        self.model.load_learned_state(checkpoint.weights)
        self.notes = now
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.progress = Progress.from_dict(checkpoint.notes["progress"])

    def describe_new_schedule(self, num_epochs: int) -> str:
        """What another number of epochs than before does to the learning rate.

        Args:
            num_epochs: what it was when the checkpoint was written.

        Returns:
            a line for a person.
        """
        step, config = self.progress.step, self.config
        shares = [
            share_of_peak(step, epochs * self.steps_per_epoch, config.warmup_steps)
            for epochs in (num_epochs, config.num_epochs)
        ]
        return (
            f"NUM_EPOCHS was {num_epochs}, is {config.num_epochs}: the learning rate goes on along the schedule of "
            f"{config.num_epochs} epochs, from {shares[1]:.0%} of its peak (where {num_epochs} epochs had it: "
            f"{shares[0]:.0%})"
        )

    def fit(self) -> Progress:
        """Train until the configured number of epochs is complete.

        Returns:
            where the run stands, with the results of each epoch.

        Raises:
            RunStopped: it was asked to stop; `last.pt` holds everything.
            NonFiniteLossError: the loss or the gradient of `MOST_SKIPPED_STEPS` steps in a row is no number.
            ValueError: not even one utterance fits in the device's memory.
        """
        progress = self.progress
        if self.accelerator.is_main_process:
            self.record.keep_until(progress)
        self.optimizer.zero_grad()  # whatever was done with the model before is no part of the first step
        if self.accelerator.device.type == "cuda" and progress.epoch < self.config.num_epochs:
            self.try_memory()
        if not progress.history:
            self._complete_epoch(0, {}, self._evaluate())
        while progress.epoch < self.config.num_epochs:
            self._train_epoch()
            totals = progress.epoch_totals  # of no target, where all steps were left out
            self._complete_epoch(progress.epoch + 1, totals.averages() if totals.target_count else {}, self._evaluate())
        return progress

    def try_memory(self) -> None:
        """Compute the epoch's most demanding batch and forget it: what does not fit is told now, not after hours.

        Nothing of the run changes.

        Raises:
            ValueError: not even one utterance fits in the device's memory.
        """
        device, codebooks = self.accelerator.device, self._codebooks()
        batches = [batch for step in self._steps_of(self.progress.epoch) for batch in step]
        batch = most_demanding(batches, self.train_set.lengths)
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # what a later step finds in memory: AdamW's two moments, and the gradients of the batches before
        moments = [torch.empty_like(values) for values in 2 * learning] if not self.optimizer.state else []
        if self.config.accumulation_steps > 1:
            for parameter in learning:
                parameter.grad = torch.zeros_like(parameter)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.wrapped_model.train()
            self._gradients([self._load(batch)], [batch], codebooks)
        del moments
        self.optimizer.zero_grad()
        self._restore(codebooks)

    def _train_epoch(self) -> None:
        """The steps of the epoch in work that are not done yet."""
        progress, config, accelerator = self.progress, self.config, self.accelerator
        todo = [
            step[accelerator.process_index :: accelerator.num_processes]
            for step in self._steps_of(progress.epoch)[progress.step_in_epoch :]
        ]
        batches = [batch for step in todo for batch in step]
        loader = iter(feature_loader(self.train_set, batches, config.num_workers, config.accumulation_steps))
        steps = progress_bar(
            todo,
            f"epoch {progress.epoch + 1}/{config.num_epochs}",
            "steps",
            done=progress.step_in_epoch,
            active=accelerator.is_main_process,
            note=lambda: f"loss {totals.averages()['loss']:.3f}",
            on_line=lambda: self.on_minute(progress.history),
        )
        for own_batches in steps:
            self._stop_or_save_if_due()
            totals = self._train_step([next(loader) for _ in own_batches], own_batches)
            if config.checkpoint_every and progress.step % config.checkpoint_every == 0:
                self._save_last()

    def _train_step(self, batches: list[Batch], numbers: list[list[int]]) -> Totals:
        """One step of the optimizer, left out where its loss or gradient is no number.

        Args:
            batches: of this process, emptied on the way.
            numbers: of the utterances in each.

        Returns:
            the sums over all batches of all processes.
        """
        progress, config, accelerator = self.progress, self.config, self.accelerator
        self.wrapped_model.train()
        codebooks = self._codebooks()
        share = share_of_peak(progress.step, config.num_epochs * self.steps_per_epoch, config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
        own_totals, spoiled = self._gradients(batches, numbers, codebooks)
        totals = Totals(*sum_over_processes(accelerator, own_totals.as_list()))
        gradient_norm = float(accelerator.clip_grad_norm_(self.wrapped_model.parameters(), config.grad_clip))
        progress.step += 1
        progress.step_in_epoch += 1
        if not (math.isfinite(totals.loss_sum) and math.isfinite(gradient_norm)):
            self.optimizer.zero_grad()
            self._restore(codebooks)
            utt_ids = [self.train_set.utt_ids[number] for batch in numbers for number in batch]
            self._note_skipped(totals, gradient_norm, gather_object(spoiled) or gather_object(utt_ids))
            return totals
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.skipped_in_a_row = 0
        progress.epoch_totals += totals
        if accelerator.is_main_process:
            results = {"lr": share * config.lr, "gradient_norm": gradient_norm, "targets": int(totals.target_count)}
            self.record.add("step", progress.step, progress.epoch + 1, totals.averages() | results)
        return totals

    def _note_skipped(self, totals: Totals, gradient_norm: float, utt_ids: list[str]) -> None:
        """Tell that a step was left out; raises `NonFiniteLossError` where too many were, one behind the other."""
        progress = self.progress
        progress.skipped_in_a_row += 1
        loss = totals.averages()["loss"]
        shown = ", ".join(utt_ids[:SHOWN_UTTERANCES]) + (", ..." if len(utt_ids) > SHOWN_UTTERANCES else "")
        what = f"the loss is {loss}, the norm of its gradient {gradient_norm}; utterances: {shown}"
        if self.accelerator.is_main_process:
            numbers = {"loss": str(loss), "gradient_norm": str(gradient_norm)}  # JSON has no NaN
            self.record.add("skipped", progress.step, progress.epoch + 1, {"utterances": utt_ids, **numbers})
            tqdm.write(f"warning: step {progress.step} is left out: {what}", file=sys.stderr)
        if progress.skipped_in_a_row >= MOST_SKIPPED_STEPS:
            raise NonFiniteLossError(
                f"step {progress.step} is the last of {progress.skipped_in_a_row} in a row that came to no number: "
                f"{what}. Nothing of these steps was learned. Look at the features of their utterances "
                f"({self.record.path.name} names them all). If these are sound, the training has failed: begin another "
                f"with a lower LR or more WARMUP_STEPS, say from the best weights of this one: --init-from "
                f"{self.best_path} --run-name <another>"
            )

    def _gradients(
        self, batches: list[Batch], numbers: list[list[int]], codebooks: dict[str, Tensor]
    ) -> tuple[Totals, list[str]]:
        """What `_add_up_gradients` gives, of smaller and smaller batches until they fit in the device's memory.

        The result is that of whole batches but for rounding, dropout and the moving averages of codebooks.

        Args:
            batches: of this process, emptied on the way.
            numbers: of the utterances in each.
            codebooks: as they were before the step.

        Returns:
            the sums over this process's batches, and the utterances whose loss is no number.

        Raises:
            ValueError: not even one utterance fits in the device's memory.
            torch.OutOfMemoryError: a batch does not fit, and there are several processes.
        """
        config, accelerator = self.config, self.accelerator
        whole = rows = max(map(len, numbers))
        longest = max(self.train_set.lengths[number] for batch in numbers for number in batch)
        while True:
            _seed_step(config.seed, self.progress.step, accelerator.process_index)
            try:
                found = self._add_up_gradients(batches)
                break
            except torch.OutOfMemoryError as error:
                if accelerator.num_processes > 1:
                    raise
                if rows == 1:
                    raise ValueError(
                        f"the device is out of memory ({error}), even with one utterance at a time, of up to {longest} "
                        "positions (text tokens and S3 units). Leave the longest recordings out, or, where that is "
                        "not so yet, let the new modules alone learn: --freeze-llm true --run-name <another>"
                    ) from error
            # only here, where the error keeps nothing of the attempt any more
            self.optimizer.zero_grad()
            batches.clear()
            torch.cuda.empty_cache()
            self._restore(codebooks)
            numbers = halved(numbers)
            rows = max(map(len, numbers))
            batches.extend(self._load(batch) for batch in numbers)
        if rows < whole and not self._told_of_parts:
            self._told_of_parts = True
            tqdm.write(
                f"warning: {whole} utterances of up to {longest} positions do not fit in the device's memory together: "
                f"steps with such batches are computed {rows} at a time, which takes longer (not told again)",
                file=sys.stderr,
            )
        return found

    def _load(self, batch: list[int]) -> Batch:
        return collate([self.train_set[number] for number in batch])

    def _codebooks(self) -> dict[str, Tensor]:
        """A copy of what a step changes beside the gradients, if there is a quantizer: its codebooks."""
        quantizer = self.model.quantizer
        return {} if quantizer is None else {name: values.clone() for name, values in quantizer.state_dict().items()}

    def _restore(self, codebooks: dict[str, Tensor]) -> None:
        if self.model.quantizer is not None:
            self.model.quantizer.load_state_dict(codebooks)

    def _add_up_gradients(self, batches: list[Batch]) -> tuple[Totals, list[str]]:
        """The gradient of the loss of a target, and of a word, over this step's targets and words in all processes.

        Args:
            batches: of this process; each is taken out of the list, so that its memory is free once it is done.

        Returns:
            the sums over this process's batches, and the utterances whose loss is no number.
        """
        accelerator, totals, spoiled = self.accelerator, Totals(), []
        # read when all are done: a GPU need not be waited for after each (but for a quantizer, whose library does)
        done: list[tuple[tuple[str, ...], Scores]] = []
        counts = [sum(batch.target_count for batch in batches), sum(batch.word_count for batch in batches)]
        all_targets, all_words = sum_over_processes(accelerator, counts)
        while batches:
            batch = batches.pop(0)
            # the processes exchange gradients once a step, while the last batch runs backwards
            with accelerator.no_sync(self.wrapped_model) if batches else nullcontext():
                with precision_of(accelerator.device):
                    scores = self.wrapped_model(batch.to(accelerator.device))
                loss = scores.loss_sums.sum() / all_targets + scores.commitment_sums.sum() / max(1, all_words)
                # the exchange averages over processes, the loss is a sum over them: undo the division
                accelerator.backward(loss * accelerator.num_processes)
            done.append((batch.utt_ids, Scores(*(values.detach() for values in scores))))
        for utt_ids, scores in done:
            totals += Totals.of(scores)
            losses = zip(utt_ids, scores.loss_sums.tolist(), strict=True)
            spoiled += [utt_id for utt_id, loss in losses if not math.isfinite(loss)]
        return totals, spoiled

    def _evaluate(self) -> dict[str, float]:
        totals = evaluate(
            self.model,
            self.test_set,
            self.config.batch_size,
            self.accelerator,
            num_workers=self.config.num_workers,
            before_batch=self._stop_or_save_if_due,
        )
        return totals.averages()

    def _complete_epoch(self, epoch: int, train: dict[str, float], test: dict[str, float]) -> None:
        """Remember the results of an epoch, and save."""
        progress = self.progress
        progress.epoch, progress.step_in_epoch, progress.epoch_totals = epoch, 0, Totals()
        progress.history.append({"epoch": epoch, "train": train, "test": test})
        if progress.best_epoch is None or test["loss"] < progress.history[progress.best_epoch]["test"]["loss"]:
            progress.best_epoch = epoch
            self._save(self.best_path, with_optimizer=False)
        self._save_last()
        if self.accelerator.is_main_process:
            self.record.add("epoch", progress.step, epoch, {"train": train, "test": test})
            self.on_epoch(progress.history)

    def _save_last(self) -> None:
        self._save(self.last_path, with_optimizer=True)
        self._saved_at = self._clock()

    def _save(self, path: Path, with_optimizer: bool) -> None:
        if self.accelerator.is_main_process:
            optimizer = self.optimizer.state_dict() if with_optimizer else None
            notes = self.notes | {"progress": asdict(self.progress)}
            save_checkpoint(path, Checkpoint(self.model.learned_state(), optimizer, notes))
        self.accelerator.wait_for_everyone()

    def _stop_or_save_if_due(self) -> None:
        """Save and leave where any process was asked to stop; save where the main one's clock says so.

        Called equally often in each process.
        """
        seconds, main = 60 * self.config.checkpoint_minutes, self.accelerator.is_main_process
        due = seconds > 0 and main and self._clock() - self._saved_at >= seconds
        asked, due = sum_over_processes(self.accelerator, [float(self.stop_requested()), float(due)])
        if asked or due:
            self._save_last()
        if asked:
            raise RunStopped(f"stopped after step {self.progress.step}; saved as {self.last_path}")

    def _steps_of(self, epoch: int) -> list[list[list[int]]]:
        return self.plan.steps(epoch, self.config.accumulation_steps, self.accelerator.num_processes)


def share_of_peak(step: int, total_steps: int, warmup_steps: int) -> float:
    """The schedule of all learning rates: a straight warm-up, then a cosine down to a small share of the peak.

    Args:
        step: its number, from 0.
        total_steps: steps of the whole run.
        warmup_steps: steps until the peak.

    Returns:
        what the peak is multiplied with.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return LAST_LR_SHARE + (1 - LAST_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(model: CosyVoiceS3Model, config: TrainingConfig) -> list[dict[str, Any]]:
    """Sort what learns by how it learns.

    What the model folder holds is to be changed with care, what is new (adapters too) has everything to learn: each has
    its own peak learning rate. Weight decay is for matrices; none for biases, norms and embeddings, whose size means
    something.

    Args:
        model: its parameters that ask for a gradient are taken.
        config: the rates and the weight decay.

    Returns:
        groups as an optimizer takes them, each with its `peak_lr`; none is empty.

    Raises:
        ValueError: nothing learns.
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and id(parameter) not in embeddings
            groups.setdefault((model.begins_trained(name), decays), []).append(parameter)
    if not groups:
        raise ValueError(
            f"a frozen {model.variant!r} model has nothing to learn: set FREEZE_LLM = False, choose another VARIANT, "
            "or evaluate the model as it is with --num-epochs 0"
        )
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "peak_lr": config.lr if pretrained else config.new_modules_lr,
        }
        for (pretrained, decays), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


def _seed_step(seed: int, step: int, process: int) -> None:
    """Make the dropout of a step a function of where it stands, so that a resumed run draws the same."""
    (number,) = np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)
    torch.manual_seed(int(number))

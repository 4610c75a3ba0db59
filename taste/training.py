"""The training loop: from a model and two data sets to checkpoints and a record of every step."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from cosyvoice.utils.abridge import abridge
from cosyvoice.utils.provenance import changed_models
from cosyvoice.utils.stops import NonFiniteLossError, RunStopped
from taste.batch import Batch
from taste.checkpoint import Checkpoint, frozen_fingerprint, save_checkpoint
from taste.data import UtteranceDataset
from taste.epoch_plan import EpochPlan, most_demanding
from taste.evaluation import SHOWN_UTTERANCES, evaluate, feature_loader, sum_over_processes
from taste.gradient_accumulation import GradientAccumulator
from taste.learned_state import learned_state, load_learned_state
from taste.lr_schedule import share_of_peak
from taste.model import CosyVoiceS3Model
from taste.parameter_groups import parameter_groups
from taste.progress_bar import progress_bar
from taste.run_files import STEPS_FILE, best_checkpoint, last_checkpoint
from taste.scores import Totals
from taste.train_state import Progress, StepRecord
from taste.training_config import TrainingConfig

ADAM_BETAS = (0.9, 0.98)
MOST_SKIPPED_STEPS = 5  # in a row, whose loss or gradient is no number; at so many the training has failed


class Trainer:
    """Trains a model, evaluates it after each epoch, and saves it so that a run can go on exactly.

    What a step minimises, however its utterances are spread over batches and processes, see `GradientAccumulator`. A
    step whose loss or gradient is no number is left out.

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
        self.last_path, self.best_path = last_checkpoint(run_folder), best_checkpoint(run_folder)
        self.record = StepRecord(run_folder / STEPS_FILE)
        self.plan = EpochPlan(train_set.lengths, config.batch_size, config.seed)
        self.progress = Progress()
        self._clock, self._saved_at = clock, clock()
        self.model = model.to(accelerator.device)
        optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=ADAM_BETAS)
        self.wrapped_model, self.optimizer = accelerator.prepare(model, optimizer)
        self.gradients = GradientAccumulator(
            self.wrapped_model, model.quantizer, self.optimizer, train_set, accelerator, config.seed
        )
        self.steps_per_epoch = len(self._steps_of(0))
        if not self.steps_per_epoch:
            raise ValueError(
                f"{accelerator.num_processes} processes, but fewer batches; start fewer, or lower BATCH_SIZE"
            )
        self.notes = {
            **notes,
            "train_set": train_set.fingerprint(),
            "test_set": test_set.fingerprint(),
            "frozen_weights": frozen_fingerprint(model, learned_state(model)),
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
        load_learned_state(self.model, checkpoint.weights)
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
        batches = [batch for step in self._steps_of(self.progress.epoch) for batch in step]
        worst = most_demanding(batches, self.train_set.lengths)
        self.gradients.try_memory(worst, self.progress.step, accumulates=self.config.accumulation_steps > 1)

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
        share = share_of_peak(progress.step, config.num_epochs * self.steps_per_epoch, config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
        own_totals, spoiled = self.gradients.add_up(batches, numbers, progress.step)
        totals = Totals(*sum_over_processes(accelerator, own_totals.as_list()))
        gradient_norm = float(accelerator.clip_grad_norm_(self.wrapped_model.parameters(), config.grad_clip))
        progress.step += 1
        progress.step_in_epoch += 1
        if not (math.isfinite(totals.loss_sum) and math.isfinite(gradient_norm)):
            self.gradients.forget()
            utt_ids = [self.train_set.utt_ids[number] for batch in numbers for number in batch]
            self._note_skipped(totals, gradient_norm, gather_object(spoiled) or gather_object(utt_ids))
            return totals
        self.gradients.take_step()
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
        shown = abridge(utt_ids, SHOWN_UTTERANCES)
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
            save_checkpoint(path, Checkpoint(learned_state(self.model), optimizer, notes))
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

"""The training loop of CosyVoice's parts: steps, cross-validation, and checkpoints that a run goes on from exactly."""

import json
import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cosyvoice.utils.abridge import abridge
from cosyvoice.utils.atomic import atomic_path
from cosyvoice.utils.checkpoint import (
    Ema,
    differences,
    flat_settings,
    random_states,
    restore_random_states,
    save_state,
)
from cosyvoice.utils.common import set_all_random_seed
from cosyvoice.utils.config import random_states_kept
from cosyvoice.utils.muon import group_settings
from cosyvoice.utils.scheduler import StepSchedule, WarmupCosine
from cosyvoice.utils.stops import NonFiniteLossError, RunStopped
from cosyvoice.utils.tensor_file import save_tensors
from cosyvoice.utils.train_log import CV_TAG, TRAIN_TAG, TrainLog, shown_time

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = dict[str, Any]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAST_FOLDER = "last"
SHOWN_SETTINGS, SHOWN_UTTERANCES = 8, 8  # that a message lists before it only counts
MOST_SKIPPED_STEPS = 20  # in a row, before float16 is given up: the scale has been halved as often


@dataclass(frozen=True)
class TrainConfig:
    """How to train."""

    max_epoch: int
    grad_clip: float  # largest norm of a gradient
    accum_grad: int  # batches whose gradients make one step
    log_interval: int  # steps between two lines
    save_per_step: int  # steps between two cross-validations within an epoch; under 1: none
    max_steps: int | None = None  # of the whole training
    max_minutes: float | None = None  # of this run
    total_minutes: float | None = None  # of the whole training
    save_minutes: float = 10.0  # between two states; 0: only at the end of an epoch that is checked
    check_every: int = 1  # epochs between two cross-validations, each of which writes weights
    adversarial_from: int = 0  # step of a GAN's first adversarial loss; until then its generator learns alone
    dtype: str = "fp32"
    seed: int = 1986

    def __post_init__(self) -> None:
        least = {
            "max_epoch": 1,
            "check_every": 1,
            "accum_grad": 1,
            "log_interval": 1,
            "save_minutes": 0,
            "adversarial_from": 0,
        }
        problems = [f"{name} is {vars(self)[name]}, wanted {low} or more" for name, low in least.items()]
        problems = [line for line, (name, low) in zip(problems, least.items(), strict=True) if vars(self)[name] < low]
        problems += [
            f"{name} is {vars(self)[name]}, wanted more than 0"
            for name in ("grad_clip", "max_steps", "max_minutes", "total_minutes")
            if vars(self)[name] is not None and vars(self)[name] <= 0
        ]
        if self.dtype not in DTYPES:
            problems.append(f"dtype is {self.dtype!r}, wanted one of {', '.join(DTYPES)}")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class Turn:
    """What one optimizer does in a step: all of it, or a GAN's discriminator and then its generator."""

    name: str | None  # what the model is told as batch["turn"]; None where it has one optimizer only
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: StepSchedule
    scaler: torch.amp.GradScaler  # disabled but for float16

    @property
    def prefix(self) -> str:
        """What the names of this turn's numbers begin with in the log."""
        return "d_" if self.name == "discriminator" else ""


@dataclass
class Progress:
    """Where a training stands."""

    epoch: int = 0  # complete epochs, their cross-validation included
    batches: int = 0  # done of the epoch in work, in each process
    step: int = 0
    seconds: float = 0.0  # of training, all runs together
    batches_per_epoch: int | None = None  # known after the first
    complete: bool = False


class Outcome(NamedTuple):
    """How a run ended."""

    complete: bool  # the whole training is done
    reason: str


class Agreed(NamedTuple):
    """What all processes hold true before a step."""

    run_seconds: float  # since this run began
    stop: bool  # one of them was asked to stop
    save: bool  # the last save is long ago


class Executor:
    """Trains a model, and saves so that a run can go on as if it had never stopped.

    Args:
        model: `model(batch, device)` gives a dict with the scalar `loss` and more scalars to note.
        turns: the optimizers, in the order in which they step.
        train_batches: `(epoch, skip)` gives the batches of an epoch without its first `skip`, always the same.
        cv_batches: gives the batches to check with, the same in every process.
        config: how to train.
        model_dir: where everything is written.
        accelerator: device and processes.
        log: where numbers are noted.
        notes: JSON values for the checkpoints: `model`, the flat settings a checkpoint must share to be gone on from,
            `order`, those that decide the order of the data, and `train_conf`.
        ema: the running average of the weights to keep; None keeps none.
        stop_requested: asked between steps; where it says True, the state is saved and `RunStopped` raised.
    """

    def __init__(
        self,
        model: nn.Module,
        turns: list[Turn],
        train_batches: Callable[[int, int], Generator[Batch, None, None]],
        cv_batches: Callable[[], Generator[Batch, None, None]],
        config: TrainConfig,
        model_dir: Path,
        accelerator: "Accelerator",
        log: TrainLog,
        notes: Mapping[str, Any],
        ema: Ema | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.turns, self.config, self.model_dir = turns, config, model_dir
        self.train_batches, self.cv_batches = train_batches, cv_batches
        self.accelerator, self.log, self.notes, self.ema = accelerator, log, dict(notes), ema
        self.stop_requested = stop_requested
        self.progress = Progress()
        self.model = model.to(accelerator.device)
        self.wrapped = accelerator.prepare_model(self.model)
        self.notes["order"] = {**self.notes["order"], "processes": accelerator.num_processes}
        self.notes = json.loads(json.dumps(self.notes))  # as a checkpoint gives them back
        self._seen: dict[str, list[float]] = {}  # numbers of the steps since the last line
        self._unchecked = False  # there were steps since the last cross-validation at an epoch's end
        self._skipped: dict[str | None, int] = {}  # steps of each turn, one after another
        self._waited = 0.0  # seconds for data since the last line
        self._run_began = self._counted_until = self._saved_at = self._line_at = time.monotonic()

    # ---- going on

    def resume(self, state: Mapping[str, Any], notes: Mapping[str, Any], source: Path) -> None:
        """Go on from a saved state.

        Learning rate, schedule and the like are those of this run's configuration.

        Args:
            state: tensors, as saved.
            notes: JSON values, as saved.
            source: where they were read, for messages.

        Raises:
            ValueError: the state is of another model, or of other data or another number of processes half-way
                through an epoch.
        """
        changed = differences(notes["model"], self.notes["model"])
        if changed:
            raise ValueError(
                f"{source} was trained with another configuration: {abridge(changed, SHOWN_SETTINGS, '; ')}. Put it "
                "back to go on, or choose another --model_dir"
            )
        progress = Progress(**notes["progress"])
        changed = differences(notes["order"], self.notes["order"])
        if changed and progress.batches:
            raise ValueError(
                f"{source} stands after {progress.batches} batches of epoch {progress.epoch}, and their order has "
                f"changed: {abridge(changed, SHOWN_SETTINGS, '; ')}. Put it back until that epoch ends, or start from "
                "the latest epoch_N.pt with --checkpoint and another --model_dir"
            )
        self.model.load_state_dict(state["model"])
        for turn, optimizer, scaler in zip(self.turns, state["optimizers"], state["scalers"], strict=True):
            configured = group_settings(turn.optimizer)
            try:
                turn.optimizer.load_state_dict(optimizer)
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"{source} was trained with another optimizer ({error}); put optim back to go on, or start from "
                    "the latest epoch_N.pt with --checkpoint and another --model_dir"
                ) from error
            for group, settings in zip(turn.optimizer.param_groups, configured, strict=True):
                group.update(settings)
            if scaler:  # else it was trained in another dtype
                turn.scaler.load_state_dict(scaler)
        if self.ema is not None:
            if state["ema"] is None:
                raise ValueError(f"{source} was trained without --ema_decay; leave it out to go on")
            self.ema.load(state["ema"])
        self.progress = progress
        self._unchecked = bool(progress.batches) or progress.epoch % self.config.check_every != 0
        if changed:
            progress.batches_per_epoch = None
        for turn in self.turns:
            self._place_schedule(turn)
        if len(state["random"]) == self.accelerator.num_processes:
            restore_random_states(state["random"][self.accelerator.process_index])
        now = differences(flat_settings(notes["train_conf"]), flat_settings(self.notes["train_conf"]))
        self.log.say(
            f"resuming from {source}: epoch {progress.epoch}, {progress.batches} batches of it done, step "
            f"{progress.step}" + (f". From here on: {abridge(now, SHOWN_SETTINGS, '; ')}" if now else "")
        )

    def fit(self) -> Outcome:
        """Train until the training is complete or this run's time is over.

        Returns:
            how it ended.

        Raises:
            RunStopped: it was asked to stop; the state is saved.
            NonFiniteLossError: a loss or gradient is no number; nothing of that step is saved.
            ValueError: the data gives no batch.
        """
        progress = self.progress
        reason = self._completed()
        while reason is None:
            reason = self._train_epoch()
            last_epoch = (reason or self._completed()) is not None or progress.epoch + 1 >= self.config.max_epoch
            due = last_epoch or (progress.epoch + 1) % self.config.check_every == 0
            if self._unchecked and due:
                # the time may have run out before this epoch's first step: then the weights are the last one's
                self._check_and_save(f"epoch_{progress.epoch if progress.batches else progress.epoch - 1}")
                self._unchecked = False
            if reason is None:
                progress.batches_per_epoch, progress.epoch, progress.batches = progress.batches, progress.epoch + 1, 0
                reason = self._completed()
            if not due and reason is None:
                continue
            progress.complete = reason is not None and reason == self._completed()
            self._save_last()
            self.log.draw(f"{self.model_dir.name}: step {progress.step}, epoch {progress.epoch}")
        return Outcome(reason == self._completed(), reason)

    # ---- training

    def _train_epoch(self) -> str | None:
        """The steps of the epoch in work that are not done yet; gives why it was left early, None at its end."""
        progress, config = self.progress, self.config
        self.log.start_epoch(progress.epoch, config.max_epoch, progress.batches, progress.batches_per_epoch)
        self._line_at, self._waited = time.monotonic(), 0.0
        with closing(self.train_batches(progress.epoch, progress.batches)) as batches:
            while True:
                if config.max_steps is not None and progress.step >= config.max_steps:
                    break
                asked_at = time.monotonic()
                group = list(islice(batches, config.accum_grad))
                self._waited += time.monotonic() - asked_at
                count, agreed = self._agree(len(group))
                if agreed.stop:
                    self._save_last()
                    raise RunStopped(f"stopped after step {progress.step}; saved in {self.model_dir / LAST_FOLDER}")
                if not count:
                    if not progress.batches:
                        raise ValueError("the training data gives no batch: look at the data list and the filter")
                    self.log.end_epoch()
                    return None
                if config.max_minutes is not None and agreed.run_seconds >= 60 * config.max_minutes:
                    self.log.end_epoch()
                    return f"{config.max_minutes:g} minutes of this run are over"
                if self._completed() is not None:
                    break
                self._train_step(group[:count])
                self._after_step(count, agreed.save)
        self.log.end_epoch()
        return self._completed()

    def _completed(self) -> str | None:
        """Why the whole training is complete; None where it is not."""
        progress, config = self.progress, self.config
        if config.max_steps is not None and progress.step >= config.max_steps:
            return f"{progress.step} steps are done"
        if config.total_minutes is not None and progress.seconds >= 60 * config.total_minutes:
            return f"{config.total_minutes:g} minutes of training are over"
        if progress.epoch >= config.max_epoch:
            return f"{progress.epoch} epochs are done"
        return None

    def _agree(self, count: int) -> tuple[int, Agreed]:
        """Batches that every process has, and what all of them shall do about the time; counts the time."""
        now, save_seconds = time.monotonic(), 60 * self.config.save_minutes
        save = bool(save_seconds) and now - self._saved_at >= save_seconds
        # the least of each: a process without a batch, asked to stop, or with a fast clock decides for all
        values = [count, self._run_began - now, self._counted_until - now, -self.stop_requested(), -save]
        self._counted_until = now
        if self.accelerator.num_processes > 1:
            shared = torch.tensor(values, device=self.accelerator.device, dtype=torch.float64)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MIN)
            values = shared.tolist()
        self.progress.seconds -= values[2]
        return int(values[0]), Agreed(-values[1], stop=values[3] < 0, save=values[4] < 0)

    def _train_step(self, group: list[Batch]) -> None:
        self.wrapped.train()
        for turn in self._turns_now():
            scalars = self._add_up_gradients(turn, group)
            turn.scaler.unscale_(turn.optimizer)
            norm = nn.utils.clip_grad_norm_(turn.parameters, self.config.grad_clip)
            names = list(scalars)
            *values, norm_value = torch.stack([*scalars.values(), norm.float()]).tolist()  # the step's only wait
            self._check_finite(turn, group, dict(zip(names, values, strict=True)), norm_value)
            turn.scaler.step(turn.optimizer)
            turn.scaler.update()
            turn.optimizer.zero_grad(set_to_none=True)
            lr = turn.optimizer.param_groups[0]["lr"]
            noted = [*zip(names, values, strict=True), ("lr", lr)]
            if math.isfinite(norm_value):
                noted.append(("grad_norm", norm_value))
            if turn.scaler.is_enabled():
                noted.append(("skipped", float(not math.isfinite(norm_value))))  # the mean is the share of such steps
            for name, value in noted:
                self._seen.setdefault(turn.prefix + name, []).append(value)
            self._loss = values[names.index("loss")]
        self.progress.step += 1
        self._unchecked = True
        for turn in self.turns:
            self._place_schedule(turn)
        if self.ema is not None:
            self.ema.update()

    def _add_up_gradients(self, turn: Turn, group: list[Batch]) -> dict[str, Tensor]:
        """Backward through every batch of a step; gives the means of what the model reports, on its device."""
        totals: dict[str, Tensor] = {}
        for number, batch in enumerate(group):
            last = number == len(group) - 1
            # the processes exchange gradients once a step, while the last batch runs backwards
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self._autocast():
                    losses = self.wrapped(self._told(turn, batch), self._device)
                turn.scaler.scale(losses["loss"].float().mean() / len(group)).backward()
            for name, value in losses.items():
                share = value.detach().float().mean() / len(group)
                totals[name] = totals[name] + share if name in totals else share
        return totals

    def _check_finite(self, turn: Turn, group: list[Batch], losses: dict[str, float], norm: float) -> None:
        """Refuse a step whose loss or gradient is no number; in float16, let the scaler look for a smaller scale."""
        if math.isfinite(norm) and (self.accelerator.num_processes > 1 or math.isfinite(losses["loss"])):
            self._skipped[turn.name] = 0
            return  # the gradient is a mean over the processes: where one's loss is no number, it is none either
        own = (math.isfinite(losses["loss"]), [str(utt) for batch in group for utt in batch["utts"]])
        seen = self._gather(own)
        skipped = self._skipped[turn.name] = self._skipped.get(turn.name, 0) + 1
        if turn.scaler.is_enabled() and all(finite for finite, _ in seen) and skipped <= MOST_SKIPPED_STEPS:
            return
        guilty = [part for part in seen if not part[0]] or seen
        utts = [utt for _, names in guilty for utt in names]
        raise self._not_finite(f"step {self.progress.step + 1}", utts, losses["loss"], norm, turn.name)

    def _not_finite(
        self, where: str, utts: list[str], loss: float, norm: float | None, turn: str | None
    ) -> NonFiniteLossError:
        last = self.model_dir / LAST_FOLDER
        kept = f"{last} is from before" if last.exists() else "no checkpoint was written yet"
        return NonFiniteLossError(
            f"{where}{f', {turn} turn' if turn else ''}: the loss is {loss}"
            + ("" if norm is None else f", the norm of its gradient {norm}")
            + f"; utterances: {abridge(utts, SHOWN_UTTERANCES)}. Nothing of it was saved: {kept}. Look at the features "
            "of these utterances, lower lr, raise warmup_steps, or use --dtype fp32"
        )

    def _after_step(self, count: int, save: bool) -> None:
        """Lines, bar, and what is saved within an epoch."""
        progress, config = self.progress, self.config
        progress.batches += count
        self.log.advance(count, self._loss, self._seconds_left())
        if progress.step % config.log_interval == 0 or progress.step == 1:
            self._write_line()
        if config.save_per_step > 0 and progress.step % config.save_per_step == 0:
            self._check_and_save(f"epoch_{progress.epoch}_step_{progress.step}")
            self._save_last()
        elif save:
            self._save_last()

    def _place_schedule(self, turn: Turn) -> None:
        if isinstance(turn.scheduler, WarmupCosine) and self.config.total_minutes is not None:
            turn.scheduler.share_done = self.progress.seconds / (60 * self.config.total_minutes)
        turn.scheduler.set_step(self.progress.step)

    # ---- cross-validation

    def evaluate(self) -> dict[str, float]:
        """Average what the model reports over the cross-validation data, each utterance counting alike.

        Random draws (the flow's times and noise) are the same at every call, and training's generators stay as they
        are.

        Returns:
            {name: mean}.

        Raises:
            NonFiniteLossError: a loss is no number.
            ValueError: there are no data.
        """
        accelerator = self.accelerator
        sums: dict[str, float] = {}
        utterances = 0
        self.model.eval()
        with random_states_kept(), torch.no_grad(), closing(self.cv_batches()) as batches:
            for number, batch in enumerate(batches):
                if number % accelerator.num_processes != accelerator.process_index:
                    continue
                set_all_random_seed(self.config.seed + number)
                with self._autocast():
                    losses = self.model(self._told(self.turns[-1], batch), self._device)
                means = {name: float(value.float().mean()) for name, value in losses.items()}
                if not math.isfinite(means["loss"]):
                    utts = [str(utt) for utt in batch["utts"]]
                    where = f"cross-validation after step {self.progress.step}"
                    raise self._not_finite(where, utts, means["loss"], None, None)
                utterances += len(batch["utts"])
                for name, mean in means.items():
                    sums[name] = sums.get(name, 0.0) + mean * len(batch["utts"])
        gathered = self._gather((utterances, sums))
        total = sum(count for count, _ in gathered)
        if not total:
            raise ValueError("the cross-validation data gives no batch: look at --cv_data and the filter")
        names = next(part for count, part in gathered if count)
        return {name: sum(part.get(name, 0.0) for _, part in gathered) / total for name in names}

    def _check_and_save(self, name: str) -> None:
        """Cross-validate, note it, and write the weights as `<name>.pt` with what is known of them as `<name>.yaml`."""
        progress = self.progress
        losses = self.evaluate()
        averaged: dict[str, float] = {}
        if self.ema is not None:
            with self.ema.applied():
                averaged = {f"ema_{key}": value for key, value in self.evaluate().items()}
        self.log.add(CV_TAG, progress.epoch, progress.step, losses | averaged)
        text = ", ".join(f"{key} {value:.5f}" for key, value in (losses | averaged).items())
        self.log.say(f"{CV_TAG} epoch {progress.epoch} step {progress.step}: {text}")
        self.save_weights(name, losses, averaged)

    def save_weights(
        self, name: str, losses: Mapping[str, float] | None = None, averaged: Mapping[str, float] | None = None
    ) -> None:
        """Write the weights as a plain state dict, `<name>.pt`, and what is known of them as `<name>.yaml`.

        Args:
            name: without suffix, e.g. `init` or `epoch_3`.
            losses: of the cross-validation.
            averaged: the same of the running average, which is written as `<name>_ema.pt`.
        """
        if self.accelerator.is_main_process:
            save_tensors(self.model_dir / f"{name}.pt", _on_cpu(self.model.state_dict()))
            if averaged:
                assert self.ema is not None
                save_tensors(self.model_dir / f"{name}_ema.pt", _on_cpu(self.ema.weights))
            info = {
                **self.notes["train_conf"],
                "tag": CV_TAG,
                "epoch": self.progress.epoch,
                "step": self.progress.step,
                "lr": float(self.turns[-1].optimizer.param_groups[0]["lr"]),
                "loss_dict": {**(losses or {}), **(averaged or {})},
                "save_time": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
            write_yaml(self.model_dir / f"{name}.yaml", info)
        self.accelerator.wait_for_everyone()

    # ---- the rest

    @property
    def _device(self) -> torch.device:
        return self.accelerator.device

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES[self.config.dtype]
        return torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)

    @property
    def _adversarial(self) -> bool:
        return self.progress.step >= self.config.adversarial_from

    def _turns_now(self) -> list[Turn]:
        """The optimizers of the coming step; a generator begins alone."""
        return self.turns if self._adversarial else self.turns[-1:]

    def _told(self, turn: Turn, batch: Batch) -> Batch:
        """The batch with what a GAN must know of the turn."""
        return batch if turn.name is None else {**batch, "turn": turn.name, "adversarial": self._adversarial}

    def _gather(self, value: Any) -> list[Any]:
        """The values of all processes, in each of them."""
        if self.accelerator.num_processes == 1:
            return [value]
        gathered: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def _write_line(self) -> None:
        progress, now = self.progress, time.monotonic()
        values = {name: sum(seen) / len(seen) for name, seen in self._seen.items()}
        spent = now - self._line_at
        values["steps_per_second"], values["data_wait"] = len(self._seen["loss"]) / spent, self._waited / spent
        self.log.add(TRAIN_TAG, progress.epoch, progress.step, values)
        shown = ", ".join(f"{name} {value:.5g}" for name, value in values.items() if name != "data_wait")
        left = shown_time(self._seconds_left())
        self.log.say(
            f"{TRAIN_TAG} epoch {progress.epoch} step {progress.step}: {shown}, waiting for data "
            f"{values['data_wait']:.0%}, {left} left"
        )
        self._seen, self._line_at, self._waited = {}, now, 0.0

    def _seconds_left(self) -> float | None:
        """Of this run, by the pace of the training so far; None where nothing is known yet."""
        progress, config = self.progress, self.config
        pace = progress.seconds / max(1, progress.step)
        left = []
        if config.max_steps is not None:
            left.append((config.max_steps - progress.step) * pace)
        if progress.batches_per_epoch is not None:
            batches = (config.max_epoch - progress.epoch) * progress.batches_per_epoch - progress.batches
            left.append(batches / config.accum_grad * pace)
        if config.max_minutes is not None:
            left.append(60 * config.max_minutes - (time.monotonic() - self._run_began))
        if config.total_minutes is not None:
            left.append(60 * config.total_minutes - progress.seconds)
        return max(0.0, min(left)) if left else None

    def _save_last(self) -> None:
        random_of_all = self._gather(random_states())
        if self.accelerator.is_main_process:
            state = {
                "model": _on_cpu(self.model.state_dict()),
                "optimizers": [turn.optimizer.state_dict() for turn in self.turns],
                "scalers": [turn.scaler.state_dict() for turn in self.turns],
                "ema": None if self.ema is None else self.ema.state(),
                "random": random_of_all,
            }
            save_state(self.model_dir / LAST_FOLDER, state, {"progress": asdict(self.progress), **self.notes})
        self.accelerator.wait_for_everyone()
        self._saved_at = time.monotonic()


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """Write plain values as YAML, atomically.

    Args:
        path: the file.
        value: the mapping.
    """
    from ruamel.yaml import YAML

    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(dict(value), file)


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in weights.items()}

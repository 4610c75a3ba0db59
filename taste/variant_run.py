"""One run of stage 3: a variant trained and evaluated, from its settings to its results."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

import taste
from cosyvoice.utils.atomic import write_json
from cosyvoice.utils.model_dir import sizes
from cosyvoice.utils.output_lock import OutputLock
from cosyvoice.utils.provenance import noted_models
from cosyvoice.utils.settings import Settings
from taste.audio_use import listen
from taste.build import TasteSizes, build_model
from taste.checkpoint import code_commit, disk_warning, load_checkpoint
from taste.data import UtteranceDataset
from taste.input_fingerprint import inputs_digest
from taste.learned_state import load_learned_state
from taste.model import CosyVoiceS3Model
from taste.plots import plot_losses
from taste.results import describe_model, epoch_line, summary
from taste.run_data import open_data
from taste.run_evaluation import as_trained, evaluate_only
from taste.run_files import RESULTS_FILE, SETTINGS_FILE, STEPS_FILE, forget_training, holds_training, run_folder_of
from taste.run_report import write_run_report
from taste.run_start import ORIGIN, check_same_settings, find_checkpoint, give_first_weights, take_best
from taste.samples import show
from taste.train_board import TrainBoard
from taste.training import Trainer
from taste.training_config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def run_variant(
    settings: Settings, accelerator: "Accelerator", loss_curve_path: Path, stop_requested: Callable[[], bool]
) -> dict[str, Any]:
    """Train a variant, or go on training, or take it as it is; evaluate it, and let it speak.

    Args:
        settings: the script's constants, as the command line left them; VARIANT is one variant.
        accelerator: device and processes.
        loss_curve_path: picture of the losses.
        stop_requested: asked between batches.

    Returns:
        what metrics.json holds; in other processes than the main one, what these know.

    Raises:
        RunStopped: it was asked to stop.
        ValueError: something in settings, features or checkpoints does not fit; the message says what.
        OSError: a file is missing, or the disk is full.
        OutputBusyError: another process works on this run.
    """
    say = accelerator.on_main_process(partial(print, flush=True))
    run_folder = run_folder_of(settings)
    model_sizes = sizes(settings.cosyvoice_model_dir)
    evaluated = None if settings.num_epochs else find_checkpoint(settings, run_folder)
    if evaluated:
        settings = as_trained(settings, evaluated, say)
    train_set, test_set = open_data(settings, model_sizes, say, only_test=evaluated is not None)
    use_speaker = settings.use_speaker and test_set.has_speakers and (train_set is None or train_set.has_speakers)
    if settings.use_speaker and not use_speaker:
        say("no utterance info: the speaker's position is left out (as with --no-use-speaker)")
    torch.manual_seed(settings.seed)
    model = build_model(
        settings.cosyvoice_model_dir,
        settings.variant,
        speech_width=test_set.speech_width,
        freeze_llm=settings.freeze_llm,
        use_speaker=use_speaker,
        lora_rank=settings.lora_rank,
        taste_sizes=TasteSizes.from_dict(settings.to_dict()),
        whisper_dir=settings.whisper_dir,
        freeze_aggregator_bottom=settings.freeze_aggregator_bottom,
    )
    say(describe_model(model))

    with OutputLock(run_folder) if accelerator.is_main_process else nullcontext():
        checkpoint = find_checkpoint(settings, run_folder) if settings.num_epochs else evaluated
        learned = cast(UtteranceDataset, train_set)  # not opened only where a checkpoint is evaluated
        origin = {} if checkpoint else give_first_weights(settings, model, learned, say)
        if settings.num_epochs:
            results = train(
                settings,
                model,
                (learned, test_set),
                run_folder,
                accelerator,
                checkpoint,
                origin,
                loss_curve_path,
                stop_requested,
            )
        else:
            untrained = f"the model folder as it is: {run_folder} has no checkpoint"
            say(f"evaluating {checkpoint or settings.init_from or untrained}")
            results = evaluate_only(settings, model, (train_set, test_set), accelerator, checkpoint)
        results |= listen(settings, model, test_set, accelerator, say, stop_requested)
        if accelerator.is_main_process:
            results |= show(settings, model, test_set, run_folder, accelerator.device, stop_requested)
            if settings.num_epochs:
                results["made_with"] = inputs_digest(settings, run_folder)
            elif not holds_training(run_folder):  # else they are those of the training
                settings.save(run_folder / SETTINGS_FILE)
            write_results(settings, results, run_folder)
    return results


def write_results(settings: Settings, results: dict[str, Any], run_folder: Path) -> None:
    """Write what was found out about a model as numbers and as a page, and print it.

    Args:
        settings: of the run.
        results: what metrics.json is to hold.
        run_folder: where to write.
    """
    write_json(run_folder / RESULTS_FILE, results)
    write_run_report(run_folder, {settings.variant: run_folder}, settings.cosyvoice_model_dir, run_folder.name)
    print(summary(results, run_folder))


def train(
    settings: Settings,
    model: CosyVoiceS3Model,
    sets: tuple[UtteranceDataset, UtteranceDataset],
    run_folder: Path,
    accelerator: "Accelerator",
    checkpoint_path: Path | None,
    origin: dict[str, Any],
    loss_curve_path: Path,
    stop_requested: Callable[[], bool],
) -> dict[str, Any]:
    """Train, or go on training, and leave the model with its best weights.

    Args:
        settings: how.
        model: what.
        sets: utterances to learn from, and utterances to choose the best epoch by.
        run_folder: where everything is written.
        accelerator: device and processes.
        checkpoint_path: to go on from; None starts anew.
        origin: what `give_first_weights` noted; not looked at where there is a checkpoint, which has its own notes.
        loss_curve_path: picture of the losses.
        stop_requested: asked between batches.

    Returns:
        results for metrics.json: history, best epoch, its test scores, checkpoint.

    Raises:
        RunStopped: it was asked to stop; it has saved.
        NonFiniteLossError: the loss of several steps in a row is no number.
        ValueError: the checkpoint does not fit the settings, or the device has too little memory.
    """
    names = [field.name for field in fields(TrainingConfig)]
    config = TrainingConfig(**{name: getattr(settings, name) for name in names})
    checkpoint = load_checkpoint(checkpoint_path) if checkpoint_path else None
    if checkpoint:
        origin = {name: checkpoint.notes.get(name) for name in ORIGIN}
    if origin["pretrained"]:
        model.trained_parts = tuple(origin["pretrained"]["parts"])
    notes = {
        "settings": settings.to_dict(),
        "commit": code_commit(taste.REPOSITORY),
        "features_made_with": noted_models(settings.train_utt2info_path),
        "use_speaker": model.use_speaker,
        **origin,
    }

    def draw(history: list[dict[str, Any]]) -> None:
        plot_losses(loss_curve_path, history, model.eos + 1, f"{run_folder.name} ({settings.variant})")

    board = TrainBoard(run_folder / "tensorboard", run_folder / STEPS_FILE) if settings.tensorboard else None

    def show_epoch(history: list[dict[str, Any]]) -> None:  # called in the main process only
        print(epoch_line(history[-1]), flush=True)
        draw(history)
        if board:
            board.update(history)

    on_minute = board.update if board else lambda history: None
    trainer = Trainer(model, *sets, config, run_folder, accelerator, notes, stop_requested, show_epoch, on_minute)
    if checkpoint and checkpoint_path:
        check_same_settings(settings, checkpoint.notes, checkpoint_path)
        trainer.resume(checkpoint)
        if checkpoint_path.resolve() != trainer.last_path.resolve():
            take_best(checkpoint, checkpoint_path, trainer.best_path, accelerator)
        if accelerator.is_main_process:
            print(f"resuming from {checkpoint_path}, epoch {trainer.progress.epoch}, step {trainer.progress.step}")
            before = checkpoint.notes["settings"]["num_epochs"]
            if before != settings.num_epochs and trainer.progress.epoch < settings.num_epochs:
                print(trainer.describe_new_schedule(before))
            if trainer.progress.history:  # it may have been stopped before the first one
                draw(trainer.progress.history)
    elif accelerator.is_main_process:
        forget_training(run_folder)
    if accelerator.is_main_process:
        settings.save(run_folder / SETTINGS_FILE)
        if warning := disk_warning(trainer.last_path, trainer.best_path, model):
            print(warning, flush=True)
    checkpoint = None  # gigabytes, of which model and optimizer have their own copies
    try:
        progress = trainer.fit()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device is out of memory ({error}). Halve BATCH_SIZE and double ACCUMULATION_STEPS: that is another "
            f"training, so add another --run-name, with --init-from {trainer.last_path} where that was saved, to begin "
            "with its weights. Or let the new modules alone learn: --freeze-llm true"
        ) from error
    finally:
        accelerator.free_memory()  # it would keep the model and the optimizer for as long as the process lives
        if board:
            board.close()
    assert progress.best_epoch is not None  # the one before the first step counts
    load_learned_state(model, load_checkpoint(trainer.best_path).weights)
    return {
        "checkpoint": str(trainer.best_path),
        **origin,
        "test": progress.history[progress.best_epoch]["test"],
        "best_epoch": progress.best_epoch,
        "history": progress.history,
    }

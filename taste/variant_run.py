"""One run of stage 3: a variant trained and evaluated, from its settings to its results."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import taste
from cosyvoice.utils.model_dir import ModelSizes, sizes
from cosyvoice.utils.output_lock import OutputLock
from cosyvoice.utils.provenance import changed_models, noted_models
from cosyvoice.utils.settings import Settings
from taste.audio_use import listen
from taste.build import TasteSizes, build_model
from taste.checkpoint import (
    Checkpoint,
    check_same_folder,
    code_commit,
    disk_warning,
    load_checkpoint,
    save_checkpoint,
    weights_fingerprint,
    write_json,
)
from taste.data import HELD_OUT_SEED, FeaturePaths, UtteranceDataset, features_exist, hold_out, open_dataset
from taste.feature_origin import check_origin, check_same_hearing
from taste.fitted_start import fit_new_parts
from taste.input_fingerprint import inputs_digest
from taste.model import PARTS, CosyVoiceS3Model
from taste.plots import plot_losses
from taste.pretrained_parts import take_parts
from taste.results import describe_fit, describe_model, describe_start, epoch_line, summary
from taste.run_report import write_run_report
from taste.samples import show
from taste.scoring import evaluate
from taste.train_board import TrainBoard
from taste.training import Trainer, TrainingConfig
from taste.transcript_check import misfits
from taste.warm_start import find_start, start_from

if TYPE_CHECKING:
    from accelerate import Accelerator

# settings that a run cannot change half-way; those that TasteSizes names too, where the variant has such parts
DECIDES_TRAINING = (
    *(
        "variant",
        "init_from",
        "load_pretrained_modules",
        "data_dependent_init",
        "freeze_llm",
        "freeze_aggregator_bottom",
        "lora_rank",
        "use_speaker",
    ),
    "batch_size",
    *("accumulation_steps", "lr", "new_modules_lr", "warmup_steps", "weight_decay", "grad_clip", "seed"),
)
ORIGIN = ("started_from", "pretrained", "fitted")  # notes about a run's first weights
SHOWN_IDS = 3


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
    say = partial(print, flush=True) if accelerator.is_main_process else _say_nothing
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

    with sole_writer(run_folder, accelerator):
        checkpoint = find_checkpoint(settings, run_folder) if settings.num_epochs else evaluated
        origin = {} if checkpoint else give_first_weights(settings, model, train_set, say)
        if settings.num_epochs:
            results = train(
                settings,
                model,
                (train_set, test_set),
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
            elif not (run_folder / "checkpoints").is_dir():  # else they are those of the training
                settings.save(run_folder / "settings.json")
            write_results(settings, results, run_folder)
    return results


def write_results(settings: Settings, results: dict[str, Any], run_folder: Path) -> None:
    """Write what was found out about a model as numbers and as a page, and print it.

    Args:
        settings: of the run.
        results: what metrics.json is to hold.
        run_folder: where to write.
    """
    write_json(run_folder / "metrics.json", results)
    write_run_report(run_folder, {settings.variant: run_folder}, settings.cosyvoice_model_dir, run_folder.name)
    print(summary(results, run_folder))


def run_folder_of(settings: Settings) -> Path:
    """Where a run writes.

    Args:
        settings: EXP_DIR, RUN_NAME and VARIANT.

    Returns:
        the folder.
    """
    return Path(settings.exp_dir) / (settings.run_name or settings.variant)


def as_trained(settings: Settings, checkpoint_path: Path, say: Callable[[str], None]) -> Settings:
    """Take from a checkpoint that is only evaluated what decides its parts and their sizes.

    Args:
        settings: of this run.
        checkpoint_path: what is evaluated.
        say: takes what a person should know.

    Returns:
        the settings, with those of the training where they decide which weights there are.

    Raises:
        ValueError: the checkpoint is of another variant.
    """
    notes = load_checkpoint(checkpoint_path, mapped=True).notes
    then = notes["settings"] | {"use_speaker": notes["use_speaker"]}
    if then["variant"] != settings.variant:
        raise ValueError(
            f"{checkpoint_path} is of variant {then['variant']!r}, VARIANT is {settings.variant!r}; "
            f"give --variant {then['variant']}"
        )
    now = settings.to_dict()
    names = ("freeze_llm", "lora_rank", "use_speaker", *(field.name for field in fields(TasteSizes)))
    changes = {name: then[name] for name in names if name in then and then[name] != now[name]}
    if changes:
        say("as it was trained: " + ", ".join(f"{name.upper()} = {value!r}" for name, value in changes.items()))
    return settings.replaced(**changes)


def open_data(
    settings: Settings, model_sizes: ModelSizes, say: Callable[[str], None], *, only_test: bool = False
) -> tuple[UtteranceDataset | None, UtteranceDataset]:
    """Open the training set and the test set, or split one off.

    Args:
        settings: paths, variant, model folder.
        model_sizes: what the features must fit.
        say: takes what a person should know.
        only_test: nothing is learned: the training set is opened only where the test set is split off it.

    Returns:
        training set and test set; None for the former where it was not opened.

    Raises:
        FileNotFoundError: a feature file is missing.
        ValueError: nothing usable, features of another model, or without the words that the variant needs.
    """
    train_paths, test_paths = _feature_paths(settings, "train"), _feature_paths(settings, "test")
    tested = has_test_set(settings)
    learned = not (only_test and tested)
    check_origin([*([train_paths] if learned else []), *([test_paths] if tested else [])], settings.cosyvoice_model_dir)
    train_set = None
    say("opening the features ...")  # many take a minute
    if learned:
        train_set = open_dataset(train_paths, model_sizes)
        say(train_set.selection.describe("training set"))
    if tested:
        if learned:
            check_same_hearing(train_paths, test_paths)
        test_set = open_dataset(test_paths, model_sizes)
        say(test_set.selection.describe("test set"))
        if train_set is not None and (warning := overlap(train_set, test_set)):
            say(warning)
    else:
        train_set, test_set, what_was_done = hold_out(train_set, HELD_OUT_SEED)
        say(what_was_done)
    if "fusion" in PARTS.get(settings.variant, ()):
        for dataset, path in ((train_set, settings.train_utt2info_path), (test_set, settings.test_utt2info_path)):
            if dataset is None:
                continue
            if not dataset.has_words:
                raise ValueError(
                    f"variant {settings.variant!r} averages over words, and not every utterance has text_token and "
                    f"word_id in {path}. They are made by `python utt2text_and_feature.py --jsonl <manifest>`; the "
                    "variants text_only and simple go without"
                )
            warn_of_misfits(dataset, say)
    return train_set, test_set


def overlap(train_set: UtteranceDataset, test_set: UtteranceDataset) -> str | None:
    """Say where utterances of the test set are learned from.

    Args:
        train_set: utterances to learn from.
        test_set: utterances to score.

    Returns:
        a warning, where they share a recording, or an id where nobody noted the recordings; None where they do not.
    """
    learned = {_recording(train_set, utt_id) for utt_id in train_set.utt_ids}
    shared = [utt_id for utt_id in test_set.utt_ids if _recording(test_set, utt_id) in learned]
    if not shared:
        return None
    return (
        f"warning: {len(shared)} of {len(test_set)} test utterances are in the training set too, {shared[0]} first: "
        "their scores say nothing of others"
    )


def _recording(dataset: UtteranceDataset, utt_id: str) -> str:
    return str(dataset.info(utt_id).get("audio_path") or utt_id)


def has_test_set(settings: Settings) -> bool:
    """Whether some test features are there; else a part of the training set is held out.

    Args:
        settings: where they would be.

    Returns:
        True where units or text embeddings are there.
    """
    paths = _feature_paths(settings, "test")
    return features_exist(paths.units) or features_exist(paths.text)


def warn_of_misfits(dataset: UtteranceDataset, say: Callable[[str], None]) -> None:
    """Name the utterances whose recording is too short or too long for what it should say.

    Args:
        dataset: with words.
        say: takes what a person should know.
    """
    found = {}
    for utt_id in dataset.utt_ids:
        if doubts := misfits(dataset.word_ids(utt_id), len(dataset.features.units[utt_id])):
            found[utt_id] = doubts[0]
    if found:
        shown = "; ".join(f"{utt_id}: {doubt}" for utt_id, doubt in list(found.items())[:SHOWN_IDS])
        say(f"warning: {len(found)} transcripts may not fit their recordings; they are used all the same: {shown}")


def find_checkpoint(settings: Settings, run_folder: Path) -> Path | None:
    """The checkpoint that RESUME means: to go on from, or with NUM_EPOCHS = 0 to evaluate.

    Args:
        settings: RESUME and NUM_EPOCHS.
        run_folder: the run's folder.

    Returns:
        the path; None to start from the model folder.

    Raises:
        FileNotFoundError: RESUME names a file that is not there.
        ValueError: the run was trained, and what its training would go on from is gone.
    """
    if settings.resume == "never":
        return None
    if settings.resume == "auto":
        last, best = (run_folder / "checkpoints" / name for name in ("last.pt", "best.pt"))
        if settings.num_epochs and not last.exists() and _is_trained(best):
            raise ValueError(
                f"{best} was trained, and {last.name}, from which a training goes on, is not beside it. Put it back, "
                "or evaluate what is there (--num-epochs 0), or begin another run with its weights "
                f"(--init-from {best} --run-name <another>), or start anew over it (--resume never)"
            )
        path = last if settings.num_epochs else best
        return path if path.exists() else None
    path = Path(settings.resume)
    if not path.is_file():
        raise FileNotFoundError(
            f"RESUME is {str(path)!r}: there is no such file; expected auto, never, or a checkpoint"
        )
    return path


def _is_trained(best: Path) -> bool:
    """Whether a run's best weights are there, and are not only those that it began with."""
    return best.exists() and load_checkpoint(best, mapped=True).notes["progress"]["epoch"] > 0


def give_first_weights(
    settings: Settings, model: CosyVoiceS3Model, train_set: UtteranceDataset, say: Callable[[str], None]
) -> dict[str, Any]:
    """Give a new run's model its first weights: another run's, else the model folder's, else fitted ones.

    Args:
        settings: INIT_FROM, LOAD_PRETRAINED_MODULES and DATA_DEPENDENT_INIT.
        model: as `build_model` made it.
        train_set: what new modules are fitted to.
        say: takes what a person should know.

    Returns:
        what was done, as notes: `started_from`, `pretrained` and `fitted`, None where nothing was.

    Raises:
        FileNotFoundError: INIT_FROM names nothing.
        ValueError: it does not fit.
    """
    start = pretrained = fitted = None
    new_parts, missing = set(PARTS[model.variant]), None
    if settings.init_from:
        start = start_from(model, find_start(settings.init_from, Path(settings.exp_dir)))
        pretrained = start["pretrained"]
        missing = start["new_parts"]
        new_parts &= set(missing)
        say(describe_start(start))
    if settings.load_pretrained_modules and new_parts:
        taken = take_parts(model, settings.cosyvoice_model_dir, missing, pretrained)
        if taken:
            new_parts -= set(taken.parts)
            pretrained = taken.as_note() | {"parts": [*taken.parts, *(pretrained["parts"] if pretrained else [])]}
            say(taken.describe())
    if not settings.data_dependent_init:
        new_parts &= {"quantizer"}  # its codebooks must come from the training set, or they come from the test set
    if new_parts:
        fitted = fit_new_parts(model, train_set, new_parts)
        say(describe_fit(fitted))
    return {"started_from": start, "pretrained": pretrained, "fitted": fitted}


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

    board = TrainBoard(run_folder / "tensorboard", run_folder / "metrics.jsonl") if settings.tensorboard else None

    def show_epoch(history: list[dict[str, Any]]) -> None:  # called in the main process only
        print(epoch_line(history[-1]), flush=True)
        draw(history)
        if board:
            board.update(history)

    on_minute = board.update if board else lambda history: None
    trainer = Trainer(model, *sets, config, run_folder, accelerator, notes, stop_requested, show_epoch, on_minute)
    if checkpoint:
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
        for old_path in (trainer.last_path, trainer.best_path):
            for file in (old_path, old_path.with_suffix(".json")):
                file.unlink(missing_ok=True)
    if accelerator.is_main_process:
        settings.save(run_folder / "settings.json")
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
    model.load_learned_state(load_checkpoint(trainer.best_path).weights)
    return {
        "checkpoint": str(trainer.best_path),
        **origin,
        "test": progress.history[progress.best_epoch]["test"],
        "best_epoch": progress.best_epoch,
        "history": progress.history,
    }


def take_best(checkpoint: Checkpoint, checkpoint_path: Path, best_path: Path, accelerator: "Accelerator") -> None:
    """Bring the best weights so far along, where a run goes on from a checkpoint that is not its own `last.pt`.

    Args:
        checkpoint: to go on from.
        checkpoint_path: where it lies; the `best.pt` of the same run must lie beside it.
        best_path: where this run's is to be.
        accelerator: processes; the main one writes.

    Raises:
        ValueError: there is none, or it is of another epoch.
    """
    progress = checkpoint.notes["progress"]
    epoch = progress["best_epoch"]
    if epoch is None:
        return
    beside = checkpoint_path.with_name(best_path.name)
    best = load_checkpoint(beside) if beside.is_file() else None
    known = best.notes["progress"]["history"] if best else []
    if known != progress["history"][: epoch + 1]:
        raise ValueError(
            f"RESUME is {str(checkpoint_path)!r}: the best weights so far, of epoch {epoch}, are not in {beside}; keep "
            f"both files of a run together, or begin a new run with its weights: --init-from {checkpoint_path}"
        )
    if accelerator.is_main_process and beside.resolve() != best_path.resolve():
        save_checkpoint(best_path, best)
    accelerator.wait_for_everyone()


def evaluate_only(
    settings: Settings,
    model: CosyVoiceS3Model,
    sets: tuple[UtteranceDataset | None, UtteranceDataset],
    accelerator: "Accelerator",
    checkpoint_path: Path | None,
) -> dict[str, Any]:
    """Score a model without training it.

    Args:
        settings: the batch size, and where features are.
        model: it gets the checkpoint's weights.
        sets: utterances to learn from, if opened, which are not looked at, and utterances to score.
        accelerator: device and processes.
        checkpoint_path: weights; None scores the model as it is.

    Returns:
        results for metrics.json.

    Raises:
        ValueError: the checkpoint does not fit the model, or was trained on another model folder, on features made
            with other models, or on what would be scored.
    """
    results: dict[str, Any] = {"checkpoint": str(checkpoint_path or settings.init_from or settings.cosyvoice_model_dir)}
    if checkpoint_path:
        checkpoint = load_checkpoint(checkpoint_path)
        model.load_learned_state(checkpoint.weights)
        check_same_folder(model, checkpoint, checkpoint_path)
        check_fair(settings, checkpoint, sets[0])
        progress = checkpoint.notes["progress"]
        results |= {
            "best_epoch": progress["best_epoch"],
            "history": whole_history(checkpoint_path, progress["history"]),
            **{name: checkpoint.notes.get(name) for name in ORIGIN},
        }
    model.to(accelerator.device)
    scores = evaluate(model, sets[1], settings.batch_size, accelerator, num_workers=settings.num_workers)
    return results | {"test": scores.averages()}


def check_fair(settings: Settings, checkpoint: Checkpoint, train_set: UtteranceDataset | None) -> None:
    """Refuse to score a checkpoint on features of other models, or on utterances that it has learned from.

    Args:
        settings: where the features are.
        checkpoint: whose weights are scored.
        train_set: what is left where no test set is there and a part was held out; else not looked at.

    Raises:
        ValueError: the scores would mean nothing.
    """
    held_out = not has_test_set(settings)
    made_with = noted_models(settings.train_utt2info_path if held_out else settings.test_utt2info_path)
    if changed := changed_models(checkpoint.notes.get("features_made_with"), made_with):
        raise ValueError(f"the checkpoint learned from features that were made otherwise: {changed}")
    if held_out and checkpoint.notes["train_set"] != train_set.fingerprint():
        raise ValueError(
            "there are no test features, and the checkpoint has learned from other utterances than those that are left "
            "when a part is held out: what is held out may be among them; make the TEST_ features"
        )


def whole_history(checkpoint_path: Path, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The epochs of the run that a checkpoint is of, also those behind a `best.pt` that was written before the end.

    Args:
        checkpoint_path: the checkpoint; the notes of the run's `last.pt` lie beside it as JSON.
        known: the epochs that the checkpoint itself knows.

    Returns:
        an entry an epoch, as in metrics.json.
    """
    notes_path = checkpoint_path.with_name("last.json")
    if not notes_path.is_file():
        return known
    history = json.loads(notes_path.read_text(encoding="utf-8"))["progress"]["history"]
    return history if history[: len(known)] == known else known


def check_same_settings(settings: Settings, notes: dict[str, Any], checkpoint_path: Path) -> None:
    """Refuse to go on where that would mix two trainings.

    Args:
        settings: of this run.
        notes: the checkpoint's; a setting that it does not name did not exist when it was written.
        checkpoint_path: it.

    Raises:
        ValueError: a setting that decides the training differs (all are named).
    """
    now, earlier = settings.to_dict(), notes["settings"]
    names = DECIDES_TRAINING
    if "fusion" in PARTS.get(settings.variant, ()):
        names += tuple(field.name for field in fields(TasteSizes))
    changed = [
        f"{name.upper()} was {earlier[name]!r}, is {now[name]!r}"
        for name in names
        if name in earlier and earlier[name] != now[name] and not (name == "init_from" and _has_moved(settings, notes))
    ]
    if changed:
        raise ValueError(
            f"{checkpoint_path} was trained with other settings: {'; '.join(changed)}. Choose another --run-name to "
            "keep it, start anew over it with --resume never, or put the settings back to go on"
        )


def _has_moved(settings: Settings, notes: dict[str, Any]) -> bool:
    """Whether INIT_FROM names the weights that a run began with, where they lie now."""
    start = notes.get("started_from")
    if not (start and settings.init_from):
        return False
    try:
        path = find_start(settings.init_from, Path(settings.exp_dir))
    except FileNotFoundError:
        return False
    return weights_fingerprint(load_checkpoint(path).weights) == start["weights"]


@contextmanager
def sole_writer(run_folder: Path, accelerator: "Accelerator") -> Iterator[None]:
    """Keep a second run out of the folder while this one lasts.

    Args:
        run_folder: it.
        accelerator: processes; the main one keeps the others of its run out as well.

    Yields:
        nothing.

    Raises:
        OutputBusyError: another run works there.
    """
    lock = OutputLock(run_folder) if accelerator.is_main_process else None
    try:
        yield
    finally:
        if lock:
            lock.release()


def _feature_paths(settings: Settings, split: str) -> FeaturePaths:
    values = {name: Path(path) for name, path in settings.to_dict().items() if name.startswith(f"{split}_utt2")}
    info = values[f"{split}_utt2info_path"]
    return FeaturePaths(
        units=values[f"{split}_utt2_s3_path"],
        text=values[f"{split}_utt2_text_emb_path"],
        speech=None if settings.variant == "text_only" else values[f"{split}_utt2_whisper_path"],
        info=info if features_exist(info) else None,
    )


def _say_nothing(text: str) -> None:
    """What all but the main process print."""

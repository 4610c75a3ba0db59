"""Where a run goes on from, or what it begins with."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosyvoice.utils.settings import Settings
from taste.build import TasteSizes
from taste.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, weights_fingerprint
from taste.data import UtteranceDataset
from taste.fitted_start import fit_new_parts
from taste.model import CosyVoiceS3Model
from taste.pretrained_parts import take_parts
from taste.results import describe_fit, describe_start
from taste.run_files import best_checkpoint, last_checkpoint
from taste.variants import PARTS
from taste.warm_start import find_start, start_from

if TYPE_CHECKING:
    from accelerate import Accelerator

# settings that a run cannot change half-way; those that TasteSizes names too, where the variant has such parts
DECIDES_TRAINING = (
    *("variant", "init_from", "load_pretrained_modules", "data_dependent_init", "freeze_llm"),
    *("freeze_aggregator_bottom", "lora_rank", "use_speaker", "batch_size"),
    *("accumulation_steps", "lr", "new_modules_lr", "warmup_steps", "weight_decay", "grad_clip", "seed"),
)
ORIGIN = ("started_from", "pretrained", "fitted")  # notes about a run's first weights


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
        last, best = last_checkpoint(run_folder), best_checkpoint(run_folder)
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
        fitted = fit_new_parts(model, train_set, new_parts, say)
        say(describe_fit(fitted))
    return {"started_from": start, "pretrained": pretrained, "fitted": fitted}


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
    if best is None or best.notes["progress"]["history"] != progress["history"][: epoch + 1]:
        raise ValueError(
            f"RESUME is {str(checkpoint_path)!r}: the best weights so far, of epoch {epoch}, are not in {beside}; keep "
            f"both files of a run together, or begin a new run with its weights: --init-from {checkpoint_path}"
        )
    if accelerator.is_main_process and beside.resolve() != best_path.resolve():
        save_checkpoint(best_path, best)
    accelerator.wait_for_everyone()


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
    names: tuple[str, ...] = DECIDES_TRAINING
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


def _is_trained(best: Path) -> bool:
    """Whether a run's best weights are there, and are not only those that it began with."""
    return best.exists() and load_checkpoint(best, mapped=True).notes["progress"]["epoch"] > 0


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

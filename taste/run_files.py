"""The files of a run, by their names in its folder."""

from pathlib import Path

from cosyvoice.utils.settings import Settings

CHECKPOINTS_FOLDER = "checkpoints"
LAST_FILE = "last.pt"  # what a training goes on from
BEST_FILE = "best.pt"  # the weights with the lowest test loss
STEPS_FILE = "metrics.jsonl"  # the results of every step
RESULTS_FILE = "metrics.json"
SETTINGS_FILE = "settings.json"


def run_folder_of(settings: Settings) -> Path:
    """Where a run writes.

    Args:
        settings: EXP_DIR, RUN_NAME and VARIANT.

    Returns:
        the folder.
    """
    return Path(settings.exp_dir) / (settings.run_name or settings.variant)


def last_checkpoint(run_folder: Path) -> Path:
    """The checkpoint that a training goes on from.

    Args:
        run_folder: of the run.

    Returns:
        the path, whether it is there or not.
    """
    return run_folder / CHECKPOINTS_FOLDER / LAST_FILE


def best_checkpoint(run_folder: Path) -> Path:
    """The checkpoint with the best weights so far.

    Args:
        run_folder: of the run.

    Returns:
        the path, whether it is there or not.
    """
    return run_folder / CHECKPOINTS_FOLDER / BEST_FILE


def notes_of(checkpoint_path: Path) -> Path:
    """The readable notes beside a checkpoint.

    Args:
        checkpoint_path: the `.pt`.

    Returns:
        the `.json`.
    """
    return checkpoint_path.with_suffix(".json")


def holds_training(run_folder: Path) -> bool:
    """Whether something was trained in a folder.

    Args:
        run_folder: of the run.

    Returns:
        True where a training has saved there.
    """
    return (run_folder / CHECKPOINTS_FOLDER).is_dir()


def forget_training(run_folder: Path) -> None:
    """Remove the checkpoints of a run and their notes, so that none can go on from them.

    Args:
        run_folder: of the run.
    """
    for path in (last_checkpoint(run_folder), best_checkpoint(run_folder)):
        path.unlink(missing_ok=True)
        notes_of(path).unlink(missing_ok=True)

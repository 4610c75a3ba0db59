"""Evaluates a released TASTE on a test set, as a run of variant `taste` that was trained elsewhere."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cosyvoice.utils.model_dir import get_tokenizer, sizes
from cosyvoice.utils.output_lock import OutputLock
from cosyvoice.utils.settings import Settings
from taste.audio_use import listen
from taste.evaluation import evaluate
from taste.released_data import ReleasedDataset
from taste.released_folder import check_same_sizes, speaker_model_warning
from taste.run_data import open_data
from taste.run_files import SETTINGS_FILE, holds_training, run_folder_of
from taste.samples import show
from taste.variant_run import write_results

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_settings(settings: Settings) -> None:
    """Refuse settings that a released TASTE would ignore.

    Args:
        settings: of MODE train, with TASTE_CHECKPOINT.

    Raises:
        ValueError: something is to be trained, of another variant, or from other weights (all that is wrong is named).
    """
    problems = [
        f"{name.upper()} is {getattr(settings, name)!r}, expected {expected}"
        for name, fine, expected in (
            ("variant", settings.variant == "taste", "'taste'"),
            ("num_epochs", settings.num_epochs == 0, "0: it is evaluated, not trained"),
            ("init_from", not settings.init_from, "none: it has weights"),
            ("resume", settings.resume in ("auto", "never"), "auto: it has weights"),
        )
        if not fine
    ]
    if problems:
        raise ValueError(
            f"TASTE_CHECKPOINT is {settings.taste_checkpoint!r}, a released TASTE, and {'; '.join(problems)}. Evaluate "
            "it (--variant taste --num-epochs 0 --run-name released), encode and decode with it (--mode encode, --mode "
            "decode), or train without --taste-checkpoint"
        )


def evaluate_released(
    settings: Settings, accelerator: "Accelerator", stop_requested: Callable[[], bool]
) -> dict[str, Any]:
    """Score a released TASTE, let it speak, and write what a run writes; nothing learns.

    Of the features of stages 1 and 2 the units are read, and the utterances' texts, speakers and recordings. What else
    the model reads it computes itself, see `taste.released_data`: its Whisper hears each recording anew.

    Args:
        settings: TASTE_CHECKPOINT, the test set's features, how to evaluate, and the run's folder.
        accelerator: device and processes.
        stop_requested: asked between batches.

    Returns:
        what metrics.json holds; in other processes than the main one, what these know.

    Raises:
        RunStopped: it was asked to stop.
        ValueError: see `check_settings`; or the folder, the model folder or the features do not fit, or the
            run's folder holds a training.
        OSError: a file is missing, or the disk is full.
        OutputBusyError: another process works on this run.
    """
    from taste.official import load_taste_checkpoint

    check_settings(settings)
    say = accelerator.on_main_process(partial(print, flush=True))
    folder, model_dir = Path(settings.taste_checkpoint), settings.cosyvoice_model_dir
    run_folder = run_folder_of(settings)
    if holds_training(run_folder):
        raise ValueError(f"{run_folder} holds what was trained, and its results; give another one: --run-name released")
    settings = settings.replaced(num_workers=0)  # no process but this one has the model that hears the recordings
    _, test_set = open_data(settings.replaced(variant="text_only"), sizes(model_dir), say, only_test=True)
    say(f"opening {folder} ...")
    taste = load_taste_checkpoint(folder)
    check_same_sizes(taste.model, folder, model_dir)
    if warning := speaker_model_warning(folder, model_dir):
        say(warning)
    test_set = ReleasedDataset.of(test_set, taste.to(accelerator.device), get_tokenizer(model_dir))
    with OutputLock(run_folder) if accelerator.is_main_process else nullcontext():
        say(f"evaluating {folder}")
        torch.manual_seed(settings.seed)
        results: dict[str, Any] = {"checkpoint": str(folder)}
        results["test"] = evaluate(taste.model, test_set, settings.batch_size, accelerator).averages()
        silence = test_set.silence() if settings.negative_controls else None
        results |= listen(settings, taste.model, test_set, accelerator, say, stop_requested, silence)
        if accelerator.is_main_process:
            results |= show(settings, taste.model, test_set, run_folder, accelerator.device, stop_requested)
            settings.save(run_folder / SETTINGS_FILE)
            write_results(settings, results, run_folder)
    return results

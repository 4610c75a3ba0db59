"""Trains all variants on the same data from the same seed, and sets what they reach side by side."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosyvoice.utils.atomic import write_json
from cosyvoice.utils.settings import Settings
from taste.input_fingerprint import inputs_digest
from taste.measure_table import PAPER
from taste.plots import plot_comparison
from taste.run_files import RESULTS_FILE, forget_training, last_checkpoint, notes_of, run_folder_of
from taste.run_report import TABLE_FILE, measures_of, write_run_report
from taste.variant_run import run_variant
from taste.variants import VARIANTS

if TYPE_CHECKING:
    from accelerate import Accelerator

STAGES = {"simple": "text_only", "taste_novq": "text_only", "taste": "taste_novq"}  # whose weights each starts from


def compare_variants(
    settings: Settings, accelerator: "Accelerator", loss_curve_path: Path, stop_requested: Callable[[], bool]
) -> None:
    """Run every variant, or go on with it, and set what they reach side by side.

    With STAGES each training starts from the one before, as in the paper: `simple` and `taste_novq` from `text_only`,
    `taste` from `taste_novq`. Each run lies in a folder of its own under exp/<RUN_NAME, or "all">/. A variant that a
    comparison before this one has finished is taken as it is, see `finished_before`.

    Args:
        settings: the script's constants, as the command line left them.
        accelerator: device and processes.
        loss_curve_path: picture of the losses, of the variant in work.
        stop_requested: asked between batches.

    Raises:
        RunStopped: it was asked to stop.
        ValueError: settings that decide for one variant only, stages that would no longer come from each other, or what
            a run raises.
        OSError: what a run raises.
    """
    if settings.init_from or settings.resume not in ("auto", "never"):
        raise ValueError(
            "with VARIANT = 'all' each variant has weights to start from and a checkpoint of its own: leave INIT_FROM "
            "unset, and RESUME auto or never"
        )
    folder = run_folder_of(settings)
    if settings.resume == "never" and settings.num_epochs:
        if accelerator.is_main_process:
            forget(folder)
        accelerator.wait_for_everyone()
    if settings.staged_training:
        check_stages(folder, settings.num_epochs)
    results = {}
    for variant in VARIANTS:
        if accelerator.is_main_process:
            print(f"\n== {variant}")
        start = STAGES.get(variant) if settings.staged_training and settings.num_epochs else None
        own = settings.replaced(
            variant=variant,
            exp_dir=str(folder),
            run_name=variant,
            init_from=str(folder / start) if start else None,
            freeze_llm=settings.freeze_llm and not (variant == "text_only" and not settings.lora_rank),
        )
        found = finished_before(own)
        if found is None:
            found = run_variant(own, accelerator, loss_curve_path, stop_requested)
        elif accelerator.is_main_process:
            print(f"already complete: {run_folder_of(own)}")
        results[variant] = found
    if accelerator.is_main_process:
        write_comparison(folder, results, settings.to_dict())


def forget(folder: Path) -> None:
    """Remove the checkpoints of an earlier comparison: where this one is stopped, the next must not go on from them.

    Args:
        folder: of the comparison.
    """
    for variant in VARIANTS:
        forget_training(folder / variant)


def check_stages(folder: Path, num_epochs: int) -> None:
    """Refuse to train a variant further whose weights another one has begun with.

    Args:
        folder: of the comparison.
        num_epochs: to train each variant.

    Raises:
        ValueError: the later variant would go on from weights that are no longer the earlier one's.
    """
    for later, earlier in STAGES.items():
        begun, before = (_last_notes(folder / variant) for variant in (later, earlier))
        epochs = before["progress"]["epoch"] if before else num_epochs
        if begun and begun.get("started_from") and epochs < num_epochs:
            raise ValueError(
                f"NUM_EPOCHS is {num_epochs}, and {later} has begun with the weights that {earlier} had after {epochs} "
                f"epochs: put NUM_EPOCHS back to {epochs} to go on; or compare anew, in another folder (--run-name "
                "<another>) or over this one (--resume never)"
            )


def _last_notes(run_folder: Path) -> dict[str, Any] | None:
    path = notes_of(last_checkpoint(run_folder))
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def finished_before(settings: Settings) -> dict[str, Any] | None:
    """The results of a run that needs not be looked at again.

    Args:
        settings: of the run.

    Returns:
        what its metrics.json holds; None where it was not finished with these settings and with all that it depends on
        as it is now (see `taste.input_fingerprint`), or where a measure was skipped for want of a package or a model.
    """
    if settings.resume != "auto" or not settings.num_epochs:
        return None
    try:
        results = json.loads((run_folder_of(settings) / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    reasons = [
        *results.get("sounds", {}).get("skipped", {}).values(),
        *(score for score in results.get("controls", {}).values() if isinstance(score, str)),
    ]
    if any(reason.startswith(("skipped", "not measured")) for reason in reasons):
        return None
    return results if results.get("made_with") == inputs_digest(settings, run_folder_of(settings)) else None


def write_comparison(folder: Path, results: Mapping[str, dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the table, the picture and the report of several runs, and print the table.

    Args:
        folder: holds a run's folder for each variant; table.md, report.html, comparison.json and comparison.png are
            written beside them.
        results: of each variant, what its metrics.json holds.
        settings: of the runs, as JSON knows values.
    """
    epochs: dict[str, dict[str, float | None]] = {
        variant: {"epochs_trained": count} for variant, count in epochs_trained(results).items()
    }
    measures = {variant: measures_of(found) | epochs[variant] for variant, found in results.items()}
    write_json(folder / "comparison.json", {"measures": measures, "paper": PAPER, "settings": settings})
    plot_comparison(
        folder / "comparison.png",
        {variant: found["history"] for variant, found in results.items() if found.get("history")},
        [(variant, results[variant]["test"]["top5"], own.get("top5_shuffled")) for variant, own in measures.items()],
    )
    runs = {variant: folder / variant for variant in results}
    title = f"{folder.name}: all variants"
    write_run_report(folder, runs, settings["cosyvoice_model_dir"], title, more_measures=epochs)
    table = (folder / TABLE_FILE).read_text(encoding="utf-8")
    print(f"\n{table}\nalso in {folder}: {TABLE_FILE}, comparison.json, comparison.png, report.html")


def epochs_trained(results: Mapping[str, Mapping[str, Any]]) -> dict[str, int | None]:
    """Count the epochs that each variant was trained, those of the runs whose weights it began with included.

    Args:
        results: of each variant, what its metrics.json holds.

    Returns:
        the epochs of each, all that were trained and not only those up to the best; None where a run began with the
        weights of one that is not among these.
    """

    def count(variant: str) -> int | None:
        if variant not in results:
            return None
        history, start = results[variant].get("history"), results[variant].get("started_from")
        before = count(start["variant"]) if start else 0
        return None if before is None else before + (history[-1]["epoch"] if history else 0)

    return {variant: count(variant) for variant in results}

"""Trains all variants on the same data from the same seed, and sets what they reach side by side."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taste.checkpoint import write_json
from taste.measure_table import PAPER
from taste.model import VARIANTS
from taste.plots import plot_comparison
from taste.run_report import TABLE_FILE, measures_of, write_run_report
from taste.settings import Settings
from taste.variant_run import run_folder_of, run_variant

if TYPE_CHECKING:
    from accelerate import Accelerator

STAGES = {"simple": "text_only", "taste_novq": "text_only", "taste": "taste_novq"}  # whose weights each starts from


def compare_variants(
    settings: Settings, accelerator: "Accelerator", loss_curve_path: Path, stop_requested: Callable[[], bool]
) -> None:
    """Run every variant, or go on with it, and set what they reach side by side.

    With STAGES each training starts from the one before, as in the paper: `simple` and `taste_novq` from `text_only`,
    `taste` from `taste_novq`. Each run lies in a folder of its own under exp/<RUN_NAME, or "all">/.

    Args:
        settings: the script's constants, as the command line left them.
        accelerator: device and processes.
        loss_curve_path: picture of the losses, of the variant in work.
        stop_requested: asked between batches.

    Raises:
        RunStopped: it was asked to stop.
        ValueError: settings that decide for one variant only, or what a run raises.
        OSError: what a run raises.
    """
    if settings.init_from or settings.resume not in ("auto", "never"):
        raise ValueError(
            "with VARIANT = 'all' each variant has weights to start from and a checkpoint of its own: leave INIT_FROM "
            "unset, and RESUME auto or never"
        )
    folder = run_folder_of(settings)
    results = {}
    for variant in VARIANTS:
        if accelerator.is_main_process:
            print(f"\n== {variant}")
        start = STAGES.get(variant) if settings.stages and settings.num_epochs else None
        own = settings.replaced(
            variant=variant,
            exp_dir=str(folder),
            run_name=variant,
            init_from=str(folder / start) if start else None,
            freeze_llm=settings.freeze_llm and not (variant == "text_only" and not settings.lora_rank),
        )
        results[variant] = run_variant(own, accelerator, loss_curve_path, stop_requested)
    if accelerator.is_main_process:
        write_comparison(folder, results, settings.to_dict())


def write_comparison(folder: Path, results: Mapping[str, dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the table, the picture and the report of several runs, and print the table.

    Args:
        folder: holds a run's folder for each variant; table.md, report.html, comparison.json and comparison.png are
            written beside them.
        results: of each variant, what its metrics.json holds.
        settings: of the runs, as JSON knows values.
    """
    measures = {variant: measures_of(found) for variant, found in results.items()}
    write_json(folder / "comparison.json", {"measures": measures, "paper": PAPER, "settings": settings})
    plot_comparison(
        folder / "comparison.png",
        {variant: found["history"] for variant, found in results.items() if found.get("history")},
        [(variant, own["top5"], own.get("top5_shuffled")) for variant, own in measures.items()],
    )
    runs = {variant: folder / variant for variant in results}
    write_run_report(folder, runs, settings["cosyvoice_model_dir"], f"{folder.name}: all variants")
    table = (folder / TABLE_FILE).read_text(encoding="utf-8")
    print(f"\n{table}\nalso in {folder}: {TABLE_FILE}, comparison.json, comparison.png, report.html")

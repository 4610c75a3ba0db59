"""Trains all variants on the same data from the same seed, and sets what they reach side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taste.atomic import atomic_path
from taste.checkpoint import write_json
from taste.model import VARIANTS
from taste.plots import plot_comparison
from taste.settings import Settings
from taste.variant_run import run_folder_of, run_variant

if TYPE_CHECKING:
    from accelerate import Accelerator

STAGES = {"simple": "text_only", "taste_novq": "text_only", "taste": "taste_novq"}  # whose weights each starts from
PAPERS_TOP5 = {"text_only": 0.65, "taste_novq": 0.88, "taste": 0.76}  # TASTE, table 4
PAPERS_NOTE = (
    "The last column is theirs: teacher-forced top-5 of arXiv 2504.07053, table 4, with the full-size models on their "
    "own data. It shows the order to expect, not a figure to compare with."
)
COLUMNS = (  # heading, how to find it in metrics.json, format
    ("test loss", ("test", "loss"), ".3f"),
    ("top-1", ("test", "top1"), ".3f"),
    ("top-5", ("test", "top5"), ".3f"),
    ("top-5, other recording", ("controls", "shuffled", "top5"), ".3f"),
    ("top-5, silence", ("controls", "silenced", "top5"), ".3f"),
    ("unit error rate", ("generation", "token_error_rate"), ".3f"),
    ("length ratio", ("generation", "length_ratio"), ".2f"),
    ("ended itself", ("generation", "eos_rate"), ".2f"),
    ("BLEU", ("generation", "bleu"), ".1f"),
    ("unigram F1", ("generation", "unigram_f1"), ".3f"),
    ("bit/s", ("codes", "bits_per_second"), ".0f"),
)


def compare_variants(
    settings: Settings, accelerator: "Accelerator", loss_curve_path: Path, stop_requested: Callable[[], bool]
) -> None:
    """Run every variant, or go on with it, and write one table and one picture.

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
    metrics = {}
    for variant in VARIANTS:
        if accelerator.is_main_process:
            print(f"\n== {variant}")
        start = STAGES.get(variant) if settings.stages else None
        own = settings.replaced(
            variant=variant,
            exp_dir=str(folder),
            run_name=variant,
            init_from=str(folder / start) if start else None,
            freeze_llm=settings.freeze_llm and not (variant == "text_only" and not settings.lora_rank),
        )
        metrics[variant] = run_variant(own, accelerator, loss_curve_path, stop_requested)
    if accelerator.is_main_process:
        write_comparison(folder, metrics, settings.to_dict())


def write_comparison(folder: Path, metrics: dict[str, dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write comparison.json, comparison.md and comparison.png, and print the table.

    Args:
        folder: where to.
        metrics: of each variant, what its metrics.json holds.
        settings: of the runs, as JSON knows values.
    """
    rows = [{"variant": variant} | _figures(found) for variant, found in metrics.items()]
    papers = [row | {"paper_top5": PAPERS_TOP5.get(row["variant"])} for row in rows]
    write_json(folder / "comparison.json", {"rows": papers, "paper": PAPERS_NOTE, "settings": settings})
    table = markdown_table(rows)
    with atomic_path(folder / "comparison.md") as temporary:
        temporary.write_text(f"{table}\n\n{PAPERS_NOTE}\n", encoding="utf-8")
    plot_comparison(
        folder / "comparison.png",
        {variant: found["history"] for variant, found in metrics.items() if found.get("history")},
        [(row["variant"], row["top-5"], row["top-5, other recording"]) for row in rows],
    )
    print(f"\n{table}\n\n{PAPERS_NOTE}\nalso in {folder / 'comparison.md'}, comparison.json and comparison.png")


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures of all variants as a table.

    Args:
        rows: a variant each; a figure that is not there is None.

    Returns:
        Markdown.
    """
    columns = [(name, form) for name, _, form in COLUMNS if any(row[name] is not None for row in rows)]
    lines = [
        f"| variant | {' | '.join(name for name, _ in columns)} | paper's top-5 |",
        "| --- |" + " --- |" * (len(columns) + 1),
    ]
    for row in rows:
        cells = ["" if row[name] is None else format(row[name], form) for name, form in columns]
        paper = PAPERS_TOP5.get(row["variant"])
        lines.append(f"| {row['variant']} | {' | '.join(cells)} | {'' if paper is None else f'{paper:.2f}'} |")
    return "\n".join(lines)


def _figures(metrics: dict[str, Any]) -> dict[str, float | None]:
    """What the columns show of one run."""
    return {name: _find(metrics, path) for name, path, _ in COLUMNS}


def _find(values: Any, path: Sequence[str]) -> float | None:
    """A nested value; None where it is not there, or is a text that says why."""
    for name in path:
        if not isinstance(values, dict) or name not in values:
            return None
        values = values[name]
    return values

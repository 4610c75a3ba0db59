"""Scores a checkpoint without training it."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosyvoice.utils.provenance import changed_models, noted_models
from cosyvoice.utils.settings import Settings
from taste.build import TasteSizes
from taste.checkpoint import Checkpoint, check_same_folder, load_checkpoint
from taste.data import UtteranceDataset
from taste.evaluation import evaluate
from taste.learned_state import load_learned_state
from taste.model import CosyVoiceS3Model
from taste.run_data import has_test_set
from taste.run_files import LAST_FILE, notes_of
from taste.run_start import ORIGIN

if TYPE_CHECKING:
    from accelerate import Accelerator


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
        load_learned_state(model, checkpoint.weights)
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
    if held_out and train_set and checkpoint.notes["train_set"] != train_set.fingerprint():
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
    notes_path = notes_of(checkpoint_path.with_name(LAST_FILE))
    if not notes_path.is_file():
        return known
    history = json.loads(notes_path.read_text(encoding="utf-8"))["progress"]["history"]
    return history if history[: len(known)] == known else known

"""Checkpoints that are whole or absent, and say in a readable file what they hold."""

import hashlib
import json
import pickle
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cosyvoice.utils.atomic import write_json
from cosyvoice.utils.tensor_file import save_tensors
from taste.learned_state import learned_state
from taste.run_files import notes_of

if TYPE_CHECKING:
    from taste.model import CosyVoiceS3Model


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on, or a model to be used."""

    weights: dict[str, Tensor]  # those that training changes; the frozen ones are in the model folder
    optimizer: dict[str, Any] | None  # None in a checkpoint kept for its weights alone
    notes: dict[str, Any]  # JSON values: settings, step, place in the data, results, commit


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically, and its notes as JSON beside it.

    The notes are in the checkpoint too, so that the two can never be of different steps.

    Args:
        path: the `.pt` to write.
        checkpoint: what to write.

    Raises:
        OSError: the disk is full, say; the checkpoint that stood there before is untouched.
    """
    content = {
        "weights": {name: value.detach().cpu() for name, value in checkpoint.weights.items()},
        "optimizer": checkpoint.optimizer,
        "notes": json.dumps(checkpoint.notes),
    }
    save_tensors(path, content)
    write_json(notes_of(path), checkpoint.notes)


# settings that had other names in notes written before they were called as they are
_RENAMED = {
    "least_units_per_token": "min_units_per_token",
    "most_units_per_token": "max_units_per_token",
    "new_parts_lr": "new_modules_lr",
    "fit_new_parts": "data_dependent_init",
    "pretrained_parts": "load_pretrained_modules",
    "stages": "staged_training",
    "audio_blocks": "audio_layers",
    "audio_units": "audio_ffn_dim",
    "fusion_start": "fusion_init",
    "codebooks": "num_quantizers",
    "codebook_width": "codebook_dim",
    "measure_sounds": "evaluate_audio",
}


def disk_warning(last_path: Path, best_path: Path, model: "CosyVoiceS3Model") -> str | None:
    """Look whether the disk has room for the checkpoints of a run.

    Args:
        last_path: of the checkpoint to go on from, in a folder whose parent exists.
        best_path: of the one that is kept for its weights alone.
        model: what is trained, as AdamW does it.

    Returns:
        a warning where the disk has too little room; None where it has enough.
    """
    best = sum(values.nbytes for values in learned_state(model).values())
    last = best + 2 * sum(values.nbytes for values in model.parameters() if values.requires_grad)  # two moments
    present = sum(path.stat().st_size for path in (last_path, best_path) if path.is_file())
    needed = 2 * last + best - present  # a new last.pt is written before the one from before goes
    free = shutil.disk_usage(last_path.parent.parent).free
    if needed <= free:
        return None
    return (
        f"warning: the checkpoints in {last_path.parent} may not fit on the disk: another {needed / 1e9:.1f} GB are "
        f"needed ({last_path.name} {last / 1e9:.1f} GB, as much again while the next one is written, {best_path.name} "
        f"{best / 1e9:.1f} GB), {free / 1e9:.1f} GB are free"
    )


def load_checkpoint(path: Path, *, mapped: bool = False) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: the `.pt`.
        mapped: weights are read from the disk when they are used: for a look at the notes.

    Returns:
        its content, on the CPU; settings under the names that they have now.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of ours, or is damaged.
    """
    if not path.is_file():
        near = ", ".join(sorted(file.name for file in path.parent.glob("*.pt"))) or "no checkpoint"
        raise FileNotFoundError(f"there is no checkpoint {path} ({path.parent} holds {near})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        notes = json.loads(content["notes"])
        if "settings" in notes:
            notes["settings"] = {_RENAMED.get(name, name): value for name, value in notes["settings"].items()}
        return Checkpoint(content["weights"], content["optimizer"], notes)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of model_code.py, or is damaged ({error}); resume from another one, "
            "or start anew with --resume never"
        ) from error


def check_same_folder(model: nn.Module, checkpoint: Checkpoint, path: str | Path) -> None:
    """Refuse weights that were trained beside others than those of this model folder.

    Args:
        model: with the checkpoint's weights.
        checkpoint: it.
        path: where it lies.

    Raises:
        ValueError: what it leaves to the model folder is something else in this one.
    """
    then, now = checkpoint.notes["frozen_weights"], frozen_fingerprint(model, checkpoint.weights)
    if then != now:
        raise ValueError(
            f"{path} was trained on another model folder: the weights that it leaves to the folder have the "
            f"fingerprint {then} there, {now} in this one; name that folder with COSYVOICE_MODEL_DIR"
        )


def frozen_fingerprint(model: nn.Module, learned: dict[str, Tensor]) -> str:
    """A short hash of the weights that a checkpoint leaves to the model folder.

    Args:
        model: the whole model.
        learned: the entries of its state that checkpoints hold.

    Returns:
        16 hexadecimal digits, equal for equal weights.
    """
    return weights_fingerprint({name: value for name, value in model.state_dict().items() if name not in learned})


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A short hash of some weights.

    Args:
        weights: by name, on any device.

    Returns:
        16 hexadecimal digits, equal for equal names and values in whatever order.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def code_commit(folder: Path) -> str | None:
    """The commit of the code, for the notes of a run.

    Args:
        folder: the repository.

    Returns:
        the commit, with `+changes` where files differ from it; None outside a git checkout.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()

"""Starts a model from the weights of another run, as each training of the paper starts from the one before."""

from pathlib import Path
from typing import Any

from cosyvoice.utils.state_difference import state_difference
from taste.checkpoint import load_checkpoint, weights_fingerprint
from taste.learned_state import learned_state, load_learned_state
from taste.model import CosyVoiceS3Model
from taste.run_files import best_checkpoint
from taste.variants import PRETRAINED_PART, VARIANTS, is_pretrained, lies_in, part_of


def find_start(init_from: str, exp_dir: Path) -> Path:
    """The checkpoint that INIT_FROM means.

    Args:
        init_from: a checkpoint file, a run's folder, or a run's name.
        exp_dir: where runs lie.

    Returns:
        the file; of a run, its best checkpoint.

    Raises:
        FileNotFoundError: there is none (the message says where it was looked for).
    """
    places = [Path(init_from), best_checkpoint(Path(init_from)), best_checkpoint(exp_dir / init_from)]
    for place in places:
        if place.is_file():
            return place
    looked, name = ", ".join(map(str, places)), Path(init_from).name
    variant = f"--variant {name}" if name in VARIANTS else "--variant <its variant>"
    raise FileNotFoundError(
        f"INIT_FROM is {init_from!r}: there is none of {looked}; expected a checkpoint, or a run that was trained: "
        f"python model_code.py {variant} --run-name {name}"
    )


def start_from(model: CosyVoiceS3Model, path: Path) -> dict[str, Any]:
    """Give a new model the weights of another run: what both have is copied, what is new keeps its own beginning.

    Parts of the other run that have no work in this model (the text encoder in `simple`) are left out. A part that
    only this model has (the quantizer of `taste`, started from `taste_novq`) must be absent from the checkpoint as a
    whole, adapters are new where the checkpoint has none, and what the checkpoint leaves to the model
    folder must be the same in this model's folder: half a match is an error, never a guess.

    Args:
        model: as `build_model` made it.
        path: the other run's checkpoint.

    Returns:
        what to note about it, as JSON knows values: checkpoint, variant, epoch, commit, weights (a fingerprint),
        new_parts, pretrained (what that run took from its model folder, see `taste.pretrained_parts`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or does not fit; all differences are named.
    """
    checkpoint = load_checkpoint(path)
    weights, own = checkpoint.weights, model.state_dict()
    own_parts, their_parts = set(map(part_of, own)), set(map(part_of, weights))
    new_parts = sorted(own_parts - their_parts - {PRETRAINED_PART})
    problems = [f"only in the checkpoint: {part}" for part in sorted(their_parts - own_parts)]
    difference = state_difference(own, weights)
    problems += [
        f"only in the checkpoint: {name}" for name in sorted(difference.unexpected) if part_of(name) in own_parts
    ]
    problems += [
        f"only in this model: {name}"
        for name in sorted(difference.missing)
        if part_of(name) not in (PRETRAINED_PART, *new_parts)
    ]
    problems += [f"{name} is {theirs}, this model has {ours}" for name, theirs, ours in sorted(difference.reshaped)]
    left_to_folder = {name: own[name] for name in difference.missing if is_pretrained(name)}
    then, now = checkpoint.notes["frozen_weights"], weights_fingerprint(left_to_folder)
    if not problems and then != now:
        problems.append(f"the weights that it left to its model folder: {then} then, {now} in this folder")
    if problems:
        raise ValueError(
            f"INIT_FROM: {path} cannot start a {model.variant!r} model on this model folder:\n  "
            + "\n  ".join(problems)
            + "\nName a run with the same COSYVOICE_MODEL_DIR and features (see the .json beside its checkpoint)."
        )
    taken = {name: value for name, value in weights.items() if not lies_in(name, model.idle_parts)}
    load_learned_state(model, learned_state(model) | taken)
    notes = checkpoint.notes
    return {
        "checkpoint": str(path),
        "variant": notes["settings"]["variant"],
        "epoch": notes["progress"]["epoch"],
        "commit": notes["commit"],
        "weights": weights_fingerprint(weights),
        "new_parts": new_parts,
        "pretrained": notes.get("pretrained"),
    }

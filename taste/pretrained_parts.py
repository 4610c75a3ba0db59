"""The parts that a model folder may hold beside its language model, trained together with it: `taste.pt`."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cosyvoice.utils.model_dir import ModelDir, read_weights
from cosyvoice.utils.tensor_file import save_tensors
from taste.checkpoint import weights_fingerprint
from taste.model import CosyVoiceS3Model
from taste.variants import PRETRAINED_PART, part_of

PARTS_FILE = "taste.pt"
FAMILY = {"simple": "simple", "taste_novq": "taste", "taste": "taste"}  # the variants whose parts are the same modules
# A part means nothing behind another one than it learned with.
READS_FROM = {"audio_branch": "aggregator", "quantizer": "aggregator", "fusion": "audio_branch"}  # of taste


class Taken(NamedTuple):
    """What a model has of a model folder's parts."""

    parts: tuple[str, ...]  # submodules that began with the folder's weights
    left: dict[str, str]  # submodules that did not, and why
    weights: str  # fingerprint of the whole file

    def as_note(self) -> dict[str, Any]:
        """The same as JSON knows values.

        Returns:
            parts, left and weights.
        """
        return {"parts": list(self.parts), "left": self.left, "weights": self.weights}

    def describe(self) -> str:
        """A line that says what was taken, and another for each part that was not.

        Returns:
            text without a line break at its end.
        """
        lines = [f"modules loaded from {PARTS_FILE}: {', '.join(self.parts) or 'none'}"]
        lines += [f"  not {part}: {reason}" for part, reason in self.left.items()]
        return "\n".join(lines)


def take_parts(
    model: CosyVoiceS3Model,
    model_dir: str | Path,
    wanted: Collection[str] | None = None,
    earlier: Mapping[str, Any] | None = None,
) -> Taken | None:
    """Give a variant's own parts the weights that its model folder has of them, where these fit.

    A part is taken as a whole or not at all, and only where the part that it reads from began with this file's weights
    too; the parts of `simple` read from each other. What is not taken keeps its own beginning.

    Args:
        model: as `build_model` made it, or with another run's weights.
        model_dir: the model folder.
        wanted: names of the submodules to look for, the others being another run's; None: all that the variant has
            beside the language model.
        earlier: that run's note about what it took, as `Taken.as_note` gives it.

    Returns:
        what was taken; None where the folder has no such file, or the variant no parts of its own.

    Raises:
        ValueError: the file is damaged.
    """
    path = ModelDir(model_dir).file(PARTS_FILE)
    if model.variant not in FAMILY or not path.is_file():
        return None
    weights = read_weights(path)
    digest, prefix = weights_fingerprint(weights), f"{FAMILY[model.variant]}."
    theirs = _by_part({name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)})
    own = _by_part(model.state_dict())
    wanted = own.keys() if wanted is None else wanted
    begun = set(earlier["parts"]) - set(wanted) if earlier and earlier["weights"] == digest else set()
    left: dict[str, str] = {}
    taken: dict[str, Tensor] = {}
    for part in sorted(wanted, key=lambda part: (part in READS_FROM, part)):  # what others read from comes first
        source = READS_FROM.get(part) if model.variant != "simple" else None
        reason = _difference(own[part], theirs.get(part, {}))
        if source and source not in begun:
            reason = f"it goes with another {source}"
        if reason:
            left[part] = reason
        else:
            begun.add(part)
            taken |= {name: value.to(own[part][name]) for name, value in theirs[part].items()}
    if model.variant == "simple" and left:
        left |= {part: f"it goes with another {min(left)}" for part in _by_part(taken)}
        taken = {}
    model.load_state_dict(model.state_dict() | taken)
    return Taken(tuple(sorted(_by_part(taken))), left, digest)


def write_parts(path: Path, models: Mapping[str, CosyVoiceS3Model]) -> None:
    """Write the parts of some models as one file, in float16 where they are floats.

    Args:
        path: the file, written atomically.
        models: by variant; `taste` gives the parts that it shares with `taste_novq`.

    Raises:
        ValueError: a weight is not finite in float16.
        OSError: it cannot be written.
    """
    state: dict[str, Tensor] = {}
    for variant, family in FAMILY.items():
        if variant in models:
            parts = _by_part(models[variant].state_dict())
            state |= {f"{family}.{name}": value for part in parts.values() for name, value in part.items()}
    halves = {
        name: (value.half() if value.is_floating_point() else value).cpu().clone() for name, value in state.items()
    }
    unfit = [name for name, value in halves.items() if value.is_floating_point() and not value.isfinite().all()]
    if unfit:
        raise ValueError(f"{path}: {len(unfit)} tensors are not finite in float16, {unfit[0]} first; train again")
    save_tensors(path, halves)


def _by_part(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights of each submodule beside the language model."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if part_of(name) != PRETRAINED_PART:
            parts.setdefault(part_of(name), {})[name] = value
    return parts


def _difference(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """Why a part of the file cannot be this model's; empty where it can."""
    if not theirs:
        return f"{PARTS_FILE} has none"
    for name, value in own.items():
        if name not in theirs:
            return f"{PARTS_FILE} has no {name}"
        if theirs[name].shape != value.shape:
            return f"{name} is {list(theirs[name].shape)} there, {list(value.shape)} with these settings"
    more = sorted(theirs.keys() - own.keys())
    return f"{PARTS_FILE} has {more[0]}, this model has none" if more else ""

"""What a training needs to go on exactly where it stopped, as one file that is whole or not there."""

import json
import pickle
import random
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cosyvoice.utils.atomic import remove_leftovers, write_text
from cosyvoice.utils.config import Call
from cosyvoice.utils.model_dir import load_state, read_weights
from cosyvoice.utils.tensor_file import save_tensors

STATE_FILE = "state.pt"  # in model_dir/last
NOTES_FILE = "state.json"  # the readable part of it


def flat_settings(value: Any, name: str = "") -> dict[str, Any]:
    """Write a configuration as one flat table, so that two can be compared.

    Args:
        value: what `cosyvoice.utils.config.read_config` gives.
        name: of the value.

    Returns:
        {"llm.llm.num_blocks": 14, ...}; a class stands under its own name followed by `!`.
    """
    prefix = f"{name}." if name else ""
    if isinstance(value, Call):
        return {f"{name}!": value.name} | flat_settings(value.arguments, name)
    if isinstance(value, dict):
        return {key: item for part in value for key, item in flat_settings(value[part], f"{prefix}{part}").items()}
    if isinstance(value, list) and any(isinstance(item, (Call, dict, list)) for item in value):
        return {
            key: item
            for number, part in enumerate(value)
            for key, item in flat_settings(part, f"{prefix}{number}").items()
        }
    return {name: value}


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the settings that differ.

    Args:
        earlier: flat settings of a checkpoint.
        now: flat settings of this run.

    Returns:
        a phrase for each.
    """
    absent = object()
    lines = []
    for key in [*earlier, *(key for key in now if key not in earlier)]:
        was, is_now = earlier.get(key, absent), now.get(key, absent)
        if was != is_now:
            lines.append(
                f"{key} was {'not there' if was is absent else repr(was)}, "
                f"is {'not there' if is_now is absent else repr(is_now)}"
            )
    return lines


def save_state(folder: Path, state: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Write a state so that, whatever stops the process, the folder holds this one or the one before, whole.

    Args:
        folder: e.g. `model_dir/last`.
        state: tensors and plain values.
        notes: JSON values that belong to it; they are stored inside too.

    Raises:
        OSError: the disk is full, say; the state that stood there is untouched.
    """
    text = json.dumps(notes, indent=2, ensure_ascii=False)
    save_tensors(folder / STATE_FILE, {**state, "notes": text})
    write_text(folder / NOTES_FILE, text + "\n")


def load_state_file(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Read the state of a training.

    Args:
        folder: e.g. `model_dir/last`.

    Returns:
        state and notes; None where there is none yet.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / STATE_FILE
    remove_leftovers(path)
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state, json.loads(state.pop("notes"))
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is damaged or no state of train.py ({cause}). Remove {folder} and start again from the latest "
            "epoch with --checkpoint"
        ) from error


def load_initial_weights(model: nn.Module, path: str | Path) -> str:
    """Load weights to start from, converted to the model's own type; every key and shape must agree.

    A file that holds a generator alone will do for a HiFi-GAN, whose discriminator then starts anew.

    Args:
        model: takes the weights.
        path: a .pt file, in any floating-point type.

    Returns:
        what was loaded, for the log.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: keys or shapes disagree, all of which the message counts and the first of which it lists.
    """
    path = Path(path)
    if not path.is_file():
        near = ", ".join(sorted(file.name for file in path.parent.glob("*.pt"))) or "no .pt file"
        raise FileNotFoundError(f"--checkpoint {path}: there is no such file; {path.parent} holds {near}")
    weights = read_weights(path)
    generator = getattr(model, "generator", None)
    if generator is not None and not any(name.startswith("generator.") for name in weights):
        load_state(generator, weights, path)
        return f"initial weights of the generator from {path}; the discriminator starts anew"
    load_state(model, weights, path)
    return f"initial weights from {path}"


def random_states() -> dict[str, Any]:
    """The state of every random generator: Python's, NumPy's, torch's on the CPU and on this process's GPU."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set every random generator.

    Args:
        states: what `random_states` gave.
    """
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class Ema:
    """A running average of a model's weights, which often generates better than the weights themselves.

    Args:
        model: whose weights are averaged.
        decay: share of the average that stays at each step; early on it is less, so that the start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                averaged.append(self.weights[name])
                current.append(value)
            else:
                self.weights[name].copy_(value)
        torch._foreach_lerp_(averaged, current, share)

    def state(self) -> dict[str, Any]:
        """What `load` takes."""
        return {"weights": self.weights, "steps": self.steps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier average.

        Args:
            state: what `state` gave.
        """
        self.steps = state["steps"]
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)

    @contextmanager
    def applied(self) -> Any:
        """Within the block the model has the averaged weights."""
        own = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.weights)
        try:
            yield
        finally:
            self.model.load_state_dict(own)

"""What a checkpoint keeps of a model: the weights that training changes, or changed before."""

from typing import TYPE_CHECKING

from torch import Tensor

from cosyvoice.utils.state_difference import state_difference
from taste.lora import is_adapter
from taste.variants import lies_in

if TYPE_CHECKING:
    from taste.model import CosyVoiceS3Model


def learned_state(model: "CosyVoiceS3Model") -> dict[str, Tensor]:
    """The weights that training changes or changed before, by name.

    Args:
        model: whose.

    Returns:
        the entries of `state_dict()` that lie in no frozen part, and the frozen ones that came from another run.
    """
    return {
        name: value
        for name, value in model.state_dict().items()
        if name in model.carried_names or not _stays(model, name)
    }


def load_learned_state(model: "CosyVoiceS3Model", state: dict[str, Tensor]) -> None:
    """Put back what `learned_state` gave.

    Weights of frozen parts are taken too, where the state has them: they are another run's, and are carried on.

    Args:
        model: takes them.
        state: weights by name.

    Raises:
        ValueError: names or shapes are not those of this model; all differences are listed.
    """
    own = model.state_dict()
    learned = {name for name in own if not _stays(model, name)}
    wanted = {name: value for name, value in own.items() if name in learned or name in state}
    problems = state_difference(wanted, state).phrases()
    if problems:
        raise ValueError(
            f"the checkpoint does not fit a {model.variant!r} model with these settings:\n  "
            + "\n  ".join(sorted(problems))
            + "\nUse the settings, the model folder and the features it was trained with (see the .json beside it)."
        )
    model.load_state_dict(own | state)
    model.carried_names = frozenset(state.keys() - learned)


def _stays(model: "CosyVoiceS3Model", name: str) -> bool:
    """Whether training leaves a weight as it is."""
    return lies_in(name, model.frozen_parts) and not is_adapter(name)

"""What learns of a model, sorted by how it learns."""

from typing import TYPE_CHECKING, Any

from torch import nn

from taste.training_config import TrainingConfig
from taste.variants import is_pretrained, lies_in

if TYPE_CHECKING:
    from taste.model import CosyVoiceS3Model


def parameter_groups(model: "CosyVoiceS3Model", config: TrainingConfig) -> list[dict[str, Any]]:
    """Sort what learns by how it learns.

    What the model folder holds is to be changed with care, what is new (adapters too) has everything to learn: each has
    its own peak learning rate. Weight decay is for matrices; none for biases, norms and embeddings, whose size means
    something.

    Args:
        model: its parameters that ask for a gradient are taken.
        config: the rates and the weight decay.

    Returns:
        groups as an optimizer takes them, each with its `peak_lr`; none is empty.

    Raises:
        ValueError: nothing learns.
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and id(parameter) not in embeddings
            pretrained = is_pretrained(name) or lies_in(name, model.trained_parts)
            groups.setdefault((pretrained, decays), []).append(parameter)
    if not groups:
        raise ValueError(
            f"a frozen {model.variant!r} model has nothing to learn: set FREEZE_LLM = False, choose another VARIANT, "
            "or evaluate the model as it is with --num-epochs 0"
        )
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "peak_lr": config.lr if pretrained else config.new_modules_lr,
        }
        for (pretrained, decays), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]

"""How fast each weight learns at each step."""

import math
from typing import Any

from torch import nn

from taste.model import CosyVoiceS3Model
from taste.training_config import TrainingConfig
from taste.variants import is_pretrained, lies_in

ADAM_BETAS = (0.9, 0.98)
LAST_LR_SHARE = 0.05  # of the peak, where the cosine ends


def share_of_peak(step: int, total_steps: int, warmup_steps: int) -> float:
    """The schedule of all learning rates: a straight warm-up, then a cosine down to a small share of the peak.

    Args:
        step: its number, from 0.
        total_steps: steps of the whole run.
        warmup_steps: steps until the peak.

    Returns:
        what the peak is multiplied with.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return LAST_LR_SHARE + (1 - LAST_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(model: CosyVoiceS3Model, config: TrainingConfig) -> list[dict[str, Any]]:
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

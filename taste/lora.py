"""Adapters of low rank that learn beside a language model which itself stays as it is."""

from typing import Any

from torch import Tensor, nn

BASE_LAYER = ".base_layer."  # what peft puts between the name of a layer and the name of its weight
ADAPTER = ".lora_"  # what the names of all weights that peft adds have in common
TARGETS = ("linear_q", "linear_k", "linear_v", "linear_out", "w_1", "w_2")  # matrices of a layer that get an adapter


def is_adapter(name: str) -> bool:
    """Whether a weight belongs to an adapter.

    Args:
        name: of the weight.

    Returns:
        True where it does.
    """
    return ADAPTER in name


def add_adapters(module: nn.Module, rank: int) -> None:
    """Put an adapter beside each matrix of a transformer's layers; it begins without effect and asks for gradients.

    The names of all other weights stay as they were, also in state dicts, so that checkpoints of runs with and without
    adapters know each other's weights.

    Args:
        module: holds layers with the names of `TARGETS`; changed in place.
        rank: of the adapters, 1 or more; they are scaled so that it does not change the size of their first steps.

    Raises:
        ValueError: peft is not installed, or the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"LORA_RANK is {rank}; expected 1 or more, or 0 for no adapters")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"LORA_RANK is {rank}, and adapters need the package peft, which is not installed: pip install peft "
            "(or LORA_RANK = 0 goes without)"
        ) from error
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(TARGETS))
    inject_adapter_in_model(config, module)
    module.register_state_dict_post_hook(_with_plain_names)
    module.register_load_state_dict_pre_hook(_with_pefts_names)


def _with_plain_names(module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    """Called by `state_dict`: the weights of a layer with an adapter keep the layer's name."""
    for name in [name for name in state if name.startswith(prefix) and BASE_LAYER in name]:
        state[name.replace(BASE_LAYER, ".")] = state.pop(name)


def _with_pefts_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Called by `load_state_dict`: the reverse."""
    for name, _parameter in module.named_parameters():
        plain = prefix + name.replace(BASE_LAYER, ".")
        if BASE_LAYER in name and plain in state:
            state[prefix + name] = state.pop(plain)

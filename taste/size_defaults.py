"""Settings of a training that depend on how large the model is."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cosyvoice.utils.model_dir import ModelSizes
from cosyvoice.utils.settings import Settings

LEAST_LARGE_WIDTH = 512  # channels of the language model from which on it is a large one; CosyVoice-300M's has 1024
SMALL: Mapping[str, Any] = MappingProxyType(
    {
        "batch_size": 8,
        "accumulation_steps": 1,
        "lr": 3e-5,
        "new_modules_lr": 3e-3,
        "warmup_steps": 10,
        "aggregator_heads": 4,
        "audio_heads": 4,
        "audio_ffn_dim": 512,
        "codebook_dim": 64,
    }
)
LARGE: Mapping[str, Any] = MappingProxyType(
    {
        "batch_size": 4,
        "accumulation_steps": 16,
        "lr": 2e-5,
        "new_modules_lr": 1e-4,
        "warmup_steps": 200,
        "aggregator_heads": 20,
        "audio_heads": 8,
        "audio_ffn_dim": 2048,
        "codebook_dim": 256,
    }
)


def defaults_for(model_sizes: ModelSizes) -> Mapping[str, Any]:
    """What suits a model.

    Args:
        model_sizes: its numbers.

    Returns:
        `LARGE` or `SMALL`: values by lower-case names of settings.
    """
    return LARGE if model_sizes.lm_width >= LEAST_LARGE_WIDTH else SMALL


def with_defaults(settings: Settings, model_sizes: ModelSizes) -> Settings:
    """Fill in the settings that were left to the model's size.

    Args:
        settings: of model_code.py; those named here that are None are filled in.
        model_sizes: of the model folder.

    Returns:
        the settings, none of these None.
    """
    defaults = defaults_for(model_sizes)
    return settings.replaced(**{name: value for name, value in defaults.items() if getattr(settings, name) is None})

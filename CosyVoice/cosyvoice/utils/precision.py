"""Keeps the parts of the model that overflow in half precision in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


def full_precision(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Run a module's method in its weights' own precision, whatever autocast says around it.

    In float16 the 300M flow overflows to NaN (FunAudioLLM/CosyVoice issues 999 and 1113), and in any 16-bit type the
    phase that HiFT sums over every sample loses its fraction. So the two stay in float32 while a caller's autocast
    region covers the language model.

    Args:
        method: a method of a module with parameters.

    Returns:
        the same method; it raises ValueError where the module's own weights are 16-bit.
    """

    @functools.wraps(method)
    def guarded(module: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        weight = next(module.parameters())
        if weight.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{type(module).__name__} has {weight.dtype} weights, expected torch.float32: it gives NaN or noise in "
                "16 bits. Call .float() on it; only the language model may run in half precision."
            )
        with torch.autocast(device_type=weight.device.type, enabled=False):
            return method(module, *args, **kwargs)

    return guarded

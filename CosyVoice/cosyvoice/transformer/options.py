"""Which of the published encoder options are implemented: those that the CosyVoice-300M family uses."""

from collections.abc import Mapping
from typing import Any

from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "swish": nn.SiLU}
FULL_CONTEXT, CAUSAL = 0, 1  # values of static_chunk_size
PUBLISHED_LAYER_NORM_EPS = 1e-12  # inside the layers; the input layer and after_norm have 1e-5

SUPPORTED_OPTIONS = {
    "input_layer": ("linear", "linear_legacy"),
    "pos_enc_layer_type": ("rel_pos_espnet",),
    "selfattention_layer_type": ("rel_selfattn",),
    "activation_type": tuple(ACTIVATIONS),
    "normalize_before": (True,),
    "static_chunk_size": (FULL_CONTEXT, CAUSAL),
    "use_dynamic_chunk": (False,),
    "use_dynamic_left_chunk": (False,),
    "global_cmvn": (None,),
    "key_bias": (True,),
    "positionwise_conv_kernel_size": (1,),
    "macaron_style": (False,),
    "use_cnn_module": (False,),
}


def refuse_unsupported(encoder: str, options: Mapping[str, Any]) -> None:
    """Raise one error that lists every option with a value that is not implemented.

    Args:
        encoder: the class's name, for the message.
        options: constructor arguments by their published names.

    Raises:
        ValueError: there is such an option.
    """
    problems = [
        f"{name}={options[name]!r} (supported: {', '.join(map(repr, supported))})"
        for name, supported in SUPPORTED_OPTIONS.items()
        if name in options and options[name] not in supported
    ]
    if problems:
        raise ValueError(
            f"{encoder}: the CosyVoice-300M family does not use these, and they are not implemented: "
            f"{'; '.join(problems)}. Set them as the released cosyvoice.yaml does"
        )

"""Builds the language model at named sizes with random weights, for measuring and for testing its shapes."""

from typing import Any

from cosyvoice.llm.llm import TransformerLM
from cosyvoice.transformer.encoder import ConformerEncoder, TransformerEncoder
from cosyvoice.utils.common import ras_sampling

# 300m: the released model; small: the scaled-down one whose reference outputs lie in tests/golden
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "300m": {
        "vocabulary": {"text_token_size": 51_866, "speech_token_size": 4096},
        "text_encoder": {
            "input_size": 512,
            "output_size": 1024,
            "attention_heads": 16,
            "linear_units": 4096,
            "num_blocks": 6,
        },
        "llm": {
            "input_size": 1024,
            "output_size": 1024,
            "attention_heads": 16,
            "linear_units": 4096,
            "num_blocks": 14,
        },
    },
    "small": {
        "vocabulary": {"text_token_size": 120, "speech_token_size": 64},
        "text_encoder": {
            "input_size": 24,
            "output_size": 32,
            "attention_heads": 4,
            "linear_units": 48,
            "num_blocks": 2,
        },
        "llm": {"input_size": 32, "output_size": 32, "attention_heads": 4, "linear_units": 64, "num_blocks": 3},
    },
}
ENCODER_OPTIONS = {
    "dropout_rate": 0.1,
    "positional_dropout_rate": 0.1,
    "attention_dropout_rate": 0.0,
    "pos_enc_layer_type": "rel_pos_espnet",
    "selfattention_layer_type": "rel_selfattn",
    "static_chunk_size": 1,
}


def build_text_encoder(size: str) -> ConformerEncoder:
    """Build the text encoder of one of `SIZES` with random weights, as released configuration files do."""
    options = {"input_layer": "linear", "use_cnn_module": False, "macaron_style": False}
    return ConformerEncoder(**SIZES[size]["text_encoder"], **ENCODER_OPTIONS, **options)


def build_llm(size: str) -> TransformerEncoder:
    """Build the encoder of the sequence of one of `SIZES` with random weights, as released configuration files do."""
    return TransformerEncoder(**SIZES[size]["llm"], **ENCODER_OPTIONS, input_layer="linear_legacy")


def build_language_model(size: str) -> TransformerLM:
    """Build the language model of one of `SIZES` with random weights, as released configuration files do."""
    llm = SIZES[size]["llm"]
    return TransformerLM(
        text_encoder_input_size=SIZES[size]["text_encoder"]["input_size"],
        llm_input_size=llm["input_size"],
        llm_output_size=llm["output_size"],
        **SIZES[size]["vocabulary"],
        text_encoder=build_text_encoder(size),
        llm=build_llm(size),
        sampling=ras_sampling,
    )

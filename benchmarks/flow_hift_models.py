"""Builds flow and HiFT at named sizes with random weights, for measuring and for testing their shapes."""

from __future__ import annotations

from typing import Any

from cosyvoice.flow.decoder import ConditionalDecoder
from cosyvoice.flow.flow import MaskedDiffWithXvec
from cosyvoice.flow.flow_matching import ConditionalCFM
from cosyvoice.flow.length_regulator import InterpolateRegulator
from cosyvoice.hifigan.f0_predictor import ConvRNNF0Predictor
from cosyvoice.hifigan.generator import HiFTGenerator
from cosyvoice.transformer.encoder import ConformerEncoder

# 300m: the released model; small: the scaled-down one whose reference outputs lie in tests/golden
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "300m": {
        "flow": {"input_size": 512, "vocab_size": 4096},
        "encoder": {"input_size": 512, "output_size": 512, "attention_heads": 8, "linear_units": 2048, "num_blocks": 6},
        "estimator": {
            "channels": [256] * 2,
            "attention_head_dim": 64,
            "n_blocks": 4,
            "num_mid_blocks": 12,
            "num_heads": 8,
        },
        "hift": {"base_channels": 512},
        "f0_predictor": {"cond_channels": 512},
    },
    "small": {
        "flow": {"input_size": 32, "vocab_size": 64},
        "encoder": {"input_size": 32, "output_size": 32, "attention_heads": 4, "linear_units": 64, "num_blocks": 2},
        "estimator": {
            "channels": [32] * 2,
            "attention_head_dim": 8,
            "n_blocks": 1,
            "num_mid_blocks": 2,
            "num_heads": 4,
        },
        "hift": {"base_channels": 32},
        "f0_predictor": {"cond_channels": 32},
    },
}
ENCODER_OPTIONS = {
    "dropout_rate": 0.1,
    "positional_dropout_rate": 0.1,
    "attention_dropout_rate": 0.1,
    "normalize_before": True,
    "input_layer": "linear",
    "pos_enc_layer_type": "rel_pos_espnet",
    "selfattention_layer_type": "rel_selfattn",
    "use_cnn_module": False,
    "macaron_style": False,
}
CFM_PARAMS = {
    "sigma_min": 1e-6,
    "solver": "euler",
    "t_scheduler": "cosine",
    "training_cfg_rate": 0.2,
    "inference_cfg_rate": 0.7,
    "reg_loss_type": "l1",
}


def build_flow(size: str) -> MaskedDiffWithXvec:
    """Build the flow of one of `SIZES` with random weights, as released configuration files do."""
    sizes = SIZES[size]
    estimator = ConditionalDecoder(in_channels=320, out_channels=80, dropout=0.0, act_fn="gelu", **sizes["estimator"])
    return MaskedDiffWithXvec(
        **sizes["flow"],
        encoder=ConformerEncoder(**ENCODER_OPTIONS, **sizes["encoder"]),
        length_regulator=InterpolateRegulator(channels=80, sampling_ratios=[1, 1, 1, 1]),
        decoder=ConditionalCFM(240, CFM_PARAMS, n_spks=1, spk_emb_dim=80, estimator=estimator),
    )


def build_hift(size: str) -> HiFTGenerator:
    """Build the vocoder of one of `SIZES` with random weights, as released configuration files do."""
    return HiFTGenerator(**SIZES[size]["hift"], f0_predictor=ConvRNNF0Predictor(**SIZES[size]["f0_predictor"]))

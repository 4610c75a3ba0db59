"""Makes small TASTE models in the published layout: published names, weights by a rule, and a folder of them."""

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.small_model_folder import SPEECH_CODES

Named = Sequence[tuple[str, Sequence[int]]]  # name and shape of each weight

QUANTIZER = {"decay": 0.99, "kmeans_init": False, "quantize_dropout": False}
CONFIG: dict[str, Any] = {  # of the released config.json, the entries that are looked at
    "model_type": "taste",
    "asr_config": {
        "activation_function": "gelu",
        "scale_embedding": False,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_layers": 32,  # wrong in the released file too: it describes another Whisper
    },
    "audio_tower_config": {
        "is_joint_encoder_segmenter": True,
        "quantization_on": True,
        "encoder__target_hidden_layer": 6,
        "kwargs_for_joint_encoder_segmenter": {
            "forward_type": "asr_attn_pooling",
            "is_word_level": True,
            "skip_prefix_idx": 4,
        },
        "kwargs_for_quantizer": QUANTIZER,
    },
    "speech_decoder_config": {
        "encoder__dropout_rate": 0.1,
        "encoder__input_layer": "linear",
        "encoder__normalize_before": True,
        "encoder__pos_enc_layer_type": "rel_pos_espnet",
        "encoder__static_chunk_size": 1,
        "fuse_encoded_audio_text_kwargs": {"normalize": False, "weight_init_type": "balance"},
        "fuse_encoded_audio_text_type": "weighted_sum",
        "length_normalized_loss": True,
        "llm__dropout_rate": 0.1,
        "llm__input_layer": "linear_legacy",
        "llm__pos_enc_layer_type": "rel_pos_espnet",
        "llm__static_chunk_size": 1,
        "lsm_weight": 0.0,
    },
}


def filled(params: Named, seed: int, gains: Iterable[tuple[str, float]] = ()) -> dict[str, Tensor]:
    """Weights by the rule of the reference: drawn from the seed and the name, some multiplied afterwards."""
    weights = {}
    for name, shape in params:
        drawn = torch.randn(tuple(shape), generator=_generator(name, seed))
        if len(shape) >= 2:
            weights[name] = drawn / math.sqrt(math.prod(shape[1:]))
        else:
            weights[name] = 1 + 0.2 * drawn if name.endswith("weight") else 0.1 * drawn
        for suffix, factor in gains:
            if name.endswith(suffix):
                weights[name] = weights[name] * factor
    return weights


def codebooks(buffers: Named, seed: int) -> dict[str, Tensor]:
    """The state of the codebooks by the same rule, levels getting smaller."""
    state = {}
    for name, shape in buffers:
        level = int(name.split("._codebook")[0].rsplit(".", 1)[1])
        embed = torch.randn(tuple(shape), generator=_generator(name, seed)) * 0.5**level
        codebook = name.removesuffix("embed")
        state |= {name: embed, f"{codebook}embed_avg": embed.clone()}
        state |= {f"{codebook}cluster_size": torch.ones(tuple(shape[:2])), f"{codebook}initted": torch.ones(1)}
    return state


def write_small_taste(
    folder: Path,
    case: dict[str, Any],
    config: dict[str, Any] | None = None,
    other_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """A released-style folder of a reference case's model, some of its spoken LM with it.

    Args:
        folder: made if missing.
        case: has `params`, `codebook_buffers` and `seed`, names as in the released model.
        config: the configuration; None: the one that fits.
        other_shapes: of weights that shall be larger than in the case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    params = [(name, (other_shapes or {}).get(name, shape)) for name, shape in case["params"]]
    weights = filled(params, case["seed"]) | codebooks(case["codebook_buffers"], case["seed"])
    weights = {
        name: value.bfloat16() if ".audio_joint_encoder_segmenter." in name else value
        for name, value in weights.items()
    }
    weights |= {
        "spoken_lm.pad_audio_unit_embed": torch.zeros(32),
        "spoken_lm.fuse_for_bridge_in_llm.weights": torch.zeros(2),
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def write_speaking_taste(folder: Path, case: dict[str, Any]) -> Path:
    """One that says the units, and reads the speaker vectors, of `write_small_model_folder`."""
    audio = "audio_tower.audio_joint_encoder_segmenter.audio_encoder.encoder."
    return write_small_taste(
        folder,
        case,
        other_shapes={
            "speech_decoder.speech_embedding.weight": (SPEECH_CODES, 32),
            "speech_decoder.llm_decoder.weight": (SPEECH_CODES + 1, 32),
            "speech_decoder.llm_decoder.bias": (SPEECH_CODES + 1,),
            "speech_decoder.spk_embed_affine_layer.weight": (32, 192),
            f"{audio}embed_positions.weight": (200, 32),  # 4 s
        },
    )


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))

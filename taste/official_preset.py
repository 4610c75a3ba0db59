"""The preset `official`: our classes with the arguments that make them compute what the published code computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cosyvoice.llm.llm import TransformerLM
from cosyvoice.transformer.encoder import ConformerEncoder, TransformerEncoder
from cosyvoice.transformer.options import CAUSAL
from cosyvoice.utils.common import ras_sampling
from taste.audio_branch import AudioBranch
from taste.fusion import WeightedSum
from taste.model import CosyVoiceS3Model
from taste.quantizer import WordQuantizer
from taste.taste_aggregator import WHISPER_PREFIX, TasteAggregator

if TYPE_CHECKING:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

# What the published code does otherwise than our default, as arguments of our classes; each says there what it is.
AGGREGATOR_OPTIONS: dict[str, Any] = {"mask_padding": False}
QUANTIZER_OPTIONS = {"once_a_word": False, "revive_dead_codes": False, "padding_as_bias": True}
LAYER_NORM_EPS = 1e-5  # inside the layers of all encoders
DROPOUT = 0.1

# What the published code can be configured to do and the released model does; nothing else is implemented.
IMPLEMENTED_CHOICES = {
    "audio_tower_config.kwargs_for_joint_encoder_segmenter.forward_type": "asr_attn_pooling",
    "audio_tower_config.kwargs_for_joint_encoder_segmenter.is_word_level": True,
    "audio_tower_config.kwargs_for_joint_encoder_segmenter.skip_prefix_idx": len(WHISPER_PREFIX),
    "speech_decoder_config.fuse_encoded_audio_text_type": "weighted_sum",
}
IMPLEMENTED_DEFAULTS = {  # these are the published defaults as well: transformers may leave them out of the file
    "asr_config.activation_function": "gelu",
    "asr_config.scale_embedding": False,
    "audio_tower_config.is_joint_encoder_segmenter": True,
    "speech_decoder_config.encoder__dropout_rate": DROPOUT,
    "speech_decoder_config.encoder__input_layer": "linear",
    "speech_decoder_config.encoder__normalize_before": True,
    "speech_decoder_config.encoder__pos_enc_layer_type": "rel_pos_espnet",
    "speech_decoder_config.encoder__static_chunk_size": CAUSAL,
    "speech_decoder_config.llm__dropout_rate": DROPOUT,
    "speech_decoder_config.llm__input_layer": "linear_legacy",
    "speech_decoder_config.llm__pos_enc_layer_type": "rel_pos_espnet",
    "speech_decoder_config.llm__static_chunk_size": CAUSAL,
}
WHISPER_DEFAULT_HEADS = 4  # of transformers' WhisperConfig, where the file names none


def build_official_model(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> CosyVoiceS3Model:
    """Build the model that weights of these shapes belong to.

    Args:
        shapes: our name -> shape, `model.` before each.
        config: the released config.json.

    Returns:
        the model, with random weights.

    Raises:
        ValueError: the configuration asks for what is not implemented, or a weight is missing that sizes come from.
    """
    found = {path: look_up(config, path) for path in IMPLEMENTED_CHOICES}
    found |= {path: look_up(config, path, default) for path, default in IMPLEMENTED_DEFAULTS.items()}
    problems = [
        f"{path} is {found[path]!r} (implemented: {wanted!r})"
        for path, wanted in (IMPLEMENTED_CHOICES | IMPLEMENTED_DEFAULTS).items()
        if found[path] != wanted
    ]
    if problems:
        raise ValueError(f"this TASTE model asks for what is not implemented: {'; '.join(problems)}")
    sizes = _Sizes(shapes)
    normalize = look_up(config, "speech_decoder_config.fuse_encoded_audio_text_kwargs.normalize", True)
    return CosyVoiceS3Model(
        _build_llm(sizes, config),
        _build_aggregator(sizes, config),
        audio_branch=_build_audio_branch(sizes),
        fusion=WeightedSum(normalize=normalize),
        quantizer=_build_quantizer(sizes, config),
        variant="taste",
    )


def build_whisper(shapes: Mapping[str, Sequence[int]], heads: int) -> "WhisperEncoder":
    """Build the Whisper encoder that weights of these shapes belong to.

    Args:
        shapes: our name -> shape.
        heads: attention heads, which shapes do not tell.

    Returns:
        transformers' encoder on the meta device: it takes weights by `load_state_dict(..., assign=True)`.

    Raises:
        ValueError: a weight is missing that sizes come from.
    """
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = _Sizes(shapes)
    config = WhisperConfig(
        d_model=sizes.of("whisper.conv1.weight"),
        num_mel_bins=sizes.of("whisper.conv1.weight", 1),
        max_source_positions=sizes.of("whisper.embed_positions.weight"),
        encoder_layers=sizes.layers("whisper.layers."),
        encoder_ffn_dim=sizes.of("whisper.layers.0.fc1.weight"),
        encoder_attention_heads=heads,
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return WhisperEncoder(config).requires_grad_(False)


@dataclass(frozen=True)
class _Sizes:
    """What the shapes of the weights tell."""

    shapes: Mapping[str, Sequence[int]]

    def of(self, name: str, axis: int = 0) -> int:
        """The size of one axis of a weight."""
        if name not in self.shapes:
            raise ValueError(f"the weight {name} is missing; the TASTE folder is incomplete, fetch it again")
        return self.shapes[name][axis]

    def layers(self, prefix: str) -> int:
        """How many layers are numbered behind a prefix."""
        return 1 + max(
            (int(name.removeprefix(prefix).split(".")[0]) for name in self.shapes if name.startswith(prefix)),
            default=-1,
        )

    def encoder(self, prefix: str) -> dict[str, Any]:
        """Constructor arguments of one of CosyVoice's encoders, by the shapes of its weights."""
        return {
            "input_size": self.of(f"{prefix}embed.out.0.weight", 1),
            "output_size": self.of(f"{prefix}embed.out.0.weight"),
            "attention_heads": self.of(f"{prefix}encoders.0.self_attn.pos_bias_u"),
            "linear_units": self.of(f"{prefix}encoders.0.feed_forward.w_1.weight"),
            "num_blocks": self.layers(f"{prefix}encoders."),
        }


def _build_llm(sizes: _Sizes, config: Mapping[str, Any]) -> TransformerLM:
    common: dict[str, Any] = {
        "dropout_rate": DROPOUT,
        "positional_dropout_rate": DROPOUT,
        "pos_enc_layer_type": "rel_pos_espnet",
        "selfattention_layer_type": "rel_selfattn",
        "static_chunk_size": CAUSAL,
        "layer_norm_eps": LAYER_NORM_EPS,
    }
    text_encoder = ConformerEncoder(
        **sizes.encoder("model.llm.text_encoder."),
        **common,
        input_layer="linear",
        macaron_style=False,
        use_cnn_module=False,
    )
    llm = TransformerEncoder(**sizes.encoder("model.llm.llm."), **common, input_layer="linear_legacy")
    return TransformerLM(
        text_encoder_input_size=sizes.of("model.llm.text_embedding.weight", 1),
        llm_input_size=sizes.of("model.llm.llm_embedding.weight", 1),
        llm_output_size=sizes.of("model.llm.llm_decoder.weight", 1),
        text_token_size=sizes.of("model.llm.text_embedding.weight"),
        speech_token_size=sizes.of("model.llm.speech_embedding.weight"),
        text_encoder=text_encoder,
        llm=llm,
        sampling=ras_sampling,
        length_normalized_loss=look_up(config, "speech_decoder_config.length_normalized_loss", True),
        lsm_weight=look_up(config, "speech_decoder_config.lsm_weight", 0.0),
        spk_embed_dim=sizes.of("model.llm.spk_embed_affine_layer.weight", 1),
    )


def _build_aggregator(sizes: _Sizes, config: Mapping[str, Any]) -> TasteAggregator:
    own = "model.aggregator."
    return TasteAggregator(
        sizes.of("model.llm.text_embedding.weight", 1),
        sizes.of(f"{own}embed_tokens.weight", 1),
        layers=sizes.layers(f"{own}layers."),
        heads=look_up(config, "asr_config.decoder_attention_heads", WHISPER_DEFAULT_HEADS),
        feed_forward=sizes.of(f"{own}layers.0.fc1.weight"),
        vocabulary=sizes.of(f"{own}embed_tokens.weight"),
        max_positions=sizes.of(f"{own}embed_positions.weight"),
        **AGGREGATOR_OPTIONS,
    )


def _build_quantizer(sizes: _Sizes, config: Mapping[str, Any]) -> WordQuantizer:
    own = "model.quantizer.rvq."
    kwargs = look_up(config, "audio_tower_config.kwargs_for_quantizer")
    return WordQuantizer(
        sizes.of(f"{own}project_in.weight", 1),
        codebook_dim=sizes.of(f"{own}project_in.weight"),
        levels=sizes.layers(f"{own}layers."),
        codes=sizes.of(f"{own}layers.0._codebook.embed", 1),
        ema_decay=kwargs["decay"],
        kmeans_init=kwargs["kmeans_init"],
        quantize_dropout=kwargs["quantize_dropout"],
        **QUANTIZER_OPTIONS,
    )


def _build_audio_branch(sizes: _Sizes) -> AudioBranch:
    encoder = sizes.encoder("model.audio_branch.audio_token_encoder.")
    return AudioBranch(
        sizes.of("model.audio_branch.audio_embed_affine_layer.weight", 1),
        encoder["input_size"],
        encoder["output_size"],
        blocks=encoder["num_blocks"],
        heads=encoder["attention_heads"],
        linear_units=encoder["linear_units"],
        dropout=DROPOUT,
        layer_norm_eps=LAYER_NORM_EPS,
    )


def look_up(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """A value of nested mappings.

    Args:
        config: the mappings.
        path: keys with dots between.
        default: what a missing entry means.

    Returns:
        the value.
    """
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return default if value is None else value

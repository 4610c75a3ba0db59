"""Puts a variant's parts beside the pretrained language model of a model folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, cast

from torch import nn

from cosyvoice.llm.llm import TransformerLM
from cosyvoice.utils.model_dir import ModelDir, load_part
from taste.aggregator import SimpleTextSpeechAggregator
from taste.audio_branch import AudioBranch
from taste.fusion import build_fusion
from taste.model import CosyVoiceS3Model
from taste.quantizer import WordQuantizer
from taste.taste_aggregator import TasteAggregator, start_from_whisper
from taste.variants import PARTS, VARIANTS


@dataclass(frozen=True)
class TasteSizes:
    """The sizes of what `taste_novq` and `taste` have beside the language model; the defaults are the paper's."""

    aggregator_layers: int = 2
    aggregator_heads: int = 20
    aggregator_from_whisper: bool = False  # start from Whisper's own decoder, with its sizes and its text embedding
    audio_layers: int = 2
    audio_heads: int = 8
    audio_ffn_dim: int = 2048  # width of the audio branch's feed-forward networks
    audio_dropout: float = 0.1
    fusion: str = "weighted_sum"  # weighted_sum, sum, concat, concat_with_sep
    fusion_init: str = "balance"  # of the weighted sum: balance, zero_audio
    num_quantizers: int = 4
    codebook_size: int = 512
    codebook_dim: int = 256
    quantize_dropout: bool = True

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TasteSizes":
        """The sizes among the settings that a run noted.

        Args:
            values: settings by their lower-case names.

        Returns:
            the sizes.
        """
        return cls(**{field.name: values[field.name] for field in fields(cls)})


class Parts(TypedDict, total=False):
    """What a variant has beside the language model, by the names that `CosyVoiceS3Model` takes it with."""

    aggregator: SimpleTextSpeechAggregator | TasteAggregator
    audio_branch: AudioBranch
    fusion: nn.Module
    quantizer: WordQuantizer


def build_model(
    model_dir: str | Path,
    variant: str,
    *,
    speech_width: int | None,
    freeze_llm: bool,
    use_speaker: bool,
    lora_rank: int = 0,
    taste_sizes: TasteSizes | None = None,
    whisper_dir: str | Path | None = None,
    freeze_aggregator_bottom: bool = False,
) -> CosyVoiceS3Model:
    """Load the pretrained language model and put the new modules beside it.

    Args:
        model_dir: a model folder in the released layout.
        variant: one of `VARIANTS`.
        speech_width: channels of the Whisper features; not looked at by `text_only`.
        freeze_llm: see `CosyVoiceS3Model`.
        use_speaker: see `CosyVoiceS3Model`.
        lora_rank: see `CosyVoiceS3Model`.
        taste_sizes: of the parts of `taste_novq` and `taste`; None: the paper's.
        whisper_dir: Whisper in transformers' format, whose decoder the aggregator may start from; None:
            `<model_dir>/whisper`.
        freeze_aggregator_bottom: the embeddings and the first layer of an aggregator from Whisper do not learn, as in
            the published first stage (taste.yaml @ 301bce2).

    Returns:
        the model, its new modules drawn from torch's global random generator, but for an aggregator from Whisper.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: the variant is unknown, needs Whisper features and there are none, a size does not fit, or an
            aggregator that is not from Whisper should be frozen.
    """
    if variant not in PARTS:
        raise ValueError(f"VARIANT is {variant!r}; expected one of {', '.join(VARIANTS)}")
    if speech_width is None:
        if PARTS[variant]:
            raise ValueError(f"variant {variant!r} needs Whisper features, and there are none")
        speech_width = 0  # nobody looks at it
    llm = load_part(model_dir, "llm")
    text_width, llm_width = llm.text_embedding.embedding_dim, llm.llm_input_size
    parts: Parts = {}
    if variant == "simple":
        parts = {"aggregator": SimpleTextSpeechAggregator(text_width, speech_width)}
    elif PARTS[variant]:
        parts = taste_parts(variant, text_width, speech_width, llm_width, taste_sizes or TasteSizes())
        if taste_sizes and taste_sizes.aggregator_from_whisper:
            folder = Path(whisper_dir) if whisper_dir else ModelDir(model_dir).file("whisper")
            parts["aggregator"] = aggregator_from_whisper(folder, llm.text_embedding, speech_width, taste_sizes)
        if freeze_aggregator_bottom:
            _freeze_bottom(cast(TasteAggregator, parts["aggregator"]))
    return CosyVoiceS3Model(
        llm, **parts, variant=variant, freeze_llm=freeze_llm, use_speaker=use_speaker, lora_rank=lora_rank
    )


def build_together(
    llm: TransformerLM, variants: Sequence[str], *, speech_width: int, taste_sizes: TasteSizes
) -> dict[str, CosyVoiceS3Model]:
    """Put the parts of several variants beside one language model that they share, all of which learns.

    `taste_novq` and `taste` share aggregator, audio branch and fusion as well.

    Args:
        llm: the language model; its `requires_grad` flags are set here: only `text_embedding` stays as it is.
        variants: some of `VARIANTS`.
        speech_width: channels of the Whisper features.
        taste_sizes: of the parts of `taste_novq` and `taste`; an aggregator from Whisper is not to be had.

    Returns:
        the models by variant, their own parts drawn from torch's global random generator.

    Raises:
        ValueError: a variant is unknown, or a size does not fit.
    """
    text_width = llm.text_embedding.embedding_dim
    parts = taste_parts("taste", text_width, speech_width, llm.llm_input_size, taste_sizes)
    models = {}
    for variant in variants:
        if variant == "simple":
            own: Parts = {"aggregator": SimpleTextSpeechAggregator(text_width, speech_width)}
        else:
            own = cast(Parts, {name: part for name, part in parts.items() if name in PARTS.get(variant, ())})
        models[variant] = CosyVoiceS3Model(llm, **own, variant=variant)
    llm.requires_grad_(True)  # each variant has switched off what has no work in it
    llm.text_embedding.requires_grad_(False)
    return models


def aggregator_from_whisper(
    folder: Path, text_embedding: nn.Embedding, speech_width: int, taste_sizes: TasteSizes
) -> TasteAggregator:
    """An aggregator with the sizes and the weights of a Whisper's decoder, but for its number of layers.

    Its prefix asks for English, as published, whatever is spoken.

    Args:
        folder: Whisper in transformers' format.
        text_embedding: the language model's; the aggregator has its own, which must know the same tokens.
        speech_width: channels of the Whisper features.
        taste_sizes: the number of layers.

    Returns:
        the aggregator.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: its decoder does not fit, knows fewer tokens, or is not there.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"AGGREGATOR_FROM_WHISPER: there is no {path}; name a Whisper folder with WHISPER_DIR")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["vocab_size"] < text_embedding.num_embeddings:
        raise ValueError(
            f"AGGREGATOR_FROM_WHISPER: the Whisper in {folder} knows {config['vocab_size']} tokens, the text has "
            f"{text_embedding.num_embeddings}; use the Whisper that shares CosyVoice's tokens (large-v3), or False"
        )
    aggregator = TasteAggregator(
        text_embedding.embedding_dim,
        speech_width,
        layers=taste_sizes.aggregator_layers,
        heads=config["decoder_attention_heads"],
        feed_forward=config["decoder_ffn_dim"],
        vocabulary=config["vocab_size"],
        max_positions=config["max_target_positions"],
    )
    start_from_whisper(aggregator, folder)
    return aggregator


def _freeze_bottom(aggregator: TasteAggregator) -> None:
    """Let only what lies above the first layer learn."""
    if aggregator.embed_tokens is None:
        raise ValueError(
            "FREEZE_AGGREGATOR_BOTTOM leaves Whisper's embeddings and first layer as they are, and this aggregator has "
            "none of Whisper's: set AGGREGATOR_FROM_WHISPER = True, or FREEZE_AGGREGATOR_BOTTOM = False"
        )
    for part in (aggregator.embed_tokens, aggregator.embed_positions, aggregator.layers[0]):
        part.requires_grad_(False)


def taste_parts(variant: str, text_width: int, speech_width: int, llm_width: int, taste_sizes: TasteSizes) -> Parts:
    """What `taste_novq` and `taste` have beside the language model.

    Args:
        variant: one of the two.
        text_width: channels of the text embeddings.
        speech_width: channels of the Whisper features.
        llm_width: channels that the language model reads.
        taste_sizes: everything else.

    Returns:
        the modules.

    Raises:
        ValueError: a size does not fit another one.
    """
    given = taste_sizes
    parts: Parts = {
        "aggregator": TasteAggregator(
            text_width, speech_width, layers=given.aggregator_layers, heads=given.aggregator_heads
        ),
        "audio_branch": AudioBranch(
            speech_width,
            text_width,
            llm_width,
            blocks=given.audio_layers,
            heads=given.audio_heads,
            linear_units=given.audio_ffn_dim,
            dropout=given.audio_dropout,
        ),
        "fusion": build_fusion(given.fusion, width=llm_width, start=given.fusion_init),
    }
    if "quantizer" in PARTS[variant]:
        parts["quantizer"] = WordQuantizer(
            speech_width,
            codebook_dim=given.codebook_dim,
            levels=given.num_quantizers,
            codes=given.codebook_size,
            quantize_dropout=given.quantize_dropout,
        )
    return parts

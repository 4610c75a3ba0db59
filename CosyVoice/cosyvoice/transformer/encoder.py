"""The encoders: a stack of layers over relative positions, run on whole sequences or step by step.

# B batch  L frames given  K frames looked at  H heads  W head width  D channels
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cosyvoice.transformer.attention import RelPositionMultiHeadedAttention
from cosyvoice.transformer.decoding import DecodingCache, KeysValues, end_together, start_together
from cosyvoice.transformer.embedding import LinearInput
from cosyvoice.transformer.encoder_layer import (
    ConformerEncoderLayer,
    EncoderLayer,
    PositionwiseFeedForward,
    TransformerEncoderLayer,
)
from cosyvoice.transformer.options import (
    ACTIVATIONS,
    CAUSAL,
    FULL_CONTEXT,
    PUBLISHED_LAYER_NORM_EPS,
    refuse_unsupported,
)
from cosyvoice.utils.mask import causal_mask, make_pad_mask


class BaseEncoder(nn.Module):
    """What both encoders share; their constructors differ only in the published defaults.

    Args:
        options: every argument of the subclass's constructor by its published name.

    Source: FunAudioLLM/CosyVoice cosyvoice/transformer/encoder.py @ ace7c47.
    """

    LAYER_CLASS: ClassVar[type[EncoderLayer]]

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        refuse_unsupported(type(self).__name__, options)
        width, dropout_rate = options["output_size"], options["dropout_rate"]
        activation = ACTIVATIONS[options["activation_type"]]
        self.static_chunk_size = options["static_chunk_size"]
        self.gradient_checkpointing = options["gradient_checkpointing"]
        self.embed = LinearInput(
            options["input_size"],
            width,
            dropout_rate,
            options["positional_dropout_rate"],
            relu=options["input_layer"] == "linear_legacy",
        )
        layers = [
            self.LAYER_CLASS(
                RelPositionMultiHeadedAttention(options["attention_heads"], width, options["attention_dropout_rate"]),
                PositionwiseFeedForward(width, options["linear_units"], dropout_rate, activation()),
                width,
                dropout_rate,
                options["layer_norm_eps"],
            )
            for _ in range(options["num_blocks"])
        ]
        self.encoders = cast(Sequence[EncoderLayer], nn.ModuleList(layers))
        self.after_norm = nn.LayerNorm(width, eps=1e-5)

    def output_size(self) -> int:
        """Width of the output, D."""
        return self.after_norm.normalized_shape[0]

    def forward(
        self, xs: Tensor, xs_lens: Tensor, decoding_chunk_size: int = 0, num_decoding_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """Encode a right-padded batch.

        Args:
            xs: [B, L, input_size].
            xs_lens: valid frames of each row, [B], integer.
            decoding_chunk_size: without effect, as in the published code where chunks are static.
            num_decoding_left_chunks: without effect, likewise.

        Returns:
            The output [B, L, D], unspecified at padding, and a bool mask [B, 1, L], True where valid.
        """
        frames = xs.size(1)
        valid = ~make_pad_mask(xs_lens.to(xs.device), frames).unsqueeze(1)
        visible = valid & causal_mask(frames, xs.device) if self.static_chunk_size == CAUSAL else valid
        visible = visible | ~visible.any(dim=-1, keepdim=True)  # an empty row sees its padding: nothing would be nan

        # Distances that the mask hides anyway are left out, but for one that align_distances asks for.
        furthest_ahead = min(1, frames - 1) if self.static_chunk_size == CAUSAL else frames - 1
        x = self.embed(xs)
        distances = self.embed.pos_enc.distances(frames - 1, -furthest_ahead, like=x)
        distances = self.embed.pos_enc.dropout(distances)
        for layer in self.encoders:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, distances, visible, use_reentrant=False).output
            else:
                x = layer(x, distances, visible).output
        return self.after_norm(x), valid

    def forward_chunk(
        self,
        xs: Tensor,
        offset: int,
        required_cache_size: int,
        att_cache: Tensor | None = None,
        cnn_cache: Tensor | None = None,
        att_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the next frames of one sequence against a cache that grows; `step` is faster and takes batches.

        The distances come from `offset`, not from the cache, as published. Callers that leave `offset` at 0 while
        they give single frames therefore get the position term of distance 0 for every key.

        Args:
            xs: [1, L, input_size].
            offset: frames before these, normally the number in the cache.
            required_cache_size: frames to return in the cache: < 0 all, else this many of the last ones.
            att_cache: keys beside values of the frames before, [layers, H, K - L, 2 * W]; None or empty at the start.
            cnn_cache: without effect: the supported layers have no convolution.
            att_mask: bool [1, L, K] or broadcastable, True where a frame may look; None or empty: everywhere.

        Returns:
            The output [1, L, D], the next `att_cache`, and an empty `cnn_cache`.

        Raises:
            ValueError: more than one row, or an offset that does not match the cache.
        """
        if xs.size(0) != 1:
            raise ValueError(f"forward_chunk takes one sequence, got {xs.size(0)}; use new_cache and step for a batch")
        frames = xs.size(1)
        before = att_cache if att_cache is not None and att_cache.size(0) > 0 else None
        keys = frames + (0 if before is None else before.size(2))
        positioned = offset + frames
        if positioned not in (keys, 1):
            raise ValueError(
                f"offset {offset} does not match the {keys - frames} frames in att_cache; "
                "keep the whole cache (required_cache_size=-1) and add the length of every chunk to offset"
            )
        visible = att_mask[..., :keys] if att_mask is not None and att_mask.numel() > 0 else None

        x = self.embed(xs)
        distances = self.embed.pos_enc.distances(positioned - 1, 1 - frames, like=x)
        kept_from = 0 if required_cache_size < 0 else max(keys - required_cache_size, 0)
        kept = []
        for index, layer in enumerate(self.encoders):
            past = None if before is None else KeysValues(*before[index : index + 1].chunk(2, dim=-1))
            x, present = layer(x, distances, visible, past)
            kept.append(torch.cat(present, dim=-1)[:, :, kept_from:])
        return self.after_norm(x), torch.cat(kept), xs.new_zeros(len(self.encoders), 0, 0, 0)

    def new_cache(
        self,
        batch_size: int,
        max_frames: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DecodingCache:
        """Allocate the state of `step`.

        Args:
            batch_size: B.
            max_frames: frames of the longest prefix, and those to come after it.
            device: None: where the weights are.
            dtype: None: autocast's where it is on, else the weights'.

        Returns:
            An empty cache.

        Raises:
            ValueError: a size is < 1, or the encoder is not causal.
        """
        if self.static_chunk_size != CAUSAL:
            raise ValueError(
                f"step-by-step decoding needs an encoder with static_chunk_size={CAUSAL}, "
                f"got {self.static_chunk_size}: a frame that sees later ones cannot be computed before them"
            )
        weight = self.after_norm.weight
        device = weight.device if device is None else torch.device(device)
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        attention = self.encoders[0].self_attn
        return DecodingCache(
            len(self.encoders), batch_size, attention.heads, attention.head_width, max_frames, device, dtype
        )

    @torch.no_grad()
    def step(self, xs: Tensor, cache: DecodingCache, lengths: Tensor | None = None) -> Tensor:
        """Encode the next frames of every row; equal to the full forward over all frames so far.

        Args:
            xs: [B, L, input_size]: the prefixes at first, then usually one frame a row.
            cache: made by `new_cache`; the new frames are added to it.
            lengths: valid frames of each row of right-padded prefixes, [B], integer, >= 1; first call only.

        Returns:
            [B, L, D], zero at padding. The last valid frame of row b stands at lengths[b] - 1.

        Raises:
            ValueError: another number of rows, no place left, or `lengths` that are out of range or come late.
        """
        batch, frames = xs.shape[:2]
        _check_step(batch, frames, cache, lengths)
        if lengths is not None:
            lengths = lengths.to(device=xs.device, dtype=torch.int64)
            xs = end_together(xs, lengths)
            cache.left_padding.copy_(frames - lengths)
            cache.ragged = bool(cache.left_padding.any())

        missing = cache.missing_distances(frames)
        if missing is not None:
            sinusoids = self.embed.pos_enc.distances(*missing, like=self.after_norm.weight)
            cache.store_positions(layer.self_attn.project_distances(sinusoids) for layer in self.encoders)

        visible = cache.visible(frames)
        x = self.embed(xs)
        for index, layer in enumerate(self.encoders):
            x = layer.step(x, cache.window(index, frames), visible)
        cache.filled += frames
        x = self.after_norm(x)
        return x if lengths is None else start_together(x, lengths)


class TransformerEncoder(BaseEncoder):
    """The encoder of the language model.

    The defaults are the published ones even where we refuse them: leaving an option out never silently builds
    something else than it did there.

    Args:
        input_size: channels of the input.
        output_size: D.
        attention_heads: H.
        linear_units: width of the feed-forward networks.
        num_blocks: number of layers.
        dropout_rate: dropout after the input layer, and on what attention and feed-forward networks add.
        positional_dropout_rate: dropout on the scaled input and on the distances.
        attention_dropout_rate: dropout on the attention weights.
        input_layer: `linear`, or `linear_legacy`, which ends with a ReLU.
        pos_enc_layer_type: `rel_pos_espnet`.
        normalize_before: True.
        static_chunk_size: 0: every frame sees all frames; 1: itself and those before.
        use_dynamic_chunk: False.
        global_cmvn: None.
        use_dynamic_left_chunk: False.
        key_bias: True.
        selfattention_layer_type: `rel_selfattn`.
        activation_type: `relu` or `swish`.
        gradient_checkpointing: in training, compute every layer again in the backward pass to save memory.
        layer_norm_eps: eps of the LayerNorms inside the layers; not a published option (TASTE's copy has 1e-5).

    Raises:
        ValueError: an option has a value that is not named here (all such options are listed).
    """

    LAYER_CLASS = TransformerEncoderLayer

    def __init__(
        self,
        input_size: int,
        output_size: int = 256,
        attention_heads: int = 4,
        linear_units: int = 2048,
        num_blocks: int = 6,
        dropout_rate: float = 0.1,
        positional_dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.0,
        input_layer: str = "conv2d",
        pos_enc_layer_type: str = "abs_pos",
        normalize_before: bool = True,
        static_chunk_size: int = FULL_CONTEXT,
        use_dynamic_chunk: bool = False,
        global_cmvn: nn.Module | None = None,
        use_dynamic_left_chunk: bool = False,
        key_bias: bool = True,
        selfattention_layer_type: str = "selfattn",
        activation_type: str = "relu",
        gradient_checkpointing: bool = False,
        *,
        layer_norm_eps: float = PUBLISHED_LAYER_NORM_EPS,
    ) -> None:
        super().__init__(_arguments(locals()))  # first line: nothing but the arguments is local yet


class ConformerEncoder(BaseEncoder):
    """The encoder of the text and of the flow: a conformer without its convolutions.

    It takes the arguments of `TransformerEncoder`, with published defaults of its own, and these:

    Args:
        positionwise_conv_kernel_size: 1.
        macaron_style: False.
        selfattention_layer_type: `rel_selfattn`.
        activation_type: `relu` or `swish`.
        use_cnn_module: False.
        cnn_module_kernel: without effect as there is no convolution.
        causal: without effect, likewise.
        cnn_module_norm: without effect, likewise.

    Raises:
        ValueError: an option has a value that is not named here (all such options are listed).
    """

    LAYER_CLASS = ConformerEncoderLayer

    def __init__(
        self,
        input_size: int,
        output_size: int = 256,
        attention_heads: int = 4,
        linear_units: int = 2048,
        num_blocks: int = 6,
        dropout_rate: float = 0.1,
        positional_dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.0,
        input_layer: str = "conv2d",
        pos_enc_layer_type: str = "rel_pos",
        normalize_before: bool = True,
        static_chunk_size: int = FULL_CONTEXT,
        use_dynamic_chunk: bool = False,
        global_cmvn: nn.Module | None = None,
        use_dynamic_left_chunk: bool = False,
        positionwise_conv_kernel_size: int = 1,
        macaron_style: bool = True,
        selfattention_layer_type: str = "rel_selfattn",
        activation_type: str = "swish",
        use_cnn_module: bool = True,
        cnn_module_kernel: int = 15,
        causal: bool = False,
        cnn_module_norm: str = "batch_norm",
        key_bias: bool = True,
        gradient_checkpointing: bool = False,
        *,
        layer_norm_eps: float = PUBLISHED_LAYER_NORM_EPS,
    ) -> None:
        super().__init__(_arguments(locals()))  # as above


def _arguments(constructor_locals: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in constructor_locals.items() if name not in ("self", "__class__")}


def _check_step(batch: int, frames: int, cache: DecodingCache, lengths: Tensor | None) -> None:
    if batch != cache.batch_size:
        raise ValueError(
            f"the cache holds {cache.batch_size} rows, got {batch}; call cache.keep_rows or make a new one"
        )
    if cache.filled + frames > cache.max_frames:
        raise ValueError(
            f"the cache has place for {cache.max_frames} frames and holds {cache.filled}; {frames} more do not fit; "
            "call new_cache with a larger max_frames"
        )
    if lengths is None:
        return
    if cache.filled > 0:
        raise ValueError("lengths belong to the first step of a cache; afterwards every row gets the same frames")
    if lengths.shape != (batch,) or int(lengths.min()) < 1 or int(lengths.max()) > frames:
        raise ValueError(f"lengths must be {batch} numbers in 1 .. {frames}, got {lengths.tolist()}")

"""A Whisper decoder without output layer, which finds in a recording how each text token is spoken."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taste.lengths import valid_mask
from taste.whisper_encoder import encoder_weight_files

# B batch   T text tokens   P prefix tokens   L = P + T positions   A Whisper frames, 50 Hz   H heads   D channels

# <|startoftranscript|> <|en|> <|transcribe|> <|notimestamps|> of Whisper-large-v3: English, whatever is spoken
WHISPER_PREFIX = (50258, 50259, 50360, 50364)
MAX_TEXT_TOKENS = 448  # positions of every published Whisper decoder
LONGEST_WAVELENGTH = 10_000.0  # of the sinusoids that the positions start as, over 2 pi, in tokens


class MultiHeadAttention(nn.Module):
    """Attention whose keys and values may come from different sources; names as in transformers' Whisper.

    Args:
        width: D, a multiple of `heads`.
        heads: H.

    Raises:
        ValueError: D cannot be split among the heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the width {width} cannot be split among {heads} attention heads")
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Mix the values where the keys match.

        Args:
            x: what looks, [B, L, D].
            keys: what is compared with, [B, A, D].
            values: what is mixed, [B, A, D].
            visible: [B, 1, 1, A], bool, True where one may look; None: everywhere.
            causal: position i looks at the first i + 1 places only; not together with `visible`.

        Returns:
            [B, L, D].
        """
        queries, keys, values = (
            self._by_head(project(inputs))
            for project, inputs in ((self.q_proj, x), (self.k_proj, keys), (self.v_proj, values))
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, keys: Tensor, visible: Tensor | None = None) -> Tensor:
        """The weights that `forward` mixes the values with, and never writes down.

        Args:
            x: as for `forward`.
            keys: as for `forward`.
            visible: as for `forward`.

        Returns:
            [B, H, L, A], each position's sum to 1.
        """
        queries, keys = self._by_head(self.q_proj(x)), self._by_head(self.k_proj(keys))
        scores = queries @ keys.mT / queries.shape[-1] ** 0.5
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        return scores.softmax(dim=-1)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, L, D / H]


class DecoderLayer(nn.Module):
    """Self-attention over the text so far, attention to the recording, feed-forward; each added to its input.

    Args:
        width: D.
        heads: H.
        feed_forward: width between the two linear layers at the end.
    """

    def __init__(self, width: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = MultiHeadAttention(width, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, feed_forward)
        self.fc2 = nn.Linear(feed_forward, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, final: Tensor, mid: Tensor, visible: Tensor | None) -> Tensor:
        """Run the layer.

        Args:
            x: [B, L, D].
            final: what keys are made of, [B, A, D].
            mid: what values are made of, [B, A, D].
            visible: [B, 1, 1, A], bool, True at frames that may be looked at; None: all.

        Returns:
            [B, L, D].
        """
        x = self._read_text(x)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), final, mid, visible)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))

    def attention(self, x: Tensor, final: Tensor, visible: Tensor | None) -> Tensor:
        """Where in the recording the layer looks.

        Args:
            x: as for `forward`.
            final: as for `forward`.
            visible: as for `forward`.

        Returns:
            [B, H, L, A].
        """
        return self.encoder_attn.weights(self.encoder_attn_layer_norm(self._read_text(x)), final, visible)

    def _read_text(self, x: Tensor) -> Tensor:
        normed = self.self_attn_layer_norm(x)
        return x + self.self_attn(normed, normed, normed, causal=True)


class TasteAggregator(nn.Module):
    """Gathers for each text token what the recording says about it.

    The keys come from Whisper's last layer (which knows what was said), the values from a middle one (which still
    knows how). Self-attention is causal, as in Whisper: a token's vector depends on no later token and no padding.

    The text is either given as embeddings, which `text_proj` brings to the speech's width, or as tokens, which have
    their own embedding here. The latter is what Whisper and the published model do: the tokens stand behind a prefix,
    whose outputs are dropped again. The prefix names English for all texts, as published.

    Args:
        text_width: channels of the text embeddings; without effect where there is a vocabulary.
        speech_width: D, channels of the Whisper features, and of everything inside.
        layers: number of decoder layers.
        heads: attention heads; they divide D.
        feed_forward: width of the feed-forward networks; None: 4 D.
        vocabulary: number of text tokens that can be embedded; None: the text is given as embeddings.
        max_positions: tokens of the longest text, prefix included.
        mask_padding: look only at the frames of the recording. The published code (False) looks at the silence that
            Whisper's window is filled up with as well, so its vectors change with what stands there; released weights
            were trained that way.
        identity_values: start the values' projections as identity, so that the middle layer arrives unchanged.
        prefix_tokens: stand before the text where there is a vocabulary.

    Raises:
        ValueError: D cannot be split among the heads, or is odd.

    Source: arXiv 2504.07053, section 3.1; taste_speech/modules_taste/audio_joint_encoder_segmenter.py @ 301bce2.
    """

    def __init__(
        self,
        text_width: int,
        speech_width: int,
        *,
        layers: int = 2,
        heads: int = 4,
        feed_forward: int | None = None,
        vocabulary: int | None = None,
        max_positions: int = MAX_TEXT_TOKENS,
        mask_padding: bool = True,
        identity_values: bool = True,
        prefix_tokens: Sequence[int] = WHISPER_PREFIX,
    ) -> None:
        super().__init__()
        self.text_width = text_width
        self.speech_width = speech_width
        self.mask_padding = mask_padding
        self.prefix_tokens = () if vocabulary is None else tuple(prefix_tokens)
        self.embed_tokens = None if vocabulary is None else nn.Embedding(vocabulary, speech_width)
        self.text_proj = nn.Linear(text_width, speech_width) if vocabulary is None else None
        self.embed_positions = nn.Embedding(max_positions, speech_width)
        with torch.no_grad():  # neighbours begin alike, which random vectors would have to learn
            self.embed_positions.weight.copy_(_sinusoids(max_positions, speech_width))
        feed_forward = 4 * speech_width if feed_forward is None else feed_forward
        decoder_layers = [DecoderLayer(speech_width, heads, feed_forward) for _ in range(layers)]
        self.layers = cast(Sequence[DecoderLayer], nn.ModuleList(decoder_layers))
        self.layer_norm = nn.LayerNorm(speech_width)
        if identity_values:
            self.reset_values()

    @torch.no_grad()
    def reset_values(self) -> None:
        """Make the values' projections in the attention to the recording identities."""
        for layer in self.layers:
            nn.init.eye_(layer.encoder_attn.v_proj.weight)
            nn.init.zeros_(layer.encoder_attn.v_proj.bias)

    def forward(
        self,
        text: Tensor | None,
        final: Tensor,
        mid: Tensor,
        text_lengths: Tensor,
        speech_lengths: Tensor,
        text_tokens: Tensor | None = None,
    ) -> Tensor:
        """Gather what the recording says about each text token.

        Args:
            text: text embeddings, [B, T, text_width], float; not looked at where there is a vocabulary.
            final: Whisper's features after its last LayerNorm, [B, A, D], float.
            mid: Whisper's features of a middle layer, [B, A, D], float.
            text_lengths: tokens of each row, [B], int64; without effect, as no token looks ahead.
            speech_lengths: real frames of each recording, [B], int64, 1..A.
            text_tokens: tokens, [B, T], int64; needed where there is a vocabulary.

        Returns:
            one vector a text token, [B, T, D]; a padded token's vector means nothing.

        Raises:
            ValueError: the features have another width, the text is missing or longer than there are positions.
        """
        hidden = self._embed(text, text_tokens)
        visible = self._visible(final, mid, speech_lengths)
        for layer in self.layers:
            hidden = layer(hidden, final, mid, visible)
        return self.layer_norm(hidden)[:, len(self.prefix_tokens) :]

    def attention(
        self,
        text: Tensor | None,
        final: Tensor,
        mid: Tensor,
        text_lengths: Tensor,
        speech_lengths: Tensor,
        text_tokens: Tensor | None = None,
        layer: int = -1,
        by_head: bool = False,
    ) -> Tensor:
        """Where each text token looks: the weights that `forward` uses without ever writing them down.

        Args:
            text: as for `forward`.
            final: as for `forward`.
            mid: as for `forward`.
            text_lengths: as for `forward`.
            speech_lengths: as for `forward`.
            text_tokens: as for `forward`.
            layer: number of the layer, from 0; negative numbers count from the last.
            by_head: do not average over the heads.

        Returns:
            [B, T, A], or [B, H, T, A] by head, each token's sum to 1; zero behind a recording's end where padding is
            masked.

        Raises:
            ValueError: as for `forward`.
        """
        hidden = self._embed(text, text_tokens)
        visible = self._visible(final, mid, speech_lengths)
        for before in self.layers[: layer % len(self.layers)]:
            hidden = before(hidden, final, mid, visible)
        weights = self.layers[layer].attention(hidden, final, visible)[:, :, len(self.prefix_tokens) :]
        return weights if by_head else weights.mean(dim=1)

    def _embed(self, text: Tensor | None, text_tokens: Tensor | None) -> Tensor:
        """The text with its positions, [B, L, D]."""
        if self.embed_tokens is not None:
            if text_tokens is None:
                raise ValueError("an aggregator with a vocabulary of its own needs text_tokens")
            prefix = text_tokens.new_tensor(self.prefix_tokens).expand(len(text_tokens), -1)
            embedded = self.embed_tokens(torch.cat([prefix, text_tokens], dim=1))
        else:
            if text is None or text.shape[-1] != self.text_width:
                got = "none" if text is None else f"{text.shape[-1]} wide"
                raise ValueError(f"expected text embeddings that are {self.text_width} wide, got {got}")
            assert self.text_proj is not None
            embedded = self.text_proj(text)
        positions = self.embed_positions.weight
        if embedded.shape[1] > len(positions):
            raise ValueError(
                f"the text has {embedded.shape[1]} tokens (prefix included), the aggregator has {len(positions)} "
                "positions; split the utterance, or train with a larger max_positions"
            )
        return embedded + positions[: embedded.shape[1]]

    def _visible(self, final: Tensor, mid: Tensor, speech_lengths: Tensor) -> Tensor | None:
        """The frames that may be looked at, [B, 1, 1, A]; None: all."""
        for name, features in (("final", final), ("mid", mid)):
            if features.shape[-1] != self.speech_width:
                raise ValueError(
                    f"the {name} Whisper features are {features.shape[-1]} wide, the aggregator was built for "
                    f"{self.speech_width}; use features of the Whisper model it was trained with"
                )
        if not self.mask_padding:
            return None
        real = valid_mask(speech_lengths, final.shape[1])
        real = real | ~real.any(dim=1, keepdim=True)  # a recording without frames sees its padding: nothing is nan
        return real[:, None, None, :]


def start_from_whisper(aggregator: TasteAggregator, whisper_dir: str | os.PathLike[str]) -> list[str]:
    """Copy the weights of a Whisper's own decoder, where the folder has them and they fit.

    Of a deeper decoder, layers at even distances are taken, the first and the last among them. Distil-whisper begins so
    too, and is then trained to write as the whole decoder does; here the layers have yet to learn to follow each other.
    A trained decoder of two layers, for English, is that of distil-large-v3. The values' projections become identities
    again: they read another layer than Whisper's did.

    Args:
        aggregator: takes the weights.
        whisper_dir: a Whisper in transformers' format.

    Returns:
        names of the weights that were copied: all but `text_proj`, and without `embed_tokens` where there is none.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: the folder has no decoder, one of other sizes, or fewer layers (all differences are listed).
    """
    folder = Path(whisper_dir)
    files = encoder_weight_files(folder)
    heads = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("decoder_attention_heads")
    theirs = _read_decoder(files)
    depth = 1 + max((int(name.split(".")[1]) for name in theirs if name.startswith("layers.")), default=-1)
    wanted = len(aggregator.layers)
    problems = [] if depth >= wanted else [f"{depth} decoder layers, wanted at least {wanted}"]
    if heads != aggregator.layers[0].self_attn.heads:
        problems.append(f"{heads} attention heads, wanted {aggregator.layers[0].self_attn.heads}")
    copied = {}
    for name, own in aggregator.state_dict().items():
        if name.startswith("text_proj."):
            continue
        value = theirs.get(_name_in_deeper(name, wanted, max(depth, 1)))
        if name == "embed_positions.weight" and value is not None:
            value = value[: len(own)]
        if value is None or value.shape != own.shape:
            got = "missing" if value is None else str(list(value.shape))
            problems.append(f"{name} is {got}, wanted {list(own.shape)}")
        else:
            copied[name] = value
    if problems:
        raise ValueError(
            f"the decoder of the Whisper in {folder} does not fit the aggregator: {'; '.join(problems)}. "
            "Choose the aggregator's layers and heads to fit, or start it from random weights"
        )
    aggregator.load_state_dict(aggregator.state_dict() | copied)
    aggregator.reset_values()
    return sorted(copied)


def _read_decoder(files: Sequence[Path]) -> dict[str, Tensor]:
    """The decoder's tensors by their names inside it, float32."""
    from safetensors import safe_open

    weights = {}
    for path in files:
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():
                name = key.removeprefix("model.")
                if name.startswith("decoder."):
                    weights[name.removeprefix("decoder.")] = file.get_tensor(key).float()
    return weights


def _name_in_deeper(name: str, layers: int, depth: int) -> str:
    """The name of a weight in a decoder of `depth` layers, of which `layers` are taken at even distances."""
    kind, _, rest = name.partition(".")
    if kind != "layers":
        return name
    number, _, rest = rest.partition(".")
    taken = round(int(number) * (depth - 1) / max(layers - 1, 1))
    return f"layers.{taken}.{rest}"


def _sinusoids(positions: int, width: int) -> Tensor:
    """[positions, width], sines beside cosines."""
    if width % 2:
        raise ValueError(f"the width must be even to hold pairs of sine and cosine, got {width}")
    channel = torch.arange(width // 2)
    angle = torch.arange(positions)[:, None] * LONGEST_WAVELENGTH ** (-2 * channel / width)
    return torch.cat([angle.sin(), angle.cos()], dim=1)

"""One layer of an encoder: self-attention, then a feed-forward network, each added to its input.

# B batch  L frames  K frames looked at  P distances  D channels
"""

from typing import ClassVar

from torch import Tensor, nn

from cosyvoice.transformer.attention import Attended, RelPositionMultiHeadedAttention
from cosyvoice.transformer.decoding import KeysValues, LayerWindow


class PositionwiseFeedForward(nn.Module):
    """Two linear layers around an activation, the same at every frame.

    Args:
        idim: D.
        hidden_units: width between the two layers.
        dropout_rate: dropout after the activation.
        activation: the activation.

    Source: FunAudioLLM/CosyVoice cosyvoice/transformer/positionwise_feed_forward.py @ ace7c47.
    """

    def __init__(self, idim: int, hidden_units: int, dropout_rate: float, activation: nn.Module) -> None:
        super().__init__()
        self.w_1 = nn.Linear(idim, hidden_units)
        self.w_2 = nn.Linear(hidden_units, idim)
        self.activation = activation
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, xs: Tensor) -> Tensor:
        """Map every frame.

        Args:
            xs: [B, L, D].

        Returns:
            [B, L, D].
        """
        return self.w_2(self.dropout(self.activation(self.w_1(xs))))


class EncoderLayer(nn.Module):
    """A layer that normalises the input of each of its two parts; a subclass says what checkpoints call the norms.

    Args:
        self_attn: the attention.
        feed_forward: the feed-forward network.
        size: D.
        dropout_rate: dropout on what either part adds.
        norm_eps: eps of the two LayerNorms.

    Source: FunAudioLLM/CosyVoice cosyvoice/transformer/encoder_layer.py @ ace7c47.
    """

    NORM_NAMES: ClassVar[tuple[str, str]]  # before the attention, before the feed-forward network

    def __init__(
        self,
        self_attn: RelPositionMultiHeadedAttention,
        feed_forward: PositionwiseFeedForward,
        size: int,
        dropout_rate: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.feed_forward = feed_forward
        for name in self.NORM_NAMES:
            self.register_module(name, nn.LayerNorm(size, eps=norm_eps))
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, distances: Tensor, visible: Tensor | None, past: KeysValues | None = None) -> Attended:
        """Run the layer; see `RelPositionMultiHeadedAttention.forward`.

        Args:
            x: [B, L, D].
            distances: sinusoids of the distances, [P, D].
            visible: bool, [B or 1, L or 1, K or 1], True where a frame may look; None: everywhere.
            past: those of the K - L frames before.

        Returns:
            The layer's output, and the keys and values of all K frames.
        """
        attended = self.self_attn(self._norm(0, x), distances, visible, past)
        return attended._replace(output=self._feed_forward(x + self.dropout(attended.output)))

    def step(self, x: Tensor, window: LayerWindow, visible: Tensor | None) -> Tensor:
        """Run the layer on new frames against the cache, and add them to it.

        Args:
            x: [B, L, D].
            window: this layer's part of the cache.
            visible: bool, [B or 1, L, K], True where a frame may look; None: everywhere.

        Returns:
            [B, L, D].
        """
        return self._feed_forward(x + self.dropout(self.self_attn.step(self._norm(0, x), window, visible)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.feed_forward(self._norm(1, x)))

    def _norm(self, part: int, x: Tensor) -> Tensor:
        return getattr(self, self.NORM_NAMES[part])(x)


class TransformerEncoderLayer(EncoderLayer):
    """The layer of the language model."""

    NORM_NAMES = ("norm1", "norm2")


class ConformerEncoderLayer(EncoderLayer):
    """The layer of the text and flow encoders: a conformer's, without convolution or second feed-forward network."""

    NORM_NAMES = ("norm_mha", "norm_ff")

"""Multi-head attention whose scores also depend on how far apart two frames are.

# B batch  L looking frames (queries)  K frames looked at (keys)  P distances  H heads  W head width  D = H * W channels
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.transformer.decoding import KeysValues, LayerWindow


class Attended(NamedTuple):
    """Attention over some frames, with the state that the frames after them need."""

    output: Tensor  # [B, L, D]
    present: KeysValues


def align_distances(scores: Tensor, keys: int) -> Tensor:
    """Turn scores by distance into scores by key.

    The queries are the last L of K consecutive frames. Query i stands L - 1 - i frames before the last one, so the
    distance to key j lies that many columns further right: result[i, j] = scores[i, j + L - 1 - i]. Reading the
    rows as one long line, one column narrower than they were, gives just that, without a copy.

    Args:
        scores: [B, H, L, P]; columns are the distances K - 1, K - 2, ... falling by one. More than K columns are
            needed unless L is 1; those of distances that no query is allowed to use may be left out.
        keys: K.

    Returns:
        [B, H, L, K], a view.
    """
    queries, columns = scores.shape[-2:]
    if queries == 1:
        return scores[..., :keys]
    assert columns > keys, f"{columns} distances cannot serve {queries} queries over {keys} keys"
    line = scores.flatten(-2)[..., queries - 1 : -1]
    return line.view(*line.shape[:-1], queries, columns - 1)[..., :keys]


class RelPositionMultiHeadedAttention(nn.Module):
    """Self-attention with relative positions (Transformer-XL, arXiv 1901.02860, section 3.3).

    score(i, j) = ((q_i + u) . k_j + (q_i + v) . p_(i - j)) / sqrt(W), p a projection of the distance's sinusoids.

    Args:
        n_head: H.
        n_feat: D, a multiple of H.
        dropout_rate: dropout on the attention weights.

    Raises:
        ValueError: D is not a multiple of H.

    Source: FunAudioLLM/CosyVoice cosyvoice/transformer/attention.py @ ace7c47.
    """

    def __init__(self, n_head: int, n_feat: int, dropout_rate: float) -> None:
        super().__init__()
        if n_feat % n_head:
            raise ValueError(f"the width {n_feat} cannot be split among {n_head} attention heads")
        self.heads, self.head_width = n_head, n_feat // n_head
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(n_feat, n_feat) for _ in range(4))
        self.linear_pos = nn.Linear(n_feat, n_feat, bias=False)
        self.pos_bias_u = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_head, self.head_width)))
        self.pos_bias_v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_head, self.head_width)))
        self.dropout_rate = dropout_rate

    def forward(self, x: Tensor, distances: Tensor, visible: Tensor | None, past: KeysValues | None = None) -> Attended:
        """Look at the frames of `x`, and at those before it.

        Args:
            x: normalised input, [B, L, D].
            distances: sinusoids of the distances K - 1, K - 2, ..., [P, D]; see `align_distances`.
            visible: bool, [B or 1, L or 1, K or 1], True where a query may look; None: everywhere.
            past: those of the K - L frames before.

        Returns:
            The output, and the keys and values of all K frames.
        """
        queries, present = self._project(x)
        if past is not None:
            present = KeysValues(*(torch.cat(pair, dim=2) for pair in zip(past, present, strict=True)))
        return Attended(self._attend(queries, present, self.project_distances(distances), visible), present)

    def step(self, x: Tensor, window: LayerWindow, visible: Tensor | None) -> Tensor:
        """Look at the frames of `x` and at all those in the cache, and add the former to it.

        Args:
            x: normalised input, [B, L, D].
            window: this layer's part of the cache; its last L places are filled here.
            visible: bool, [B or 1, L, K], True where a query may look; None: everywhere.

        Returns:
            [B, L, D].
        """
        queries, new = self._project(x)
        window.seen.keys[:, :, -x.size(1) :] = new.keys
        window.seen.values[:, :, -x.size(1) :] = new.values
        return self._attend(queries, window.seen, window.positions, visible)

    def project_distances(self, distances: Tensor) -> Tensor:
        """Project sinusoids of distances to what the queries are compared with.

        Args:
            distances: [P, D].

        Returns:
            [H, P, W].
        """
        return self._by_head(self.linear_pos(distances)).transpose(0, 1)

    def _project(self, x: Tensor) -> tuple[Tensor, KeysValues]:
        """Queries [B, L, H, W], and the keys and values of the same frames."""
        queries, keys, values = (self._by_head(layer(x)) for layer in (self.linear_q, self.linear_k, self.linear_v))
        return queries, KeysValues(keys.transpose(1, 2), values.transpose(1, 2))

    def _by_head(self, x: Tensor) -> Tensor:
        # Not unflatten: the rank of its result is unknown to ONNX, which then keeps the lengths it was traced with.
        return x.view(*x.shape[:-1], self.heads, self.head_width)

    def _attend(self, queries: Tensor, seen: KeysValues, positions: Tensor, visible: Tensor | None) -> Tensor:
        # Positions have no batch axis: einsum folds B into the rows of one product a head, where matmul copies them.
        by_distance = torch.einsum("blhw,hpw->bhlp", queries + self.pos_bias_v, positions)
        bias = align_distances(by_distance, seen.keys.size(2)) * self.head_width**-0.5
        if visible is not None:
            bias = bias.masked_fill(~visible.unsqueeze(1), -torch.inf)
        context = F.scaled_dot_product_attention(
            (queries + self.pos_bias_u).transpose(1, 2),
            seen.keys,
            seen.values,
            attn_mask=bias,
            dropout_p=self.dropout_rate if self.training else 0.0,
        )
        return self.linear_out(context.transpose(1, 2).flatten(2))

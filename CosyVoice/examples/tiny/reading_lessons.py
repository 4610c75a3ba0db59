"""What a language model is told, beside its published loss, about the text token and the phone of each unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from corpus_reader import PHONES
from torch import Tensor, nn

from cosyvoice.llm.llm import TransformerLM
from cosyvoice.transformer.attention import RelPositionMultiHeadedAttention, align_distances

# B batch   T text tokens   S S3 units   L = 3 + T + S positions   H heads   W head width   G guided heads

GUIDED_LAYERS = (2, 3)  # of the language model, from 0: behind them are some that use what these have found
GUIDED_HEADS = 2  # of each: the first looks at the token that is spoken next, the second at the one after it
_BEFORE_TEXT = 2  # positions: sos, speaker
_NOBODY = -1


class Lessons(NamedTuple):
    """What a batch costs, and how well it is read; 0-d each."""

    loss: Tensor  # the published one
    acc: Tensor  # share of units that are the best guess
    guide: Tensor  # cross-entropy of where the guided heads look, in nats
    found: Tensor  # share of units for which the first guided head of the last guided layer looks most at their token
    phone: Tensor  # cross-entropy of the next unit's phone, in nats
    phone_acc: Tensor  # share of these that are right


class ReadingLessons(nn.Module):
    """A language model with a phone reader, listened in to by hooks: its own forward pass is the published one.

    Args:
        llm: the language model; it becomes part of this module.

    Raises:
        ValueError: it has too few layers.
    """

    def __init__(self, llm: TransformerLM) -> None:
        super().__init__()
        if len(llm.llm.encoders) <= max(GUIDED_LAYERS):
            raise ValueError(
                f"the language model has {len(llm.llm.encoders)} layers, expected at least {max(GUIDED_LAYERS) + 1}: "
                f"those with the numbers {GUIDED_LAYERS} are shown where to look; see GUIDED_LAYERS in {__file__}"
            )
        self.llm = llm
        self.phone_reader = nn.Linear(llm.llm_decoder.in_features, len(PHONES))
        self._kept: Tensor | None = None  # which units may be seen, [B, S]
        self._scores: list[Tensor] = []  # log-weights of the guided heads, [B, G, L, L] a layer
        self._hidden: Tensor | None = None
        self._listening = False
        llm.speech_embedding.register_forward_hook(self._hide)
        llm.llm.register_forward_hook(self._keep_hidden)
        for layer in GUIDED_LAYERS:
            llm.llm.encoders[layer].self_attn.register_forward_pre_hook(self._keep_scores)

    def forward(self, batch: Mapping[str, Tensor], kept: Tensor | None = None, lessons: bool = True) -> Lessons:
        """Run the language model and its lessons.

        Args:
            batch: as for `TransformerLM.forward`, with `owner`, the text token of each unit, and `phone`, its class,
                both [B, S] int64.
            kept: units that the language model may see, [B, S], bool; None: all.
            lessons: False leaves the lessons out; their values are then 0.

        Returns:
            the losses, means over what they are of.
        """
        self._kept, self._scores, self._listening = kept, [], lessons
        out = self.llm(batch, batch["text_token"].device)
        scores, hidden = self._scores, self._hidden
        self._kept, self._scores, self._hidden = None, [], None
        nothing = out["loss"].new_zeros(())
        if not lessons:
            return Lessons(out["loss"], out["acc"], nothing, nothing, nothing, nothing)
        owners, phones = _by_position(batch, hidden.shape[1])
        return Lessons(out["loss"], out["acc"], *_guide(scores, owners, batch), *self._phone(hidden, phones))

    def _phone(self, hidden: Tensor, phones: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the phones [B, L], and the share that is right."""
        logits = self.phone_reader(hidden).float()
        loss = F.cross_entropy(logits.flatten(0, 1), phones.flatten(), ignore_index=_NOBODY)
        asked = phones != _NOBODY
        return loss, ((logits.argmax(dim=-1) == phones) & asked).sum() / asked.sum()

    def _hide(self, _module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor | None:
        return None if self._kept is None else embedded * self._kept[:, :, None]

    def _keep_hidden(self, _module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._hidden = output[0] if self._listening else None

    def _keep_scores(self, module: RelPositionMultiHeadedAttention, inputs: tuple[Any, ...]) -> None:
        if self._listening:
            x, distances, visible, *_ = inputs
            self._scores.append(log_weights(module, x, distances, visible, GUIDED_HEADS))


def log_weights(
    attention: RelPositionMultiHeadedAttention, x: Tensor, distances: Tensor, visible: Tensor | None, heads: int
) -> Tensor:
    """The logarithms of the weights of an attention's first heads, which its forward pass never writes down.

    Args:
        attention: the attention.
        x: its input, [B, L, D].
        distances: as it gets them.
        visible: as it gets it.
        heads: G.

    Returns:
        [B, G, L, L], float32.
    """

    def first(values: Tensor) -> Tensor:
        return values.view(*values.shape[:-1], attention.heads, -1)[..., :heads, :]

    queries, keys = first(attention.linear_q(x)).float(), first(attention.linear_k(x)).float()
    positions = attention.project_distances(distances)[:heads].float()
    by_key = torch.einsum("blgw,bkgw->bglk", queries + attention.pos_bias_u[:heads], keys)
    by_distance = torch.einsum("blgw,gpw->bglp", queries + attention.pos_bias_v[:heads], positions)
    scores = (by_key + align_distances(by_distance, x.shape[1])) * attention.head_width**-0.5
    if visible is not None:
        scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
    return scores.log_softmax(dim=-1)


def _by_position(batch: Mapping[str, Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Token and phone of the unit that each position predicts, [B, L] each; `_NOBODY` where it predicts none."""
    first = batch["text_token_len"][:, None] + _BEFORE_TEXT  # the position of [task], which predicts unit 0
    unit = torch.arange(length, device=first.device) - first
    real = (unit >= 0) & (unit < batch["speech_token_len"][:, None])
    place = unit.clamp(0, batch["owner"].shape[1] - 1)
    owners, phones = (batch[name].gather(1, place).masked_fill(~real, _NOBODY) for name in ("owner", "phone"))
    return owners, phones


def _guide(scores: list[Tensor], owners: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of where the guided heads look, and the share of units whose token the last layer has found."""
    asked = owners != _NOBODY  # [B, L]
    last = batch["text_token_len"][:, None] - 1
    wanted = [torch.minimum(owners.clamp(min=0) + head, last) + _BEFORE_TEXT for head in range(GUIDED_HEADS)]
    columns = torch.stack(wanted, dim=1)[..., None]  # [B, G, L, 1]
    losses = [-layer.gather(3, columns).squeeze(3).transpose(0, 1)[:, asked].mean() for layer in scores]
    looked_at = scores[-1][:, 0].argmax(dim=-1)
    found = ((looked_at == wanted[0]) & asked).sum() / asked.sum()
    return torch.stack(losses).mean(), found

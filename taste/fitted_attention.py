"""Teaches an attention to look at the frames that speak each token, where an alignment found them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from taste.alignment import Alignment, align
from taste.batch import Example

# T text tokens   A Whisper frames, 50 Hz   H attention heads

SHARPEN_LR = 3e-3  # of Adam
SHARPNESSES = tuple(2.0 ** (power / 2) for power in range(-2, 17))  # tried on the attention's scores
LEAST_ATTENTION = 1e-12  # before the logarithm

AttentionOf = Callable[[int], Tensor]  # number of an utterance -> where its tokens look, [..., T, A]


class Spoken(NamedTuple):
    """Where the tokens of some utterances are spoken."""

    alignment: Alignment
    size: float  # mean length of the text embeddings, less their mean
    outside: list[Tensor]  # of each utterance [T, A], True where a token is not spoken


class Agreement(NamedTuple):
    """How much of a token's attention is where it is spoken, mean over tokens."""

    on_token: float
    evenly: float  # the same if it looked at all frames alike


def find_spoken(examples: Sequence[Example]) -> Spoken:
    """Align some utterances.

    Args:
        examples: with Whisper features.

    Returns:
        where their tokens are spoken.

    Raises:
        ValueError: no recording has as many frames as tokens.
    """
    texts, speech = [example.text for example in examples], [example.speech[0] for example in examples]
    found = align(texts, speech)
    size = float((torch.cat(texts) - found.centre).norm(dim=1).mean())
    return Spoken(found, size, [_outside(span, len(frames)) for span, frames in zip(found.spans, speech, strict=True)])


def scores_of(spoken: Spoken, examples: Sequence[Example]) -> list[Tensor]:
    """How well each frame goes with each token, by the map that found them.

    Args:
        spoken: what `find_spoken` gave.
        examples: the same utterances.

    Returns:
        of each utterance [T, A], of embeddings of length one.
    """
    found = spoken.alignment
    return [
        ((example.text - found.centre) / spoken.size) @ (example.speech[0] @ found.weight.T + found.bias).T
        for example in examples
    ]


def best_sharpness(scores: Sequence[Tensor], outside: Sequence[Tensor]) -> float:
    """The factor on the scores with which their softmax looks best where tokens are spoken.

    Args:
        scores: of each utterance, [T, A].
        outside: of each utterance, [T, A].

    Returns:
        one of `SHARPNESSES`.
    """

    def likelihood(sharpness: float) -> float:
        rows = [_mean_log(part * sharpness, masked).flatten() for part, masked in zip(scores, outside, strict=True)]
        return float(torch.cat(rows).mean())

    return max(SHARPNESSES, key=likelihood)


@torch.enable_grad()
def sharpen(parameters: Sequence[Tensor], attention: AttentionOf, outside: Sequence[Tensor], steps: int) -> None:
    """Teach some weights to look at all frames of a token and at no others; nothing else changes.

    Args:
        parameters: what learns; left without gradients.
        attention: of an utterance, [..., T, A].
        outside: of each utterance, [T, A].
        steps: of Adam; each sees all utterances.
    """
    optimizer = torch.optim.Adam(parameters, lr=SHARPEN_LR)
    for _ in range(steps):
        optimizer.zero_grad()
        for number, masked in enumerate(outside):
            logs = attention(number).clamp(min=LEAST_ATTENTION).log()
            (-_mean_log(logs, masked).mean() / len(outside)).backward(inputs=parameters)
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def agreement(attention: AttentionOf, outside: Sequence[Tensor]) -> Agreement:
    """How much attention is where it should be.

    Args:
        attention: of an utterance, [..., T, A].
        outside: of each utterance, [T, A].

    Returns:
        the shares.
    """
    own = [attention(number).masked_fill(masked, 0.0).sum(dim=-1).flatten() for number, masked in enumerate(outside)]
    evenly = [1 - masked.float().mean(dim=1) for masked in outside]
    return Agreement(float(torch.cat(own).mean()), float(torch.cat(evenly).mean()))


def _mean_log(scores: Tensor, outside: Tensor) -> Tensor:
    """Mean log-probability of each token's own frames, [..., T]; logs may be given as scores."""
    logs = scores.log_softmax(dim=-1).masked_fill(outside, 0.0)
    return logs.sum(dim=-1) / (~outside).sum(dim=-1)


def _outside(spans: Tensor, frames: int) -> Tensor:
    """True where a token is not spoken, [T, A]."""
    numbers = torch.arange(frames)
    return (numbers < spans[:, :1]) | (numbers >= spans[:, 1:])

"""Fits the new parts of `simple` to its training set, so that training starts beside the pretrained model."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taste.alignment import align
from taste.batch import Example
from taste.data import UtteranceDataset, spread_evenly
from taste.model import CosyVoiceS3Model

# T text tokens   A Whisper frames, 50 Hz   D channels of the LM   E of the text embeddings   N tokens of all utterances

MOST_UTTERANCES = 100  # that are looked at; more would cost time and memory
RIDGE = 1e-2  # of a channel's mean square, added to each
SPEECH_GAIN = 0.1  # what speech is multiplied with beside the text at first: a hint that training can make louder
SHARPEN_STEPS, SHARPEN_LR = 60, 3e-3  # of Adam, on query and key alone
SHARPNESSES = tuple(2.0 ** (power / 2) for power in range(-2, 17))  # tried on the attention's scores


@torch.no_grad()
def fit_new_parts(model: CosyVoiceS3Model, dataset: UtteranceDataset) -> dict[str, Any]:
    """Give the aggregator, the two norms and the projection weights with which the pretrained parts can work.

    - `input_proj` becomes the linear map from LayerNorm(text embeddings) that comes closest, over the training texts,
      to what the pretrained text encoder makes of them: the LM goes on reading what it was trained to read.
    - query and key find each token where `align` found it spoken.
    - value and output keep the directions in which the speech of tokens differs most; the speech's norm begins quiet.

    The same model and data give the same weights; nothing is drawn.

    Args:
        model: of variant `simple`, on the CPU.
        dataset: the training set; some utterances from all of it are read.

    Returns:
        what to note about it, as JSON knows values: utterances, text_explained (share of the text encoder's variance
        that the projection gives), attention_on_token (mean share of a token's attention that is where it is spoken),
        attention_on_token_evenly (the same if it looked at all frames alike).
    """
    assert model.aggregator is not None, "only a model with an aggregator has new parts"
    examples = [dataset[index] for index in spread_evenly(len(dataset), MOST_UTTERANCES)]
    explained = _fit_text_path(model, examples)
    attention, evenly = _fit_attention(model, examples)
    _fit_values(model, examples)
    return {
        "utterances": len(examples),
        "text_explained": explained,
        "attention_on_token": attention,
        "attention_on_token_evenly": evenly,
    }


def _fit_text_path(model: CosyVoiceS3Model, examples: Sequence[Example]) -> float:
    """Set `input_proj`; gives the share of the variance it explains."""
    inputs, wanted = [], []
    for example in examples:
        encoded, _ = model.llm.encode(example.text[None], torch.tensor([len(example.text)]))
        inputs.append(model.text_norm(example.text))
        wanted.append(encoded[0])
    x, y = torch.cat(inputs).double(), torch.cat(wanted).double()  # [N, E], [N, D]
    weight, bias = ridge(x, y)
    model.input_proj.weight.copy_(weight)
    model.input_proj.bias.copy_(bias)
    rest = y - (x @ weight.T + bias)
    return 1 - float(rest.square().sum() / (y - y.mean(dim=0)).square().sum())


def _fit_attention(model: CosyVoiceS3Model, examples: Sequence[Example]) -> tuple[float, float]:
    """Set query and key; gives the mean attention a token pays to its own frames, and what chance would pay."""
    aggregator = model.aggregator
    texts, speech = [example.text for example in examples], [example.speech_final for example in examples]
    found = align(texts, speech)
    size = float((torch.cat(texts) - found.centre).norm(dim=1).mean())
    outside = [_outside(span, len(frames)) for span, frames in zip(found.spans, speech, strict=True)]
    scores = [  # of a query of length one, [T, A]
        ((text - found.centre) / size) @ (frames @ found.weight.T + found.bias).T
        for text, frames in zip(texts, speech, strict=True)
    ]
    sharpness = max(SHARPNESSES, key=lambda sharpness: _agreement(scores, outside, sharpness))
    # the attention divides its scores by the root of its width; query and key share the rest
    factor = math.sqrt(sharpness * math.sqrt(aggregator.text_width))
    aggregator.query.weight.copy_(torch.eye(aggregator.text_width) * (factor / size))
    aggregator.query.bias.copy_(-found.centre * (factor / size))
    aggregator.key.weight.copy_(found.weight * factor)
    aggregator.key.bias.copy_(found.bias * factor)
    _sharpen(model, examples, outside)
    own = [
        _attention(model, example).masked_fill(masked, 0.0).sum(dim=1)
        for example, masked in zip(examples, outside, strict=True)
    ]
    evenly = [1 - masked.float().mean(dim=1) for masked in outside]
    return float(torch.cat(own).mean()), float(torch.cat(evenly).mean())


@torch.enable_grad()
def _sharpen(model: CosyVoiceS3Model, examples: Sequence[Example], outside: Sequence[Tensor]) -> None:
    """Teach query and key to look at all frames of a token and at no others; nothing else changes."""
    aggregator = model.aggregator
    parameters = [*aggregator.query.parameters(), *aggregator.key.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=SHARPEN_LR)
    for _ in range(SHARPEN_STEPS):
        optimizer.zero_grad()
        for example, masked in zip(examples, outside, strict=True):
            logs = _attention(model, example).clamp(min=1e-12).log().masked_fill(masked, 0.0)
            (-(logs.sum(dim=1) / (~masked).sum(dim=1)).mean() / len(examples)).backward()
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def _attention(model: CosyVoiceS3Model, example: Example) -> Tensor:
    """Where each token of one utterance looks, [T, A]."""
    final = example.speech_final
    return model.aggregator.attention(example.text[None], final[None], torch.tensor([len(final)]))[0]


def _agreement(scores: Sequence[Tensor], outside: Sequence[Tensor], sharpness: float) -> float:
    """Mean log-probability, over tokens and their frames, of attending to these frames."""
    total = []
    for rows, masked in zip(scores, outside, strict=True):
        logs = (rows * sharpness).log_softmax(dim=1).masked_fill(masked, 0.0)
        total.append(logs.sum(dim=1) / (~masked).sum(dim=1))
    return float(torch.cat(total).mean())


def _fit_values(model: CosyVoiceS3Model, examples: Sequence[Example]) -> None:
    """Set value, output and the speech's gain."""
    aggregator = model.aggregator
    heard = torch.cat([_attention(model, example) @ example.speech_mid for example in examples])
    heard = heard.double()  # [N, speech_width]
    mean = heard.mean(dim=0)
    sizes, directions = torch.linalg.eigh((heard - mean).T @ (heard - mean) / len(heard))
    kept = min(aggregator.text_width, aggregator.speech_width)
    sizes, directions = sizes.flip(0)[:kept], directions.flip(1)[:, :kept]
    directions = directions * directions.sum(dim=0).sign()  # the sign that eigh gives is the library's choice
    weight = torch.zeros_like(aggregator.value.weight, dtype=torch.float64)
    weight[:kept] = (directions / (sizes + RIDGE * sizes[0]).sqrt()).T
    aggregator.value.weight.copy_(weight)
    aggregator.value.bias.copy_(-weight @ mean)
    aggregator.output.weight.copy_(torch.eye(aggregator.text_width))
    aggregator.output.bias.zero_()
    model.speech_norm.weight.fill_(SPEECH_GAIN)


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares with a little doubt.

    Args:
        x: inputs, [N, channels in], float64.
        y: what they should give, [N, channels out], float64.

    Returns:
        weight [channels out, channels in] and bias [channels out] of `x @ weight.T + bias`.
    """
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    centred = x - x_mean
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, centred.T @ (y - y_mean)).T
    return weight, y_mean - weight @ x_mean


def _outside(spans: Tensor, frames: int) -> Tensor:
    """True where a token is not spoken, [T, A]."""
    numbers = torch.arange(frames)
    return (numbers < spans[:, :1]) | (numbers >= spans[:, 1:])

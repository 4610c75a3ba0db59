"""Finds which frames of a recording speak which token of its text, with no help but many recordings and their texts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# T text tokens   A Whisper frames, 50 Hz   D channels   N frames of all recordings   E channels of the embeddings

PASSES = 12  # of aligning and fitting; the alignment moves less and less
EDGE_SHARE = 0.05  # of a recording, at each end, that the first pass takes for silence
RIDGE = 1e-2  # of a channel's mean square, added to each: what few recordings say is not trusted to the last digit
PACE = 5.0  # taken off a frame's score, which is about 1 at best, times its squared distance from an even pace


class Alignment(NamedTuple):
    """Where each token is spoken, and the map that found it."""

    spans: list[Tensor]  # of each recording [T, 2], int64: a token's first frame, and the one behind its last
    weight: Tensor  # [E, D]: `frames @ weight.T + bias` points to the embedding, less `centre`, of what is spoken
    bias: Tensor  # [E]
    centre: Tensor  # [E], mean of the embeddings


def align(texts: Sequence[Tensor], speech: Sequence[Tensor]) -> Alignment:
    """Align recordings with their texts.

    The first pass divides each recording evenly among its tokens. Each pass fits a linear map from frames to the
    embeddings of the tokens they were given to, every different token with the same weight, or the frequent ones would
    draw all frames to them. Then it gives each frame anew: in the text's order, at least one frame a token, silence
    between any two, as well as the map's outputs and the embeddings agree over the whole recording, less something for
    leaving an even pace. That improves by itself as far as the frames tell words apart and words come back in other
    surroundings. The same input gives the same result.

    Args:
        texts: text embeddings of each recording, [T, E], float32.
        speech: its frames, [A, D], float32; recordings with fewer frames than tokens are of no use here.

    Returns:
        spans of each recording (of one without use: its even division) and the map.

    Raises:
        ValueError: no recording has as many frames as tokens.
    """
    usable = [index for index, (text, frames) in enumerate(zip(texts, speech, strict=True)) if len(frames) >= len(text)]
    if not usable:
        raise ValueError("no recording has as many Whisper frames as text tokens: nothing can be aligned")
    centre = torch.cat(list(texts)).mean(dim=0)
    targets = [_directions(text - centre) for text in texts]
    classes = _classes(texts)
    paths = [_even_path(len(text), len(frames)) for text, frames in zip(texts, speech, strict=True)]
    counts = [len(speech[index]) for index in usable]
    inputs = torch.cat([speech[index] for index in usable]).double()
    mean, scale = inputs.mean(dim=0), inputs.std(dim=0).clamp(min=1e-6)
    inputs = (inputs - mean) / scale  # [N, D]
    for _ in range(PASSES):
        wanted = torch.cat([targets[index][paths[index]] for index in usable]).double()  # [N, E + 1]
        solution, middle = _balanced_ridge(
            inputs, wanted, torch.cat([classes[index][paths[index]] for index in usable])
        )
        outputs = ((inputs - middle) @ solution).float().split(counts)
        moved = False
        for index, output in zip(usable, outputs, strict=True):
            path = _best_path(output @ targets[index].T - PACE * _off_pace(len(texts[index]), len(output)))
            moved |= not torch.equal(path, paths[index])
            paths[index] = path
        if not moved:
            break
    weight = (solution / scale[:, None]).T  # of frames as they are
    bias = -weight @ (mean + middle * scale)
    spans = [_spans(path, len(text)) for path, text in zip(paths, texts, strict=True)]
    return Alignment(spans, weight[:-1].float(), bias[:-1].float(), centre)


def _balanced_ridge(inputs: Tensor, wanted: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares in which each class weighs the same: the map [D, E + 1], and the inputs [D] that give zero."""
    _, numbers, sizes = classes.unique(return_inverse=True, return_counts=True)
    weights = 1.0 / sizes[numbers].double()[:, None]
    weights *= len(weights) / weights.sum()
    middle = (weights * inputs).mean(dim=0)
    centred = inputs - middle
    weighted = (weights * centred).T
    gram = weighted @ centred
    gram.diagonal().add_(RIDGE * len(inputs))
    return torch.linalg.solve(gram, weighted @ (wanted - (weights * wanted).mean(dim=0))), middle


def _classes(texts: Sequence[Tensor]) -> list[Tensor]:
    """A number for each different embedding, [1 + T] a text; 0 comes first and is silence."""
    _, numbers = torch.cat(list(texts)).unique(dim=0, return_inverse=True)
    silence = torch.zeros(1, dtype=torch.long)
    return [torch.cat([silence, 1 + part]) for part in numbers.split([len(text) for text in texts])]


def _directions(text: Tensor) -> Tensor:
    """What a frame should point to, [1 + T, E + 1]: silence has a direction of its own, then the tokens in order."""
    directions = torch.zeros(1 + text.shape[0], text.shape[1] + 1)
    directions[0, -1] = 1.0
    directions[1:, :-1] = torch.nn.functional.normalize(text, dim=1)
    return directions


def _even_path(tokens: int, frames: int) -> Tensor:
    """0 for silence at both ends, 1 .. T in equal parts between, [A] int64."""
    edge = int(EDGE_SHARE * frames)
    path = torch.zeros(frames, dtype=torch.long)
    inner = frames - 2 * edge
    path[edge : frames - edge] = 1 + torch.arange(inner) * tokens // max(1, inner)
    return path


def _off_pace(tokens: int, frames: int) -> Tensor:
    """How far each frame lies from each token if all were equally long, as share of the whole, squared; [A, 1 + T]."""
    places = (torch.arange(frames) + 0.5) / frames
    even = (torch.arange(tokens) + 0.5) / tokens
    return torch.nn.functional.pad((places[:, None] - even).square(), (1, 0))  # silence may be anywhere


def _best_path(scores: Tensor) -> Tensor:
    """The sequence 0* 1+ 0* 2+ ... T+ 0* whose scores [A, 1 + T] add up to the most, [A] int64."""
    from torchaudio.functional import forced_align

    tokens = torch.arange(1, scores.shape[1], dtype=torch.int32)[None]
    path, _ = forced_align(scores[None].contiguous(), tokens, blank=0)
    return path[0].long()


def _spans(path: Tensor, tokens: int) -> Tensor:
    """First frame, and the one behind the last, of tokens 1 .. T; of one without frames: where it would begin."""
    numbers = torch.arange(1, tokens + 1)
    given = path[None] == numbers[:, None]  # [T, A]
    frames = torch.arange(len(path))
    first = torch.where(given, frames, len(path)).amin(dim=1).clamp(max=len(path) - 1)
    last = torch.where(given, frames, -1).amax(dim=1)
    return torch.stack([first, torch.maximum(last, first) + 1], dim=1)

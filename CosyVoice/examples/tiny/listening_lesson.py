"""Teaches an aggregator to tell how long each word lasts and what it sounds like, before anyone listens to it.

A language model that is told nothing yet by what it gets of a recording has no reason to look at it, and an aggregator
that nobody looks at has no reason to tell more. So it begins with a lesson: from the vector of a word, a linear map
that is thrown away afterwards must find the word's length and the middle states of Whisper in each quarter of it, where
an alignment has found the word. Where the language model has learned already what to do with the sound of words
(teach_reading.py), what it was told is the lesson instead, and aggregator and audio branch then learn to tell it so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from packed_features import PackedFeatures, PackedRows
from reading_lessons import WordFacts, WordSounds, log_paces
from resumable import learning_rate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from unit_codes import CODE_WIDTH

from taste.alignment import align
from taste.batch import Example
from taste.fusion import WeightedSum
from taste.lengths import valid_mask
from taste.linear_fits import widest_directions
from taste.model import CosyVoiceS3Model
from taste.words import word_spans

# T text tokens   A Whisper frames, 50 Hz   D channels of the speech   C of each part   Y numbers to tell of a token

_GROUP = 500  # utterances that are aligned together
_PARTS = 4  # of a word, of equal lengths
_CHANNELS = 24  # widest directions of the middle states
_UNSEEN_SHARE = 0.1  # of the utterances, to measure with
_POSITIONS = 5_000  # of the language model in a batch, as `PackedFeatures` counts
_GRAD_CLIP = 1.0
_FEWEST_CHANGES = 0.1  # standard deviation, over words, of the changes of a phone that is listened for
_BLUR = 0.3  # standard deviation of what is added to the aggregator's vectors while the branch learns to read them
_BULK_WEIGHT = 0.02  # of the vectors' variance: what nobody reads shall not take the codes' room


class Wanted(NamedTuple):
    """What the vectors of a word shall tell, in numbers of zero mean and unit variance."""

    rows: list[Tensor]  # of each utterance, [T, Y]
    groups: dict[str, int]  # how many of the numbers are about what, in their order; each group counts as much


class _Aligned(Dataset[list[np.ndarray]]):
    """Groups of utterances, aligned when they are asked for."""

    def __init__(self, dataset: Dataset[Example], groups: Sequence[Sequence[int]]) -> None:
        self.dataset, self.groups = dataset, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, group: int) -> list[np.ndarray]:
        examples = [self.dataset[number] for number in self.groups[group]]
        found = align([example.text for example in examples], [example.speech_final for example in examples])
        return [span.numpy() for span in found.spans]


def find_tokens(dataset: Dataset[Example], chosen: Sequence[int], workers: int = 0) -> dict[int, Tensor]:
    """Find where the tokens of some utterances are spoken.

    Args:
        dataset: with Whisper features.
        chosen: numbers of the utterances.
        workers: processes that work side by side; 0: this one alone.

    Returns:
        of each of them, first frame of each token and the one behind its last, [T, 2], int64.
    """
    count = max(1, round(len(chosen) / _GROUP))
    groups = [chosen[first::count] for first in range(count)]  # each from all parts of the data
    loader = DataLoader(_Aligned(dataset, groups), batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    return {
        number: torch.as_tensor(span)
        for group, spans in zip(groups, loader, strict=True)
        for number, span in zip(group, spans, strict=True)
    }


def _as_it_is(value: list[np.ndarray]) -> list[np.ndarray]:
    return value  # a tensor would need a file handle to come from another process


def teach(
    model: CosyVoiceS3Model,
    examples: Sequence[Example],
    wanted: Wanted,
    *,
    device: torch.device,
    steps: int,
    peak_lr: float,
    seed: int,
) -> dict[str, float]:
    """Teach the aggregator of a variant.

    Args:
        model: of a variant that hears; on the device. Only its aggregator changes.
        examples: of the training set, at least ten.
        wanted: what `from_alignment` or `from_words` makes of them.
        device: where to compute.
        steps: of AdamW.
        peak_lr: its highest learning rate.
        seed: of the order.

    Returns:
        share of the variance of each group that the linear map finds, over utterances that it did not learn from.
    """
    unseen = max(1, round(len(examples) * _UNSEEN_SHARE))
    parts = []
    for first, last in ((unseen, len(examples)), (0, unseen)):
        parts.append((PackedFeatures([examples[first:last]], device), PackedRows(wanted.rows[first:last], 0.0, device)))
    (features, targets), measured = parts
    torch.manual_seed(seed)
    reader = nn.Linear(_width(model), wanted.rows[0].shape[1]).to(device)
    learning = [*model.aggregator.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(learning, lr=peak_lr, weight_decay=0.01)
    model.train()
    sizes = list(wanted.groups.values())

    def error(chosen: list[int]) -> Tensor:
        errors = _errors(model, reader, features, targets, chosen)
        return sum(group.mean() for group in errors.split(sizes))

    _descend(error, features, optimizer, steps, peak_lr, seed)
    model.eval()
    with torch.inference_mode():
        everyone = list(range(unseen))
        errors = _errors(model, reader, *measured, everyone)
    model.zero_grad(set_to_none=True)
    return {name: 1 - float(group.mean()) for name, group in zip(wanted.groups, errors.split(sizes), strict=True)}


def hear_sounds(
    model: CosyVoiceS3Model,
    sounds: WordSounds,
    words: Mapping[str, Tensor],
    examples: Sequence[Example],
    *,
    device: torch.device,
    steps: int,
    peak_lr: float,
    seed: int,
) -> float:
    """Teach aggregator and audio branch to tell how the words sound, as the language model was told it.

    The branch reads the aggregator's vectors through some noise: what it needs is therefore said loudly, and is what a
    quantizer keeps of them. `simple`, in which text and recording are one sum and nothing is quantized, learns without
    noise to give the sum of what the text encoder makes of the text and of how the words sound.

    Args:
        model: of a variant that hears; on the device.
        sounds: what the language model was told; on the device.
        words: what it was told of each token, see `describe_words`, of the examples.
        examples: of the training set, at least ten.
        device: where to compute.
        steps: of AdamW.
        peak_lr: its highest learning rate.
        seed: of the order.

    Returns:
        share of the variance, over utterances that were not learned from, of what was to be told.
    """
    with torch.no_grad():
        wanted = [sounds.eval()(words[example.utt_id][None].to(device).float())[0].cpu() for example in examples]
    if model.variant == "simple":
        wanted = [row + _encoded(model, example, device) for row, example in zip(wanted, examples, strict=True)]
        hearing = (model.aggregator, model.text_norm, model.speech_norm, model.input_proj)
    else:
        share = 1.0
        if isinstance(model.fusion, WeightedSum):
            of_audio, of_text = model.fusion.weights.detach().softmax(dim=0).tolist()
            share = of_text / of_audio  # the text that it is added to is weighted too
        wanted = [share * row for row in wanted]
        hearing = (model.aggregator, model.audio_branch)
    unseen = max(1, round(len(examples) * _UNSEEN_SHARE))
    rows = torch.cat(wanted)
    variance = rows.var(dim=0).sum()
    parts = []
    for first, last in ((unseen, len(examples)), (0, unseen)):
        parts.append((PackedFeatures([examples[first:last]], device), PackedRows(wanted[first:last], 0.0, device)))
    (features, targets), measured = parts

    def error(features: PackedFeatures, targets: PackedRows, chosen: list[int]) -> Tensor:
        batch = features.batch(chosen)
        wanted, lengths = targets.batch(chosen, features.there(chosen))
        valid = valid_mask(lengths, wanted.shape[1])[:, :, None]
        vectors, bulk = model.aggregate(batch), wanted.new_zeros(())
        if model.variant == "simple":
            told = model.input_proj(model.text_norm(batch.text) + model.speech_norm(vectors))
            return ((told - wanted).square() * valid).sum() / valid.sum() / variance
        if model.training:
            there = vectors[valid[:, :, 0]]
            bulk = _BULK_WEIGHT * (there - there.mean(dim=0)).square().mean()
            vectors = vectors + _BLUR * torch.randn_like(vectors)
        told = model.audio_branch(vectors, batch.text_lengths)
        return ((told - wanted).square() * valid).sum() / valid.sum() / variance + bulk

    learning = [weight for part in hearing for weight in part.parameters()]
    optimizer = torch.optim.AdamW(learning, lr=peak_lr, weight_decay=0.01)
    model.train()
    _descend(lambda chosen: error(features, targets, chosen), features, optimizer, steps, peak_lr, seed)
    model.eval()
    with torch.inference_mode():
        left = float(error(*measured, list(range(unseen))))
    model.zero_grad(set_to_none=True)
    return 1 - left


@torch.no_grad()
def _encoded(model: CosyVoiceS3Model, example: Example, device: torch.device) -> Tensor:
    """What the text encoder makes of an utterance's text, [T, D]."""
    text, length = example.text[None].to(device), torch.tensor([len(example.text)], device=device)
    return model.llm.encode(text, length)[0][0].cpu()


def _descend(
    loss: Callable[[list[int]], Tensor],
    features: PackedFeatures,
    optimizer: torch.optim.Optimizer,
    steps: int,
    peak_lr: float,
    seed: int,
) -> None:
    """Take some steps on batches of utterances."""
    learning = [weight for group in optimizer.param_groups for weight in group["params"]]
    batches: list[list[int]] = []
    for step in range(steps):
        batches = batches or features.batches(_POSITIONS, seed, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        loss(batches.pop()).backward()
        nn.utils.clip_grad_norm_(learning, _GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _errors(
    model: CosyVoiceS3Model, reader: nn.Linear, features: PackedFeatures, targets: PackedRows, chosen: list[int]
) -> Tensor:
    """Mean squared errors of the numbers, whose variances are 1, [Y]."""
    batch = features.batch(chosen)
    wanted, lengths = targets.batch(chosen, torch.tensor(chosen, device=batch.text.device))
    valid = valid_mask(lengths, wanted.shape[1])[:, :, None]
    squares = (reader(model.aggregate(batch)) - wanted).square() * valid
    return squares.sum(dim=(0, 1)) / valid.sum()


def from_words(examples: Sequence[Example], words: Mapping[str, Tensor]) -> Wanted:
    """What to tell of each token: how slow its word is, the pause after it, phones its text does not say, its units.

    Args:
        examples: the utterances.
        words: what `describe_words` gives of each.

    Returns:
        pace, pause, changes, and codes; phones that hardly ever change are left out.
    """
    rows = [words[example.utt_id].float() for example in examples]
    facts = [WordFacts.of(row) for row in rows]
    vary = torch.cat([fact.changes for fact in facts]).std(dim=0) > _FEWEST_CHANGES
    told = [
        torch.cat([log_paces(row), fact.changes[:, vary], fact.codes], dim=1)
        for row, fact in zip(rows, facts, strict=True)
    ]
    groups = {"pace": 1, "pause": 1, "changes": int(vary.sum()), "codes": CODE_WIDTH}
    return Wanted(_standardized(told), {name: size for name, size in groups.items() if size})


def from_alignment(examples: Sequence[Example], spans: Sequence[Tensor], by_word: bool) -> Wanted:
    """What to tell of each token: how long its word lasts, and Whisper's middle states in the quarters of it.

    Args:
        examples: the utterances.
        spans: what `find_tokens` gave of each.
        by_word: False takes each token for a word.

    Returns:
        length, and states.
    """
    axes = widest_directions(torch.cat([example.speech_mid for example in examples]), _CHANNELS).axes.float()
    rows = []
    for example, span in zip(examples, spans, strict=True):
        words = word_spans(example.word_ids) if by_word else [(token, token + 1) for token in range(len(example.text))]
        mid = example.speech_mid @ axes
        told = []
        for first, last in words:
            start, end = int(span[first, 0]), int(span[last - 1, 1])
            pieces = [mid[place[0] : place[1]].mean(dim=0) for place in _parts(start, end)]
            told += [torch.cat([torch.tensor([float(end - start)]).log(), *pieces])] * (last - first)
        rows.append(torch.stack(told))
    return Wanted(_standardized(rows), {"length": 1, "states": _PARTS * len(axes.T)})


def _standardized(rows: list[Tensor]) -> list[Tensor]:
    everything = torch.cat(rows)
    mean, spread = everything.mean(dim=0), everything.std(dim=0).clamp(min=1e-6)
    return [(row - mean) / spread for row in rows]


def _parts(start: int, end: int) -> list[tuple[int, int]]:
    """Stretches of frames, none of them empty; in a short word they overlap."""
    bounds = [start + (end - start) * part / _PARTS for part in range(_PARTS + 1)]
    firsts = [min(int(bound), end - 1) for bound in bounds[:-1]]
    return [(first, max(first + 1, round(bound))) for first, bound in zip(firsts, bounds[1:], strict=True)]


def _width(model: CosyVoiceS3Model) -> int:
    return model.aggregator.text_width if model.variant == "simple" else model.aggregator.speech_width

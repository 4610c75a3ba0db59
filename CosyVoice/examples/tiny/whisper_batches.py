"""Batches of disturbed recordings with the labels of their frames, made by worker processes."""

# B rows   L Whisper frames of the longest row, 50 Hz   A of an utterance   W mel frames, 100 Hz

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from whisper_start import MEL_BINS
from whisper_training import CLEAR_FRAMES, IGNORED
from word_times import Span

TIMES = 6  # numbers about timing
BANDS = 16  # the log-mel's 128 bins, eight at a time
MEL_PER_FRAME = 2
_DYNAMIC_RANGE = 2.0  # of a log-mel: 8 decades, divided by 4
_QUIETEST = -1.5  # log-mel of 1e-10
_MOST_JOINED_FRAMES = 1_200

Plan = list[list[list[int]]]  # batches of rows of utterances' numbers


class Example(NamedTuple):
    """An utterance as the network sees it."""

    mel: Tensor  # log-mel [128, 2 A + 4], float16, with what the recording's end leaves in the silence behind it
    tokens: Tensor  # class of each frame, [A] int64; 0 is silence, IGNORED where nobody knows
    phones: Tensor  # [A] int64
    timing: Tensor  # [A, 6] float32: how long the frame's phone and token have lasted, will last, and last in all
    units: Tensor  # class of each frame's S3 unit, [A] int64; IGNORED where there is none
    token_spans: list[tuple[int, Span]]  # the text's tokens that are classes, and when they are heard


class Batch(NamedTuple):
    """Rows of one or more utterances; L is the longest row plus the two frames that its end still changes."""

    mels: Tensor  # [B, 128, 2 (L + 4)], float16, with silence behind each row
    tokens: Tensor  # [B, L] int64, as in `Example`; IGNORED behind a row's end
    phones: Tensor  # the same
    units: Tensor  # the same
    prosody: Tensor  # [B, L, 6 + 16] float32: timing, and the log-mel's bands


def open_batches(
    examples: Sequence[Example],
    plan: Callable[[int], Plan],
    first: tuple[int, int],
    clean_share: float,
    seed: int,
    workers: int,
    pinned: bool,
) -> Iterator[Batch]:
    """Give batches without end; each depends on the seed, its epoch and its number there only.

    Args:
        examples: to learn from.
        plan: gives the rows of an epoch's batches.
        first: epoch and number of the batch to begin with.
        clean_share: of the rows that stay as they are.
        seed: of what is drawn.
        workers: processes that make them; 0: this one does.
        pinned: in memory that a GPU can read.
    """
    loader = DataLoader(
        _Disturbed(examples, clean_share, seed),
        sampler=_places(plan, *first),
        batch_size=None,
        num_workers=workers,
        pin_memory=pinned,
    )
    return iter(loader)


def _places(plan: Callable[[int], Plan], epoch: int, number: int) -> Iterator[tuple[int, int, list[list[int]]]]:
    while True:
        batches = plan(epoch)
        yield from ((epoch, place, batches[place]) for place in range(number, len(batches)))
        epoch, number = epoch + 1, 0


class _Disturbed(Dataset):
    def __init__(self, examples: Sequence[Example], clean_share: float, seed: int) -> None:
        self.examples, self.clean_share, self.seed = examples, clean_share, seed

    def __getitem__(self, place: tuple[int, int, list[list[int]]]) -> Batch:
        epoch, number, rows = place
        drawn = np.random.SeedSequence((self.seed, epoch, number)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(drawn))
        batch = collate([[self.examples[i] for i in row] for row in rows])
        lengths = (batch.phones != IGNORED).sum(dim=1)
        return batch._replace(mels=disturb(batch.mels.float(), lengths, self.clean_share, generator).half())


def plan_batches(lengths: Sequence[int], frames_per_batch: int, joined_share: float, draw: random.Random) -> Plan:
    """Group utterances of like length; some rows hold several, one after another.

    Args:
        lengths: frames of each utterance.
        frames_per_batch: padding included.
        joined_share: of the utterances, about, that share a row with others.
        draw: decides the rows and their order.

    Returns:
        batches of rows of utterances' numbers; each utterance stands in one row.
    """
    order = list(range(len(lengths)))
    draw.shuffle(order)
    rows: list[list[int]] = []
    while order:
        row = [order.pop()]
        wanted = draw.randint(2, 5) if draw.random() < joined_share / 2.5 else 1
        while order and len(row) < wanted and sum(lengths[i] for i in (*row, order[-1])) <= _MOST_JOINED_FRAMES:
            row.append(order.pop())
        rows.append(row)
    size_of = {id(row): sum(lengths[i] for i in row) for row in rows}
    rows.sort(key=lambda row: size_of[id(row)] * draw.uniform(0.9, 1.1))
    batches: Plan = [[]]
    longest = 0
    for row in rows:
        longest = max(longest, size_of[id(row)])
        if batches[-1] and longest * (len(batches[-1]) + 1) > frames_per_batch:
            batches.append([])
            longest = size_of[id(row)]
        batches[-1].append(row)
    draw.shuffle(batches)
    return batches


def collate(rows: Sequence[Sequence[Example]]) -> Batch:
    """Join the examples of each row, and pad the rows.

    Args:
        rows: B lists of examples.
    """
    frames = [sum(len(example.phones) for example in row) for row in rows]
    length = max(frames) + CLEAR_FRAMES // 2
    mels = torch.empty(len(rows), MEL_BINS, MEL_PER_FRAME * (length + CLEAR_FRAMES), dtype=torch.float16)
    tokens, phones, units = (torch.full((len(rows), length), IGNORED) for _ in range(3))
    prosody = torch.zeros(len(rows), length, TIMES + BANDS)
    for number, row in enumerate(rows):
        inner = [example.mel[:, : MEL_PER_FRAME * len(example.phones)] for example in row[:-1]]
        mel = torch.cat([*inner, row[-1].mel], dim=1)
        mels[number, :, : mel.shape[1]] = mel
        mels[number, :, mel.shape[1] :] = float(silence_of(mel))
        size = frames[number]
        for labels, name in ((tokens, "tokens"), (phones, "phones"), (units, "units")):
            labels[number, :size] = torch.cat([getattr(example, name) for example in row])
        prosody[number, :size, :TIMES] = torch.cat([example.timing for example in row])
        bands = mel[:, : MEL_PER_FRAME * size].float().unflatten(1, (size, -1)).unflatten(0, (BANDS, -1))
        prosody[number, :size, TIMES:] = bands.mean(dim=(1, 3)).T
    return Batch(mels, tokens, phones, units, prosody)


def silence_of(mels: Tensor) -> Tensor:
    """The value of digital silence in log-mels [..., 128, W] that are cut 8 decades below their loudest points."""
    return (mels.amax(dim=(-2, -1)) - _DYNAMIC_RANGE).clamp(min=_QUIETEST)


def disturb(mels: Tensor, lengths: Tensor, clean_share: float, generator: torch.Generator) -> Tensor:
    """Change level and colour of some rows, add noise, and hide a band and two moments.

    Args:
        mels: [B, 128, W], float32, silent behind each row's end; the rows are changed in place.
        lengths: frames of 20 ms, [B].
        clean_share: of the rows that stay as they are.
        generator: draws it all.

    Returns:
        log-mels as the disturbed recordings would have them, silence included.
    """
    drawn = torch.rand(len(mels), 13, 1, 1, generator=generator)
    chosen = (drawn[:, 0, 0, 0] >= clean_share).nonzero()[:, 0]
    if not len(chosen):
        return mels
    gain, tilt, wave, phase, ratio, colour, *places = drawn[chosen, 1:].unbind(dim=1)  # each [rows, 1, 1]
    bins = torch.linspace(0.0, 1.0, MEL_BINS)[:, None]
    moments = torch.arange(mels.shape[2])
    length = MEL_PER_FRAME * lengths[chosen, None, None]
    inside = moments < length
    values = MEL_BINS * length

    colouring = 0.3 * (tilt - 0.5) * bins + 0.1 * wave * torch.sin(2 * math.pi * (phase + 1.5 * bins))
    mel = mels[chosen] + (0.65 * gain - 0.5 + colouring)  # -20 to +6 dB
    level = (mel * inside).sum(dim=(1, 2), keepdim=True) / values + 0.3 - 0.9 * ratio  # a unit is 40 dB
    noise = torch.randn(mel.shape, generator=generator).mul_(0.06).add_(level + 0.6 * (colour - 0.5) * bins)
    decade = 0.25 / math.log(10)
    noisy = torch.logaddexp(mel.div(decade), noise.div_(decade)).mul_(decade)
    mel = torch.where(inside, noisy, mel)
    silence = silence_of(mel)[:, None, None]
    mel = mel.maximum(silence)

    fill = (mel * inside).sum(dim=(1, 2), keepdim=True) / values
    width = (16 * places[0]).round()
    lowest = (places[1] * (MEL_BINS - width)).round()
    numbers = torch.arange(MEL_BINS)[:, None]
    hidden = (numbers >= lowest) & (numbers < lowest + width)  # [rows, 128, 1]
    for share, place in ((places[2], places[3]), (places[4], places[5])):
        size = (16 * share).round().minimum(length // 8)
        start = (place * (length - size)).round()
        hidden = hidden | ((moments >= start) & (moments < start + size))
    mel = torch.where(hidden & inside, fill, mel)
    mels[chosen] = torch.where(moments < length + CLEAR_FRAMES, mel, silence)
    return mels

"""The steps of the data pipeline that are done again each epoch: crops, order, batches.

Axes: N samples  F mel frames, 86.13 Hz  B batch  S speech tokens, 50 Hz  T text tokens.

Every random choice follows from the `seed` text, which `Dataset` makes from its seed and the epoch.

Source of names, arguments and defaults: FunAudioLLM/CosyVoice cosyvoice/dataset/processor.py @ ace7c47.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cosyvoice.dataset.sample import Sample
from cosyvoice.utils.audio import AMPLITUDE_FLOOR

SILENT_MEL = math.log(AMPLITUDE_FLOOR)


def truncate(
    data: Iterable[Sample], truncate_length: int = 24576, mode: str = "train", hop_size: int = 256, seed: str = ""
) -> Iterator[Sample]:
    """Cut each utterance to one length at a random place, which follows from seed and utterance name alone.

    Before compute_fbank (as published) the sound is cut anywhere. After it, `speech_feat` and `pitch_feat` are cut
    along, at a frame: their edges then know the sound beyond the cut, and nothing has to be computed again for
    another crop. What is too short is followed by silence.

    Args:
        data: utterances with `speech` [1, N].
        truncate_length: samples wanted, a multiple of the hop.
        mode: not used.
        hop_size: samples a mel frame.
        seed: of all crops.

    Yields:
        new dicts; `speech` is [1, truncate_length].

    Raises:
        ValueError: the length is no whole number of mel frames.
    """
    if truncate_length < hop_size or truncate_length % hop_size:
        raise ValueError(f"truncate_length is {truncate_length}; expected a multiple of the hop, {hop_size} samples")
    for sample in data:
        draw = random.Random(f"{seed}/crop/{sample['utt']}")
        crop = {**sample, "is_crop": True}
        if "speech_feat" in sample:
            _crop_frames(crop, truncate_length // hop_size, hop_size, draw)
        else:
            start = draw.randint(0, max(0, sample["speech"].size(1) - truncate_length))
            crop["speech"] = _cut(sample["speech"], start, truncate_length, 0.0)
        yield crop


def shuffle(data: Iterable[Sample], shuffle_size: int = 10000, mode: str = "train", seed: str = "") -> Iterator[Sample]:
    """Mix the order within a window of utterances.

    Args:
        data: utterances.
        shuffle_size: utterances held at a time; half of them leave before more come in.
        mode: not used.
        seed: of the order.

    Yields:
        the utterances.
    """
    draw = random.Random(f"{seed}/order")
    held: list[Sample] = []
    for sample in data:
        held.append(sample)
        if len(held) >= shuffle_size:
            draw.shuffle(held)
            leaving = shuffle_size // 2
            yield from held[:leaving]
            del held[:leaving]
    draw.shuffle(held)
    yield from held


def sort(data: Iterable[Sample], sort_size: int = 500, mode: str = "train") -> Iterator[Sample]:
    """Put neighbours of similar length together: sort each run of `sort_size` utterances by mel frames.

    Args:
        data: utterances with `speech_feat`.
        sort_size: utterances sorted at a time, at most the `shuffle_size` before.
        mode: not used.

    Yields:
        the utterances.
    """
    held: list[Sample] = []
    for sample in data:
        held.append(sample)
        if len(held) >= sort_size:
            yield from sorted(held, key=_frames)
            held = []
    yield from sorted(held, key=_frames)


def batch(
    data: Iterable[Sample],
    batch_type: str = "static",
    batch_size: int = 16,
    max_frames_in_batch: int = 12000,
    mode: str = "train",
) -> Iterator[list[Sample]]:
    """Gather utterances: a fixed number of them, or as many as stay within a number of frames, padding included.

    Args:
        data: utterances with `speech_feat`.
        batch_type: "static" or "dynamic".
        batch_size: utterances of a static batch.
        max_frames_in_batch: mel frames of a dynamic batch; an utterance longer than this comes alone.
        mode: not used.

    Yields:
        lists of utterances, none empty.

    Raises:
        ValueError: another batch_type.
    """
    if batch_type not in ("static", "dynamic"):
        raise ValueError(f"batch_type is {batch_type!r}; expected static or dynamic")
    gathered: list[Sample] = []
    longest = 0
    for sample in data:
        longest = max(longest, _frames(sample))
        if batch_type == "static":
            full = len(gathered) == batch_size
        else:
            full = longest * (len(gathered) + 1) > max_frames_in_batch
        if full and gathered:
            yield gathered
            gathered, longest = [], _frames(sample)
        gathered.append(sample)
    if gathered:
        yield gathered


def padding(
    data: Iterable[list[Sample]], use_spk_embedding: bool, mode: str = "train", gan: bool = False
) -> Iterator[dict[str, Any]]:
    """Turn lists of utterances into the batches that the models read, longest mel first.

    Args:
        data: lists of utterances.
        use_spk_embedding: `embedding` is the speaker's mean vector, not the utterance's own.
        mode: not used.
        gan: add what HiFT needs: `speech` [B, N], `pitch_feat` [B, F] and their lengths.

    Yields:
        `utts`, `text` (lists of str); `text_token` [B, T] and `speech_token` [B, S] int64; `speech_feat` [B, F, 80],
        `utt_embedding`, `spk_embedding`, `embedding` [B, 192] float32; and `..._len` [B] int32 of each padded one.
        Padding is 0.
    """
    for samples in data:
        ordered = sorted(samples, key=_frames, reverse=True)
        padded: dict[str, Any] = {"utts": [s["utt"] for s in ordered], "text": [s["text"] for s in ordered]}
        columns = {
            "text_token": [torch.as_tensor(s["text_token"], dtype=torch.int64) for s in ordered],
            "speech_token": [torch.as_tensor(s["speech_token"], dtype=torch.int64) for s in ordered],
            "speech_feat": [s["speech_feat"] for s in ordered],
        }
        if gan:
            columns["speech"] = [s["speech"].squeeze(0) for s in ordered]
            columns["pitch_feat"] = [s["pitch_feat"] for s in ordered]
        for name, values in columns.items():
            padded[name] = pad_sequence(values, batch_first=True)
            padded[f"{name}_len"] = torch.tensor([value.size(0) for value in values], dtype=torch.int32)
        for name in ("utt_embedding", "spk_embedding"):
            padded[name] = torch.stack([s[name] for s in ordered])
        padded["embedding"] = padded["spk_embedding" if use_spk_embedding else "utt_embedding"]
        yield padded


def _frames(sample: Sample) -> int:
    return sample["speech_feat"].size(0)


def _crop_frames(crop: Sample, frames: int, hop_size: int, draw: random.Random) -> None:
    """Cut `speech_feat`, `pitch_feat` and `speech` of one utterance at the same frame."""
    frames_here = crop["speech_feat"].size(0)
    start = draw.randint(0, max(0, frames_here - frames))
    speech = crop["speech"][:, : frames_here * hop_size]
    crop["speech"] = _cut(speech, start * hop_size, frames * hop_size, 0.0)
    crop["speech_feat"] = _cut(crop["speech_feat"].T, start, frames, SILENT_MEL).T
    if "pitch_feat" in crop:
        crop["pitch_feat"] = _cut(crop["pitch_feat"], start, frames, 0.0)


def _cut(values: Tensor, start: int, length: int, filler: float) -> Tensor:
    """Take `length` values of the last axis from `start` on, followed by the filler where they end."""
    taken = values[..., start : start + length]
    return F.pad(taken, (0, length - taken.size(-1)), value=filler)

"""The features of many utterances in a few large tensors, from which a batch is cut without a loop over its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from cosyvoice.utils.common import IGNORE_ID
from taste.batch import NO_WORD, Batch
from taste.data import UtteranceDataset
from taste.unit_sequence import EXTRA_POSITIONS

# U utterances   N rows of all utterances   B batch   T text tokens   A Whisper frames, 50 Hz   S S3 units, 50 Hz

_POOL_BATCHES = 32  # batches are cut from pools of so many, sorted by length: little padding, and still a new mix


class PackedRows:
    """One feature of all utterances, one behind the other.

    Args:
        rows: of each utterance, [length, ...].
        padding: what stands behind an utterance's end in a batch.
        device: where to keep them.
    """

    def __init__(self, rows: Sequence[Tensor], padding: float, device: torch.device) -> None:
        self.lengths = np.array([len(row) for row in rows])
        padded = [*rows, torch.full_like(rows[0][:1], padding)]
        self.values = torch.cat(padded).to(device)  # [N + 1, ...]
        starts = np.concatenate([[0], self.lengths.cumsum()])[:-1]
        self.starts, self.device_lengths = (torch.from_numpy(part).to(device) for part in (starts, self.lengths))

    def batch(self, chosen: Sequence[int], chosen_there: Tensor) -> tuple[Tensor, Tensor]:
        """Some utterances side by side.

        Args:
            chosen: their numbers, [B].
            chosen_there: the same on the device.

        Returns:
            [B, longest, ...], floats as float32, and lengths [B], int64.
        """
        place = torch.arange(int(self.lengths[chosen].max()), device=self.values.device)
        lengths = self.device_lengths[chosen_there]
        source = torch.where(place < lengths[:, None], self.starts[chosen_there][:, None] + place, len(self.values) - 1)
        values = self.values[source]
        return values.float() if values.is_floating_point() else values, lengths


class PackedFeatures:
    """The utterances of one or more data sets, on the device; speech in float16.

    Args:
        datasets: with speakers, words and Whisper features.
        device: where to keep them and give batches.
    """

    def __init__(self, datasets: Iterable[UtteranceDataset], device: torch.device) -> None:
        examples = [dataset[index] for dataset in datasets for index in range(len(dataset))]
        self.utt_ids = [example.utt_id for example in examples]
        self.device = device
        half = torch.float16
        self.text = PackedRows([example.text for example in examples], 0.0, device)
        self.final = PackedRows([example.speech_final.to(half) for example in examples], 0.0, device)
        self.mid = PackedRows([example.speech_mid.to(half) for example in examples], 0.0, device)
        self.units = PackedRows([example.units for example in examples], IGNORE_ID, device)
        self.text_tokens = PackedRows([example.text_tokens for example in examples], 0, device)
        self.word_ids = PackedRows([example.word_ids for example in examples], NO_WORD, device)
        self.speakers = torch.stack([example.speaker for example in examples]).to(device)
        self.positions = self.text.lengths + self.units.lengths + EXTRA_POSITIONS  # of the language model, [U]

    def __len__(self) -> int:
        return len(self.utt_ids)

    def batch(
        self, chosen: Sequence[int], *, recordings: Sequence[int] | None = None, texts: Sequence[int] | None = None
    ) -> Batch:
        """Some utterances as a model reads them.

        Args:
            chosen: their numbers.
            recordings: utterances whose Whisper features they get; None: their own.
            texts: utterances whose texts they get; None: their own.

        Returns:
            the batch, on the device.
        """
        own = self.there(chosen)
        heard, heard_there = (chosen, own) if recordings is None else (recordings, self.there(recordings))
        read, read_there = (chosen, own) if texts is None else (texts, self.there(texts))
        text, text_lengths = self.text.batch(read, read_there)
        final, speech_lengths = self.final.batch(heard, heard_there)
        units, unit_lengths = self.units.batch(chosen, own)
        return Batch(
            utt_ids=tuple(self.utt_ids[number] for number in chosen),
            text=text,
            text_lengths=text_lengths,
            speech_final=final,
            speech_mid=self.mid.batch(heard, heard_there)[0],
            speech_lengths=speech_lengths,
            speaker=self.speakers[own],
            units=units,
            unit_lengths=unit_lengths,
            text_tokens=self.text_tokens.batch(read, read_there)[0],
            word_ids=self.word_ids.batch(read, read_there)[0],
        )

    def batches(self, most_positions: int, seed: int, epoch: int) -> list[list[int]]:
        """Every utterance once, in batches of similar lengths; a pure function of its arguments.

        Args:
            most_positions: of the language model in a batch, padding included; a longer utterance is one alone.
            seed: another one gives another order.
            epoch: likewise.

        Returns:
            utterance numbers of each batch.
        """
        return cut_batches(self.positions, most_positions, seed, epoch)

    def batches_by_length(self, most_positions: int) -> list[list[int]]:
        """Every utterance once, sorted by length: for evaluation.

        Args:
            most_positions: as for `batches`.

        Returns:
            utterance numbers of each batch.
        """
        return cut_batches(self.positions, most_positions)

    def there(self, numbers: Sequence[int]) -> Tensor:
        """Utterance numbers on the device; a GPU is not waited for.

        Args:
            numbers: here.

        Returns:
            the same there, int64.
        """
        here = torch.tensor(numbers)
        return here.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else here


def cut_batches(positions: np.ndarray, most_positions: int, seed: int | None = None, epoch: int = 0) -> list[list[int]]:
    """Every utterance once, in batches of similar lengths; a pure function of its arguments.

    Args:
        positions: of each utterance, in the language model, [U].
        most_positions: in a batch, padding included; a longer utterance is one alone.
        seed: another one gives another order; None: sorted by length.
        epoch: likewise.

    Returns:
        utterance numbers of each batch.
    """
    if seed is None:
        return _cut(np.argsort(positions, kind="stable"), positions, most_positions)
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(positions))
    pool_size = max(1, _POOL_BATCHES * most_positions // max(1, int(positions.mean())))
    batches = []
    for start in range(0, len(order), pool_size):
        pool = order[start : start + pool_size]
        batches += _cut(pool[np.argsort(positions[pool], kind="stable")], positions, most_positions)
    return [batches[index] for index in random.permutation(len(batches))]


def _cut(sorted_numbers: np.ndarray, positions: np.ndarray, most_positions: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    for number in sorted_numbers.tolist():
        if batches[-1] and (len(batches[-1]) + 1) * positions[number] > most_positions:
            batches.append([])
        batches[-1].append(number)
    return batches

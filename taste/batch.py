"""One utterance as the model reads it, and several of them padded side by side."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cosyvoice.utils.common import IGNORE_ID
from taste.words import word_starts

# B batch   T text tokens   A Whisper frames, 50 Hz   S S3 units, 50 Hz   D channels   L codes a word
NO_WORD = -1  # word number of padding


class Example(NamedTuple):
    """One utterance."""

    utt_id: str
    text: Tensor  # [T, D_text] float32
    speech_final: Tensor | None  # [A, D_speech] float32
    speech_mid: Tensor | None  # [A, D_speech] float32
    speaker: Tensor | None  # [D_speaker] float32
    units: Tensor  # [S] int64
    text_tokens: Tensor | None = None  # [T] int64; None where the features came without
    word_ids: Tensor | None = None  # [T] int64, the word's number of each token; None likewise

    @property
    def speech(self) -> tuple[Tensor, Tensor]:
        """The Whisper features, known to be there: final, mid."""
        assert self.speech_final is not None and self.speech_mid is not None, f"{self.utt_id} has no Whisper features"
        return self.speech_final, self.speech_mid

    @property
    def is_finite(self) -> bool:
        """Whether all features are numbers."""
        parts = (self.text, self.speech_final, self.speech_mid, self.speaker)
        return all(bool(part.isfinite().all()) for part in parts if part is not None)


@dataclass(frozen=True)
class Batch:
    """Utterances padded on the right; how much of each row is real is told by the lengths alone."""

    utt_ids: tuple[str, ...]
    text: Tensor  # [B, T, D_text] float32
    text_lengths: Tensor  # [B] int64
    speech_final: Tensor | None  # [B, A, D_speech] float32
    speech_mid: Tensor | None  # [B, A, D_speech] float32
    speech_lengths: Tensor | None  # [B] int64
    speaker: Tensor | None  # [B, D_speaker] float32
    units: Tensor  # [B, S] int64, IGNORE_ID behind each row's end
    unit_lengths: Tensor  # [B] int64
    text_tokens: Tensor | None = None  # [B, T] int64, 0 behind each row's end
    word_ids: Tensor | None = None  # [B, T] int64, NO_WORD behind each row's end
    codes: Tensor | None = None  # [B, T, L] int64; where they are, the recording's codes, read in its stead

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device.

        Args:
            device: where to.

        Returns:
            a batch whose tensors are on that device.
        """
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU reads by itself; a DataLoader asks for it by this name.

        Returns:
            a batch of page-locked tensors.
        """
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return Batch(**values | tensors)

    @property
    def finite_rows(self) -> Tensor:
        """In which rows all features are numbers, [B] bool; padding is."""
        parts = [self.text, self.speech_final, self.speech_mid, self.speaker]
        finite = [part.isfinite().flatten(1).all(dim=1) for part in parts if part is not None]
        return torch.stack(finite).all(dim=0)

    @property
    def target_count(self) -> int:
        """Targets of the whole batch: its units and one EOS a row."""
        return int(self.unit_lengths.sum()) + len(self.utt_ids)

    @property
    def word_count(self) -> int:
        """Words of the whole batch; 0 where nobody noted them."""
        return 0 if self.word_ids is None else int(word_starts(self.word_ids, self.text_lengths).sum())


def collate(examples: list[Example]) -> Batch:
    """Pad utterances side by side.

    Args:
        examples: at least one; either all or none of them have speech, and likewise a speaker, text tokens, word ids.

    Returns:
        the batch, in the order given.
    """
    text, text_lengths = _pad([example.text for example in examples])
    final, speech_lengths = _pad_if_there([example.speech_final for example in examples])
    mid, _ = _pad_if_there([example.speech_mid for example in examples])
    units, unit_lengths = _pad([example.units for example in examples], IGNORE_ID)
    speakers = [example.speaker for example in examples if example.speaker is not None]
    assert len(speakers) in (0, len(examples)), "some utterances of a batch have a speaker vector, others none"
    text_tokens, _ = _pad_if_there([example.text_tokens for example in examples])
    word_ids, _ = _pad_if_there([example.word_ids for example in examples], NO_WORD)
    return Batch(
        utt_ids=tuple(example.utt_id for example in examples),
        text=text,
        text_lengths=text_lengths,
        speech_final=final,
        speech_mid=mid,
        speech_lengths=speech_lengths,
        speaker=torch.stack(speakers) if speakers else None,
        units=units,
        unit_lengths=unit_lengths,
        text_tokens=text_tokens,
        word_ids=word_ids,
    )


def _pad(rows: list[Tensor], value: float = 0.0) -> tuple[Tensor, Tensor]:
    """The rows side by side, [B, longest, ...], and their lengths, [B]."""
    return pad_sequence(rows, batch_first=True, padding_value=value), torch.tensor([len(row) for row in rows])


def _pad_if_there(rows: list[Tensor | None], value: float = 0.0) -> tuple[Tensor | None, Tensor | None]:
    present = [row for row in rows if row is not None]
    assert len(present) in (0, len(rows)), "some utterances of a batch have Whisper features or words, others none"
    return _pad(present, value) if present else (None, None)

"""The features of a split, joined by utterance id into one data set."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cosyvoice.utils.model_dir import ModelSizes
from cosyvoice.utils.rates import WHISPER_FRAMES_PER_SECOND
from taste.batch import Example
from taste.feature_set import WORD_FIELDS, FeaturePaths, Features, open_split
from taste.utterance_selection import Selection, select_utterances

# T text tokens   A Whisper frames, 50 Hz   S S3 units, 50 Hz   D channels

UNTRIMMED_FRAMES = 1500  # what Whisper gives for any recording: 30 s, padded


class UtteranceDataset(Dataset[Example]):
    """Utterances that have all the features a model needs.

    Args:
        features: the open maps.
        selection: ids and lengths of the usable utterances.
    """

    def __init__(self, features: Features, selection: Selection) -> None:
        self.features = features
        self.selection = selection

    def __len__(self) -> int:
        return len(self.selection.utt_ids)

    def __getitem__(self, index: int) -> Example:
        example = self.without_speech(index)
        if not self.has_speech:
            return example
        final, mid = self.speech(example.utt_id)
        return example._replace(speech_final=final, speech_mid=mid)

    def without_speech(self, index: int) -> Example:
        """An utterance without its Whisper features, which are not read.

        Args:
            index: its number.

        Returns:
            all else of it.
        """
        utt_id = self.selection.utt_ids[index]
        units = torch.tensor(self.features.units[utt_id])
        text_tokens, word_ids = (self._of_tokens(utt_id, name) if self.has_words else None for name in WORD_FIELDS)
        text = self.text_embedding(utt_id)
        return Example(utt_id, text, None, None, self.speaker(utt_id), units, text_tokens, word_ids)

    def text_embedding(self, utt_id: str) -> Tensor:
        """The embeddings of an utterance's text tokens.

        Args:
            utt_id: its id.

        Returns:
            [T, D_text] float32.
        """
        return self.features.text[utt_id].float()

    def speech(self, utt_id: str) -> tuple[Tensor, Tensor]:
        """The Whisper features of an utterance.

        Args:
            utt_id: its id; the data set has Whisper features.

        Returns:
            the last layer's and the middle layer's, both [A, D] float32.
        """
        assert self.features.speech is not None
        frames = self.speech_frames(utt_id)
        speech = self.features.speech[utt_id]
        return speech["final"][:frames].float(), speech["mid"][:frames].float()

    @property
    def utt_ids(self) -> list[str]:
        """Ids of the utterances, in their order."""
        return self.selection.utt_ids

    @property
    def lengths(self) -> list[int]:
        """LM positions of each utterance."""
        return self.selection.lengths

    @property
    def has_speakers(self) -> bool:
        """Whether each utterance has a speaker vector."""
        return self.features.info is not None

    @property
    def has_speech(self) -> bool:
        """Whether each utterance has Whisper features."""
        return self.features.speech is not None

    @property
    def has_words(self) -> bool:
        """Whether each utterance has its text tokens and their words."""
        return self.selection.with_words

    @property
    def speech_width(self) -> int | None:
        """Channels of the Whisper features; None where there are none."""
        return None if self.features.speech is None else self.features.speech[self.utt_ids[0]]["final"].shape[-1]

    def info(self, utt_id: str) -> Mapping[str, Any]:
        """What stage 1 noted about an utterance.

        Args:
            utt_id: its id.

        Returns:
            text, duration_s, audio_path and more; empty without a utt2info file.
        """
        return {} if self.features.info is None else self.features.info[utt_id]

    def speaker(self, utt_id: str) -> Tensor | None:
        """The speaker vector of an utterance.

        Args:
            utt_id: its id.

        Returns:
            [D_speaker] float32; None without a utt2info file.
        """
        info = self.info(utt_id)
        return torch.as_tensor(info["spk_embedding"], dtype=torch.float32).flatten() if info else None

    def duration_seconds(self, utt_id: str) -> float | None:
        """How long the recording is.

        Args:
            utt_id: its id.

        Returns:
            seconds; None where nobody noted it.
        """
        return self.info(utt_id).get("duration_s")

    def word_ids(self, utt_id: str) -> Tensor:
        """The words of an utterance's text tokens; its Whisper features are not read.

        Args:
            utt_id: its id; the data set has words.

        Returns:
            each token's word, [T] int64.
        """
        return self._of_tokens(utt_id, "word_id")

    def speech_frames(self, utt_id: str) -> int:
        """How many Whisper frames an utterance has; they are not read.

        Args:
            utt_id: its id; the data set has Whisper features.

        Returns:
            frames, 50 a second.
        """
        assert self.features.speech is not None
        stored, units = len(self.features.speech[utt_id]["final"]), len(self.features.units[utt_id])
        return real_frames(stored, units, self.duration_seconds(utt_id))

    def recording_frames(self, utt_id: str) -> int:
        """How many of the Whisper frames are the recording, and not silence behind it.

        Args:
            utt_id: its id; the data set has Whisper features.

        Returns:
            frames, 50 a second.
        """
        return self.speech_frames(utt_id)

    def _of_tokens(self, utt_id: str, name: str) -> Tensor:
        """One number of `WORD_FIELDS` for each token of an utterance, [T] int64."""
        return torch.as_tensor(self.info(utt_id)[name], dtype=torch.int64)

    def subset(self, indices: Sequence[int]) -> "UtteranceDataset":
        """Some of the utterances.

        Args:
            indices: their numbers.

        Returns:
            a data set over the same files.
        """
        utt_ids, lengths = [self.utt_ids[index] for index in indices], [self.lengths[index] for index in indices]
        return UtteranceDataset(self.features, Selection(utt_ids, lengths, with_words=self.has_words))

    def fingerprint(self) -> str:
        """A short hash of the ids and lengths: equal for the same data in the same order."""
        text = "\n".join(f"{utt_id} {length}" for utt_id, length in zip(self.utt_ids, self.lengths, strict=True))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def open_dataset(paths: FeaturePaths, sizes: ModelSizes) -> UtteranceDataset:
    """Open the feature files of a split and keep the utterances that have everything.

    Args:
        paths: the files; `speech` and `info` may be None.
        sizes: the sizes of the model folder, which the features must have.

    Returns:
        the data set, sorted by utterance id; `selection.left_out` says what is missing.

    Raises:
        FileNotFoundError: a file is absent (all absent ones are named).
        FeatureFileError: a file cannot be read.
        ValueError: no utterance is usable, or the features are not of this model folder.
    """
    features = open_split(paths)
    selection = select_utterances(features, sizes)
    if not selection.utt_ids:
        raise ValueError(f"no utterance of {paths.units} can be used:\n{selection.describe('none usable')}")
    return UtteranceDataset(features, selection)


def real_frames(stored: int, units: int, duration_seconds: float | None) -> int:
    """How many of an utterance's stored Whisper frames are speech.

    Some scripts store the 1500 frames that Whisper gives for any recording; the rest of them is padding.

    Args:
        stored: frames in the file.
        units: S3 units of the utterance, which have the rate of the frames.
        duration_seconds: the recording's length, where it is known.

    Returns:
        frames to keep; anything but 1500 has been trimmed already and is kept.
    """
    if stored != UNTRIMMED_FRAMES:
        return stored
    expected = units if duration_seconds is None else math.ceil(duration_seconds * WHISPER_FRAMES_PER_SECOND)
    return max(1, min(stored, expected))

"""The feature files of stages 1 and 2, joined by utterance id into one data set."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cosyvoice.utils.model_dir import ModelSizes
from taste.batch import Example
from taste.feature_store import open_features, open_units, stored_bytes
from taste.utterance_ids import common_ids

# T text tokens   A Whisper frames, 50 Hz   S S3 units, 50 Hz   D channels

FRAMES_PER_SECOND = 50
UNTRIMMED_FRAMES = 1500  # what Whisper gives for any recording: 30 s, padded
MAX_LM_POSITIONS = 5000  # positions the LM's table of relative positions was made for
EXTRA_POSITIONS = 3  # [sos] [speaker] [task]
WORD_FIELDS = ("text_token", "word_id")  # of utt2info: a number for each text token
HELD_OUT_SHARE = 0.1
HELD_OUT_SEED = 0  # one for all runs: what a run has learned from is no other's test set
MOST_UNITS_OFF = 3  # by which an utterance's units may be more or fewer than its recording has
MOST_HELD_OUT = 0.25  # of the utterances; where whole speakers are more, single utterances are held out
SHOWN_IDS = 3


@dataclass(frozen=True)
class FeaturePaths:
    """Where the features of one split lie."""

    units: Path
    text: Path
    speech: Path | None = None  # not needed by text_only
    info: Path | None = None  # speaker vectors and durations; the model goes without when the file is absent


@dataclass(frozen=True)
class Features:
    """The open maps from utterance id to feature; values are read when they are asked for."""

    units: Mapping[str, list[int]]
    text: Mapping[str, Tensor]
    speech: Mapping[str, Mapping[str, Tensor]] | None  # "mid" and "final" of each
    info: Mapping[str, Mapping[str, Any]] | None


@dataclass
class Selection:
    """Which utterances can be used, and why the others cannot."""

    utt_ids: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # LM positions of each
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason -> utterance ids
    with_words: bool = False  # all of them have text tokens and word ids

    def describe(self, name: str) -> str:
        """One line a person reads, and one more for each reason.

        Args:
            name: what to call this data set.

        Returns:
            text without a line break at its end.
        """
        lines = [f"{name}: {len(self.utt_ids)} utterances, {sum(len(ids) for ids in self.left_out.values())} left out"]
        for reason, ids in self.left_out.items():
            shown = ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(ids) > SHOWN_IDS else "")
            lines.append(f"  {len(ids)} {reason}: {shown}")
        return "\n".join(lines)


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


def spread_evenly(count: int, wanted: int) -> list[int]:
    """Choose some of many, from all of them alike: data is often sorted by speaker.

    Args:
        count: how many there are.
        wanted: how many to choose.

    Returns:
        rising numbers below `count`, all of them where fewer are there than wanted.
    """
    wanted = min(wanted, count)
    return [(2 * number + 1) * count // (2 * wanted) for number in range(wanted)]  # the middle of each part


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
    needed = [path for path in (paths.units, paths.text, paths.speech, paths.info) if path is not None]
    absent = [path for path in needed if not features_exist(path)]
    if absent:
        raise FileNotFoundError(
            "missing feature files: "
            + ", ".join(str(path) for path in absent)
            + "\nS3 units are made by `bash s3.sh --model-dir <folder>`, "
            "the others by `python utt2text_and_feature.py --model-dir <folder> --jsonl <manifest>`"
        )
    text = open_features(paths.text)
    features = Features(
        units=open_units(paths.units, known_ids=text),
        text=text,
        speech=None if paths.speech is None else open_features(paths.speech, known_ids=text),
        info=None if paths.info is None else open_features(paths.info, known_ids=text),
    )
    selection = select_utterances(features, sizes)
    if not selection.utt_ids:
        raise ValueError(f"no utterance of {paths.units} can be used:\n{selection.describe('none usable')}")
    return UtteranceDataset(features, selection)


def features_exist(path: Path) -> bool:
    """Whether a feature file is there, as one `.pt` or as its chunks.

    Args:
        path: the `.pt`.

    Returns:
        True where `open_features` would find something.
    """
    return stored_bytes(path) > 0


def select_utterances(features: Features, sizes: ModelSizes) -> Selection:
    """Sort the utterances into usable ones and ones that lack something.

    Args:
        features: the open maps.
        sizes: the sizes that the features must have.

    Returns:
        the usable ids, sorted, and the reasons for leaving the others out.

    Raises:
        ValueError: nothing is in all the files (with the key schemes seen), or a feature's width or a unit's number is
            not of this model folder.
    """
    named = {"S3 units": features.units, "text embeddings": features.text}
    if features.speech is not None:
        named["Whisper features"] = features.speech
    if features.info is not None:
        named["utterance info"] = features.info
    common = set(common_ids(named))
    selection = Selection()
    for utt_id in sorted(set().union(*named.values())):
        missing = [name for name, source in named.items() if utt_id not in source]
        reason = f"without {' and '.join(missing)}" if utt_id not in common else _reason_to_leave_out(features, utt_id)
        if reason:
            selection.left_out.setdefault(reason, []).append(utt_id)
            continue
        first_id = selection.utt_ids[0] if selection.utt_ids else utt_id
        _check_sizes(features, utt_id, sizes, first_id)
        selection.utt_ids.append(utt_id)
        selection.lengths.append(len(features.text[utt_id]) + len(features.units[utt_id]) + EXTRA_POSITIONS)
    selection.with_words = bool(selection.utt_ids) and all(
        features.info is not None and all(name in features.info[utt_id] for name in WORD_FIELDS)
        for utt_id in selection.utt_ids
    )
    return selection


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
    expected = units if duration_seconds is None else math.ceil(duration_seconds * FRAMES_PER_SECOND)
    return max(1, min(stored, expected))


def hold_out(dataset: UtteranceDataset, seed: int) -> tuple[UtteranceDataset, UtteranceDataset, str]:
    """Split about a tenth off, for when there is no test set: whole speakers, or utterances where these are few.

    Whether a speaker (or an utterance) is held out depends on its name, not on the others, unless none would be. So
    data that grows leaves each where it was, and a run that goes on with another's weights is not tested on what that
    one has learned from; but for data that has speakers enough to hold whole ones out only since it has grown.

    Args:
        dataset: the utterances; at least two.
        seed: another seed holds out others.

    Returns:
        the larger part, the part held out, and a sentence that says what was done.

    Raises:
        ValueError: there is only one utterance.
    """
    if len(dataset) < 2:
        raise ValueError("there is no test set, and one training utterance cannot be split; make the TEST_ features")
    speakers = [dataset.info(utt_id).get("speaker") for utt_id in dataset.utt_ids]
    named = [speaker for speaker in speakers if speaker is not None]
    by_speaker = len(named) == len(speakers) and len(set(named)) > 1
    held_out = _draw_groups(named if by_speaker else dataset.utt_ids, seed)
    if by_speaker and sum(speaker in held_out for speaker in speakers) > MOST_HELD_OUT * len(dataset):
        by_speaker = False
        held_out = _draw_groups(dataset.utt_ids, seed)
    group_of = speakers if by_speaker else dataset.utt_ids
    test = [index for index, group in enumerate(group_of) if group in held_out]
    train = [index for index, group in enumerate(group_of) if group not in held_out]
    what = f"{len(held_out)} of {len(set(speakers))} speakers, " if by_speaker else ""
    sentence = f"no test set: {what}{len(test)} of {len(dataset)} training utterances are held out (seed {seed})"
    return dataset.subset(train), dataset.subset(test), sentence


def _draw_groups(group_of: Sequence[str], seed: int) -> set[str]:
    """About a tenth of the groups of utterances, one at least, not all of them."""
    drawn = {group: _between_0_and_1(f"{seed}/{group}") for group in set(group_of)}
    ordered = sorted(drawn, key=drawn.__getitem__)
    count = sum(value < HELD_OUT_SHARE for value in drawn.values())
    return set(ordered[: min(max(count, 1), len(ordered) - 1)])


def _between_0_and_1(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def _reason_to_leave_out(features: Features, utt_id: str) -> str | None:
    """Why an utterance that is in all files cannot be used; None if it can."""
    units, text = features.units[utt_id], features.text[utt_id]
    if not units:
        return "without S3 units"
    if len(text) == 0:
        return "without text tokens"
    if features.speech is not None and len(features.speech[utt_id]["final"]) == 0:
        return "without Whisper frames"
    if features.info is not None and features.info[utt_id].get("spk_embedding") is None:
        return "without a speaker vector"
    if len(text) + len(units) + EXTRA_POSITIONS > MAX_LM_POSITIONS:
        return f"longer than the {MAX_LM_POSITIONS} positions of the language model"
    duration_s = features.info[utt_id].get("duration_s") if features.info is not None else None
    if duration_s is not None and abs(len(units) - duration_s * FRAMES_PER_SECOND) > MOST_UNITS_OFF:
        return (
            f"with other S3 units than {FRAMES_PER_SECOND} a second of their recordings; where they were made of an "
            "earlier corpus, remove them and run s3.sh again"
        )
    return None


def _check_sizes(features: Features, utt_id: str, sizes: ModelSizes, first_id: str) -> None:
    """Hold one utterance's widths and unit numbers against the model folder and the first utterance."""
    problems = []
    text_width = features.text[utt_id].shape[-1]
    if text_width != sizes.text_width:
        problems.append(f"its text embedding is {text_width} wide, the model's is {sizes.text_width}")
    lowest, highest = min(features.units[utt_id]), max(features.units[utt_id])
    if lowest < 0 or highest >= sizes.speech_vocab:
        problems.append(f"its S3 units reach from {lowest} to {highest}, the model knows 0 to {sizes.speech_vocab - 1}")
    if features.info is not None:
        speaker_width = torch.as_tensor(features.info[utt_id]["spk_embedding"]).numel()
        if speaker_width != sizes.spk_width:
            problems.append(f"its speaker vector has {speaker_width} numbers, the model reads {sizes.spk_width}")
        tokens = len(features.text[utt_id])
        problems += [
            f"its {name} is for {len(features.info[utt_id][name])} text tokens, its text embedding for {tokens}"
            for name in WORD_FIELDS
            if name in features.info[utt_id] and len(features.info[utt_id][name]) != tokens
        ]
    if features.speech is not None:
        mid, final = features.speech[utt_id]["mid"].shape, features.speech[utt_id]["final"].shape
        first_width = features.speech[first_id]["final"].shape[-1]
        if mid != final:
            problems.append(f"its Whisper features differ in shape: mid {list(mid)}, final {list(final)}")
        if final[-1] != first_width:
            problems.append(f"its Whisper features are {final[-1]} wide, those of {first_id} {first_width}")
    if problems:
        raise ValueError(
            f"utterance {utt_id} does not fit the model folder: "
            + "; ".join(problems)
            + "\nMake the features again with this model folder: python utt2text_and_feature.py --model-dir <folder> "
            "--jsonl <manifest>, and bash s3.sh --model-dir <folder>"
        )

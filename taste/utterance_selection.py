"""Sorts the utterances of a split into those that a model can use, and those that lack something."""

from dataclasses import dataclass, field

import torch

from cosyvoice.utils.abridge import abridge
from cosyvoice.utils.model_dir import ModelSizes
from cosyvoice.utils.rates import S3_UNITS_PER_SECOND
from taste.feature_set import WORD_FIELDS, Features
from taste.unit_sequence import EXTRA_POSITIONS, MAX_LM_POSITIONS
from taste.utterance_ids import common_ids

MOST_UNITS_OFF = 3  # by which an utterance's units may be more or fewer than its recording has
SHOWN_IDS = 3


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
            lines.append(f"  {len(ids)} {reason}: {abridge(ids, SHOWN_IDS)}")
        return "\n".join(lines)


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
    if duration_s is not None and abs(len(units) - duration_s * S3_UNITS_PER_SECOND) > MOST_UNITS_OFF:
        return (
            f"with other S3 units than {S3_UNITS_PER_SECOND} a second of their recordings; where they were made of an "
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

"""How close generated S3 units come to the true ones, and how well text is found in a recording."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosyvoice.utils.rates import WHISPER_FRAMES_PER_SECOND

# T text tokens   A Whisper frames, 50 Hz


@dataclass(frozen=True)
class UnitMetrics:
    """Results over a set of utterances; sums are taken over the set before dividing."""

    utterances: int
    unit_error_rate: float  # insertions + deletions + substitutions, for each true unit; can exceed 1
    length_ratio: float  # units generated for each true unit
    eos_rate: float  # share of the utterances that the model itself ended
    bleu: float  # 0..100, up to 4-grams
    unigram_f1: float  # 0..1, units in common whatever their order

    def to_dict(self) -> dict[str, Any]:
        """The results by name, for JSON."""
        return dict(vars(self))


def compare_units(
    true: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]], ended: Sequence[bool]
) -> UnitMetrics:
    """Measure generated units against the true ones.

    Args:
        true: the units of each utterance, none of them empty.
        predicted: the units generated for it; may be empty.
        ended: whether the model ended it with EOS, rather than the length limit.

    Returns:
        the results.

    Raises:
        ValueError: the numbers of utterances differ, there are none, or one has no true units.
    """
    import jiwer
    import sacrebleu

    if not len(true) == len(predicted) == len(ended) or not true:
        raise ValueError(
            f"expected as many predictions as references, got {len(predicted)}, {len(ended)} and {len(true)}"
        )
    if not all(true):
        raise ValueError("an utterance has no true units to compare with")
    references, hypotheses = [_as_words(units) for units in true], [_as_words(units) for units in predicted]
    true_count, predicted_count = sum(map(len, true)), sum(map(len, predicted))
    common = sum((Counter(a) & Counter(b)).total() for a, b in zip(true, predicted, strict=True))
    return UnitMetrics(
        utterances=len(true),
        unit_error_rate=jiwer.wer(references, hypotheses),
        length_ratio=predicted_count / true_count,
        eos_rate=sum(ended) / len(ended),
        bleu=sacrebleu.corpus_bleu(hypotheses, [references], tokenize="none", force=True).score,
        unigram_f1=2 * common / (true_count + predicted_count),
    )


def describe_attention(weights: Sequence[Tensor]) -> dict[str, float]:
    """Whether tokens look at the recording in the order in which they are spoken, and how closely.

    Args:
        weights: attention of each utterance, [T, A], each row's sum is 1.

    Returns:
        monotonicity: share of neighbouring tokens of which the later looks at a later place; looking anywhere gives .5,
        speech that is followed 1. width_seconds: standard deviation of where one token looks, mean over tokens.
        chance_width_seconds: that of a token which looks at all frames alike.
    """
    risen, pairs, widths, chance = 0, 0, [], []
    for rows in weights:
        times = torch.arange(rows.shape[1], device=rows.device) / WHISPER_FRAMES_PER_SECOND
        centres = rows @ times  # [T], seconds
        risen += int((centres.diff() > 0).sum())
        pairs += len(centres) - 1
        widths += (rows * (times - centres[:, None]).square()).sum(dim=1).sqrt().tolist()
        chance += [float(times.std(correction=0))] * len(rows)
    return {
        "monotonicity": risen / max(1, pairs),
        "width_seconds": sum(widths) / len(widths),
        "chance_width_seconds": sum(chance) / len(chance),
    }


def on_recording(attention: Tensor, frames: int) -> Tensor:
    """The attention to a recording alone, where silence behind it could be looked at too.

    Args:
        attention: [T, A], each row's sum is 1.
        frames: how many of the A are the recording.

    Returns:
        [T, frames], each row's sum 1; what was given, where there is nothing behind the recording.
    """
    if frames >= attention.shape[1]:
        return attention
    heard = attention[:, :frames]
    return heard / heard.sum(dim=1, keepdim=True).clamp(min=torch.finfo(heard.dtype).tiny)


def _as_words(units: Sequence[int]) -> str:
    """The units as the libraries for text want them."""
    return " ".join(map(str, units))

"""Signs that a transcript is not what its recording says."""

import math

import torch
from torch import Tensor

from taste.words import word_spans

# T text tokens   A Whisper frames, 50 Hz

MIN_UNITS_PER_TOKEN, MAX_UNITS_PER_TOKEN = 2.0, 40.0  # of speech; a little wider than what generation allows
BLURRED_SHARE = 0.97  # of the entropy of looking everywhere alike: more says that nothing was found


def misfits(word_ids: Tensor, frames: int, attention: Tensor | None = None) -> list[str]:
    """Look for signs that text and recording do not belong together.

    Args:
        word_ids: the word's number of each token, [T].
        frames: length of the recording at 50 Hz: S3 units or Whisper frames.
        attention: where each token looks, [T, A], each row's sum is 1; None where that is not known.

    Returns:
        a phrase for each sign; none where all is well.
    """
    words, ratio = len(word_spans(word_ids)), frames / len(word_ids)
    signs = []
    if frames < words:
        signs.append(f"{words} words in {frames} frames (50 a second): some words have no sound of their own")
    elif not MIN_UNITS_PER_TOKEN <= ratio <= MAX_UNITS_PER_TOKEN:
        signs.append(
            f"{frames} frames for {len(word_ids)} text tokens, {ratio:.1f} each; speech has "
            f"{MIN_UNITS_PER_TOKEN:g} to {MAX_UNITS_PER_TOKEN:g}"
        )
    if attention is not None and (blur := blurredness(attention)) > BLURRED_SHARE:
        signs.append(f"the text is found nowhere in the recording (attention is {blur:.0%} of evenly spread)")
    return signs


def blurredness(attention: Tensor) -> float:
    """How evenly tokens look at all frames.

    Args:
        attention: [T, A], each row's sum is 1.

    Returns:
        mean entropy as a share of the largest there is: 0 where each looks at one frame, 1 where at all alike.
    """
    if attention.shape[1] < 2:
        return 0.0
    entropies = -torch.special.xlogy(attention, attention).sum(dim=1)
    return float(entropies.mean()) / math.log(attention.shape[1])

"""The schedule of the learning rates."""

import math

LAST_LR_SHARE = 0.05  # of the peak, where the cosine ends


def share_of_peak(step: int, total_steps: int, warmup_steps: int) -> float:
    """The schedule of all learning rates: a straight warm-up, then a cosine down to a small share of the peak.

    Args:
        step: its number, from 0.
        total_steps: steps of the whole run.
        warmup_steps: steps until the peak.

    Returns:
        what the peak is multiplied with.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return LAST_LR_SHARE + (1 - LAST_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

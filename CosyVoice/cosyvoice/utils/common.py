"""Sampling, accuracy, cross-fading and seeding as published, shared by the models and the command line.

# B batch  L positions  V vocabulary
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

IGNORE_ID = -1  # target of the positions that carry no loss


def set_all_random_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (every CUDA device included).

    Args:
        seed: any integer of at least 0.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # seeds the CUDA generators as well


def th_accuracy(pad_outputs: Tensor, pad_targets: Tensor, ignore_label: int) -> Tensor:
    """Share of the positions whose best-scored token is the target.

    Args:
        pad_outputs: scores, [B * L, V], rows in the order of `pad_targets`.
        pad_targets: wanted tokens, [B, L], int64.
        ignore_label: target value of the positions that do not count.

    Returns:
        0-d float32 tensor in [0, 1], without gradient; nan where no position counts.

    Source: FunAudioLLM/CosyVoice cosyvoice/utils/common.py @ ace7c47.
    """
    best = pad_outputs.detach().argmax(dim=-1).view_as(pad_targets)
    counted = pad_targets != ignore_label
    return ((best == pad_targets) & counted).sum() / counted.sum()


def nucleus_sampling(weighted_scores: Tensor, top_p: float = 0.8, top_k: int = 25) -> int:
    """Draw a token among the likeliest ones.

    Those are the shortest run of tokens, in order of falling probability, that holds at least `top_p` of the
    probability, cut at `top_k` tokens. Exactly one draw is taken from torch's generator.

    Args:
        weighted_scores: log-probabilities or logits, [V], float.
        top_p: probability that the run must reach, > 0.
        top_k: most tokens in the run, >= 1.

    Returns:
        The token's id.

    Source: FunAudioLLM/CosyVoice cosyvoice/utils/common.py @ ace7c47.
    """
    # The sort is stable, so equal scores leave in order of id whatever the device.
    probability, token = weighted_scores.softmax(dim=0).sort(descending=True, stable=True)
    probability, token = probability[:top_k], token[:top_k]
    kept = 1 + int((probability.cumsum(dim=0)[:-1] < top_p).sum())
    drawn = probability[:kept].multinomial(1, replacement=True)
    return int(token[drawn])


def random_sampling(weighted_scores: Tensor, decoded_tokens: Sequence[int], sampling: int) -> int:
    """Draw a token from the whole distribution.

    Args:
        weighted_scores: log-probabilities or logits, [V], float.
        decoded_tokens: unused; every sampler takes the same arguments.
        sampling: unused, likewise.

    Returns:
        The token's id.

    Source: FunAudioLLM/CosyVoice cosyvoice/utils/common.py @ ace7c47.
    """
    return int(weighted_scores.softmax(dim=0).multinomial(1, replacement=True))


def ras_sampling(
    weighted_scores: Tensor,
    decoded_tokens: Sequence[int],
    sampling: int,
    top_p: float = 0.8,
    top_k: int = 25,
    win_size: int = 10,
    tau_r: float = 0.1,
) -> int:
    """Repetition-aware sampling (VALL-E 2): a nucleus draw, repeated over everything else where it loops.

    A token that fills at least `tau_r` of the last `win_size` places is struck out, and a second draw is taken
    from the whole remaining distribution. The scores of the caller are left as they are.

    Args:
        weighted_scores: log-probabilities or logits, [V], float.
        decoded_tokens: the tokens so far, oldest first.
        sampling: passed on to `random_sampling`, which ignores it.
        top_p: see `nucleus_sampling`.
        top_k: see `nucleus_sampling`.
        win_size: how many of the last tokens are searched for the drawn one.
        tau_r: share of the window from which a token counts as repeated.

    Returns:
        The token's id.

    Source: FunAudioLLM/CosyVoice cosyvoice/utils/common.py @ ace7c47.
    """
    token = nucleus_sampling(weighted_scores, top_p=top_p, top_k=top_k)
    repeats = sum(int(past) == token for past in decoded_tokens[-win_size:])
    if repeats < win_size * tau_r:
        return token
    others = weighted_scores.clone()
    others[token] = -torch.inf
    return random_sampling(others, decoded_tokens, sampling)


def fade_in_out(fade_in_mel: Tensor, fade_out_mel: Tensor, window: Tensor | np.ndarray) -> Tensor:
    """Cross-fade the end of one piece into the start of the next.

    Args:
        fade_in_mel: the next piece, [..., N], mel frames or samples.
        fade_out_mel: the piece before it, [..., M]; only its last `len(window) // 2` values are used.
        window: weights; the first half rises over the next piece, the second half falls over the last one.

    Returns:
        A copy of `fade_in_mel` whose first `len(window) // 2` values are the mixture.

    Raises:
        ValueError: one of the pieces is shorter than the overlap.

    Source: FunAudioLLM/CosyVoice cosyvoice/utils/common.py @ ace7c47.
    """
    overlap = len(window) // 2
    if min(fade_in_mel.size(-1), fade_out_mel.size(-1)) < overlap:
        raise ValueError(
            f"cannot cross-fade over {overlap} values: the pieces hold {fade_out_mel.size(-1)} (before) and "
            f"{fade_in_mel.size(-1)} (next); use a shorter window or longer pieces"
        )
    weights = torch.as_tensor(window, dtype=fade_in_mel.dtype, device=fade_in_mel.device)
    tail = fade_out_mel[..., fade_out_mel.size(-1) - overlap :].to(fade_in_mel)
    mixed = fade_in_mel.clone()
    mixed[..., :overlap] = mixed[..., :overlap] * weights[:overlap] + tail * weights[overlap : 2 * overlap]
    return mixed

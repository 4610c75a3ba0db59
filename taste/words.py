"""Which text tokens make up a word, and one vector for all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from taste.lengths import valid_mask

# B batch   T text tokens   D channels


def word_spans(word_ids: Sequence[int] | Tensor) -> list[tuple[int, int]]:
    """The words of one utterance: runs of tokens with equal numbers.

    Args:
        word_ids: the word's number of each token, [T], without padding.

    Returns:
        first token, and the one behind the last, of each word, in order.
    """
    ids = word_ids.tolist() if isinstance(word_ids, Tensor) else list(word_ids)
    starts = [token for token, number in enumerate(ids) if token == 0 or number != ids[token - 1]]
    return list(zip(starts, [*starts, len(ids)][1:], strict=True))


def word_starts(word_ids: Tensor, text_lengths: Tensor) -> Tensor:
    """Mark the first token of each word.

    Args:
        word_ids: the word's number of each token, [B, T], int64, anything at padding.
        text_lengths: tokens of each row, [B], int64.

    Returns:
        [B, T], bool; False at padding.
    """
    return _run_starts(word_ids) & valid_mask(text_lengths, word_ids.shape[1])


def word_mean(vectors: Tensor, word_ids: Tensor, text_lengths: Tensor, *, padding_joins_word_0: bool = False) -> Tensor:
    """Replace the vectors of a word's tokens by their mean; the length stays.

    Args:
        vectors: one for each token, [B, T, D], float.
        word_ids: the word's number of each token, [B, T], int64, anything at padding.
        text_lengths: tokens of each row, [B], int64.
        padding_joins_word_0: what the published code does, for parity with it: padding is read as word 0, and a word is
            averaged only where it ends no later than one place behind the row's end (the end token counts as text). So
            a row of one word that is shorter than the batch, all of it word 0, is not averaged, or together with
            padding, while the same row alone is.

    Returns:
        [B, T, D]; a padded token keeps its vector.

    Source: arXiv 2504.07053, section 3.1; taste_speech/modules_taste/audio_joint_encoder_segmenter.py @ 301bce2.
    """
    tokens = vectors.shape[1]
    starts = _run_starts(word_ids)
    if not padding_joins_word_0:
        # Behind a row's end every place is a run of its own: it joins no word, and its mean is itself.
        starts = starts | ~valid_mask(text_lengths, tokens)
    run_of = starts.long().cumsum(dim=1) - 1  # [B, T]
    means, ends = _mean_of_runs(vectors, run_of)
    averaged = means.gather(1, _over_channels(run_of, vectors))
    if padding_joins_word_0:
        used = ends.gather(1, run_of) <= text_lengths[:, None] + 1
        averaged = torch.where(used[:, :, None], averaged, vectors)
    return averaged


def _run_starts(word_ids: Tensor) -> Tensor:
    """[B, T], bool: the first place of each run of equal numbers."""
    starts = torch.ones_like(word_ids, dtype=torch.bool)
    starts[:, 1:] = word_ids[:, 1:] != word_ids[:, :-1]
    return starts


def _mean_of_runs(vectors: Tensor, run_of: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each run [B, T, D], runs first and then zeros; and the place behind its end [B, T], int64."""
    counts = torch.zeros_like(run_of).scatter_add(1, run_of, torch.ones_like(run_of))
    sums = torch.zeros_like(vectors).scatter_add(1, _over_channels(run_of, vectors), vectors)
    return sums / counts.clamp(min=1)[:, :, None], counts.cumsum(dim=1)


def _over_channels(index: Tensor, vectors: Tensor) -> Tensor:
    return index[:, :, None].expand_as(vectors)

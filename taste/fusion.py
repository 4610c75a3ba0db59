"""How encoded text and encoded speech become one sequence that the language model reads."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

# B batch   T text tokens   D channels

START_WEIGHTS = {  # before the softmax, speech first
    "balance": (1.0, 1.0),  # both count a half
    "zero_audio": (-2.0, 2.0),  # 98 % text: training starts near the model that knows the text alone
}


class Fused(NamedTuple):
    """What the language model reads in place of the text."""

    vectors: Tensor  # [B, T', D]; padding means nothing
    lengths: Tensor  # [B] int64


class WeightedSum(nn.Module):
    """Text and speech, added with two learned weights that sum to 1.

    Args:
        start: where the weights start, one of `START_WEIGHTS`.
        normalize: bring every vector to zero mean and unit variance before.

    Raises:
        ValueError: there is no such start.

    Source: arXiv 2504.07053, section 3.2; taste_speech/modules_taste/fusion.py @ 301bce2.
    """

    def __init__(self, start: str = "balance", normalize: bool = False) -> None:
        super().__init__()
        if start not in START_WEIGHTS:
            raise ValueError(f"the weighted sum starts from {', '.join(START_WEIGHTS)}; got {start!r}")
        self.normalize = normalize
        self.weights = nn.Parameter(torch.tensor(START_WEIGHTS[start]))  # [2], speech first, as released

    def forward(self, text: Tensor, text_lengths: Tensor, audio: Tensor, audio_lengths: Tensor) -> Fused:
        """Add two sequences of equal lengths.

        Args:
            text: encoded text, [B, T, D].
            text_lengths: tokens of each row, [B], int64.
            audio: encoded speech, one vector a text token, [B, T, D].
            audio_lengths: equal to `text_lengths`.

        Returns:
            vectors [B, T, D], and the lengths unchanged.

        Raises:
            ValueError: the sequences have different sizes or lengths.
        """
        _check_same_lengths(text, text_lengths, audio, audio_lengths)
        if self.normalize:
            text, audio = (F.layer_norm(vectors, vectors.shape[-1:]) for vectors in (text, audio))
        of_audio, of_text = self.weights.softmax(dim=0)
        return Fused(of_audio * audio + of_text * text, text_lengths)


class Sum(nn.Module):
    """Text and speech, added as they are; nothing to learn."""

    def forward(self, text: Tensor, text_lengths: Tensor, audio: Tensor, audio_lengths: Tensor) -> Fused:
        """Add two sequences of equal lengths; see `WeightedSum.forward`.

        Args:
            text: [B, T, D].
            text_lengths: [B], int64.
            audio: [B, T, D].
            audio_lengths: equal to `text_lengths`.

        Returns:
            vectors [B, T, D], and the lengths unchanged.

        Raises:
            ValueError: the sequences have different sizes or lengths.
        """
        _check_same_lengths(text, text_lengths, audio, audio_lengths)
        return Fused(text + audio, text_lengths)


class Concat(nn.Module):
    """Text and speech, one behind the other; each row is joined unpadded and padded afterwards.

    Args:
        audio_first: speech before text, or behind it.
        separator_width: D, to put one learned vector between the two; None: nothing.
        padding_value: what stands behind a row's end; the published code has -1.

    Source: taste_speech/modules_taste/fusion.py @ 301bce2.
    """

    def __init__(
        self, audio_first: bool = True, separator_width: int | None = None, padding_value: float = 0.0
    ) -> None:
        super().__init__()
        self.audio_first = audio_first
        self.padding_value = padding_value
        self.sep_embed = None if separator_width is None else nn.Parameter(1e-5 * torch.rand(1, separator_width))

    def forward(self, text: Tensor, text_lengths: Tensor, audio: Tensor, audio_lengths: Tensor) -> Fused:
        """Join two sequences; their lengths may differ.

        Args:
            text: encoded text, [B, T, D].
            text_lengths: tokens of each row, [B], int64.
            audio: encoded speech, [B, T2, D].
            audio_lengths: vectors of each row, [B], int64.

        Returns:
            vectors [B, T', D] and their lengths [B].
        """
        between = [] if self.sep_embed is None else [self.sep_embed]
        rows = []
        for row, (texts, sounds) in enumerate(zip(text_lengths.tolist(), audio_lengths.tolist(), strict=True)):
            first, second = audio[row, :sounds], text[row, :texts]
            if not self.audio_first:
                first, second = second, first
            rows.append(torch.cat([first, *between, second]))
        lengths = text_lengths + audio_lengths + len(between)
        return Fused(pad_sequence(rows, batch_first=True, padding_value=self.padding_value), lengths)


def build_fusion(name: str, *, width: int, start: str = "balance") -> nn.Module:
    """Build a fusion by its name.

    Args:
        name: `weighted_sum`, `sum`, `concat` or `concat_with_sep`.
        width: D.
        start: see `WeightedSum`; the others do not look at it.

    Returns:
        the module; `forward(text, text_lengths, audio, audio_lengths)` gives `Fused`.

    Raises:
        ValueError: there is no such fusion, or no such start.
    """
    fusions: dict[str, Callable[[], nn.Module]] = {
        "weighted_sum": lambda: WeightedSum(start),
        "sum": Sum,
        "concat": Concat,
        "concat_with_sep": lambda: Concat(separator_width=width),
    }
    if name not in fusions:
        raise ValueError(f"FUSION is {name!r}; expected one of {', '.join(fusions)}")
    return fusions[name]()


def _check_same_lengths(text: Tensor, text_lengths: Tensor, audio: Tensor, audio_lengths: Tensor) -> None:
    # One and the same tensor is the usual case, and costs no wait for a GPU.
    same_lengths = text_lengths is audio_lengths or torch.equal(text_lengths, audio_lengths)
    if text.shape != audio.shape or not same_lengths:
        raise ValueError(
            f"only sequences of equal lengths can be added: text {list(text.shape)} with lengths "
            f"{text_lengths.tolist()}, speech {list(audio.shape)} with lengths {audio_lengths.tolist()}; "
            "FUSION = 'concat' takes others"
        )

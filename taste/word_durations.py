"""How much the durations of words differ between two recordings of a text."""

from collections.abc import Sequence
from typing import NamedTuple

from taste.word_timing import Word

DURATION_TOLERANCE_S = 0.05  # within which a word's duration is kept
DURATION_WINDOW_S = 0.025  # below which it is kept in the published evaluation of TASTE (tools/.local there, @ 301bce2)
ROUNDING_S = 1e-6  # that must not push a difference over an edge: times are multiples of 10 or 20 ms


class DurationMetrics(NamedTuple):
    """Durations of the words that two recordings have in common."""

    words: int  # compared
    consistent: int  # of these, whose durations differ by the tolerance at most
    inside_window: int  # of these, whose durations differ by less than DURATION_WINDOW_S
    difference_s: float  # sum of the absolute differences
    reference_s: float  # sum of the durations in the reference


def compare_durations(reference: Sequence[Word], other: Sequence[Word]) -> DurationMetrics:
    """Compare how long each word lasts, where the words agree.

    Args:
        reference: the words of the recording in order.
        other: those of another sound of the same text.

    Returns:
        counts and sums; of no words where none agree.
    """
    durations = [
        (reference[i].end_s - reference[i].start_s, other[j].end_s - other[j].start_s)
        for i, j in agreeing_words(reference, other)
    ]
    differences = [abs(theirs - ours) for ours, theirs in durations]
    return DurationMetrics(
        words=len(durations),
        consistent=sum(difference <= DURATION_TOLERANCE_S + ROUNDING_S for difference in differences),
        inside_window=sum(difference < DURATION_WINDOW_S - ROUNDING_S for difference in differences),
        difference_s=sum(differences),
        reference_s=sum(ours for ours, _ in durations),
    )


def agreeing_words(reference: Sequence[Word], other: Sequence[Word]) -> list[tuple[int, int]]:
    """Find the words that a best alignment of two rows of words has in common, wherever in time they lie.

    Args:
        reference: a row of words.
        other: another one.

    Returns:
        the places of each, in `reference` and in `other`.
    """
    import jiwer

    if not reference or not other:
        return []
    # numbers in place of words, whatever is in them: jiwer divides at blanks
    numbers = {text: str(number) for number, text in enumerate({word.text for word in (*reference, *other)})}
    ours, theirs = (" ".join(numbers[word.text] for word in row) for row in (reference, other))
    return [
        pair
        for piece in jiwer.process_words(ours, theirs).alignments[0]
        if piece.type == "equal"
        for pair in zip(
            range(piece.ref_start_idx, piece.ref_end_idx), range(piece.hyp_start_idx, piece.hyp_end_idx), strict=True
        )
    ]

"""Says when each word of a recording begins and ends."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from taste.text_normalisation import normalise, word_goes_on


class Word(NamedTuple):
    """A word that was heard, or looked for, in a recording."""

    text: str  # as `normalise` leaves it
    start_s: float
    end_s: float


def timed_words(pieces: Sequence[Mapping[str, Any]]) -> list[Word]:
    """Make words of the timed pieces that a recogniser divides what it wrote into.

    Where a language writes no blanks, a piece is a character, or a token of a few, and so is each part of a foreign
    word among them: the parts of a word are put together again.

    Args:
        pieces: in order, each with `text`, blanks included, and `timestamp`, (start, end) in seconds or None.

    Returns:
        the words as `normalise` leaves them; several in one piece share its time evenly, and what has no start or no
        end is left out.
    """
    whole: list[tuple[str, float | None, float | None]] = []
    for piece in pieces:
        text, (start, end) = piece["text"], piece["timestamp"]
        if whole and word_goes_on(whole[-1][0], text):
            before, start, _ = whole.pop()
            text = before + text
        whole.append((text, start, end))
    words = []
    for text, start, end in whole:
        parts = normalise(text).split()
        if start is not None and end is not None:
            times = [start + (end - start) * number / max(len(parts), 1) for number in range(len(parts) + 1)]
            words += [Word(part, *times[number : number + 2]) for number, part in enumerate(parts)]
    return words

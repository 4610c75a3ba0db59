"""Reduces a text to what can be heard of it."""

import re
import unicodedata

from taste.text import SPELLED_BY_CHARACTER

SPELLINGS = {"grey": "gray", "harbour": "harbor", "colours": "colors", "mr": "mister", "mrs": "missus"}
COMMA_OF_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def normalise(text: str) -> str:
    """Reduce a text to what can be heard, for counting wrong words.

    Args:
        text: a transcript, or what a recogniser wrote.

    Returns:
        words of small letters, digits and apostrophes, in one spelling, with a blank between two; where a language
        writes no blanks, each character is a word.
    """
    text = re.sub(r"\(\d+\)", "", _plain(text))  # (2): pronunciations
    characters = []
    for character in text:
        if _is_spelled(character):
            characters.append(f" {character} ")
        else:
            characters.append(character if _is_heard(character) else " ")
    words = (word.strip("'") for word in "".join(characters).split())
    return " ".join(SPELLINGS.get(word, word) for word in words if word)


def word_goes_on(before: str, after: str) -> bool:
    """Tell whether a word goes on from the end of one piece of a text to the beginning of the next.

    Args:
        before: the piece, blanks included.
        after: the next one.

    Returns:
        True where what can be heard of both is one word there.
    """
    if _plain(before + after) != _plain(before) + _plain(after):  # 3 | ,000; a letter | its mark
        return True
    meeting = _plain(before)[-1:], _plain(after)[:1]
    return all(character and _is_heard(character) and not _is_spelled(character) for character in meeting)


def _plain(text: str) -> str:
    """A text in one form of its characters and numbers, small letters, one kind of apostrophe."""
    return COMMA_OF_THOUSANDS.sub("", unicodedata.normalize("NFKC", text).lower().replace("’", "'"))


def _is_spelled(character: str) -> bool:
    """Whether a character is a word by itself."""
    return unicodedata.name(character, "").startswith(SPELLED_BY_CHARACTER)


def _is_heard(character: str) -> bool:
    """Whether a character stands for a sound: letters, their marks, digits, and the apostrophe."""
    return character == "'" or unicodedata.category(character)[0] in "LMN"

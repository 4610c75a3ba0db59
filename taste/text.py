"""Splits a transcript into the model's tokens and says which word each token belongs to."""

import unicodedata
from typing import Any, NamedTuple

# T text tokens
# how the Unicode names of characters begin that are written without spaces
SPELLED_BY_CHARACTER = ("CJK UNIFIED", "CJK COMPATIBILITY", "IDEOGRAPHIC NUMBER", "HIRAGANA", "KATAKANA")


class TextTokens(NamedTuple):
    """A transcript as the model reads it."""

    tokens: list[int]  # [T]
    word_ids: list[int]  # [T], 0, 0, 1, 2, 2 ...: never falls, leaves no number out


def tokenize(tokenizer: Any, text: str) -> TextTokens:
    """Encode a transcript and number its words.

    A word is what white space separates, with its punctuation; where a language writes none (Mandarin, Japanese) it is
    one character with the punctuation after it. All tokens of a word have its number. A token that holds several
    characters counts as one word, since it cannot be divided.

    Args:
        tokenizer: openai-whisper's, as `cosyvoice.utils.model_dir.get_tokenizer` gives it.
        text: the transcript; white space around it is dropped.

    Returns:
        tokens and word numbers.

    Raises:
        ValueError: the transcript is empty.
    """
    text = text.strip()
    if not text:
        raise ValueError("the transcript is empty")
    tokens = tokenizer.encode(text, allowed_special="all")
    pieces = [tokenizer.encoding.decode_single_token_bytes(token) for token in tokens]
    assert b"".join(pieces) == text.encode(), f"the tokens do not spell the transcript {text!r}"

    word_of_byte = _words_of_bytes(text)
    word_ids: list[int] = []
    position = 0
    previous_word = None
    for piece in pieces:
        word = word_of_byte[position]
        word_ids.append((word_ids[-1] if word_ids else -1) + (word != previous_word))
        previous_word = word
        position += len(piece)
    return TextTokens(tokens, word_ids)


def _words_of_bytes(text: str) -> list[int]:
    """The word number of each UTF-8 byte; white space belongs to the word after it, as in Whisper's tokens."""
    words: list[int] = []
    word = 0
    after_space = False
    has_letters = False  # the word so far: opening quotes belong to what follows them
    is_spelled = False  # the word so far is a character of a language without spaces
    for character in text:
        if character.isspace():
            word += not after_space
            after_space, has_letters, is_spelled = True, False, False
        else:
            spelled = unicodedata.name(character, "").startswith(SPELLED_BY_CHARACTER)
            is_letter = character.isalnum()
            if has_letters and (spelled or (is_spelled and is_letter)):
                word += 1
            after_space = False
            if is_letter or spelled:
                has_letters, is_spelled = True, spelled
        words.extend([word] * len(character.encode()))
    return words

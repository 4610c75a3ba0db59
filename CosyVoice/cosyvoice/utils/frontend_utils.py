"""Text rules of CosyVoice's front end: what is spelled out, what is dropped, where a paragraph is cut.

Source: FunAudioLLM/CosyVoice cosyvoice/utils/frontend_utils.py @ ace7c47 (behaviour, not code), except that the point
of a decimal number is no full stop: that commit reads "3.5" as "3。5" in Chinese and as "three.five" in English.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Protocol

CHINESE_CHARACTER = re.compile("[\u4e00-\u9fff]")
CHINESE_SENTENCE_MARKS = "。？！；：、.?!;"
OTHER_SENTENCE_MARKS = ".?!;:"
COMMAS = "，,"
CLOSING_QUOTES = '"”'

_SPELLED_SYMBOLS = str.maketrans({"²": "平方", "³": "立方"})
_DROPPED_BRACKETS = str.maketrans("", "", "（）【】`")
_DECIMAL_POINT = r"(?<=\d)\.(?=\d)"
# A decimal number, or a run of digits; of 12.05.2024 or 1.2.3 each run by itself.
_NUMBER = re.compile(r"(?<!\d)(?<!\d\.)\d+\.\d+(?!\d|\.\d)|\d+")
# A space survives between two ASCII characters that are no spaces themselves.
_BLANK_TO_DROP = re.compile(r"(?<![\x00-\x1f!-\x7f]) | (?![\x00-\x1f!-\x7f])")


class NumberSpeller(Protocol):
    """What is used of `inflect.engine()`."""

    def number_to_words(self, num: str) -> str:
        """Spell a number: "12" -> "twelve", "3.5" -> "three point five"."""


def contains_chinese(text: str) -> bool:
    """Whether the text holds a Chinese character, and so takes the Chinese rules."""
    return CHINESE_CHARACTER.search(text) is not None


def replace_corner_mark(text: str) -> str:
    """Spell superscript two and three in Chinese."""
    return text.translate(_SPELLED_SYMBOLS)


def remove_bracket(text: str) -> str:
    """Drop full-width brackets and backticks (their content stays); a Chinese dash becomes a space."""
    return text.translate(_DROPPED_BRACKETS).replace("——", " ")


def replace_blank(text: str) -> str:
    """Drop the spaces that do not separate two ASCII characters."""
    return _BLANK_TO_DROP.sub("", text)


def replace_full_stop(text: str) -> str:
    """Write each full stop as a Chinese one; the point of a decimal number stays."""
    return re.sub(rf"(?!{_DECIMAL_POINT})\.", "。", text)


def spell_out_number(text: str, inflect_parser: NumberSpeller) -> str:
    """Replace each number by its English words.

    Args:
        text: any text.
        inflect_parser: `inflect.engine()`.

    Returns:
        The text with "12" as "twelve" and "3.50" as "three point five zero"; everything else unchanged.
    """
    return _NUMBER.sub(lambda number: inflect_parser.number_to_words(number[0]), text)


def is_only_punctuation(text: str) -> bool:
    """Whether there is nothing to say: every character is punctuation or a symbol, or there is none."""
    return all(unicodedata.category(character)[0] in "PS" for character in text)


def split_paragraph(
    text: str,
    tokenize: Callable[[str], Sequence[int]],
    lang: str = "zh",
    token_max_n: int = 80,
    token_min_n: int = 60,
    merge_len: int = 20,
    comma_split: bool = False,
) -> list[str]:
    """Cut a paragraph at its sentence marks into pieces of a length the language model was trained on.

    Sentences are joined until the next one would exceed `token_max_n` while the piece already has more than
    `token_min_n`; a last piece under `merge_len` joins the one before. Of several marks in a row the first stays, and
    a closing quote belongs to the sentence before it. The point of a decimal number is no mark.

    Args:
        text: the paragraph; a final mark is added where it has none.
        tokenize: text -> tokens; its length measures everything but Chinese.
        lang: "zh" measures in characters and cuts at Chinese marks too; anything else measures in tokens.
        token_max_n: length not to exceed by joining.
        token_min_n: length up to which sentences are always joined.
        merge_len: length under which the last piece is no piece of its own.
        comma_split: also cut at commas.

    Returns:
        The pieces in order; none where the text has nothing but marks.
    """
    length = len if lang == "zh" else lambda piece: len(tokenize(piece))
    marks = (CHINESE_SENTENCE_MARKS if lang == "zh" else OTHER_SENTENCE_MARKS) + (COMMAS if comma_split else "")
    if not text or text[-1] not in marks:
        text += "。" if lang == "zh" else "."

    sentences: list[str] = []
    sentence = f"((?:{_DECIMAL_POINT}|[^{marks}])*)([{marks}])([{CLOSING_QUOTES}]?)"
    for words, mark, quote in re.findall(sentence, text):
        if words:
            sentences.append(words + mark)
        if quote and sentences:
            sentences[-1] += quote

    pieces: list[str] = []
    piece = ""
    for sentence in sentences:
        if length(piece) > token_min_n and length(piece + sentence) > token_max_n:
            pieces.append(piece)
            piece = ""
        piece += sentence
    if pieces and length(piece) < merge_len:
        pieces[-1] += piece
    elif piece:
        pieces.append(piece)
    return pieces

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from whisper.tokenizer import Tokenizer, get_tokenizer

from taste.text import tokenize


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return get_tokenizer(multilingual=True, num_languages=100, language="en", task="transcribe")


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text of each word, by joining the tokens that have its number."""
    tokens, word_ids = tokenize(tokenizer, text)
    words = [b""] * (max(word_ids) + 1)
    for token, word in zip(tokens, word_ids, strict=True):
        words[word] += tokenizer.encoding.decode_single_token_bytes(token)
    return [word.decode() for word in words]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", ["hello"]),
        ("Hello, world.", ["Hello,", " world."]),
        ("It's antidisestablishmentarianism!", ["It's", " antidisestablishmentarianism!"]),
        ("CHAPTER TWENTY ONE", ["CHAPTER", " TWENTY", " ONE"]),
        ("那很明智", ["那", "很", "明", "智"]),
        ("高价低廉的别墅", ["高", "价", "低", "廉", "的", "别", "墅"]),
        ("鬱龘", ["鬱", "龘"]),
        ("我爱Python编程, yes 3号吗?", ["我", "爱", "Python", "编", "程,", " yes", " 3", "号", "吗?"]),
        ("“好” x", ["“好”", " x"]),
        ("a  b\nc", ["a", "  b", "\nc"]),
        ("  padded \n", ["padded"]),
    ],
)
def test_words_are_what_white_space_separates_or_single_characters(
    tokenizer: Tokenizer, text: str, words: list[str]
) -> None:
    assert _words(tokenizer, text) == words


def test_a_token_of_several_characters_is_one_word(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("一些")) == 1
    assert _words(tokenizer, "是一些人") == ["是", "一些", "人"]


def test_the_tokens_are_the_published_ones(tokenizer: Tokenizer) -> None:
    text = "Half past 3, 你好"
    assert tokenize(tokenizer, text).tokens == tokenizer.encode(text, allowed_special="all")


@given(st.text(min_size=1).filter(str.strip))
def test_word_numbers_rise_by_one_at_most_and_cover_every_token(text: str) -> None:
    tokens, word_ids = tokenize(get_tokenizer(multilingual=True, num_languages=100), text)
    assert len(tokens) == len(word_ids) and word_ids[0] == 0
    assert all(later - earlier in (0, 1) for earlier, later in itertools.pairwise(word_ids))


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_an_empty_transcript_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(ValueError, match="transcript is empty"):
        tokenize(tokenizer, text)

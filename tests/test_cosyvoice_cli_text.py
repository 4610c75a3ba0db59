"""The text rules: where a paragraph is cut, what is spelled out, what is dropped."""

import importlib.util
import re
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cosyvoice.cli.frontend import CosyVoiceFrontEnd
from cosyvoice.utils.frontend_utils import (
    CHINESE_SENTENCE_MARKS,
    CLOSING_QUOTES,
    OTHER_SENTENCE_MARKS,
    contains_chinese,
    is_only_punctuation,
    remove_bracket,
    replace_blank,
    replace_corner_mark,
    replace_full_stop,
    spell_out_number,
    split_paragraph,
)


class Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text, allowed_special):
        return text.split()


@pytest.fixture
def frontend():
    made = CosyVoiceFrontEnd(Words, partial(lambda y, sampling_rate: y, sampling_rate=22_050), "a", "b", device="cpu")
    made.text_frontend = ""  # wetext may be installed
    return made


TEXT = st.text(alphabet='ab 你好。？！；：、.?!;,，:"”1', max_size=80)


def spoken(text, marks):
    """What is left of a text when marks and closing quotes are not counted."""
    return re.sub(f"[{re.escape(marks + CLOSING_QUOTES)}]", "", text)


@given(TEXT, st.sampled_from(["zh", "en"]), st.integers(1, 30), st.integers(0, 20), st.integers(0, 10))
@example("", "zh", 5, 3, 2)
@example('"', "en", 5, 3, 2)
@example('."', "en", 5, 3, 2)
@example('Hi."', "en", 5, 3, 2)
def test_splitting_keeps_every_word_in_order(text, lang, longest, shortest, merged):
    pieces = split_paragraph(text, str.split, lang, longest, shortest, merged)
    marks = CHINESE_SENTENCE_MARKS if lang == "zh" else OTHER_SENTENCE_MARKS
    assert spoken("".join(pieces), marks) == spoken(text, marks)
    assert all(piece.rstrip(CLOSING_QUOTES)[-1] in marks for piece in pieces)


@given(TEXT.filter(lambda text: not set(text) & set(CLOSING_QUOTES)), st.integers(1, 30), st.integers(0, 20))
def test_a_piece_is_over_the_maximum_only_where_it_had_not_reached_the_minimum(text, longest, shortest):
    for piece in split_paragraph(text, str.split, "zh", longest, shortest, merge_len=0):
        sentences = split_paragraph(piece, str.split, "zh", 0, 0, merge_len=0)
        if len(piece) > longest:
            assert len(piece) - len(sentences[-1]) <= shortest


@pytest.mark.parametrize(
    ("text", "lang", "pieces"),
    [
        ("Hello", "en", ["Hello."]),
        ("你好", "zh", ["你好。"]),
        ("Wait... what?!", "en", ["Wait. what?"]),
        ('He said "no." Then he left.', "en", ['He said "no." Then he left.']),
        ("一、二，三", "zh", ["一、二，三。"]),
        ("1. 2.5.", "en", ["1. 2.5."]),
        ("...", "en", []),
        ("", "zh", []),
    ],
)
def test_marks_are_kept_once_and_added_at_the_end(text, lang, pieces):
    assert split_paragraph(text, str.split, lang) == pieces


def test_sentences_are_joined_up_to_the_maximum_and_a_short_end_joins_the_piece_before():
    text = "a a a a. b b b b. c c c c. d."
    assert split_paragraph(text, str.split, "en", token_max_n=8, token_min_n=3, merge_len=0) == [
        "a a a a. b b b b.",
        " c c c c. d.",
    ]
    assert split_paragraph(text, str.split, "en", token_max_n=4, token_min_n=3, merge_len=2) == [
        "a a a a.",
        " b b b b.",
        " c c c c. d.",
    ]
    assert split_paragraph("a a a a. d.", str.split, "en", 4, 3, merge_len=1) == ["a a a a.", " d."]


@pytest.mark.parametrize(("lang", "pieces"), [("en", ["It is 3.5.", " Or 1."]), ("zh", ["It is 3.5.", " Or 1."])])
def test_no_piece_ends_within_a_decimal_number(lang, pieces):
    assert split_paragraph("It is 3.5. Or 1.", str.split, lang, token_max_n=0, token_min_n=0, merge_len=0) == pieces


def test_commas_cut_where_that_is_asked_for():
    assert split_paragraph("aa,bb", str.split, "en", 0, 0, 0, comma_split=True) == ["aa,", "bb."]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("你 好", "你好"),
        ("good day", "good day"),
        ("好 day", "好day"),
        ("a  b", "ab"),
        (" a", "a"),
        ("a ", "a"),
        ("", ""),
    ],
)
def test_a_blank_stays_between_two_ascii_characters_only(text, kept):
    assert replace_blank(text) == kept


def test_symbols_are_spelled_and_brackets_dropped():
    assert replace_corner_mark("5m²和3m³") == "5m平方和3m立方"
    assert remove_bracket("（一）【二】`三`——四") == "一二三 四"


@pytest.mark.parametrize(
    ("text", "empty"), [("", True), ("。！", True), ("$+", True), ("a.", False), ("1", False), (" ", False)]
)
def test_only_punctuation_is_nothing_to_say(text, empty):
    assert is_only_punctuation(text) is empty


def test_chinese_is_told_by_its_characters():
    assert contains_chinese("abc 你") and not contains_chinese("abc。カナ")


def test_each_run_of_digits_becomes_words():
    class Spelled:
        def number_to_words(self, num):
            return f"<{num}>"

    assert spell_out_number("12 apples for 3.50", Spelled()) == "<12> apples for <3.50>"
    assert spell_out_number("Version 1.2.3 of 12.05.2024.", Spelled()) == "Version <1>.<2>.<3> of <12>.<05>.<2024>."
    assert spell_out_number("I have 7. 8.5", Spelled()) == "I have <7>. <8.5>"


def test_a_full_stop_becomes_a_chinese_one_and_a_decimal_point_stays():
    assert replace_full_stop("共3.5元.好.5.") == "共3.5元。好。5。"


def test_decimal_numbers_in_english_are_spelled_with_their_point(frontend):
    pytest.importorskip("inflect")
    assert frontend.text_normalize("It cost $3.50.") == ["It cost $three point five zero."]


def test_numbers_in_english_are_spelled_with_inflect(frontend):
    pytest.importorskip("inflect")
    assert frontend.text_normalize("It cost 12 pounds.", split=False) == "It cost twelve pounds."


def test_without_inflect_numbers_stay_and_the_log_says_so_once(frontend, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert frontend.text_normalize("No number.", split=False) == "No number."
    assert caplog.messages == []
    for _ in range(2):
        assert frontend.text_normalize("It cost 12 pounds.", split=False) == "It cost 12 pounds."
    assert len(caplog.messages) == 1 and "inflect" in caplog.messages[0]


def test_without_wetext_numbers_in_chinese_stay_and_the_log_says_so_once(frontend, caplog):
    assert frontend.text_normalize("你好.", split=False) == "你好。"
    assert caplog.messages == []
    for _ in range(2):
        assert frontend.text_normalize("价格是3.5元.", split=False) == "价格是3.5元。"
    assert len(caplog.messages) == 1 and "pip install wetext" in caplog.messages[0]


def test_a_folder_named_like_the_package_is_not_taken_for_it(tmp_path, monkeypatch):
    if importlib.util.find_spec("wetext"):
        pytest.skip("wetext is installed")
    (tmp_path / "wetext").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    made = CosyVoiceFrontEnd(Words, partial(lambda y, sampling_rate: y, sampling_rate=22_050), "a", "b", device="cpu")
    assert made.text_normalize("Hello there.") == ["Hello there."]


def test_wetext_reads_numbers_and_dates_where_it_is_installed():
    pytest.importorskip("wetext")
    made = CosyVoiceFrontEnd(Words, partial(lambda y, sampling_rate: y, sampling_rate=22_050), "a", "b", device="cpu")
    assert made.text_normalize("价格是3.5元。", split=False) == "价格是三点五元。"
    assert made.text_normalize("It cost $3.50.", split=False) == "It cost three point five dollars."


@pytest.mark.parametrize(
    ("text", "whole", "pieces"),
    [
        ("", "", [""]),
        (" Hello there. ", "Hello there.", ["Hello there."]),
        ("3.5 你好 - 再见，", None, ["3.5你好-再见。"]),
        ("你好.再见，，", "你好。再见。", ["你好。再见。"]),
        ("say <|en|> this  ", "say <|en|> this  ", ["say <|en|> this  "]),
        ("...", "...", []),
    ],
)
def test_texts_are_normalised_by_their_language(frontend, text, whole, pieces):
    assert frontend.text_normalize(text) == pieces
    if whole is not None:
        assert frontend.text_normalize(text, split=False) == whole


def test_a_text_is_taken_as_it_is_where_that_is_asked_for(frontend):
    assert frontend.text_normalize(" 12 (a) ", text_frontend=False) == [" 12 (a) "]
    assert frontend.text_normalize(" 12 (a) ", split=False, text_frontend=False) == " 12 (a) "


def test_only_a_string_can_be_tokenized(frontend):
    with pytest.raises(TypeError, match="must be a str; got generator"):
        frontend._extract_text_token(letter for letter in "abc")

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taste.utterance_ids import common_ids, describe_scheme, normalise_key


@pytest.mark.parametrize(
    "key",
    [
        "103-1240-0000",
        "103-1240-0000.flac",
        "103/1240/103-1240-0000",
        "/data/LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac",
        "D:\\LibriSpeech\\103\\1240\\103-1240-0000.FLAC",
        "103-1240-103-1240-0000",
        "train-clean-100-103-1240-103-1240-0000.flac",
    ],
)
def test_every_key_scheme_gives_one_id(key: str) -> None:
    assert normalise_key(key) == "103-1240-0000"


@pytest.mark.parametrize(
    "key", ["a", "SSB00050112", "1-1-1", "2024-01-01", "p225_001", "take.2", "a-b-c-d-e", "日本 語"]
)
def test_an_id_stays_as_it_is(key: str) -> None:
    assert normalise_key(key) == key


def test_known_ids_help_where_a_dashed_path_does_not_repeat_itself() -> None:
    assert normalise_key("wav48-p225-p225_001.wav", {"p225_001"}) == "p225_001"
    assert normalise_key("b-c", {"c", "b-c"}) == "b-c"


@given(st.lists(st.sampled_from(["a", "b", "-", "/", ".wav", "1", "\\"])).map("".join))
def test_normalising_twice_changes_nothing(key: str) -> None:
    once = normalise_key(key)
    assert normalise_key(once) == once


def test_common_ids_cross_key_schemes_and_keep_the_first_order() -> None:
    named = {"S3 units": ["c", "1-2-1-2-9", "b"], "features": ["/x/1-2-9.flac", "/x/b.flac", "/x/c.flac", "/x/d.flac"]}
    assert common_ids(named) == ["c", "1-2-9", "b"]


def test_no_common_id_is_an_error_that_shows_every_scheme() -> None:
    named = {"S3 units": ["1-2-1-2-9"], "features": ["/x/b.flac"], "text": ["c"], "speakers": []}
    with pytest.raises(ValueError, match="no utterance is in all") as caught:
        common_ids(named)
    message = str(caught.value)
    for part in (
        "S3 units: 1 keys, keyed by dashed path, such as '1-2-1-2-9'",
        "keyed by path",
        "keyed by id",
        "0 keys",
    ):
        assert part in message
    assert [describe_scheme(key) for key in ("a/b.wav", "1-2-1-2-9", "a")] == ["path", "dashed path", "id"]

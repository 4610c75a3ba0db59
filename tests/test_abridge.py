import pytest

from cosyvoice.utils.abridge import abridge


@pytest.mark.parametrize(
    ("items", "separator", "expected"),
    [
        ([], ", ", ""),
        (["a", "b"], ", ", "a, b"),
        (["a", "b", "c", "d"], ", ", "a, b, and 2 more"),
        (["a is 1", "b is 2", "c is 3"], "; ", "a is 1; b is 2; and 1 more"),
    ],
)
def test_what_is_not_shown_is_counted(items, separator, expected):
    assert abridge(items, 2, separator) == expected

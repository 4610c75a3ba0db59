"""Cuts a list short for a message."""

from collections.abc import Sequence


def abridge(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """Join the first items of a list, and count the others.

    Args:
        items: e.g. names.
        most: how many are shown.
        separator: stands between them, and its mark before the count, unless it is a comma.

    Returns:
        such as `a, b and 3 more`; nothing of an empty list.
    """
    shown = separator.join(items[:most])
    return shown + (f"{separator.rstrip(', ')} and {len(items) - most} more" if len(items) > most else "")

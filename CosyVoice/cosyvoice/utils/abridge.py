"""Cuts a list short for a message."""

from collections.abc import Sequence


def abridge(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """Join the first items of a list, and count the others.

    Args:
        items: e.g. names.
        most: how many are shown.
        separator: stands between them, and before the count.

    Returns:
        such as `a, b, and 3 more`; nothing of an empty list.
    """
    shown = list(items[:most])
    if len(items) > most:
        shown.append(f"and {len(items) - most} more")
    return separator.join(shown)

"""Shows how far a loop has come: a bar on a terminal, a line a minute where there is none."""

import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LINE_SECONDS = 60.0  # between two lines


def progress_bar(
    items: Collection[Item],
    description: str,
    unit: str,
    *,
    done: int = 0,
    size: Callable[[Item], int] = lambda item: 1,
    active: bool = True,
    note: Callable[[], str] = lambda: "",
    on_line: Callable[[], None] = lambda: None,
) -> Iterator[Item]:
    """Go through some items, and show on stderr how far that has come.

    Args:
        items: what to go through.
        description: what is done.
        unit: what the items, or what they hold, are called, in the plural.
        done: how many were done before these.
        size: how many of the unit an item holds.
        active: False shows nothing, in all processes but the main one.
        note: gives what else to show, once an item is done.
        on_line: called where there is, or would be, a line.

    Yields:
        the items.
    """
    if not active:
        yield from items
        return
    count, total = 0, done + sum(map(size, items))
    begun = told = time.monotonic()
    # disable=None: no bar where nobody watches a terminal
    options = {"initial": done, "total": total, "leave": False, "dynamic_ncols": True, "disable": None}
    with tqdm(desc=description, unit=f" {unit}", **options) as bar:
        for item in items:
            yield item
            count += size(item)
            bar.set_postfix_str(note(), refresh=False)
            bar.update(size(item))
            now = time.monotonic()
            if now - told < LINE_SECONDS:
                continue
            told = now
            on_line()
            if bar.disable:
                rate = count / (now - begun)
                left = tqdm.format_interval((total - done - count) / rate)
                parts = [f"{description}: {done + count:,} of {total:,} {unit}", f"{rate:.3g} a second", f"{left} left"]
                print(", ".join(filter(None, [*parts, note()])), file=sys.stderr, flush=True)

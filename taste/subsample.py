"""Some utterances of many, chosen from all of them alike."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taste.batch import Example
    from taste.data import UtteranceDataset


def spread_evenly(count: int, wanted: int) -> list[int]:
    """Choose some of many, from all of them alike: data is often sorted by speaker.

    Args:
        count: how many there are.
        wanted: how many to choose.

    Returns:
        rising numbers below `count`, all of them where fewer are there than wanted.
    """
    wanted = min(wanted, count)
    return [(2 * number + 1) * count // (2 * wanted) for number in range(wanted)]  # the middle of each part


def finite_examples(
    dataset: "UtteranceDataset", wanted: int, say: Callable[[str], None], consequence: str
) -> "Iterator[tuple[int, Example]]":
    """Utterances from all of a data set, without those whose features are no numbers, which are named.

    Args:
        dataset: the utterances.
        wanted: how many to look at.
        say: takes a warning for each that is left out.
        consequence: of being left out, for the warning.

    Yields:
        the number of each in the data set, and its features, which are read one utterance at a time.
    """
    for index in spread_evenly(len(dataset), wanted):
        example = dataset[index]
        if example.is_finite:
            yield index, example
        else:
            say(f"warning: {example.utt_id} has features that are no numbers; {consequence}")

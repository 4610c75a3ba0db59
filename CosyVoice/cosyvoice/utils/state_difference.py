"""What sets a state dict apart from the one that a module has."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Reshaped(NamedTuple):
    """A tensor whose shape is not the expected one."""

    name: str
    shape: list[int]
    expected: list[int]


class StateDifference(NamedTuple):
    """The names in which two state dicts differ, each kind in the order of the state dict it is taken from."""

    missing: list[str]  # expected, not given
    unexpected: list[str]  # given, not expected
    reshaped: list[Reshaped]  # in both

    def phrases(self) -> list[str]:
        """Say each difference in a few words.

        Returns:
            the phrases; none where all is as expected.
        """
        return [
            *(f"{name} is missing" for name in self.missing),
            *(f"{name} is unknown" for name in self.unexpected),
            *(f"{name} is {shape}, expected {expected}" for name, shape, expected in self.reshaped),
        ]


def state_difference(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> StateDifference:
    """Compare names and shapes; values are not looked at.

    Args:
        expected: what a module's `state_dict()` gives; its tensors may be on the meta device.
        weights: what it is to take.

    Returns:
        the differences.
    """
    return StateDifference(
        missing=[name for name in expected if name not in weights],
        unexpected=[name for name in weights if name not in expected],
        reshaped=[
            Reshaped(name, list(weights[name].shape), list(value.shape))
            for name, value in expected.items()
            if name in weights and weights[name].shape != value.shape
        ],
    )

import torch

from cosyvoice.utils.state_difference import state_difference


def test_each_kind_of_difference_is_named():
    expected = {"same": torch.zeros(2), "gone": torch.zeros(1), "other": torch.zeros(3, device="meta")}
    difference = state_difference(expected, {"new": torch.zeros(1), "same": torch.ones(2), "other": torch.zeros(3, 1)})
    assert difference.phrases() == ["gone is missing", "new is unknown", "other is [3, 1], expected [3]"]


def test_equal_names_and_shapes_are_no_difference():
    assert state_difference({"a": torch.zeros(2)}, {"a": torch.ones(2, dtype=torch.half)}).phrases() == []

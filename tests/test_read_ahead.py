import itertools
import mmap

import pytest
import torch

from taste import read_ahead as module
from taste.read_ahead import PIECE_BYTES, read_ahead
from tests.small_stage3 import small_dataset


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, int]]:
    """First and last byte of what the kernel is asked for."""
    asked = []
    advise = module._madvise()

    def noted(start: int, count: int, advice: int) -> int:
        asked.append((start, start + count))
        return advise(start, count, advice)

    monkeypatch.setattr(module, "_madvise", lambda: noted)
    return asked


def test_all_pages_of_a_mapped_tensor_are_asked_for_in_pieces_that_the_kernel_takes(tmp_path, asked):
    path = tmp_path / "features.pt"
    torch.save({"a": torch.randn(100), "b": torch.randn(300, 500)}, path)
    values = torch.load(path, mmap=True, weights_only=True)["b"][:250]
    read_ahead(values)
    assert asked[0][0] % mmap.PAGESIZE == 0 and asked[0][0] <= values.data_ptr()
    assert asked[-1][1] == values.data_ptr() + 250 * 500 * 4
    assert all(end - start <= PIECE_BYTES for start, end in asked)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(asked))
    assert module._madvise()(asked[0][0], PIECE_BYTES, mmap.MADV_WILLNEED) == 0  # the kernel agrees


@pytest.mark.parametrize("values", [torch.empty(0), torch.randn(30, 50).T])
def test_what_lies_in_no_one_piece_is_left_alone(values, asked):
    read_ahead(values)
    assert not asked


def test_another_system_reads_as_it_does(monkeypatch):
    monkeypatch.setattr(module.sys, "platform", "darwin")
    module._madvise.cache_clear()
    assert module._madvise() is None
    read_ahead(torch.randn(3))
    monkeypatch.undo()
    module._madvise.cache_clear()
    assert module._madvise() is not None


def test_whisper_features_are_asked_for_before_they_are_read(tmp_path, asked):
    dataset = small_dataset(tmp_path, "train", [(3, 20), (4, 30)])
    example = dataset[1]
    assert len(asked) == 2  # two layers
    stored = dataset.features.speech["utt-01"]
    assert {end for _, end in asked} == {stored[name].data_ptr() + stored[name].nbytes for name in ("final", "mid")}
    assert torch.equal(example.speech_final, stored["final"].float())

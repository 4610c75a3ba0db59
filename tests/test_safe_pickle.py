import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from taste.safe_pickle import load_plain


class _RunsCode:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.touched,)


def test_numbers_and_text_come_back_as_they_were_saved(tmp_path: Path) -> None:
    content = {"a": [0, 4095, 10**12, -1], "b": [1.5, None, True], "c": {"words": ("one", "\u4f60\u597d")}, "d": []}
    torch.save(content, tmp_path / "plain.pt")
    loaded = load_plain(tmp_path / "plain.pt")
    assert loaded == content == torch.load(tmp_path / "plain.pt", weights_only=True)


@pytest.mark.parametrize("content", [{"a": torch.ones(3)}, torch.Size([1]), {"when": datetime.date(2020, 1, 1)}])
def test_anything_else_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="no file of plain data"):
        load_plain(tmp_path / "objects.pt")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": [1], "b": _RunsCode(tmp_path / "touched")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="no file of plain data"):
        load_plain(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "touched").exists()  # the file is as evil as it says


def test_a_damaged_or_an_old_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": [1] * 1000}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:500])
    torch.save({"a": [1]}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("cut.pt", "old.pt", "absent.pt"):
        with pytest.raises(ValueError, match=name):
            load_plain(tmp_path / name)

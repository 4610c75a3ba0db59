from pathlib import Path

import pytest

from cosyvoice.utils.atomic import atomic_path, remove_leftovers


def test_a_file_appears_whole_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert temporary.suffix == ".json" and not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_earlier_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("earlier")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("ha")
        raise RuntimeError
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_leftovers_of_that_file_are_removed(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("a.pt", ".b.writing-1.pt", ".a.writing-1.json", ".hidden")]
    for path in [*kept, tmp_path / ".a.writing-1.pt", tmp_path / ".a.writing-22.pt"]:
        path.touch()
    remove_leftovers(tmp_path / "a.pt")
    assert sorted(tmp_path.iterdir()) == sorted(kept)

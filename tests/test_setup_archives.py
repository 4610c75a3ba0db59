"""Unpacking: what an archive holds lands inside the folder, or nothing of it lands anywhere."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from taste.archives import ArchiveError, is_archive, unpack_archive


def make_tar(path: Path, members: list[tarfile.TarInfo], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for member in members:
            content = b"content of " + member.name.encode()
            if member.isreg():
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return path


def regular(name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(name)


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(
    "suffix, mode", [(".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz"), (".tar.bz2", "w:bz2")]
)
def test_a_good_archive_is_unpacked_whole(tmp_path, suffix, mode):
    archive = make_tar(
        tmp_path / f"model{suffix}", [special("sub", tarfile.DIRTYPE), regular("./llm.pt"), regular("sub/a.txt")], mode
    )
    assert is_archive(archive.name)

    assert unpack_archive(archive, tmp_path / "out") == ["llm.pt", "sub/a.txt"]
    assert files_under(tmp_path / "out") == {"llm.pt", "sub/a.txt"}
    assert (tmp_path / "out/sub/a.txt").read_bytes() == b"content of sub/a.txt"


@pytest.mark.parametrize(
    "bad, reason",
    [
        (regular("../escaped.txt"), "a path out of the folder"),
        (regular("sub/../../escaped.txt"), "a path out of the folder"),
        (regular("/tmp/escaped-from-archive.txt"), "a path out of the folder"),
        (regular("sub\\..\\escaped.txt"), "a path out of the folder"),
        (special("link", tarfile.SYMTYPE, "/etc"), "a link"),
        (special("link", tarfile.SYMTYPE, "../.."), "a link"),
        (special("link", tarfile.SYMTYPE, "llm.pt"), "a link"),
        (special("hard", tarfile.LNKTYPE, "../../etc/passwd"), "a link"),
        (special("pipe", tarfile.FIFOTYPE), "a special file"),
        (special("device", tarfile.CHRTYPE), "a special file"),
    ],
)
def test_an_archive_with_anything_unfit_is_not_unpacked_at_all(tmp_path, bad, reason):
    archive = make_tar(tmp_path / "model.tar.gz", [regular("llm.pt"), bad])
    before = files_under(tmp_path)

    with pytest.raises(ArchiveError, match=rf"model\.tar\.gz is not unpacked, because it holds {reason} \("):
        unpack_archive(archive, tmp_path / "deep" / "out")
    assert files_under(tmp_path) == before
    assert not Path("/tmp/escaped-from-archive.txt").exists()


def test_every_unfit_entry_is_listed_at_once(tmp_path):
    archive = make_tar(tmp_path / "model.tar", [regular("../one"), special("two", tarfile.SYMTYPE, "/etc")], "w")

    with pytest.raises(ArchiveError) as caught:
        unpack_archive(archive, tmp_path / "out")
    assert "'../one'" in str(caught.value)
    assert "'two'" in str(caught.value)


def test_a_link_that_lies_in_the_folder_already_is_not_followed_out(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "asset").symlink_to(outside)
    (folder / "llm.pt").symlink_to(outside / "target.pt")

    with pytest.raises(ArchiveError, match="through a link"):
        unpack_archive(make_tar(tmp_path / "one.tar", [regular("asset/escaped.txt")], "w"), folder)
    unpack_archive(make_tar(tmp_path / "two.tar", [regular("llm.pt")], "w"), folder)
    assert files_under(outside) == set()
    assert not (folder / "llm.pt").is_symlink()


def test_an_archive_larger_than_the_free_disk_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "model.tar", [regular("llm.pt")], "w")
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk._replace(free=5))

    with pytest.raises(ArchiveError, match=r"model\.tar needs 17 bytes unpacked; .* has 5 free"):
        unpack_archive(archive, tmp_path / "out")
    assert files_under(tmp_path / "out") == set()


def test_a_file_that_is_no_whole_archive_is_an_error_that_names_it(tmp_path):
    whole = make_tar(tmp_path / "whole.tar.gz", [regular(f"{number}.bin") for number in range(50)]).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.tar").write_bytes(b"this is no archive")

    for name in ("cut.tar.gz", "text.tar"):
        with pytest.raises(ArchiveError, match=f"{name} cannot be unpacked"):
            unpack_archive(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("name", ["llm.llm.fp16.zip", "flow.encoder.fp32.zip", "llm.pt", "model.safetensors"])
def test_a_torchscript_zip_or_a_weight_file_is_never_an_archive_to_unpack(name):
    assert not is_archive(name)

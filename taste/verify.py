"""Checks the files of a model folder without a network: their formats, and the hashes recorded at the download."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cosyvoice.utils.atomic import atomic_path

MANIFEST_NAME = ".verified.json"
MANIFEST_VERSION = 1
HASH_BLOCK_BYTES = 1 << 22
POINTER_BYTES = 1024  # a git-lfs pointer is about 130 bytes of text
WEIGHT_SUFFIXES = (".pt", ".onnx", ".safetensors", ".zip", ".bin")
SPEAKERS_FILE = "spk2info.pt"  # `CosyVoice.save_spkinfo` writes to it


class ModelPart(NamedTuple):
    """Files that are published together and lie together in a model folder."""

    name: str
    subfolder: str  # inside the model folder; "" is the folder itself
    repositories: Mapping[str, str]  # hub name -> repository
    home: str  # the hub asked first when none is preferred
    required: tuple[str, ...]
    optional: tuple[str, ...]  # taken where the hub has them


class ExpectedFile(NamedTuple):
    """What a file must be, as far as a hub or a manifest knows it."""

    path: str  # inside its repository or model folder, with forward slashes
    size_bytes: int
    sha256: str | None  # lower-case hexadecimal
    git_sha1: str | None = None  # of the git blob, where a hub gives only that


class FileHashes(NamedTuple):
    """What a file is."""

    size_bytes: int
    sha256: str
    git_sha1: str


class Check(NamedTuple):
    """The outcome of one check, told in one line."""

    name: str
    passed: bool | None  # None: not made, because what it needs has failed already
    detail: str  # what was seen, or: what, got, expected, next command

    def line(self) -> str:
        """The outcome as the user reads it."""
        outcome = {True: "ok     ", False: "FAILED ", None: "skipped"}[self.passed]
        return f"{outcome} {self.name}: {self.detail}"


class PartRecord(NamedTuple):
    """What a part was when it was last found complete."""

    hub: str | None  # the hub whose hashes it was compared with; None: adopted as it lay there
    repository: str | None
    revision: str | None
    all_files: bool  # whether everything the repository holds was fetched
    optional: tuple[str, ...]  # what was asked for beside the required files, whether or not the hub had it
    files: dict[str, ExpectedFile]  # path inside the model folder -> its size and sha256


def read_records(folder: Path) -> dict[str, PartRecord]:
    """Read what a folder held when it was last found complete.

    Args:
        folder: the model folder.

    Returns:
        a record a part name; empty where none can be read (a broken manifest is worth no more than a missing one).
    """
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        if content["version"] != MANIFEST_VERSION:
            return {}
        return {name: _as_record(fields) for name, fields in content["parts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def save_records(folder: Path, records: Mapping[str, PartRecord]) -> None:
    """Write what a folder holds as `.verified.json` into it, atomically.

    Args:
        folder: the model folder.
        records: a record a part name.
    """
    parts = {}
    for name, record in records.items():
        files = {path: {"size_bytes": file.size_bytes, "sha256": file.sha256} for path, file in record.files.items()}
        parts[name] = {**record._asdict(), "files": dict(sorted(files.items()))}
    written = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with atomic_path(folder / MANIFEST_NAME) as temporary:
        content = {"version": MANIFEST_VERSION, "written": written, "parts": parts}
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def hash_file(path: Path) -> FileHashes:
    """Read a file once and compute the hashes that hubs publish.

    Args:
        path: the file.

    Returns:
        its size, its SHA-256, and the SHA-1 that git gives a blob of this content.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        sha256 = hashlib.sha256()
        git_sha1 = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
        while block := stream.read(HASH_BLOCK_BYTES):
            sha256.update(block)
            git_sha1.update(block)
    return FileHashes(size_bytes, sha256.hexdigest(), git_sha1.hexdigest())


def difference(got: FileHashes, expected: ExpectedFile) -> str | None:
    """Compare a file with what it must be, by the strongest hash that is known.

    Args:
        got: what the file is.
        expected: what it must be.

    Returns:
        what differs, with both values, or None.
    """
    if got.size_bytes != expected.size_bytes:
        return f"{got.size_bytes:,} bytes, expected {expected.size_bytes:,}"
    if expected.sha256 is not None:
        if got.sha256 != expected.sha256.lower():
            return f"sha256 {got.sha256}, expected {expected.sha256.lower()}"
    elif expected.git_sha1 is not None and got.git_sha1 != expected.git_sha1.lower():
        return f"git sha1 {got.git_sha1}, expected {expected.git_sha1.lower()}"
    return None


def format_problem(path: Path) -> str | None:
    """Find out, without knowing its hash, whether a file is plainly not what its name says: cut off, or a stand-in.

    Args:
        path: the file.

    Returns:
        what is wrong with it, or None where nothing can be told from its shape.
    """
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        return "the file is empty"
    with path.open("rb") as stream:
        start = stream.read(POINTER_BYTES)
        if size_bytes <= POINTER_BYTES and start.startswith(b"version ") and b"\noid sha256:" in start:
            return "this is a git-lfs pointer, not the file; run `git lfs pull` in the folder it was cloned into"
        if start.lstrip()[:9].lower() in (b"<!doctype", b"<html") or start.lstrip()[:5].lower() == b"<html":
            return "this is a web page, not the file"
        if path.suffix in (".pt", ".zip"):
            return _zip_problem(path, start)
        if path.suffix == ".safetensors":
            return _safetensors_problem(stream, size_bytes)
        if path.suffix == ".onnx":
            return _onnx_problem(stream, size_bytes)
        if path.suffix == ".json":
            return _json_problem(path)
    return None


def check_part(folder: Path, part: ModelPart, recorded: Mapping[str, ExpectedFile], next_command: str) -> list[Check]:
    """Check one part of a model folder as it lies there.

    Args:
        folder: the model folder.
        part: the part to check.
        recorded: what the manifest holds for it, by path inside the model folder; empty if there is none.
        next_command: what to run when something is wrong.

    Returns:
        one outcome a file: the required ones, the recorded ones, and the optional ones that are there.
    """
    inside = f"{part.subfolder}/" if part.subfolder else ""
    paths = [inside + name for name in part.required]
    paths += [inside + name for name in part.optional if (folder / inside / name).is_file()]
    paths += [path for path in recorded if path not in paths]
    return [_check_file(folder, path, recorded.get(path), next_command) for path in paths]


def _as_record(fields: Mapping[str, Any]) -> PartRecord:
    files = {
        path: ExpectedFile(path, int(entry["size_bytes"]), str(entry["sha256"]))
        for path, entry in fields["files"].items()
    }
    optional = tuple(fields.get("optional", ()))  # which earlier manifests do not tell
    return PartRecord(
        fields["hub"], fields["repository"], fields["revision"], bool(fields["all_files"]), optional, files
    )


def _check_file(folder: Path, name: str, recorded: ExpectedFile | None, next_command: str) -> Check:
    path = folder / name
    if not path.is_file():
        return Check(name, False, f"there is no such file in {folder}; next: {next_command}")
    problem = format_problem(path)
    if problem is not None:
        return Check(name, False, f"{problem} ({path.stat().st_size:,} bytes); next: {next_command}")
    size = human_bytes(path.stat().st_size)
    if recorded is None:
        return Check(name, True, f"{size}, whole by its format (no hash is recorded for it)")
    problem = difference(hash_file(path), recorded)
    if problem is None:
        return Check(name, True, f"{size}, sha256 as recorded")
    if may_be_edited(name):
        return Check(name, True, f"{size}, changed since it was recorded (this file may be edited)")
    return Check(name, False, f"changed since it was recorded: got {problem}; next: {next_command}")


def may_be_edited(path: str) -> bool:
    """Whether a change of a published file may be its owner's will; it is told then, but is no fault.

    The hubs themselves differ in such files: each has its own README.

    Args:
        path: the file's path in its repository or model folder.

    Returns:
        True for text, and for the named speakers; False for weights.
    """
    return path == SPEAKERS_FILE or not path.endswith(WEIGHT_SUFFIXES)


def human_bytes(size_bytes: int) -> str:
    """A size as people read it.

    Args:
        size_bytes: the size.

    Returns:
        at most four digits and a decimal unit, `1.24 GB`.
    """
    size = float(size_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _zip_problem(path: Path, start: bytes) -> str | None:
    """torch.save writes a zip archive, and its directory comes last: a file cut off has none."""
    if path.suffix == ".pt" and start[:1] == b"\x80":
        return None  # the older format of torch.save, a plain pickle, which tells nothing without being run
    try:
        with zipfile.ZipFile(path) as archive:
            return None if archive.namelist() else "the archive is empty"
    except (zipfile.BadZipFile, EOFError, OSError):
        return "not a whole archive (cut off while it was downloaded or copied?)"


def _safetensors_problem(stream: BinaryIO, size_bytes: int) -> str | None:
    """Eight bytes of header length, a JSON header with every tensor's place, then the tensors."""
    stream.seek(0)
    header_bytes = int.from_bytes(stream.read(8), "little")
    if header_bytes > size_bytes - 8:
        return "not a whole safetensors file (its header is cut off)"
    try:
        header = json.loads(stream.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return "not a safetensors file (its header cannot be read)"
    expected_bytes = 8 + header_bytes + max(ends, default=0)
    return None if size_bytes == expected_bytes else f"not a whole safetensors file (expected {expected_bytes:,} bytes)"


def _onnx_problem(stream: BinaryIO, size_bytes: int) -> str | None:
    """An ONNX file is one protobuf message; its outermost fields must end where the file does."""
    stream.seek(0)
    try:
        while stream.tell() < size_bytes:
            stream.seek(_protobuf_field_bytes(stream), os.SEEK_CUR)
    except ValueError as error:
        return f"not an ONNX file ({error})"
    if stream.tell() > size_bytes:
        return "not a whole ONNX file (cut off while it was downloaded or copied?)"
    return None


def _protobuf_field_bytes(stream: BinaryIO) -> int:
    """Read a field's tag (and its number, where the field is one); return how many bytes of it follow."""
    wire_type = _varint(stream) & 7
    if wire_type == 0:
        _varint(stream)
        return 0
    if wire_type == 2:
        return _varint(stream)
    if wire_type in (1, 5):
        return 8 if wire_type == 1 else 4
    raise ValueError(f"a protobuf field of the unknown kind {wire_type}")


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = stream.read(1)
        if not byte:
            raise ValueError("it ends inside a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number is too long")


def _json_problem(path: Path) -> str | None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return "not a whole JSON file"
    return None

"""Fills a model folder from the hubs: what is missing is fetched, what is there is verified, nothing good is lost.

Everything is fetched into `<folder>/.download`, compared with the hub's hashes there, and only then renamed into its
place; so a file under its own name is always whole, and a run that was stopped goes on where it was.
"""

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cosyvoice.utils.atomic import atomic_path
from cosyvoice.utils.output_lock import OutputLock
from taste.archives import ArchiveError, is_archive, unpack_archive
from taste.folder_swap import finish_swap, fresh_folder, swap
from taste.hub import Hub, HubError, Listing
from taste.verify import (
    ExpectedFile,
    ModelPart,
    PartRecord,
    check_part,
    difference,
    format_problem,
    hash_file,
    human_bytes,
    may_be_edited,
    read_records,
    save_records,
)

STAGING_NAME = ".download"
SPARE_BYTES = 64_000_000  # left free on the disk beside what is fetched


class InstallError(RuntimeError):
    """No hub could give what is missing; the message lists all that is, and every reason."""


class AnotherModelError(RuntimeError):
    """A model folder holds whole files that are not the wanted ones; the message lists them."""


class DiskSpaceError(RuntimeError):
    """What is missing does not fit on the disk; nothing was begun."""


class Plan(NamedTuple):
    """What one hub's listing asks for, compared with what lies in the folder."""

    fetch: list[ExpectedFile]  # missing, or there but damaged
    present: dict[str, ExpectedFile]  # path in the repository -> the file as it is, with its sha256
    notes: list[str]
    keep: dict[str, Path]  # path in the repository -> where what stands there moves when it is fetched again


class Installer:
    """Fills one model folder.

    Args:
        folder: the model folder; made if missing.
        parts: what it shall hold.
        hubs: the hubs by name.
        source: the name of the hub to ask first; None asks each part's home first.
        all_files: fetch everything the repositories hold, not only what the stages read.
        say: told each step, one line at a time.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[ModelPart],
        hubs: Mapping[str, Hub],
        source: str | None = None,
        all_files: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder.resolve()  # a link to another disk stays one
        self.parts = parts
        self.hubs = hubs
        self.source = source
        self.all_files = all_files
        self.say = say
        self._fetched: set[Path] = set()  # by this run: not somebody's, so another hub's file may take their place

    def install(self) -> None:
        """Adopt what the folder holds, fetch the rest, and record what it holds now.

        Raises:
            InstallError: a part cannot be completed; what was fetched stays.
            AnotherModelError: the folder holds another model; nothing was touched.
            DiskSpaceError: the disk has no room for what is missing.
            OutputBusyError: another process is filling this folder.
        """
        with OutputLock(self.folder):
            finish_swap(self.folder, self.say, STAGING_NAME)
            self._fill(self.folder)

    def replace(self) -> None:
        """Fetch everything anew beside the folder, and put it in the folder's place once it is complete.

        Files that only the old folder holds (other speakers, the parts that are not being replaced) move over.

        Raises:
            InstallError: the new folder cannot be completed; the old one is untouched, and what was fetched is gone on
                with next time.
            DiskSpaceError: the disk has no room for a second folder.
            SwapError: the new folder is complete but cannot take the old one's place.
            OutputBusyError: another process is filling this folder.
        """
        with OutputLock(self.folder):
            finish_swap(self.folder, self.say, STAGING_NAME)
            fresh = fresh_folder(self.folder)
            self._fill(fresh)
            save_records(fresh, {**read_records(self.folder), **read_records(fresh)})
            swap(self.folder, self.say, STAGING_NAME)

    def _fill(self, folder: Path) -> None:
        records = read_records(folder)
        problems = []
        for part in self.parts:
            record = records.get(part.name)
            if self._is_complete(folder, part, record):
                continue
            try:
                records[part.name] = self._fill_part(folder, part, record)
            except InstallError as error:
                problems.append(str(error))
            else:
                save_records(folder, records)
        if problems:
            raise InstallError("\n".join(problems))
        shutil.rmtree(folder / STAGING_NAME, ignore_errors=True)

    def _is_complete(self, folder: Path, part: ModelPart, record: PartRecord | None) -> bool:
        """Whether all of a part was verified against a hub once, and is still what it was then: no hub is asked."""
        if record is None or record.hub is None or (self.all_files and not record.all_files):
            return False
        if not set(part.optional) <= set(record.optional):  # it was filled when less was wanted
            return False
        checks = check_part(folder, part, record.files, next_command="")
        failed = [check.name for check in checks if not check.passed]
        if failed:
            self.say(f"{part.name}: no longer as recorded: {', '.join(failed)}")
            return False
        origin = f"{record.repository} on {record.hub}"
        self.say(f"{part.name}: {len(checks)} files are as recorded from {origin}; no hub is asked")
        return True

    def _fill_part(self, folder: Path, part: ModelPart, record: PartRecord | None) -> PartRecord:
        """Complete a part from the first hub that can, or adopt it as it is where none can and nothing is missing."""
        reasons = []
        another = None
        first = self.source or part.home
        for name in sorted(part.repositories, key=lambda name: name != first):
            try:
                listing = self.hubs[name].list_files(part.repositories[name])
                files = self._fill_from(self.hubs[name], listing, folder, part, record)
            except (HubError, ArchiveError) as error:
                self.say(f"{part.name}: {error}")
                reasons.append(str(error))
                continue
            except AnotherModelError as error:
                another = error  # unless the other hub has just these files
                continue
            return PartRecord(name, listing.repository, listing.revision, self.all_files, part.optional, files)
        if another is not None:
            raise another
        adopted = _adopt(folder, part, record, reasons)
        self.say(f"{part.name}: adopted as it is; its files are whole, but no hub could be asked for their hashes")
        return adopted

    def _fill_from(
        self, hub: Hub, listing: Listing, folder: Path, part: ModelPart, record: PartRecord | None
    ) -> dict[str, ExpectedFile]:
        """Bring a part to what one hub lists; returns what it holds then, by path inside the model folder."""
        part_folder = folder / part.subfolder
        ours: dict[Path, str | None] = dict.fromkeys(self._fetched)
        if record is not None and record.hub is not None:
            ours |= {folder / path: file.sha256 for path, file in record.files.items() if folder / path not in ours}
        plan = _compare(part_folder, _select(listing, part, self.all_files), ours, listing)
        staging = folder / STAGING_NAME / hub.name.replace(" ", "-") / part.name
        _check_space(part_folder, staging, plan.fetch)
        for note in plan.notes:
            self.say(f"{part.name}: {note}")
        held = dict(plan.present)
        for file in plan.fetch:
            self.say(f"{part.name}: fetching {file.path} ({human_bytes(file.size_bytes)}) from {hub.name}")
            held[file.path] = _fetch(hub, listing, file, staging, part_folder, plan.keep.get(file.path))
            self._fetched.add(part_folder / file.path)
        for path in [path for path in held if is_archive(path)]:
            for name in unpack_archive(part_folder / path, part_folder):
                held[name] = _as_it_is(part_folder, name)
        missing = [path for path in part.required if path not in held]
        if missing:
            raise HubError(f"the archives of {listing.repository} on {listing.hub} hold no {', '.join(missing)}")
        self.say(f"{part.name}: {len(held)} files, the content of {listing.repository} on {listing.hub}")
        return {str(Path(part.subfolder, path)): file for path, file in held.items()}


def _select(listing: Listing, part: ModelPart, all_files: bool) -> list[ExpectedFile]:
    """The files of a repository that are wanted; an archive always is, since it may hold the others."""
    wanted = [
        file
        for path, file in listing.files.items()
        if all_files or path in part.required or path in part.optional or is_archive(path)
    ]
    missing = [path for path in part.required if path not in listing.files]
    if missing and not any(is_archive(file.path) for file in wanted):
        raise HubError(f"{listing.repository} on {listing.hub} has no {', '.join(missing)}")
    return wanted


def _compare(
    part_folder: Path, wanted: Sequence[ExpectedFile], ours: Mapping[Path, str | None], listing: Listing
) -> Plan:
    """Find what must be fetched; a whole weight file that differs is somebody's, and stops everything before it starts.

    `ours` are files that came from a hub, with the SHA-256 that was recorded, None for those of this run: if they
    differ now, they were damaged, or replaced, or belong to the other hub. A whole one that is not as recorded may be
    somebody's work, such as a model that was trained on.
    """
    plan = Plan([], {}, [], {})
    others = []
    for file in wanted:
        path = part_folder / file.path
        if not path.is_file():
            plan.fetch.append(file)
            continue
        got = hash_file(path)
        problem = difference(got, file)
        broken = None if problem is None else format_problem(path)
        if problem is None:
            plan.present[file.path] = file._replace(sha256=got.sha256)
        elif broken is None and may_be_edited(file.path):
            plan.notes.append(f"{file.path} differs from the hub's and is kept: it may be edited")
            plan.present[file.path] = ExpectedFile(file.path, got.size_bytes, got.sha256)
        elif broken is not None or path in ours:
            plan.notes.append(f"{file.path} is fetched again: got {broken or problem}")
            plan.fetch.append(file)
            if broken is None and ours.get(path) not in (None, got.sha256):
                aside = path.with_name(f"{path.name}.replaced-{got.sha256[:8]}")
                plan.notes.append(f"what stands there is whole, and is kept as {aside.name}")
                plan.keep[file.path] = aside
        else:
            others.append(f"{path}: whole, but not the file of {listing.repository} on {listing.hub}: got {problem}")
    if others:
        raise AnotherModelError(
            "\n".join(others)
            + "\nthis seems to be another model, and nothing was touched; check it as it is with --verify-only, "
            "choose another --model-dir, or replace it with --force-download"
        )
    return plan


def _fetch(
    hub: Hub, listing: Listing, file: ExpectedFile, staging: Path, part_folder: Path, aside: Path | None
) -> ExpectedFile:
    """Fetch a file, compare it with the hub's hash, and put it in its place; a wrong one is fetched once more.

    What stands there moves `aside`, where that is given.
    """
    staged = staging / file.path
    for last_attempt in (False, True):
        if not staged.is_file():
            hub.fetch(listing, file, staging)
        got = hash_file(staged)
        problem = difference(got, file)
        if problem is None:
            break
        staged.unlink()
        if last_attempt:
            raise HubError(f"{hub.name} sent a wrong {file.path} of {listing.repository}: got {problem}")
    with staged.open("rb") as stream:
        os.fsync(stream.fileno())
    target = part_folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    if aside is not None:
        target.replace(aside)
    try:
        os.replace(staged, target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # the part's folder is a link to another disk
            raise
        with atomic_path(target) as temporary:
            shutil.copyfile(staged, temporary)
        staged.unlink()
    return file._replace(sha256=got.sha256)


def _check_space(part_folder: Path, staging: Path, files: Sequence[ExpectedFile]) -> None:
    fetched_bytes = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    needed_bytes = sum(file.size_bytes for file in files) - fetched_bytes + SPARE_BYTES
    part_folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(part_folder).free
    if files and needed_bytes > free_bytes:
        raise DiskSpaceError(
            f"the disk of {part_folder} has {human_bytes(free_bytes)} free, {human_bytes(needed_bytes)} are needed; "
            "free some, or choose a folder on another disk with --model-dir"
        )


def _adopt(folder: Path, part: ModelPart, record: PartRecord | None, reasons: Sequence[str]) -> PartRecord:
    """Record a part as it lies there, if all of it does; no hub has vouched for its content."""
    known = record.files if record is not None else {}
    checks = check_part(folder, part, known, next_command="run this again with a network")
    missing = [check.name for check in checks if not (folder / check.name).is_file()]
    broken = [check.line() for check in checks if not check.passed and check.name not in missing]
    if missing or broken:
        absent = [f"{part.name}: missing {', '.join(missing)}"] if missing else []
        raise InstallError("\n".join([*absent, *broken, *(f"{part.name}: {reason}" for reason in reasons)]))
    files = {check.name: _as_it_is(folder, check.name) for check in checks}
    return PartRecord(None, None, None, False, part.optional, files)


def _as_it_is(folder: Path, name: str) -> ExpectedFile:
    got = hash_file(folder / name)
    return ExpectedFile(name, got.size_bytes, got.sha256)

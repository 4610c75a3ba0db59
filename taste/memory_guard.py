"""Stops a long run before the machine, or the container it runs in, is out of memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

CHECK_EVERY_UTTERANCES = 20
UNLIMITED_BYTES = 2**60  # cgroup v1 writes "no limit" as a number near 2**63


class MemoryUse(NamedTuple):
    """How full one memory limit is."""

    percent: float
    used_bytes: int
    limit_bytes: int
    source: str  # "system memory", or the cgroup's folder

    def __str__(self) -> str:
        used, limit = self.used_bytes / 2**30, self.limit_bytes / 2**30
        return f"{self.percent:.0f} % of {self.source} in use ({used:.1f} of {limit:.1f} GiB)"


class MemoryGuard:
    """Looks at the memory every few utterances.

    Args:
        limit_percent: above this share of the tightest limit the run should stop.
        every_utterances: how often to look.
    """

    def __init__(self, limit_percent: float, every_utterances: int = CHECK_EVERY_UTTERANCES) -> None:
        self.limit_percent = limit_percent
        self.every_utterances = every_utterances
        self._since_last_look = 0

    def over_limit(self, utterances: int) -> MemoryUse | None:
        """Count utterances and, when enough have passed since the last look, look again.

        Args:
            utterances: how many were processed since the last call.

        Returns:
            the limit that is too full, or None while there is room (or it was not time to look).
        """
        self._since_last_look += utterances
        if self._since_last_look < self.every_utterances:
            return None
        self._since_last_look = 0
        use = tightest_use()
        return use if use.percent > self.limit_percent else None


def tightest_use(root: Path = Path("/")) -> MemoryUse:
    """The fullest of the system's memory and every cgroup this process belongs to.

    Args:
        root: where `proc` and `sys` are mounted.

    Returns:
        its use.
    """
    memory = psutil.virtual_memory()
    system = MemoryUse(memory.percent, memory.total - memory.available, memory.total, "system memory")
    return max([system, *_cgroup_uses(root)], key=lambda use: use.percent)


def _cgroup_uses(root: Path) -> Iterator[MemoryUse]:
    """The limited ones among this process's cgroups and their parents."""
    for folder, limit_file, usage_file in _cgroup_folders(root):
        limit_bytes = _number(folder / limit_file)
        usage_bytes = _number(folder / usage_file)
        if limit_bytes is None or usage_bytes is None or not 0 < limit_bytes < UNLIMITED_BYTES:
            continue
        used_bytes = max(0, usage_bytes - _file_cache_bytes(folder / "memory.stat"))
        yield MemoryUse(100 * used_bytes / limit_bytes, used_bytes, limit_bytes, f"the cgroup {folder}")


def _cgroup_folders(root: Path) -> Iterator[tuple[Path, str, str]]:
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # no Linux
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # inside a container the path may be the host's, so that only the mounted base exists
        folder = base / path.strip("/")
        while True:
            yield folder, *names
            if folder == base:
                break
            folder = folder.parent


def _file_cache_bytes(stat_file: Path) -> int:
    """What the kernel counts as used but gives back when memory is short: pages of files, mapped features included."""
    try:
        fields = dict(line.split(maxsplit=1) for line in stat_file.read_text().splitlines())
    except OSError:
        return 0
    prefix = "total_" if "total_inactive_file" in fields else ""  # v1 counts the children apart
    return sum(int(fields.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # v2 writes "max" for no limit

from pathlib import Path

import psutil
import pytest

from taste.memory_guard import MemoryGuard, tightest_use

GIB = 2**30


def _mount(root: Path, membership: str, files: dict[str, str]) -> Path:
    """A root with /proc/self/cgroup and the control files of some cgroups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for name, content in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(content)
    return root


def test_without_cgroups_the_system_counts(tmp_path: Path) -> None:
    use = tightest_use(tmp_path)
    assert use.source == "system memory"
    assert use.limit_bytes == psutil.virtual_memory().total
    assert 0 < use.percent < 100


def test_a_v2_limit_counts_without_the_file_cache(tmp_path: Path) -> None:
    stat = f"anon 1\nactive_file {GIB}\ninactive_file {2 * GIB}\n"
    files = {"a/b/memory.max": f"{10 * GIB}\n", "a/b/memory.current": f"{10 * GIB}\n", "a/b/memory.stat": stat}
    use = tightest_use(_mount(tmp_path, "0::/a/b\n", files))
    # 7 of 10 GiB; a machine whose own memory is fuller than that would rightly win
    assert use.percent >= 70
    if use.source != "system memory":
        assert use.percent == pytest.approx(70) and use.source.endswith("a/b")


def test_a_parents_tighter_limit_wins(tmp_path: Path) -> None:
    files = {
        "a/b/memory.max": "max\n",
        "a/b/memory.current": f"{GIB}\n",
        "a/memory.max": f"{GIB}\n",
        "a/memory.current": f"{GIB}\n",
    }
    use = tightest_use(_mount(tmp_path, "0::/a/b\n", files))
    assert use.percent == pytest.approx(100) and use.source.endswith("cgroup/a")
    assert str(use).startswith("100 % of the cgroup") and "1.0 of 1.0 GiB" in str(use)


def test_a_v1_limit_counts_even_where_the_path_is_the_hosts(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "memory/memory.usage_in_bytes": f"{4 * GIB}\n",
        "memory/memory.stat": "inactive_file 5\ntotal_inactive_file 0\ntotal_active_file 0\n",
    }
    use = tightest_use(_mount(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/docker/of/the/host\n", files))
    assert use.percent == pytest.approx(100) and use.limit_bytes == 4 * GIB


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    files = {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": f"{GIB}\n"}
    assert tightest_use(_mount(tmp_path, "4:memory:/\n0::/\n", files)).source == "system memory"


def test_the_guard_looks_every_twenty_utterances() -> None:
    guard = MemoryGuard(limit_percent=0.001)
    assert [guard.over_limit(8) is not None for _ in range(7)] == [False, False, True, False, False, True, False]
    assert MemoryGuard(limit_percent=101, every_utterances=1).over_limit(1) is None

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hashlens.cpus import cgroup_quota_cpus, usable_cpus


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        # The tightest of the group and those above it.
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "200000 100000\n"}, 0.5),
        # A container sees its own group as the root, under a path that is not there.
        ("0::/pod/x\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (
            "5:memory:/a\n4:cpu,cpuacct:/a\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            "4:cpu,cpuacct:/gone\n",
            {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"},
            2.0,
        ),
        ("4:cpuset:/a\n", {"cpuset/a/cpu.cfs_quota_us": "1\n"}, None),
    ],
)
def test_quota(tmp_path: Path, own: str, files: dict[str, str], quota: float | None) -> None:
    write(tmp_path, {"own": own})
    write(tmp_path / "mount", files)
    assert cgroup_quota_cpus(tmp_path / "mount", tmp_path / "own") == quota


@pytest.mark.parametrize(
    ("cpu_max", "cpus"), [("50000 100000", 1), ("100000 100000", 1), ("199999 100000", 1)]
)
def test_part_of_a_cpu_is_rounded_down_but_one_is_left(
    tmp_path: Path, cpu_max: str, cpus: int
) -> None:
    write(tmp_path, {"own": "0::/\n", "cpu.max": cpu_max})
    assert usable_cpus(tmp_path, tmp_path / "own") == cpus


def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    cpus = usable_cpus(tmp_path, tmp_path / "nothing")
    assert 1 <= cpus <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_limits(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus(tmp_path, tmp_path / "nothing") == 1
    finally:
        os.sched_setaffinity(0, before)

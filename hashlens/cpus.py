"""How many CPUs this process may really use, and which of its threads go first."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path
from typing import Final

NICENESS_OF_WORK: Final = 5
"""Of threads that compute for callers: below the thread that takes and answers calls, which would
else wait behind them for a CPU, and with it everybody who is to be refused at once."""

NICENESS_OF_CARE: Final = 10
"""Of threads whose work nobody waits for."""


def lower_priority(niceness: int) -> None:
    """Let the threads of lower niceness go before the calling one, and those that it starts.

    Where priorities are not a thread's own, as on macOS, all share alike.

    Parameters
    ----------
    niceness
        As of `nice`: 0 to 19.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def usable_cpus(
    cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int:
    """Return the number of CPUs by affinity and by cgroup quota, whichever is less.

    A quota of part of a CPU is rounded down: one thread too many is stopped for the rest of the
    period with its share undone, and the others wait for it.

    Parameters
    ----------
    cgroups
        Where the cgroup file systems are mounted.
    own
        The list of this process's cgroups.

    Returns
    -------
    int
        At least 1.
    """
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cpus = os.cpu_count() or 1
    quota = cgroup_quota_cpus(cgroups, own)
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def cgroup_quota_cpus(cgroups: Path, own: Path) -> float | None:
    """Return the CPU quota in CPUs, or None without one; version 2 or 1 of cgroups.

    The tightest limit from the process's own group up to the root counts. In a container the
    root often is the process's group, and its path names nothing: then only the root is found.
    """
    quotas = []
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [cgroups]
        elif "cpu" in controllers.split(","):
            mounts = [cgroups / controllers, cgroups / "cpu"]
        else:
            continue
        for mount in mounts:
            group = mount / path.lstrip("/")
            for directory in (group, *group.parents):
                quotas.append(_quota_v2(directory) if controllers == "" else _quota_v1(directory))
                if directory == mount:
                    break
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(directory: Path) -> float | None:
    fields = _read(directory / "cpu.max").split()
    if len(fields) != 2 or fields[0] == "max":
        return None
    return int(fields[0]) / int(fields[1])


def _quota_v1(directory: Path) -> float | None:
    quota_us = _read(directory / "cpu.cfs_quota_us").strip()
    period_us = _read(directory / "cpu.cfs_period_us").strip()
    if not quota_us or not period_us or int(quota_us) <= 0:
        return None
    return int(quota_us) / int(period_us)


def _read(path: Path) -> str:
    """Return a small file's text, empty if it cannot be read: no cgroups, no limit."""
    try:
        return path.read_text("ascii")
    except OSError:
        return ""

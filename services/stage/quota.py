"""How many processors this process may really use: the container's quota and affinity, not the host's cores."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1 = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


def cpus(limit: float | None = None) -> float:
    """Processors this process may use: the least of `limit`, the cgroup's quota and the affinity mask."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    bounds = [float(len(affinity(0)) if affinity else os.cpu_count() or 1)]
    if limit is not None:
        bounds.append(limit)
    quota = parse_v2(_read(_CGROUP_V2)) or parse_v1(*(_read(path) for path in _CGROUP_V1))
    if quota is not None:
        bounds.append(quota)
    return min(bounds)


def parse_v2(text: str | None) -> float | None:
    """Processors in `cpu.max` ("QUOTA PERIOD" in µs, or "max PERIOD"); None where it sets no limit."""
    if not text or text.startswith("max"):
        return None
    quota, period = text.split()
    return int(quota) / int(period)


def parse_v1(quota: str | None, period: str | None) -> float | None:
    """Processors in the two files of cgroup v1 [µs]; None where they set no limit (-1) or are not there."""
    if not quota or not period or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None

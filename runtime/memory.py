"""How much memory the process may still take."""

from __future__ import annotations

import re
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")
_FALLBACK = 4 << 30
"""Where the system does not tell."""


def free_memory() -> int:
    """Bytes that are free on the machine, or in the process's control group if that is less."""
    found = [_available()]
    limit, used = _number(_GROUP / "memory.max"), _number(_GROUP / "memory.current")
    if limit is not None and used is not None:
        found.append(max(0, limit - used))
    return min((x for x in found if x is not None), default=_FALLBACK)


def _available() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) << 10 if found else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


__all__ = ["free_memory"]

"""How much memory the process may still take."""

from __future__ import annotations

import re
from pathlib import Path

from mesart.graphs.errors import InputError

_GROUP = Path("/sys/fs/cgroup")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_FALLBACK = 4 << 30
"""Where the system does not tell."""


def free_memory() -> int:
    """Bytes that are free on the machine, or in the process's control group if that is less."""
    found = [_available()]
    limit, used = _number(_GROUP / "memory.max"), _number(_GROUP / "memory.current")
    if limit is not None and used is not None:
        found.append(max(0, limit - used))
    return min((x for x in found if x is not None), default=_FALLBACK)


def parse_memory(memory: int | str | None) -> int | None:
    """Bytes, of a number or of a text such as ``2GiB``, ``512 MiB`` or ``2G``; ``None`` stays.

    Raises:
        InputError: it is neither, or not above 0.
    """
    if memory is None:
        return None
    if type(memory) is int and memory > 0:
        return memory
    found = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", memory, re.IGNORECASE)
        if type(memory) is str
        else None
    )
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise InputError(f"kv_memory is {memory!r}; give a number of bytes above 0, or a text such as '2GiB'")
    return size


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


__all__ = ["free_memory", "parse_memory"]

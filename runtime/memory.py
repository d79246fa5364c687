"""How much memory the process may still take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mesart.graphs.errors import CapacityError

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_GROUP = Path("/sys/fs/cgroup")
_FALLBACK = 4 << 30
"""Where the system does not tell."""


@contextmanager
def enough_memory() -> Iterator[None]:
    """Where Python runs out of memory, the error is a :class:`CapacityError` of one line."""
    try:
        yield
    except MemoryError as error:
        raise CapacityError(
            f"out of memory{f' ({error})' if str(error) else ''}: use fewer rows or shorter prompts, or give "
            "the process more memory"
        ) from error


def free_memory() -> int:
    """Bytes that are free: on the machine, in the process's control group, in its address space, whatever is least."""
    found = [_available(), _address_space()]
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


def _address_space() -> int | None:
    """A third of what is left of a limited one: OpenVINO reserves as much as the caches take, for a moment."""
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        pages = 0
    return max(0, int(limit) - pages * resource.getpagesize()) // 3


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


__all__ = ["free_memory"]

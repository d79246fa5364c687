"""Sizes of memory as people write them."""

from __future__ import annotations

import re
from typing import Final

from mesart.graphs.errors import InputError

GIB: Final = 1 << 30

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE | re.ASCII)


def parse_memory(memory: object, name: str = "kv_memory") -> int:
    """Bytes, of a number of bytes or of a text such as ``2GiB``, ``512 MiB`` or ``2G``.

    Raises:
        InputError: it is neither, or less than a byte.
    """
    if type(memory) is int and memory > 0:
        return memory
    found = _SIZE.fullmatch(memory) if isinstance(memory, str) and len(memory) < 32 else None
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise InputError(f"{name} is {memory!r}; give a number of bytes above 0, or a text such as '2GiB'")
    return size


__all__ = ["GIB", "parse_memory"]

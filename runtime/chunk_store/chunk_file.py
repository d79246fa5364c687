"""One chunk as a file in the safetensors format, its own SHA-256 in the metadata.

safetensors itself cannot give numpy bfloat16, nor say whether the numbers are those that were written; the format is
a length, a JSON object and the numbers (https://github.com/huggingface/safetensors), and any reader of it opens these.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesart.runtime.kv.block import BlockLayout, KvBlock

_NAMES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}
"""By the dtype in which numpy holds them."""

_MOST_HEADER = 1 << 24

_ALIGNMENT = 64


def header_of(block: KvBlock, key: str) -> bytes:
    """What stands before the numbers; ``key`` names them."""
    layout, fields, at = block.layout, {}, 0
    half = len(layout.heads_and_sizes) // 2
    for index, shape in enumerate(layout.shapes(block.tokens)):
        size = math.prod(shape) * layout.storage.itemsize
        name = f"{'keys' if index < half else 'values'}.{index % half}"
        fields[name] = {"dtype": _NAMES[layout.storage.name], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    metadata = {"format": "mesart-chunk", "key": key, "sha256": hashlib.sha256(block.buffer.data).hexdigest()}
    text = json.dumps({"__metadata__": metadata, **fields}).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_block(file: int, layout: BlockLayout, tokens: int, key: str) -> KvBlock | None:
    """The block that an open file holds; ``None`` unless it is this one, whole and as it was written."""
    found = _read(file)
    if found is None or len(found[1]) != tokens * layout.bytes_per_token:
        return None
    block = KvBlock(layout, tokens, found[1])
    return block if header_of(block, key) == found[0] else None


def is_whole(file: int, key: str) -> bool:
    """Whether an open file holds the numbers, whatever they are of, that were written under this key."""
    found = _read(file)
    if found is None:
        return False
    try:
        metadata: Any = json.loads(found[0][8:])["__metadata__"]
        named, expected = metadata["key"], metadata["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return bool(named == key and expected == hashlib.sha256(found[1].data).hexdigest())


def _read(file: int) -> tuple[bytes, NDArray[np.uint8]] | None:
    """The header, its length before it, and the numbers: read, not mapped, for a file may be cut while it is used."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        return None
    with os.fdopen(file, "rb", buffering=0, closefd=False) as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MOST_HEADER, status.st_size - 8):
            return None
        header = start + stream.read(length)
        numbers = np.empty(status.st_size - 8 - length, np.uint8)
        view, done = numbers.data, 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                return None
            done += count
    return (header, numbers) if len(header) == 8 + length else None


__all__ = ["header_of", "is_whole", "read_block"]

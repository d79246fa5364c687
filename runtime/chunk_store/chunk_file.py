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
    header, count = _read_header(file), tokens * layout.bytes_per_token
    # Before memory is taken for the numbers: a damaged file may seem to have any number of them.
    if header is None or os.fstat(file).st_size != len(header) + count:
        return None
    numbers = _read(file, count)
    if numbers is None:
        return None
    block = KvBlock(layout, tokens, numbers)
    return block if header_of(block, key) == header else None


def is_whole(file: int, key: str) -> bool:
    """Whether an open file holds a block, of whatever layout, as it was written under this key."""
    header = _read_header(file)
    found = None if header is None else _layout_of(header)
    if found is None:
        return False
    os.lseek(file, 0, os.SEEK_SET)
    return read_block(file, *found, key) is not None


def _layout_of(header: bytes) -> tuple[BlockLayout, int] | None:
    """The layout and the number of tokens that a header speaks of."""
    storages = {name: storage for storage, name in _NAMES.items()}
    try:
        fields: Any = json.loads(header[8:])
        tensors = [tensor for name, tensor in fields.items() if name != "__metadata__"]
        shapes = [(int(heads), int(tokens), int(size)) for heads, tokens, size in (x["shape"] for x in tensors)]
        storage = np.dtype(storages[tensors[0]["dtype"]])
        return BlockLayout(tuple((heads, size) for heads, _, size in shapes), storage), shapes[0][1]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
        return None


def _read_header(file: int) -> bytes | None:
    """What stands before the numbers, its length first; the file is at the first number then."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        return None
    start = _read(file, 8)
    length = 0 if start is None else int.from_bytes(start, "little")
    if start is None or length > min(_MOST_HEADER, status.st_size - 8):
        return None
    text = _read(file, length)
    return None if text is None else start.tobytes() + text.tobytes()


def _read(file: int, count: int) -> NDArray[np.uint8] | None:
    """The next bytes, if there are as many: read, not mapped, for a file may be cut while it is used."""
    content = np.empty(count, np.uint8)
    with os.fdopen(file, "rb", buffering=0, closefd=False) as stream:
        done = 0
        while done < count:
            read = stream.readinto(content.data[done:])
            if not read:
                return None
            done += read
    return content


__all__ = ["header_of", "is_whole", "read_block"]

"""Small blocks of random numbers, and what is under a key of a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from mesart.runtime.kv.block import BlockLayout, KvBlock

LAYOUT = BlockLayout(((2, 4), (1, 2), (2, 6), (1, 2)), np.dtype(np.float32))
"""Two layers, keys and values of different widths."""


def key_of(index: int) -> str:
    """A key as any other: 64 hexadecimal digits."""
    return hashlib.sha256(str(index).encode()).hexdigest()


def block_of(index: int, tokens: int = 5, layout: BlockLayout = LAYOUT) -> KvBlock:
    """The block that belongs to :func:`key_of` the same number."""
    size = tokens * layout.bytes_per_token
    return KvBlock(layout, tokens, np.random.default_rng(index).integers(0, 256, size).astype(np.uint8))


def same(block: KvBlock | None, other: KvBlock) -> bool:
    return block is not None and np.array_equal(block.buffer, other.buffer)


def file_of(folder: Path, index: int) -> Path:
    return folder / "chunks" / f"{key_of(index)}.safetensors"


def bytes_on_disk(folder: Path) -> int:
    """Of all that the store writes beside its marker and its lock."""
    total = 0
    for path in (folder / "chunks").iterdir():
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue
    return total


__all__ = ["LAYOUT", "block_of", "bytes_on_disk", "file_of", "key_of", "same"]

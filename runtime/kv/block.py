"""Keys and values of a span of tokens, apart from any text: what is kept, written to disks, put into other texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.bundle.manifest import LayerInfo


@dataclass(frozen=True)
class BlockLayout:
    """How keys and values of a bundle lie in a block: ``[K, S, D]``, keys of all layers, then their values."""

    heads_and_sizes: tuple[tuple[int, int], ...]
    """K and D of each of these tensors."""
    storage: np.dtype[np.generic]
    """Of the numbers; whole numbers of 16 bits hold bfloat16, which numpy lacks."""

    @classmethod
    def of(cls, layers: Sequence[LayerInfo], storage: type[np.generic]) -> BlockLayout:
        keys = [(layer.kv_heads, layer.key_size) for layer in layers]
        values = [(layer.kv_heads, layer.value_size) for layer in layers]
        return cls((*keys, *values), np.dtype(storage))

    @property
    def bytes_per_token(self) -> int:
        return self.storage.itemsize * sum(heads * size for heads, size in self.heads_and_sizes)

    def shapes(self, tokens: int) -> list[tuple[int, int, int]]:
        return [(heads, tokens, size) for heads, size in self.heads_and_sizes]


class KvBlock:
    """Keys, at local positions, and values of ``tokens`` tokens, all layers, in one buffer. Not to be changed.

    Args:
        buffer: uint8 ``[tokens * layout.bytes_per_token]``; without one, whatever the memory holds.
    """

    def __init__(self, layout: BlockLayout, tokens: int, buffer: NDArray[np.uint8] | None = None) -> None:
        self.layout, self.tokens = layout, tokens
        self.buffer = np.empty(tokens * layout.bytes_per_token, np.uint8) if buffer is None else buffer

    @property
    def bytes(self) -> int:
        return self.buffer.size

    @cached_property
    def tensors(self) -> list[NDArray[Any]]:
        """Views ``[K, S, D]``: keys of all layers, then their values."""
        views, at = [], 0
        for shape in self.layout.shapes(self.tokens):
            size = int(np.prod(shape)) * self.layout.storage.itemsize
            views.append(self.buffer[at : at + size].view(self.layout.storage).reshape(shape))
            at += size
        return views

    @property
    def keys(self) -> list[NDArray[Any]]:
        return self.tensors[: len(self.tensors) // 2]

    @property
    def values(self) -> list[NDArray[Any]]:
        return self.tensors[len(self.tensors) // 2 :]


__all__ = ["BlockLayout", "KvBlock"]

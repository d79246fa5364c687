"""The live cache: values, and keys turned once in every view that the rule has; dropped where no query needs them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_SLACK = 64
"""Rows more than are needed, at least; else a quarter."""


@dataclass
class CacheRows:
    """Which row of every layer's buffers holds which token: the pinned first tokens, then all behind a gap."""

    pinned: int = 0
    """Tokens before this are never dropped."""
    gap: int = 0
    """Tokens dropped, those directly behind the pinned ones."""
    tokens: int = 0
    """Tokens there have been."""
    capacity: int = 0
    move: tuple[int, int] | None = None
    """Rows that every layer has to drop before the next run: ``(first, count)``; with new buffers of ``capacity``."""

    @property
    def count(self) -> int:
        """Rows in use."""
        return self.tokens - self.gap

    def row(self, token: int) -> int:
        """The row of a token that is kept."""
        return token if token < self.pinned else token - self.gap

    def begin(self, needed: tuple[int, int], new: int, total: int) -> None:
        """Makes room for ``new`` tokens of a text of ``total``; drops what only earlier queries needed."""
        self.pinned, first = needed
        dropped = max(0, min(first, self.tokens) - self.pinned - self.gap)
        least = self.count - dropped + new
        self.move = None
        if self.count + new > self.capacity or (dropped and self.capacity > 2 * least + _SLACK):
            expected = least if first > self.pinned else max(least, total)
            self.capacity = expected + max(_SLACK, expected // 4)
            self.move = (self.pinned, dropped)
            self.gap += dropped


@dataclass
class LayerCache:
    """Values and keys of one layer, ``[1, K, capacity, D]`` each."""

    values: Tensor | None = None
    keys: dict[str, Tensor] = field(default_factory=dict)

    def make_room(self, rows: CacheRows, keys: dict[str, Tensor], values: Tensor) -> None:
        """Moves to larger (or smaller) buffers if ``rows`` says so. ``keys`` and ``values``: what will be added."""
        if rows.move is None:
            return
        old = rows.tokens - rows.gap + rows.move[1]  # rows in use before the move
        self.values = _moved(self.values, values, rows, old)
        self.keys = {name: _moved(self.keys.get(name), key, rows, old) for name, key in keys.items()}

    def write(self, row: int, keys: dict[str, Tensor], values: Tensor) -> None:
        """Adds the keys, in every view, and values of new tokens, ``[1, K, S, D]`` each."""
        assert self.values is not None
        stop = row + values.shape[2]
        self.values[:, :, row:stop] = values
        for name, key in keys.items():
            self.keys[name][:, :, row:stop] = key


def _moved(buffer: Tensor | None, like: Tensor, rows: CacheRows, old: int) -> Tensor:
    new = torch.empty(1, like.shape[1], rows.capacity, like.shape[3], dtype=like.dtype, device=like.device)
    if buffer is not None and rows.move is not None:
        first, dropped = rows.move
        first = min(first, old)
        new[:, :, :first] = buffer[:, :, :first]
        new[:, :, first : old - dropped] = buffer[:, :, first + dropped : old]
    return new

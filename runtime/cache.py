"""The keys and values of live prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.manifest import LayerInfo
from mesart.graphs.stairs import ORDINARY, Stairs
from mesart.runtime.backends import Array, Graph

MASKED = np.float32(-1e9)
"""Added to the scores of empty slots: far below any score, and finite, so that no row becomes NaN."""


@dataclass
class Row:
    """One prompt of the batch."""

    tokens: list[int] = field(default_factory=list)
    """All tokens whose keys are in the cache."""
    stairs: Stairs = ORDINARY
    """Where they stand."""


class Cache:
    """Buffers ``[B, K, capacity, D]`` for keys and values of each layer; slot i of a row holds its token i.

    Written in place; copied only when the capacity grows.
    """

    def __init__(self, layers: list[LayerInfo], dtype: type[np.generic], batch: int, capacity: int) -> None:
        self.layers = layers
        self.rows = [Row() for _ in range(batch)]
        self.capacity = capacity
        self.keys: list[Array] = [np.zeros((batch, x.kv_heads, capacity, x.key_size), dtype) for x in layers]
        self.values: list[Array] = [np.zeros((batch, x.kv_heads, capacity, x.value_size), dtype) for x in layers]
        self.mask = np.full((batch, 1, 1, capacity), MASKED)
        """Added to the scores of each slot, float32: 0 where a key may be seen."""

    def grow(self, capacity: int) -> None:
        """Makes room for ``capacity`` tokens, more than now; what is there stays."""
        for buffers in (self.keys, self.values):
            for index, old in enumerate(buffers):
                buffers[index] = np.zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
                buffers[index][:, :, : self.capacity] = old
        mask = np.full((len(self.rows), 1, 1, capacity), MASKED)
        mask[..., : self.capacity] = self.mask
        self.mask, self.capacity = mask, capacity

    def write(self, row: int, start: int, keys: list[Array], values: list[Array]) -> None:
        """Stores new keys and values ``[K, S, D]`` of one row from slot ``start`` on; they may be seen from now on."""
        stop = start + keys[0].shape[1]
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.keys[layer][row, :, start:stop] = key
            self.values[layer][row, :, start:stop] = value
        self.mask[row, ..., start:stop] = 0

    def forget(self, row: int, start: int) -> None:
        """Tokens of a row from ``start`` on may be seen no more."""
        self.mask[row, ..., start:] = MASKED

    def past(self, row: int) -> dict[str, Array]:
        """One row's buffers as a graph's inputs, ``[1, K, capacity, D]``."""
        return past_feeds([k[row : row + 1] for k in self.keys], [v[row : row + 1] for v in self.values])

    def move(self, row: int, old: NDArray[np.int64], new: NDArray[np.int64], places: dict[str, Graph]) -> None:
        """Moves the keys of slots ``0 .. len(old) - 1`` from their old positions to new ones."""
        moved = np.flatnonzero(old != new)
        if not len(moved):
            return
        span = slice(int(moved[0]), int(moved[-1]) + 1)
        for layer, info in enumerate(self.layers):
            if info.place is not None:
                keys = self.keys[layer][row : row + 1, :, span]
                keys[:] = move_keys(places[info.place], keys, old[span], new[span])


def move_keys(place: Graph, keys: Array, old: NDArray[np.int64], new: NDArray[np.int64]) -> Array:
    """Keys ``[B, K, S, D]`` turned from positions ``old`` to ``new``, int64 ``[S]`` both."""
    from_ids, to_ids = (np.broadcast_to(ids, (len(keys), len(ids))) for ids in (old, new))
    feeds = {"key": np.ascontiguousarray(keys), "from_ids": np.array(from_ids), "to_ids": np.array(to_ids)}
    return place(feeds)["moved"]


def past_feeds(keys: list[Array], values: list[Array]) -> dict[str, Array]:
    """The inputs ``past_key_values.N.key`` and ``.value``."""
    feeds = {f"past_key_values.{index}.key": key for index, key in enumerate(keys)}
    feeds.update({f"past_key_values.{index}.value": value for index, value in enumerate(values)})
    return feeds

"""What a store of keys and values should hold: each text as a list of its tokens, in plain numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import LayerInfo
from mesart.runtime.kv.paged import PagedKv, PagedStore
from mesart.runtime.kv.slab import SlabKv, SlabStore
from mesart.runtime.kv.store import Array, Kv, Positions
from tests.runtime.faults import Interruption

# Keys of the second layer are not rotated.
LAYERS = [LayerInfo(2, 4, 6, "rerotate.onnx"), LayerInfo(1, 2, 2, None), LayerInfo(1, 8, 4, "rerotate-1.onnx")]
BYTES = 4 * sum(layer.kv_heads * (layer.key_size + layer.value_size) for layer in LAYERS)
"""Of a token, in float32."""


class Rotation:
    """Adds a position, times a number of the layer: whole numbers, so that it can be undone to the last bit.

    ``fails``: asked with the number of each call.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.fails: Callable[[int], bool] = lambda call: False
        self.error: type[BaseException] = MesaError

    def __call__(self, layer: int, keys: Array, old: Positions, new: Positions) -> Array:
        assert LAYERS[layer].rerotate is not None
        assert keys.ndim == 4
        assert old.shape == new.shape == (keys.shape[0], keys.shape[2])
        self.calls += 1
        if self.fails(self.calls):
            raise self.error("the engine gave up")
        rotated: Array = keys + self.added(layer, new - old)[:, None, :, None]
        return rotated

    @staticmethod
    def added(layer: int, positions: Positions) -> Array:
        return ((layer + 1) * positions).astype(np.float32)


@dataclass
class Tokens:
    """New tokens: keys that stand nowhere yet, and values, ``[K, S, D]`` a layer each."""

    keys: list[Array]
    values: list[Array]

    @classmethod
    def random(cls, rng: np.random.Generator, count: int) -> Tokens:
        def numbers(heads: int, size: int) -> Array:
            return rng.integers(1, 1000, (heads, count, size)).astype(np.float32)

        return cls(
            [numbers(x.kv_heads, x.key_size) for x in LAYERS], [numbers(x.kv_heads, x.value_size) for x in LAYERS]
        )

    def standing(self, positions: Positions) -> list[Array]:
        """The keys at positions."""
        return [
            key if info.rerotate is None else key + Rotation.added(layer, positions)[None, :, None]
            for layer, (key, info) in enumerate(zip(self.keys, LAYERS, strict=True))
        ]

    def part(self, start: int, stop: int) -> Tokens:
        return Tokens([x[:, start:stop] for x in self.keys], [x[:, start:stop] for x in self.values])

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            [np.concatenate(pair, 1) for pair in zip(self.keys, other.keys, strict=True)],
            [np.concatenate(pair, 1) for pair in zip(self.values, other.values, strict=True)],
        )


@dataclass
class Text:
    """A text in a store, and what is to be there."""

    kv: Any
    tokens: Tokens = field(default_factory=lambda: Tokens.random(np.random.default_rng(0), 0))
    positions: Positions = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.positions)

    def first(self, count: int) -> Text:
        return Text(None, self.tokens.part(0, count), self.positions[:count])

    def check(self, store: Any, kept: Sequence[int] | None = None) -> None:
        """``kept``: the tokens that are still there; the others read as zeros."""
        assert self.kv.length == len(self)
        assert self.kv.positions.tolist() == self.positions.tolist()
        keys, values = store.read(self.kv)
        for found, right in ((keys, self.tokens.standing(self.positions)), (values, self.tokens.values)):
            for ours, theirs in zip(found, right, strict=True):
                if kept is not None:
                    gone = np.setdiff1d(np.arange(len(self)), kept)
                    theirs = theirs.copy()
                    theirs[:, gone] = 0
                assert np.array_equal(ours, theirs)

    def append(self, store: Any, tokens: Tokens, positions: Positions) -> None:
        """As a run that computes them does."""
        write(store, self.kv, self.kv.length, tokens.standing(positions), tokens.values, positions)
        self.tokens, self.positions = self.tokens + tokens, np.concatenate([self.positions, positions])


def write(
    store: Any, kv: Kv, start: int, keys: list[Array], values: list[Array], positions: Positions | None = None
) -> None:
    """Writes slots from ``start`` on, as engines do; without positions they are not the text's, as if a run failed."""
    count = keys[0].shape[1]
    if isinstance(store, PagedStore):
        assert isinstance(kv, PagedKv)
        slots = np.arange(start, start + count)
        for pools, arrays in ((store.keys, keys), (store.values, values)):
            for pool, array in zip(pools, arrays, strict=True):
                pool.array[kv.blocks[slots // 32], :, slots % 32] = array.transpose(1, 0, 2)
        if positions is not None:
            kv.append(positions)
        return
    assert isinstance(store, SlabStore)
    assert isinstance(kv, SlabKv)
    if positions is not None:
        store.write(kv, keys, values, positions)
        return
    for mine, arrays in ((kv.slab.keys, keys), (kv.slab.values, values)):
        for slab, array in zip(mine, arrays, strict=True):
            slab[kv.row, :, start : start + count] = array


def spoil(store: Any, kv: Kv, count: int) -> None:
    """A run that fails: what it has written behind a text is no numbers."""
    nothing = Tokens.random(np.random.default_rng(0), count)
    for array in (*nothing.keys, *nothing.values):
        array[:] = np.nan
    write(store, kv, kv.length, nothing.keys, nothing.values)


__all__ = ["BYTES", "LAYERS", "Interruption", "Rotation", "Text", "Tokens", "spoil", "write"]

"""Keys and values of methods that drop keys: the first tokens, and the last ones in a ring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.bundle.manifest import LayerInfo
from mesart.graphs.method.sink_window import SinkWindow
from mesart.runtime.kv.slab import SlabKv, SlabStore
from mesart.runtime.kv.store import Array, Kv, Positions, Rotate


class RingStore(SlabStore):
    """A slab store whose texts take no more memory as they grow; see ``SinkWindow``.

    The slots of the first tokens are theirs. The others are taken in turn: a token overwrites the one that was
    ``window`` tokens before it. Graphs see by a key's position, not by its slot, what it is.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        storage: type[np.generic],
        rotate: Rotate,
        memory: int,
        capacity: Callable[[int, bool], int],
        sink_window: SinkWindow,
    ) -> None:
        def slots(tokens: int, growing: bool) -> int:
            return min(capacity(tokens, growing), sink_window.slots)

        super().__init__(layers, storage, rotate, memory, slots)
        self._sink_window = sink_window

    def bytes_missing(self, kv: Kv, tokens: int) -> int:
        return super().bytes_missing(kv, min(tokens, self._sink_window.slots))

    def allocate(self, tokens: int) -> SlabKv:
        return super().allocate(min(tokens, self._sink_window.slots))

    def reserve(self, kv: Kv, tokens: int) -> None:
        super().reserve(kv, min(tokens, self._sink_window.slots))

    def checkpoint(self, kv: Kv, tokens: int) -> Callable[[], None]:
        assert isinstance(kv, SlabKv)
        length = kv.length
        # As many tokens as there are slots overwrite each of them once.
        slots = self._slots(np.arange(length, length + min(tokens, self._sink_window.slots)))
        slots = slots[slots < self.slots_in_use(kv)]
        kept = [array[kv.row][:, slots] for array in (*kv.slab.keys, *kv.slab.values)]

        def bring_back() -> None:
            kv.torn = True
            for array, old in zip((*kv.slab.keys, *kv.slab.values), kept, strict=True):
                array[kv.row][:, slots] = old
            kv.length = length
            kv.torn = False

        return bring_back

    def write(self, kv: SlabKv, keys: Iterable[Array], values: Iterable[Array], positions: Positions) -> None:
        slots = self._slots(np.arange(kv.length, kv.length + len(positions)))
        kv.torn = True
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            kv.slab.keys[layer][kv.row][:, slots] = key
            kv.slab.values[layer][kv.row][:, slots] = value
        kv.append(positions)
        kv.torn = False

    def slots_in_use(self, kv: SlabKv) -> int:
        return min(kv.length, self._sink_window.slots)

    def slot_positions(self, kv: SlabKv, slots: int) -> Positions:
        tokens = self._kept(kv)
        found = np.zeros(slots, np.int64)
        found[self._slots(tokens)] = kv.positions[tokens]
        return found

    def read(self, kv: Kv) -> tuple[list[Array], list[Array]]:
        """As of every store; zeros in place of the keys and values that were dropped."""
        assert isinstance(kv, SlabKv)
        tokens = self._kept(kv)
        slots = self._slots(tokens)
        result: list[list[Array]] = []
        for arrays in (kv.slab.keys, kv.slab.values):
            result.append([])
            for array in arrays:
                whole = np.zeros((array.shape[1], kv.length, array.shape[3]), array.dtype)
                whole[:, tokens] = array[kv.row][:, slots]
                result[-1].append(whole)
        return result[0], result[1]

    def _kept(self, kv: Kv) -> NDArray[np.int64]:
        """The tokens whose keys are there."""
        first, window = self._sink_window.sinks, self._sink_window.window
        recent = np.arange(max(first, kv.length - window), max(first, kv.length))
        return np.concatenate([np.arange(min(first, kv.length)), recent])

    def _slots(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        first, window = self._sink_window.sinks, self._sink_window.window
        return np.where(tokens < first, tokens, first + (tokens - first) % window)


__all__ = ["RingStore"]

"""Keys and values of texts as rows of one array a layer, on the host: a row's slots lie side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mesart.graphs.bundle.manifest import LayerInfo
from mesart.graphs.errors import CapacityError
from mesart.graphs.method.plan import Span
from mesart.runtime.kv.block import BlockLayout, KvBlock
from mesart.runtime.kv.store import Array, Kv, MemoryBudget, Positions, Rotate, moved_span, rotated_keys


class Slab:
    """Keys ``[R, K, capacity, D]`` and values of each layer; rows beyond a text's length hold zeros, or old numbers."""

    def __init__(self, layers: Sequence[LayerInfo], storage: type[np.generic]) -> None:
        self._layers, self._storage = layers, storage
        self.texts: list[SlabKv | None] = []
        self.capacity = 0
        self.keys, self.values = self._zeros(0, 0)

    def _zeros(self, rows: int, capacity: int) -> tuple[list[Array], list[Array]]:
        # Zeros take memory only once they are written, so rows that are short or unused cost nothing.
        keys = [np.zeros((rows, x.kv_heads, capacity, x.key_size), self._storage) for x in self._layers]
        values = [np.zeros((rows, x.kv_heads, capacity, x.value_size), self._storage) for x in self._layers]
        return keys, values

    @property
    def rows(self) -> int:
        return len(self.texts)

    def add(self, kv: SlabKv, capacity: int) -> None:
        """Gives a text the first row that is unused, with at least so many slots."""
        row = next((row for row, text in enumerate(self.texts) if text is None), self.rows)
        rows = self.rows if row < self.rows else row + row // 2 + 1  # more than is needed, so as to copy seldom
        self._grow(rows, max(capacity, self.capacity))
        kv.slab, kv.row = self, row
        self.texts[row] = kv

    def grow(self, capacity: int) -> None:
        self._grow(self.rows, max(capacity, self.capacity))

    def remove(self, row: int) -> None:
        self.texts[row] = None
        if not any(self.texts):
            self.texts, self.capacity = [], 0
            self.keys, self.values = self._zeros(0, 0)

    def _grow(self, rows: int, capacity: int) -> None:
        if (rows, capacity) == (self.rows, self.capacity):
            return
        new_keys, new_values = self._zeros(rows, capacity)  # all, or if there is no memory none
        for arrays, grown in ((self.keys, new_keys), (self.values, new_values)):
            for layer, array in enumerate(grown):
                for row, text in enumerate(self.texts):
                    if text is not None:
                        used = slice(min(text.length, self.capacity))
                        array[row, :, used] = arrays[layer][row, :, used]
                arrays[layer] = array  # one layer at a time is there twice
        self.capacity = capacity
        self.texts += [None] * (rows - len(self.texts))


class SlabKv(Kv):
    """A text's row."""

    slab: Slab
    row: int = -1


class SlabStore:
    """One slab for texts, and one a chunk; see :class:`~mesart.runtime.kv.store.KvStore`.

    Args:
        capacity: ``(tokens, growing)``: slots for that many tokens; more of them if they have just become too few.
            They take no memory before they are written, so what counts as taken is the tokens.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        storage: type[np.generic],
        rotate: Rotate,
        memory: int,
        capacity: Callable[[int, bool], int],
    ) -> None:
        self._layers, self._storage, self.rotation, self._capacity = layers, storage, rotate, capacity
        self.layout = BlockLayout.of(layers, storage)
        self.bytes_per_token = self.layout.bytes_per_token
        self._budget = MemoryBudget(memory)
        self._texts = Slab(layers, storage)

    @property
    def free_bytes(self) -> int:
        return self._budget.free

    @property
    def bytes_in_use(self) -> int:
        return self._budget.taken

    def bytes_missing(self, kv: Kv, tokens: int) -> int:
        return max(0, tokens - kv.room) * self.bytes_per_token

    def shortage(self, needed: int) -> CapacityError:
        return self._budget.shortage(needed)

    def allocate(self, tokens: int) -> SlabKv:
        return self._allocate(self._texts, tokens, self._capacity(tokens, False))

    def _allocate(self, slab: Slab, tokens: int, slots: int) -> SlabKv:
        kv = SlabKv()
        self._budget.take(tokens * self.bytes_per_token)
        try:
            slab.add(kv, slots)
        except BaseException:
            self._budget.give(tokens * self.bytes_per_token)
            raise
        kv.room = tokens
        return kv

    def reserve(self, kv: Kv, tokens: int) -> None:
        assert isinstance(kv, SlabKv)
        more = tokens - kv.room
        if more <= 0:
            return
        self._budget.take(more * self.bytes_per_token)
        try:
            if self._capacity(tokens, False) > kv.slab.capacity:
                kv.slab.grow(self._capacity(tokens, True))  # by more than is needed, so as to copy seldom
        except BaseException:
            self._budget.give(more * self.bytes_per_token)
            raise
        kv.room = tokens

    def free(self, kv: Kv) -> None:
        assert isinstance(kv, SlabKv)
        if kv.row >= 0:
            self._budget.give(kv.room * self.bytes_per_token)
            kv.slab.remove(kv.row)
            kv.row, kv.room, kv.length = -1, 0, 0

    def truncate(self, kv: Kv, length: int) -> None:
        kv.length = length

    def checkpoint(self, kv: Kv, tokens: int) -> Callable[[], None]:
        del tokens
        length = kv.length  # new tokens have slots of their own
        return lambda: self.truncate(kv, length)

    def begin_chunk(self, head: Kv, size: int, text: Kv, span: Span) -> SlabKv:
        assert isinstance(head, SlabKv)
        del text
        tokens = size + len(span)
        chunk = self._allocate(Slab(self._layers, self._storage), tokens, tokens + 1)
        self._copy(head, slice(size), chunk, 0)
        chunk.append(head.positions[:size])
        return chunk

    def end_chunk(self, chunk: Kv, size: int, text: Kv, new: Positions) -> None:
        self.append_block(text, self.read_block(chunk, size, chunk.length), chunk.positions[size:], new)
        self.free(chunk)

    def copy(self, kv: Kv, length: int) -> SlabKv:
        assert isinstance(kv, SlabKv)
        copied = self._allocate(Slab(self._layers, self._storage), length, length)
        self._copy(kv, slice(length), copied, 0)
        copied.append(kv.positions[:length])
        return copied

    def _copy(self, source: SlabKv, slots: slice, target: SlabKv, start: int) -> None:
        stop = start + slots.stop - (slots.start or 0)
        for before, after in ((source.slab.keys, target.slab.keys), (source.slab.values, target.slab.values)):
            for old, new in zip(before, after, strict=True):
                new[target.row, :, start:stop] = old[source.row, :, slots]

    def rotate(self, kv: Kv, start: int, positions: Positions) -> None:
        assert isinstance(kv, SlabKv)
        old = kv.positions[start : start + len(positions)]
        first, last = moved_span(old, positions)
        if first == last:
            return
        before, after = old[None, first:last], positions[None, first:last]
        here, done = slice(start + first, start + last), []
        try:
            for layer, info in enumerate(self._layers):
                if info.rerotate is not None:
                    keys = kv.slab.keys[layer][kv.row : kv.row + 1, :, here]
                    rotated = self.rotation(layer, keys, before, after)
                    kv.torn = True
                    keys[:] = rotated
                    done.append((layer, keys))
                    kv.torn = False
        except BaseException:
            torn, kv.torn = kv.torn, True  # until all are back
            for layer, keys in done:
                keys[:] = self.rotation(layer, keys, after, before)
            kv.torn = torn
            raise
        kv.place(start + first, positions[first:last])

    def write(self, kv: SlabKv, keys: Iterable[Array], values: Iterable[Array], positions: Positions) -> None:
        """Stores new keys and values ``[K, S, D]``, a layer each, behind those that are there.

        Each layer's are taken when those before are stored: an engine may give all of them in one place.
        """
        start, stop = kv.length, kv.length + len(positions)
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            kv.slab.keys[layer][kv.row, :, start:stop] = key
            kv.slab.values[layer][kv.row, :, start:stop] = value
        kv.append(positions)

    def slots_in_use(self, kv: SlabKv) -> int:
        """The first slots, which are in use."""
        return kv.length

    def slot_positions(self, kv: SlabKv, slots: int) -> Positions:
        """Positions of the keys in the first ``slots`` slots, int64; 0 where there is none."""
        found = np.zeros(slots, np.int64)
        count = min(slots, kv.length)
        found[:count] = kv.positions[:count]
        return found

    def read(self, kv: Kv) -> tuple[list[Array], list[Array]]:
        assert isinstance(kv, SlabKv)
        part = slice(kv.length)
        return (
            [key[kv.row][:, part].copy() for key in kv.slab.keys],
            [value[kv.row][:, part].copy() for value in kv.slab.values],
        )

    def read_block(self, kv: Kv, start: int, stop: int) -> KvBlock:
        assert isinstance(kv, SlabKv)
        block = KvBlock(self.layout, stop - start)
        for tensor, array in zip(block.tensors, (*kv.slab.keys, *kv.slab.values), strict=True):
            tensor[:] = array[kv.row, :, start:stop]
        return block

    def append_block(self, kv: Kv, block: KvBlock, old: Positions, new: Positions) -> None:
        assert isinstance(kv, SlabKv)
        self.write(kv, rotated_keys(block, self._layers, self.rotation, old, new), block.values, new)

    def trim(self) -> None:
        """Nothing: slabs without texts are given back at once."""

    def close(self) -> None:
        self._texts = Slab(self._layers, self._storage)


__all__ = ["Slab", "SlabKv", "SlabStore"]

"""Keys and values in blocks of one pool, on the host: a text owns whichever blocks are free, and may share them."""

from __future__ import annotations

import heapq
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.bundle.manifest import LayerInfo
from mesart.graphs.bundle.names import BLOCK
from mesart.graphs.errors import CapacityError, InputError
from mesart.graphs.method.plan import Span
from mesart.runtime.kv.block import BlockLayout, KvBlock
from mesart.runtime.kv.store import Array, Kv, Positions, Rotate, moved_span, no_room, rotated_keys

_ROTATED = 128
"""Blocks that are rotated at a time: bounds the memory that it takes."""


class PagedKv(Kv):
    """A text's blocks: token ``i`` lies in slot ``i % 32`` of its block ``i // 32``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: NDArray[np.int32] = np.zeros(0, np.int32)


class PagedStore:
    """A pool of blocks ``[N, K, 32, D]`` a layer, for keys and for values; a :class:`~mesart.runtime.kv.store.KvStore`.

    Address space for the whole pool is reserved at once, memory comes as blocks are written. That of blocks that no
    text has is kept for the next, since new memory takes longer than to write it, and goes with :meth:`trim`.
    A block may belong to several texts, to read: whoever is to change it copies it first.
    """

    def __init__(self, layers: Sequence[LayerInfo], storage: type[np.generic], rotate: Rotate, memory: int) -> None:
        self._layers, self.rotation = layers, rotate
        self.layout = BlockLayout.of(layers, storage)
        self.bytes_per_token = self.layout.bytes_per_token
        self._block_bytes = BLOCK * self.bytes_per_token
        self._count = max(1, min(memory // self._block_bytes, np.iinfo(np.int32).max))
        self.keys = [_Pool(self._count, (x.kv_heads, BLOCK, x.key_size), storage) for x in layers]
        self.values = [_Pool(self._count, (x.kv_heads, BLOCK, x.value_size), storage) for x in layers]
        self._unused: list[int] = []  # a heap of blocks that were in use once
        self._fresh = 0  # the first block that never was
        self._owners = np.zeros(64, np.int32)  # of each block that ever was in use
        self._is_written = np.zeros(64, np.bool_)  # whether it may hold numbers of another text

    @property
    def free_bytes(self) -> int:
        return self._free_blocks * self._block_bytes

    @property
    def bytes_in_use(self) -> int:
        return (self._count - self._free_blocks) * self._block_bytes

    def bytes_missing(self, kv: Kv, tokens: int) -> int:
        return max(0, -(-tokens // BLOCK) - kv.room // BLOCK) * self._block_bytes

    def shortage(self, needed: int) -> CapacityError:
        return no_room(needed, self.free_bytes, self._count * self._block_bytes)

    @property
    def _free_blocks(self) -> int:
        return len(self._unused) + self._count - self._fresh

    def allocate(self, tokens: int) -> PagedKv:
        kv = PagedKv()
        self.reserve(kv, tokens)
        return kv

    def reserve(self, kv: Kv, tokens: int) -> None:
        assert isinstance(kv, PagedKv)
        missing = -(-tokens // BLOCK) - len(kv.blocks)
        if missing > 0:
            kv.blocks = np.concatenate([kv.blocks, self._take(missing)])
            kv.room = len(kv.blocks) * BLOCK

    def free(self, kv: Kv) -> None:
        assert isinstance(kv, PagedKv)
        blocks, kv.blocks, kv.room, kv.length = kv.blocks, kv.blocks[:0], 0, 0
        self._give(blocks)

    def truncate(self, kv: Kv, length: int) -> None:
        assert isinstance(kv, PagedKv)
        kv.length = length
        # What is not seen has the weight 0, and 0 times NaN is NaN.
        within = length % BLOCK
        if within and self._owners[kv.blocks[length // BLOCK]] == 1:
            for pool in (*self.keys, *self.values):
                pool.array[kv.blocks[length // BLOCK], :, within:] = 0
        behind = kv.blocks[-(-length // BLOCK) :]
        self._clear(behind[self._owners[behind] == 1])

    def checkpoint(self, kv: Kv, tokens: int) -> Callable[[], None]:
        del tokens
        length = kv.length  # new tokens have slots of their own
        return lambda: self.truncate(kv, length)

    def begin_chunk(self, head: Kv, size: int, text: Kv, span: Span) -> PagedKv:
        assert isinstance(head, PagedKv)
        assert isinstance(text, PagedKv)
        chunk = PagedKv()
        if size % BLOCK == 0 and span.start % BLOCK == 0:  # written where it is to stay
            own = text.blocks[span.start // BLOCK : -(-span.stop // BLOCK)]
            chunk.blocks = np.concatenate([head.blocks[: size // BLOCK], own])
            self._owners[chunk.blocks] += 1
        else:
            whole = size // BLOCK
            new = self._take(-(-(size + len(span)) // BLOCK) - whole)
            chunk.blocks = np.concatenate([head.blocks[:whole], new])
            self._owners[chunk.blocks[:whole]] += 1
            if size % BLOCK:
                for pool in (*self.keys, *self.values):
                    pool.array[new[0]] = pool.array[head.blocks[whole]]
        chunk.room = len(chunk.blocks) * BLOCK
        chunk.append(head.positions[:size])
        return chunk

    def end_chunk(self, chunk: Kv, size: int, text: Kv, new: Positions) -> None:
        self.append_block(text, self.read_block(chunk, size, chunk.length), chunk.positions[size:], new)
        self.free(chunk)

    def copy(self, kv: Kv, length: int) -> PagedKv:
        assert isinstance(kv, PagedKv)
        copied = self.allocate(length)
        count = len(copied.blocks)
        for pool in (*self.keys, *self.values):
            pool.array[copied.blocks] = pool.array[kv.blocks[:count]]
        copied.append(kv.positions[:length])
        return copied

    def rotate(self, kv: Kv, start: int, positions: Positions) -> None:
        assert isinstance(kv, PagedKv)
        old = kv.positions[start : start + len(positions)]
        first, last = moved_span(old, positions)
        if first == last:
            return
        self._own(kv, (start + first) // BLOCK, -(-(start + last) // BLOCK))
        done: list[tuple[int, NDArray[np.int32], Positions, Positions]] = []
        try:
            for layer, info in enumerate(self._layers):
                if info.rerotate is not None:
                    for piece in self._pieces(kv, start + first, old[first:last], positions[first:last]):
                        rotated = self._rotated(layer, *piece)
                        kv.torn = True
                        self.keys[layer].array[piece[0]] = rotated
                        done.append((layer, *piece))
                        kv.torn = False
        except BaseException:
            torn, kv.torn = kv.torn, True  # until all are back
            for layer, blocks, before, after in done:
                self.keys[layer].array[blocks] = self._rotated(layer, blocks, after, before)
            kv.torn = torn
            raise
        kv.place(start + first, positions[first:last])

    def _pieces(
        self, kv: PagedKv, start: int, old: Positions, new: Positions
    ) -> list[tuple[NDArray[np.int32], Positions, Positions]]:
        """Blocks, and old and new positions ``[blocks, 32]``; the same where nothing is to be rotated."""
        first, last = start // BLOCK, -(-(start + len(old)) // BLOCK)
        padding = (start - first * BLOCK, last * BLOCK - start - len(old))
        before, after = (np.pad(positions, padding).reshape(-1, BLOCK) for positions in (old, new))
        blocks = kv.blocks[first:last]
        parts = [slice(at, at + _ROTATED) for at in range(0, len(blocks), _ROTATED)]
        return [(blocks[part], before[part], after[part]) for part in parts]

    def _rotated(self, layer: int, blocks: NDArray[np.int32], old: Positions, new: Positions) -> Array:
        """Keys of blocks, ``[blocks, K, 32, D]``, from old to new positions."""
        before = self.keys[layer].array[blocks]
        after = self.rotation(layer, before, old, new)
        # Slots that stay where they are keep their bits: rotating by nothing may round.
        stay = (old == new)[:, None, :, None]
        rotated: Array = np.where(stay, before, after) if stay.any() else after
        return rotated

    def read(self, kv: Kv) -> tuple[list[Array], list[Array]]:
        assert isinstance(kv, PagedKv)
        return (
            [_read(pool.array, kv.blocks, 0, kv.length) for pool in self.keys],
            [_read(pool.array, kv.blocks, 0, kv.length) for pool in self.values],
        )

    def written(self, spans: Iterable[tuple[Kv, int, int]]) -> Iterator[Array]:
        """Copies of the blocks of keys, then of values, in which slots ``start .. stop - 1`` of some texts lie."""
        parts = []
        for kv, start, stop in spans:
            assert isinstance(kv, PagedKv)
            parts.append(kv.blocks[start // BLOCK : -(-stop // BLOCK)])
        blocks = np.concatenate(parts)
        return (pool.array[blocks] for pool in (*self.keys, *self.values))

    def read_block(self, kv: Kv, start: int, stop: int) -> KvBlock:
        assert isinstance(kv, PagedKv)
        block = KvBlock(self.layout, stop - start)
        for tensor, pool in zip(block.tensors, (*self.keys, *self.values), strict=True):
            tensor[:] = _read(pool.array, kv.blocks, start, stop)
        return block

    def append_block(self, kv: Kv, block: KvBlock, old: Positions, new: Positions) -> None:
        assert isinstance(kv, PagedKv)
        for layer, keys in enumerate(rotated_keys(block, self._layers, self.rotation, old, new)):
            _write(self.keys[layer].array, kv.blocks, kv.length, keys)
            _write(self.values[layer].array, kv.blocks, kv.length, block.values[layer])
        kv.append(new)

    def trim(self) -> None:
        unused = np.array(self._unused, np.int32)
        self._clear(unused[self._is_written[unused]])
        self._is_written[unused] = False

    def close(self) -> None:
        self.keys, self.values = [], []

    def _take(self, count: int) -> NDArray[np.int32]:
        if count > self._free_blocks:
            raise self.shortage(count * self._block_bytes)
        blocks = [heapq.heappop(self._unused) for _ in range(min(count, len(self._unused)))]
        more = count - len(blocks)
        blocks.extend(range(self._fresh, self._fresh + more))
        self._fresh += more
        if self._fresh > len(self._owners):
            self._owners = np.concatenate([self._owners, np.zeros(self._fresh, np.int32)])
            self._is_written = np.concatenate([self._is_written, np.zeros(self._fresh, np.bool_)])
        taken = np.array(blocks, np.int32)
        self._owners[taken] = 1
        used = taken[self._is_written[taken]]
        for pool in (*self.keys, *self.values):  # what a run that was interrupted has left may be no numbers
            pool.array[used] = 0
        self._is_written[taken] = True
        return taken

    def _give(self, blocks: NDArray[np.int32]) -> None:
        self._owners[blocks] -= 1
        for block in blocks[self._owners[blocks] == 0].tolist():
            heapq.heappush(self._unused, block)

    def _clear(self, blocks: NDArray[np.int32]) -> None:
        """Gives the memory of blocks back; they read as zeros then."""
        blocks = np.sort(blocks)
        for run in np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1):
            if len(run):
                for pool in (*self.keys, *self.values):
                    pool.clear(int(run[0]), int(run[-1]) + 1)

    def _own(self, kv: PagedKv, first: int, last: int) -> None:
        """Copies those of a text's blocks ``first .. last - 1`` that others share."""
        shared = [index for index in range(first, last) if self._owners[kv.blocks[index]] > 1]
        if not shared:
            return
        new = self._take(len(shared))
        for pool in (*self.keys, *self.values):
            pool.array[new] = pool.array[kv.blocks[shared]]
        blocks = kv.blocks.copy()
        old, blocks[shared] = blocks[shared], new
        kv.blocks = blocks
        self._give(old)


class _Pool:
    """One tensor of blocks ``[N, K, 32, D]`` in address space of its own."""

    def __init__(self, count: int, shape: tuple[int, int, int], storage: type[np.generic]) -> None:
        self._bytes = int(np.prod(shape)) * np.dtype(storage).itemsize
        reserved = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        try:
            self._memory = mmap.mmap(-1, count * self._bytes, flags=reserved)
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(
                f"no address space for {count} blocks of keys and values ({error}); load the model with a smaller "
                "kv_memory"
            ) from error
        self.array: Array = np.frombuffer(self._memory, storage).reshape(count, *shape)

    def clear(self, first: int, last: int) -> None:
        """Gives the memory of blocks back; they read as zeros then."""
        start, stop = first * self._bytes, last * self._bytes
        whole = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if whole[0] < whole[1]:
            self._memory.madvise(mmap.MADV_DONTNEED, whole[0], whole[1] - whole[0])
        else:
            whole = stop, stop
        flat = np.frombuffer(self._memory, np.uint8)
        flat[start : whole[0]] = 0
        flat[whole[1] : stop] = 0


def _read(pool: Array, blocks: NDArray[np.int32], start: int, stop: int) -> Array:
    """Slots ``start .. stop - 1`` of a text, ``[K, S, D]``."""
    first = start // BLOCK
    found = pool[blocks[first : -(-stop // BLOCK)]].transpose(1, 0, 2, 3)
    heads, count, _, size = found.shape
    slots: Array = found.reshape(heads, count * BLOCK, size)
    return slots[:, start - first * BLOCK : stop - first * BLOCK]


def _write(pool: Array, blocks: NDArray[np.int32], start: int, new: Array) -> None:
    """Writes ``[K, S, D]`` into a text's slots from ``start`` on."""
    heads, count, size = new.shape
    first = min(-start % BLOCK, count)  # of the tokens, the one that begins a block
    last = first + (count - first) // BLOCK * BLOCK
    for part in (slice(first), slice(last, count)):
        slots = np.arange(start, start + count)[part]
        if len(slots):
            pool[blocks[slots[0] // BLOCK], :, slots % BLOCK] = new[:, part].transpose(1, 0, 2)
    if last > first:  # block by block is far faster than token by token
        whole = new[:, first:last].reshape(heads, -1, BLOCK, size)
        pool[blocks[(start + first) // BLOCK : (start + last) // BLOCK]] = whole.transpose(1, 0, 2, 3)


__all__ = ["PagedKv", "PagedStore"]

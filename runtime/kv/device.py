"""Keys and values of texts on a device, a buffer for each text, as large as its bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.errors import CapacityError
from mesart.graphs.method.plan import Span
from mesart.runtime.backends import STORAGE
from mesart.runtime.cuda import Pinned
from mesart.runtime.device_buckets import DeviceBuckets
from mesart.runtime.device_rotation import DeviceRotation
from mesart.runtime.engines import Engines
from mesart.runtime.kv.block import BlockLayout, KvBlock
from mesart.runtime.kv.device_buffers import DeviceBuffer, DeviceBuffers
from mesart.runtime.kv.store import Array, Kv, Positions, moved_span
from mesart.runtime.slots import SlotTensor


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of device memory, by what they are for."""

    weights: int
    cache: int
    """Keys and values of texts."""
    scratch: int
    """Where chunks are computed and keys are rotated; inputs and logits; what is kept for the next texts."""
    activations: int
    """What engines need within a run."""


class DeviceKv(Kv):
    """A text's buffer; none while it has no room."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer: DeviceBuffer | None = None
        self.owner: DeviceBuffers | None = None

    @property
    def held(self) -> DeviceBuffer:
        """Its buffer, which it has."""
        assert self.buffer is not None
        return self.buffer

    def append(self, positions: Positions) -> None:
        self.announce(positions)
        super().append(positions)

    def place(self, start: int, positions: Positions) -> None:
        super().place(start, positions)
        self._show(start, positions)

    def announce(self, positions: Positions) -> None:
        """Tells the engines where the next tokens are, which a run looks up while it computes them."""
        self._show(self.length, positions)

    def show(self) -> None:
        """Tells the engines where all tokens are, in a new buffer."""
        self._show(0, self.positions)

    def _show(self, start: int, positions: Positions) -> None:
        if self.buffer is not None and self.buffer.positions is not None:
            self.buffer.positions.numbers[start : start + len(positions)] = positions


class DeviceStore:
    """A buffer ``[1, K, P, D]`` a layer for each text; see :class:`~mesart.runtime.kv.store.KvStore`.

    Chunks are computed in buffers of their own, at their local positions, and copied to their slots. An engine writes
    all the tokens of a run, also those that fill it up: they land in slots that are not yet seen, and are overwritten
    before they are. All slots hold finite numbers at all times: a slot that is not seen has weight 0, and 0 times NaN
    is NaN.
    """

    def __init__(self, manifest: Manifest, engines: Engines, rotation: DeviceRotation) -> None:
        self._layers, self._engines, self._cuda, self._rotation = manifest.layers, engines, engines.cuda, rotation
        self._storage = np.dtype(STORAGE[manifest.dtype])
        self.layout = BlockLayout.of(manifest.layers, STORAGE[manifest.dtype])
        self.bytes_per_token = self.layout.bytes_per_token
        self._buckets = DeviceBuckets(manifest, engines)
        size, looks = self._storage.itemsize, manifest.looks_at_positions
        what = "the keys and values"
        self._texts = DeviceBuffers(self._cuda, self._layers, size, positions=looks, what=what)
        self._chunks = DeviceBuffers(self._cuda, self._layers, size, positions=looks, what=f"{what} of a chunk")
        self._live: set[DeviceKv] = set()
        self._cuda.reclaim = self._reclaim

    @property
    def memory(self) -> DeviceMemory:
        """What is in use now."""
        weights, activations, cache = self._engines.weight_bytes, self._engines.activation_bytes, self.bytes_in_use
        scratch = self._cuda.allocated_bytes - self._engines.allocated_bytes - cache
        return DeviceMemory(weights, cache, scratch, activations)

    @property
    def free_bytes(self) -> int:
        return self._cuda.memory()[0] + self._texts.spare_bytes + self._chunks.spare_bytes

    @property
    def bytes_in_use(self) -> int:
        return sum(kv.held.bytes for kv in self._live)

    def bytes_missing(self, kv: Kv, tokens: int) -> int:
        """The whole buffer that the text then needs: the one that it has is given back behind the copying only.

        A text ends with the largest bucket, and is refused more once it is there: most texts end before they may.
        """
        tokens = min(tokens, self._buckets.most_tokens)
        return 0 if tokens <= kv.room else self._texts.bytes_of(self._buckets.slots(self._buckets.room(tokens)))

    def shortage(self, needed: int) -> CapacityError:
        self._reclaim()
        return self._cuda.out_of_memory(needed, "the keys and values")

    def allocate(self, tokens: int) -> DeviceKv:
        kv = DeviceKv()
        self.reserve(kv, tokens)
        return kv

    def reserve(self, kv: Kv, tokens: int) -> None:
        assert isinstance(kv, DeviceKv)
        if tokens <= kv.room:
            return
        room = self._buckets.room(tokens)
        new = self._texts.take(self._buckets.slots(room))
        if kv.buffer is not None:
            new.copy(self._cuda, 0, kv.buffer, 0, kv.length)
        self._give(kv)
        kv.buffer, kv.owner, kv.room = new, self._texts, room
        kv.show()
        self._live.add(kv)

    def free(self, kv: Kv) -> None:
        assert isinstance(kv, DeviceKv)
        self._live.discard(kv)
        self._give(kv)
        kv.room, kv.length = 0, 0

    def _give(self, kv: DeviceKv) -> None:
        buffer, owner = kv.buffer, kv.owner
        kv.buffer = kv.owner = None
        if buffer is not None and owner is not None:
            owner.give(buffer)

    def truncate(self, kv: Kv, length: int) -> None:
        """Clears what it forgets: a run that failed may have left numbers there that are none."""
        assert isinstance(kv, DeviceKv)
        torn, kv.torn = kv.torn, True
        self._cuda.synchronize()  # what failed on the device shows here
        if kv.buffer is not None:
            kv.buffer.clear(self._cuda, length)
        kv.length = length
        kv.torn = torn

    def checkpoint(self, kv: Kv, tokens: int) -> Callable[[], None]:
        del tokens
        length = kv.length  # new tokens have slots of their own
        return lambda: self.truncate(kv, length)

    def begin_chunk(self, head: Kv, size: int, text: Kv, span: Span) -> DeviceKv:
        del text, span
        self._rotation.prepare()  # its keys will be rotated while it and others are there
        return self._new_chunk(head, size, self._buckets.chunk_slots)

    def _new_chunk(self, head: Kv, size: int, room: int) -> DeviceKv:
        assert isinstance(head, DeviceKv)
        chunk = DeviceKv()
        chunk.buffer, chunk.owner, chunk.room = self._chunks.take(self._buckets.chunk_slots), self._chunks, room
        try:
            if size:
                chunk.buffer.copy(self._cuda, 0, head.held, 0, size)
        except BaseException:
            self.free(chunk)
            raise
        chunk.append(head.positions[:size])
        return chunk

    def end_chunk(self, chunk: Kv, size: int, text: Kv, new: Positions) -> None:
        assert isinstance(chunk, DeviceKv)
        assert isinstance(text, DeviceKv)
        self.bring(chunk, size, text, len(new))
        self._append_rotated(text, chunk.positions[size:], new)
        self.free(chunk)

    def bring(self, chunk: DeviceKv, size: int, text: DeviceKv, count: int) -> None:
        """Copies what was computed behind the first ``size`` tokens of a chunk to the slots behind a text."""
        text.held.copy(self._cuda, text.length, chunk.held, size, count)

    def _append_rotated(self, kv: DeviceKv, old: Positions, new: Positions) -> None:
        """A text goes on by tokens whose keys and values are there, and are to be rotated."""
        start = kv.length
        kv.append(old)
        try:
            self.rotate(kv, start, new)
        except BaseException:
            self.truncate(kv, start)
            raise

    def copy(self, kv: Kv, length: int) -> DeviceKv:
        assert isinstance(kv, DeviceKv)
        if length <= self._buckets.chunk_slots:  # such as a head
            return self._new_chunk(kv, length, length)
        copied = self.allocate(length)
        try:
            copied.held.copy(self._cuda, 0, kv.held, 0, length)
        except BaseException:
            self.free(copied)
            raise
        copied.append(kv.positions[:length])
        return copied

    def rotate(self, kv: Kv, start: int, positions: Positions) -> None:
        assert isinstance(kv, DeviceKv)
        old = kv.positions[start : start + len(positions)].copy()
        first, last = moved_span(old, positions)
        if first == last:
            return
        self._rotate(kv, start + first, old[first:last], positions[first:last])
        kv.place(start + first, positions[first:last])

    def _rotate(self, kv: DeviceKv, start: int, old: Positions, new: Positions) -> None:
        """Rotates the keys of slots ``start ..``; all of them, or none."""
        size, keys, done = self._rotation.at_a_time, kv.held.tensors[: len(self._layers)], 0

        def write(rotated: Mapping[int, SlotTensor], part: slice) -> None:
            for layer, tensor in rotated.items():
                keys[layer].copy(self._cuda, start + part.start, tensor, 0, part.stop - part.start)

        parts = [slice(at, min(at + size, len(old))) for at in range(0, len(old), size)] if size else []
        try:
            for part in parts:
                rotated = self._rotation(keys, start + part.start, old[part], new[part])
                kv.torn = True
                write(rotated, part)
                kv.torn = False
                done += 1
        except BaseException:
            torn, kv.torn = kv.torn, True  # until all are back
            for part in parts[:done]:
                write(self._rotation(keys, start + part.start, new[part], old[part]), part)
            kv.torn = torn
            raise

    def read(self, kv: Kv) -> tuple[list[Array], list[Array]]:
        assert isinstance(kv, DeviceKv)
        if kv.buffer is None:
            empty = [np.zeros((x.kv_heads, 0, x.key_size), self._storage) for x in self._layers]
            return empty, [np.zeros((x.kv_heads, 0, x.value_size), self._storage) for x in self._layers]
        host = self._cuda.pinned(max(tensor.bytes for tensor in kv.buffer.tensors))
        arrays: list[Array] = []
        try:
            for tensor in kv.buffer.tensors:
                self._cuda.download(host, tensor.address, tensor.bytes)
                self._cuda.synchronize()
                found = host.bytes[: tensor.bytes].view(self._storage).reshape(tensor.heads, tensor.slots, -1)
                arrays.append(found[:, : kv.length].copy())
        finally:
            self._cuda.free_pinned(host)
        return arrays[: len(self._layers)], arrays[len(self._layers) :]

    def read_block(self, kv: Kv, start: int, stop: int) -> KvBlock:
        assert isinstance(kv, DeviceKv)
        block, buffer = KvBlock(self.layout, stop - start), kv.held
        with self._staged(block) as (host, places):
            for tensor, at in zip(buffer.tensors, places, strict=True):
                width = (stop - start) * tensor.slot_bytes
                self._cuda.download_rows(host, at, tensor.at(start), tensor.pitch, width, tensor.heads)
            self._cuda.synchronize()
            block.buffer[:] = host.bytes[: block.bytes]
        return block

    def append_block(self, kv: Kv, block: KvBlock, old: Positions, new: Positions) -> None:
        assert isinstance(kv, DeviceKv)
        with self._staged(block) as (host, places):
            host.bytes[: block.bytes] = block.buffer
            for tensor, at in zip(kv.held.tensors, places, strict=True):
                width = block.tokens * tensor.slot_bytes
                self._cuda.upload_rows(tensor.at(kv.length), tensor.pitch, host, at, width, tensor.heads)
        self._append_rotated(kv, old, new)

    @contextmanager
    def _staged(self, block: KvBlock) -> Iterator[tuple[Pinned, list[int]]]:
        """Host memory that the device can reach, and where each of a block's tensors lies in it."""
        host = self._cuda.pinned(block.bytes)
        try:
            yield host, [0, *accumulate(tensor.nbytes for tensor in block.tensors[:-1])]
        finally:
            try:
                self._cuda.synchronize()  # after an error too: copies that were begun go on in this memory
            finally:
                self._cuda.free_pinned(host)

    def trim(self) -> None:
        self._reclaim()

    def _reclaim(self) -> bool:
        """Frees buffers that no text has; whether there were any."""
        texts, chunks = self._texts.trim(), self._chunks.trim()
        return texts or chunks

    def close(self) -> None:
        """Its memory goes with the engines', whoever closes those."""
        self._live.clear()
        self._texts.close()
        self._chunks.close()


__all__ = ["DeviceKv", "DeviceMemory", "DeviceStore"]

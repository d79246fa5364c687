"""The live cache on a GPU: TensorRT engines write keys and values in place, the CPU only says what comes next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import BundleError, EngineError, InputError
from mesart.graphs.manifest import Manifest, ProfileInfo, Role
from mesart.graphs.plan import Span
from mesart.graphs.stairs import ORDINARY
from mesart.runtime.backends import STORAGE, Array
from mesart.runtime.cache import NextToken, Positions, require_numbers
from mesart.runtime.cuda import Pinned, aligned
from mesart.runtime.engines import Engines
from mesart.runtime.slot_positions import SlotPositions
from mesart.runtime.slots import SlotBlock, SlotTensor

_RUNS_AHEAD = 16
"""Runs that the CPU may be ahead of the GPU: each has its own copy of its inputs until they are on the device."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of device memory, by what they are for."""

    weights: int
    cache: int
    """Keys and values of all rows."""
    scratch: int
    """Where heads and chunks are computed and keys are turned; inputs and logits."""
    activations: int
    """What engines need within a run."""


class DeviceCache:
    """Buffers ``[1, K, P, D]`` on the device for each row and layer; see :class:`~mesart.runtime.cache.LiveCache`.

    P comes from the engines: of the row's bucket, or with layout ``profile`` of the largest. Heads and chunks are
    computed in scratch buffers, at their local positions, and copied to their slots. An engine writes all the tokens
    of a run, also those that fill it up: they land in slots that are not yet seen, and are overwritten before they are.
    All slots hold finite numbers at all times: a slot that is not seen has weight 0, and 0 times NaN is NaN.
    """

    last_logits_only = True

    def __init__(self, manifest: Manifest, engines: Engines) -> None:
        self.manifest, self.config, self.layers = manifest, manifest.config, manifest.layers
        self._engines, self._cuda = engines, engines.cuda
        self._storage = np.dtype(STORAGE[manifest.dtype])
        self._turning = [index for index, layer in enumerate(self.layers) if layer.place is not None]
        self._vocabulary = int(manifest.model["vocab_size"])
        self._profiles = engines.layout == "profile"
        self._look_at_positions = manifest.looks_at_positions
        self._buckets = engines.buckets(manifest)
        self._scratch: SlotBlock | None = None
        self._scratch_positions: SlotPositions | None = None
        self._staging: tuple[SlotBlock, SlotBlock] | None = None
        self._rows = [_Row()]
        self._torn = False  # keys that move are partly moved
        self._warm: set[int] = set()
        self._warm_moves = engines.moves
        profiles = [profile for engine in engines.set.engines for profile in engine.profiles]
        longest, columns = max(x.new for x in profiles), max(x.columns for x in profiles)
        self._step_bytes = max(_Packing(x.new).bytes for x in profiles if x.role == "step")
        self._small_bytes = _Packing(longest).bytes + aligned(8 * columns) + aligned(4 * self._vocabulary)
        self._inputs = self._cuda.allocate(self._small_bytes, "inputs and logits")
        self._columns = self._inputs + _Packing(longest).bytes
        self._logits = self._columns + aligned(8 * columns)
        self._ahead = [self._cuda.pinned(_Packing(longest).bytes) for _ in range(_RUNS_AHEAD)]
        self._used = 0
        counts = self._cuda.pinned(8 * columns)
        counts.bytes.view(np.int64)[:] = np.arange(columns)
        self._cuda.upload(self._columns, counts, 8 * columns)
        self._cuda.synchronize()
        self._cuda.free_pinned(counts)

    @property
    def capacity(self) -> int:
        return max(row.capacity for row in self._rows)

    @property
    def memory(self) -> DeviceMemory:
        """What is in use now."""
        staging = sum(block.bytes for block in self._staging or ())
        of_slots = [self._scratch_positions, *(row.positions for row in self._rows)]
        positions = sum(x.bytes for x in of_slots if x is not None)
        return DeviceMemory(
            weights=self._engines.weight_bytes,
            cache=sum(row.block.bytes for row in self._rows if row.block is not None),
            scratch=self._small_bytes + positions + staging + (self._scratch.bytes if self._scratch else 0),
            activations=self._engines.activation_bytes,
        )

    def begin(self, lengths: Sequence[int]) -> None:
        buckets = [self._bucket(length) for length in lengths]
        self._torn = False
        slots = [self._slots(bucket) for bucket in buckets]
        old, self._rows = self._rows, [_Row()]
        kept: list[_Row | None] = []
        for size in slots:  # memory of the right size is used again
            match = next((row for row in old if row.block and row.block.slots == size), None)
            if match is not None:
                old.remove(match)
            kept.append(match)
        for row in old:
            self._release(row)
        try:
            for index, bucket in enumerate(buckets):
                row = kept[index] = kept[index] or self._new_row(bucket)
                row.capacity = self._limit(bucket)
        except BaseException:
            for row in filter(None, kept):
                self._release(row)
            raise
        self._rows = [row for row in kept if row is not None]

    def clear(self) -> None:
        self._synchronize()
        old, self._rows, self._torn = self._rows, [_Row()], False
        for row in old:
            self._release(row)
        self._clear_scratch()

    def make_room(self, row: int, tokens: int) -> None:
        old = self._rows[row]
        if tokens <= old.capacity:
            return
        bucket = self._bucket(tokens)
        new = self._new_row(bucket)
        if old.block is not None:
            for target, source in zip(new.tensors, old.tensors, strict=True):
                target.copy(self._cuda, 0, source, 0, source.slots)
            if old.positions is not None and new.positions is not None:
                new.positions.numbers[: len(old.positions.numbers)] = old.positions.numbers
            self._release(old)
        self._rows[row] = new

    def head(self, row: int, tokens: Sequence[int], span: Span) -> None:
        scratch, positions = self._open_scratch(), ORDINARY.positions(0, len(span))
        ids = tokens[span.start : span.stop]
        self._run("head", None, scratch.tensors, self._scratch_positions, ids, positions)
        for target, source in zip(self._rows[row].tensors, scratch.tensors, strict=True):
            target.copy(self._cuda, span.start, source, 0, len(span))
        self._rows[row].stand(span.start, positions)

    def chunks(self, row: int, tokens: Sequence[int], spans: Sequence[Span], head: Positions) -> None:
        scratch, size, cache = self._open_scratch().tensors, self.config.head_length, self._rows[row].tensors
        local = ORDINARY.positions(0, size)
        for target, source in zip(scratch, cache, strict=True):
            target.copy(self._cuda, 0, source, 0, size)
        if not np.array_equal(head, local):  # a later turn: the head stands on stairs
            self._turn(cache, scratch, 0, head, local)
        for span in spans:
            positions = ORDINARY.positions(size, size + len(span))
            ids = tokens[span.start : span.stop]
            self._run("chunk", None, scratch, self._scratch_positions, ids, positions, write_at=size)
            for target, source in zip(cache, scratch, strict=True):
                target.copy(self._cuda, span.start, source, size, len(span))
            self._rows[row].stand(span.start, positions)

    def tail(
        self,
        row: int,
        tokens: Sequence[int],
        span: Span,
        positions: Positions,
        scales: NDArray[np.float32],
        *,
        all_logits: bool,
    ) -> NDArray[np.float32]:
        if all_logits:
            raise ValueError("engines give the last logits only")
        live = self._rows[row]
        bucket = self._bucket_of(live, span.stop)
        profile = self._engines.profile("tail", bucket)
        live.stand(span.start, positions)  # of all slices: none sees the slots behind it
        if live.positions is not None:
            live.positions.upload()
        for start in range(span.start, span.stop, profile.new):
            piece = Span(start, min(start + profile.new, span.stop))
            here = slice(piece.start - span.start, piece.stop - span.start)
            _require_slots(profile, piece.start, piece.stop)
            ids = tokens[piece.start : piece.stop]
            self._run("tail", bucket, live.tensors, live.positions, ids, positions[here], scales[here], start)
        logits = self._host_logits(live)
        self._cuda.download(logits, self._logits, 4 * self._vocabulary)
        self._synchronize()
        return self._numbers([live], "tail")

    def step(self, tokens: Sequence[NextToken | None]) -> NDArray[np.float32]:
        asked = [(row, token) for row, token in zip(self._rows, tokens, strict=True) if token is not None]
        for row, token in asked:
            self._enqueue_step(row, token)
        self._synchronize()
        logits = np.zeros((len(tokens), self._vocabulary), np.float32)
        if asked:
            logits[[token is not None for token in tokens]] = self._numbers([row for row, _ in asked], "step")
        return logits

    def _enqueue_step(self, row: _Row, token: NextToken) -> None:
        """One step of one row, logits to the host included; from the second time on as a CUDA graph."""
        bucket = self._bucket_of(row, token.slot + 1)
        profile = self._engines.profile("step", bucket)
        _require_slots(profile, token.slot, token.slot + 1)
        packing = _Packing(profile.new)
        row.inputs = row.inputs or self._cuda.pinned(self._step_bytes)
        logits = self._host_logits(row)
        packing.fill(row.inputs, [token.token], [token.position], [token.scale], token.slot)
        row.stand(token.slot, [token.position])
        inputs = row.inputs

        def work() -> None:
            self._cuda.upload(self._inputs, inputs, packing.bytes)
            if row.positions is not None:
                row.positions.upload()
            self._engines.enqueue("step", bucket, self._addresses(row.tensors, row.positions, packing))
            self._cuda.download(logits, self._logits, 4 * self._vocabulary)

        self._engines.prepare("step", bucket)
        if self._warm_moves != self._engines.moves:  # graphs hold the address that activations had
            self._warm, self._warm_moves = set(), self._engines.moves
        for known, (moves, graph) in list(row.graphs.items()):
            if moves != self._engines.moves:
                del row.graphs[known]
                self._cuda.free_graph(graph)
        if bucket not in self._warm or not self._engines.capturable("step", bucket):
            work()  # the first run may allocate, which a capture may not
            self._warm.add(bucket)
            return
        if bucket not in row.graphs:
            row.graphs[bucket] = (self._engines.moves, self._cuda.capture(work))
        self._cuda.launch(row.graphs[bucket][1])

    def move(self, row: int, old: Positions, new: Positions) -> None:
        moved = np.flatnonzero(old != new)
        if len(moved):
            span = slice(int(moved[0]), int(moved[-1]) + 1)
            tensors = self._rows[row].tensors
            self._turn(tensors, tensors, span.start, old[span], new[span])
            self._rows[row].stand(span.start, new[span])

    def keep(self, row: int, tokens: int) -> Callable[[], None]:
        del row, tokens  # new tokens have slots of their own
        return lambda: None

    def forget(self, row: int, start: int) -> None:
        """Clears the slots, and the scratch: what failed may have left NaN there."""
        if self._torn:
            raise EngineError("keys of the cache are partly moved")
        self._synchronize()
        for tensor in self._rows[row].tensors:
            tensor.clear(self._cuda, start)
        self._clear_scratch()

    def _clear_scratch(self) -> None:
        for tensor in self._scratch.tensors if self._scratch else ():
            tensor.clear(self._cuda, 0)

    def snapshot(self, row: int) -> tuple[list[Array], list[Array]]:
        tensors = self._rows[row].tensors
        if not tensors:
            empty = [np.zeros((x.kv_heads, 0, x.key_size), self._storage) for x in self.layers]
            return empty, [np.zeros((x.kv_heads, 0, x.value_size), self._storage) for x in self.layers]
        host = self._cuda.pinned(max(tensor.bytes for tensor in tensors))
        arrays = []
        try:
            for tensor in tensors:
                self._cuda.download(host, tensor.address, tensor.bytes)
                self._synchronize()
                flat = host.bytes[: tensor.bytes].view(self._storage).copy()
                arrays.append(flat.reshape(tensor.heads, tensor.slots, -1))
        finally:
            self._cuda.free_pinned(host)
        return arrays[: len(self.layers)], arrays[len(self.layers) :]

    def close(self) -> None:
        self._engines.close()
        self._rows, self._scratch, self._staging, self._small_bytes = [_Row()], None, None, 0
        self._scratch_positions = None

    # Buckets and rows

    def _bucket(self, tokens: int) -> int:
        """The number of chunks of the smallest bucket that holds so many tokens."""
        for bucket in self._buckets:
            if bucket.max_tokens >= tokens:
                return bucket.chunks
        raise InputError(
            f"prompt and generated text reach {tokens} tokens, more than the largest bucket's "
            f"{self._buckets[-1].max_tokens}; export and build again with a larger --max-tokens"
        )

    def _bucket_of(self, row: _Row, tokens: int) -> int:
        """The bucket whose engines run a row of so many tokens."""
        return self._bucket(tokens) if self._profiles else self._bucket(row.capacity)

    def _limit(self, bucket: int) -> int:
        """Tokens for which a row's buffers have room."""
        return next(b.max_tokens for b in reversed(self._buckets) if self._profiles or b.chunks == bucket)

    def _slots(self, bucket: int) -> int:
        return self._engines.profile("tail", bucket).slots

    def _new_row(self, bucket: int) -> _Row:
        size = self._storage.itemsize
        sizes = [(x.kv_heads, x.key_size * size) for x in self.layers]
        sizes += [(x.kv_heads, x.value_size * size) for x in self.layers]
        slots = self._slots(bucket)
        row = _Row(self._limit(bucket), SlotBlock(self._cuda, sizes, slots, "the keys and values"))
        if self._look_at_positions:
            try:
                row.positions = SlotPositions(self._cuda, slots)
            except BaseException:
                self._release(row)
                raise
        return row

    def _release(self, row: _Row) -> None:
        for _, graph in row.graphs.values():
            self._cuda.free_graph(graph)
        row.graphs.clear()
        if row.block is not None:
            row.block.free()
        if row.positions is not None:
            row.positions.free()
        for memory in (row.inputs, row.logits):
            if memory is not None:
                self._cuda.free_pinned(memory)
        row.block = row.positions = row.inputs = row.logits = None

    # Scratch and staging

    def _open_scratch(self) -> SlotBlock:
        if self._scratch is None:
            size = self._storage.itemsize
            sizes = [(x.kv_heads, x.key_size * size) for x in self.layers]
            sizes += [(x.kv_heads, x.value_size * size) for x in self.layers]
            slots = self._engines.profile("chunk").slots
            self._scratch = SlotBlock(self._cuda, sizes, slots, "the keys and values of a chunk")
        if self._scratch_positions is None and self._look_at_positions:
            # Heads and chunks stand at their slots' own numbers.
            self._scratch_positions = SlotPositions(self._cuda, self._scratch.slots)
            self._scratch_positions.upload()
        return self._scratch

    def _open_staging(self) -> tuple[SlotBlock, SlotBlock]:
        if self._staging is None:
            sizes = [(x.kv_heads, x.key_size * self._storage.itemsize) for x in self.layers if x.place is not None]
            slots = self._engines.profile("place").new
            first = SlotBlock(self._cuda, sizes, slots, "the keys that move")
            try:
                self._staging = first, SlotBlock(self._cuda, sizes, slots, "the keys that move")
            except BaseException:
                first.free()
                raise
        return self._staging

    def _turn(
        self, source: list[SlotTensor], target: list[SlotTensor], first: int, old: Positions, new: Positions
    ) -> None:
        """Turns the keys of slots ``first`` and behind of ``source``, into the same slots of ``target``."""
        if not self._turning:
            return
        before, after = self._open_staging()
        self._engines.prepare("place")
        done = 0
        try:
            for start in range(0, len(old), before.slots):
                part = slice(start, min(start + before.slots, len(old)))
                count = part.stop - part.start
                for place, layer in enumerate(self._turning):
                    before.tensors[place].copy(self._cuda, 0, source[layer], first + start, count)
                self._place(before, after, old[part], new[part])
                for place, layer in enumerate(self._turning):
                    target[layer].copy(self._cuda, first + start, after.tensors[place], 0, count)
                done = part.stop
        except BaseException:
            if done and target is source:  # all or nothing
                self._torn = True  # until all are back
                self._turn(source, target, first, new[:done], old[:done])
                self._torn = False
            raise

    def _place(self, before: SlotBlock, after: SlotBlock, old: Positions, new: Positions) -> None:
        packing = _Packing(before.slots)
        addresses = packing.addresses(self._inputs)
        for place, layer in enumerate(self._turning):
            addresses[f"key.{layer}"] = before.tensors[place].address
            addresses[f"moved.{layer}"] = after.tensors[place].address
        inputs = self._next_inputs()
        packing.fill_places(inputs, old, new)
        self._cuda.upload(self._inputs, inputs, packing.bytes)
        self._engines.enqueue("place", None, addresses)

    # Runs

    def _run(
        self,
        role: Role,
        bucket: int | None,
        tensors: list[SlotTensor],
        standing: SlotPositions | None,
        ids: Sequence[int],
        positions: Positions,
        scales: NDArray[np.float32] | None = None,
        write_at: int = 0,
    ) -> None:
        """Enqueues one run of a role on caches; fewer tokens than it takes are filled up at the end.

        ``standing``: where the keys of the caches stand, the new ones too.
        """
        packing = _Packing(self._engines.profile(role, bucket).new)
        inputs = self._next_inputs()
        packing.fill(inputs, ids, positions, 1.0 if scales is None else scales, write_at)
        self._cuda.upload(self._inputs, inputs, packing.bytes)
        self._engines.enqueue(role, bucket, self._addresses(tensors, standing, packing))

    def _addresses(
        self, tensors: list[SlotTensor], standing: SlotPositions | None, packing: _Packing
    ) -> Mapping[str, int]:
        """Where each input and output of a head, chunk, tail or step lies."""
        addresses = packing.addresses(self._inputs)
        addresses["columns"], addresses["logits"] = self._columns, self._logits
        if standing is not None:
            addresses["past_position_ids"] = standing.address
        for index, tensor in enumerate(tensors):
            kind, layer = ("key", index) if index < len(self.layers) else ("value", index - len(self.layers))
            addresses[f"past_key_values.{layer}.{kind}"] = tensor.address
            addresses[f"present.{layer}.{kind}"] = tensor.address  # written in place
        return addresses

    def _next_inputs(self) -> Pinned:
        """Pinned memory for a run's inputs, which no copy is still reading."""
        if self._used == len(self._ahead):
            self._synchronize()
        self._used += 1
        return self._ahead[self._used - 1]

    def _synchronize(self) -> None:
        self._cuda.synchronize()
        self._used = 0

    def _host_logits(self, row: _Row) -> Pinned:
        row.logits = row.logits or self._cuda.pinned(4 * self._vocabulary)
        return row.logits

    def _numbers(self, rows: Sequence[_Row], role: str) -> NDArray[np.float32]:
        """The logits that rows have got, float32 ``[rows, V]``."""
        logits = np.stack([row.logits.bytes.view(np.float32) for row in rows if row.logits is not None])
        require_numbers(logits, role, self.manifest)
        return logits


@dataclass
class _Row:
    """The buffers of one prompt."""

    capacity: int = 0
    """Tokens that they have room for."""
    block: SlotBlock | None = None
    """Keys of all layers, then values of all layers."""
    positions: SlotPositions | None = None
    """Where the keys stand, if the engines look at that."""
    inputs: Pinned | None = None
    """Of a step, on the host."""
    logits: Pinned | None = None
    """On the host."""
    graphs: dict[int, tuple[int, Any]] = field(default_factory=dict)
    """The step of each bucket as a CUDA graph, and the number of moves of the activations when it was captured."""

    @property
    def tensors(self) -> list[SlotTensor]:
        return self.block.tensors if self.block is not None else []

    def stand(self, start: int, positions: Sequence[int] | Positions) -> None:
        """The keys of the slots from ``start`` on stand there from now on."""
        if self.positions is not None:
            self.positions.numbers[start : start + len(positions)] = positions


def _require_slots(profile: ProfileInfo, start: int, stop: int) -> None:
    """All tokens of a run, also those that fill it up, have a slot, and the real ones can be seen."""
    if start + profile.new > profile.slots or stop > profile.columns:
        raise BundleError(
            f"the {profile.role} engine of {profile.bucket} chunks has {profile.slots} slots, {profile.columns} of "
            f"them seen, too few for tokens {start} to {start + profile.new - 1}; run `mesart build` again"
        )


class _Packing:
    """Where the small inputs of a run of ``new`` tokens lie in one block, which is copied to the device at once."""

    def __init__(self, new: int) -> None:
        self.new = new
        ids, scales = aligned(8 * new), aligned(4 * new)
        self._at = {"input_ids": 0, "position_ids": ids, "query_scale": 2 * ids}
        self._at |= {"logits_at": 2 * ids + scales, "write_at": 2 * ids + scales + aligned(8)}
        self._at |= {"from_ids": 0, "to_ids": ids}  # no run has both
        self.bytes = 2 * ids + scales + 2 * aligned(8)

    def addresses(self, block: int) -> dict[str, int]:
        """The device address of each input."""
        return {name: block + at for name, at in self._at.items()}

    def fill(
        self,
        memory: Pinned,
        ids: Sequence[int],
        positions: Sequence[int] | Positions,
        scales: float | Sequence[float] | NDArray[np.float32],
        write_at: int,
    ) -> None:
        count = len(ids)
        self._put(memory, "input_ids", ids, count)
        self._put(memory, "position_ids", positions, count)
        scale = self._view(memory, "query_scale", np.float32, self.new)
        scale[:count], scale[count:] = scales, 1
        self._view(memory, "logits_at", np.int64, 1)[0] = count - 1
        self._view(memory, "write_at", np.int64, 1)[0] = write_at

    def fill_places(self, memory: Pinned, old: Positions, new: Positions) -> None:
        self._put(memory, "from_ids", old, len(old))
        self._put(memory, "to_ids", new, len(new))

    def _put(self, memory: Pinned, name: str, numbers: Sequence[int] | Positions, count: int) -> None:
        view = self._view(memory, name, np.int64, self.new)
        view[:count], view[count:] = numbers, 0

    def _view(self, memory: Pinned, name: str, dtype: type[np.generic], count: int) -> Array:
        start = self._at[name]
        return memory.bytes[start : start + count * np.dtype(dtype).itemsize].view(dtype)


__all__ = ["DeviceCache", "DeviceMemory"]

"""The live cache in numpy arrays: for the backends that map arrays to arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import BundleError, EngineError
from mesart.graphs.manifest import Manifest, Role
from mesart.graphs.plan import Span
from mesart.graphs.stairs import ORDINARY
from mesart.runtime.backends import STORAGE, Array, Graph
from mesart.runtime.cache import NextToken, Positions, require_keys, require_numbers
from mesart.runtime.graphs import RoleGraphs

MASKED = np.float32(-1e9)
"""Added to the scores of empty slots: far below any score, and finite, so that no row becomes NaN."""


class HostCache:
    """Buffers ``[B, K, capacity, D]`` for keys and values of each layer, all rows in one; see :class:`LiveCache`.

    Written in place; copied only when the capacity grows.
    """

    def __init__(self, manifest: Manifest, graphs: RoleGraphs) -> None:
        self.manifest, self.config, self.layers, self._graphs = manifest, manifest.config, manifest.layers, graphs
        self.last_logits_only = graphs.last_logits_only
        self._places: dict[str, Graph] = {x.place: graphs.place(x.place) for x in self.layers if x.place}
        self._storage = STORAGE[manifest.dtype]
        self._vocabulary = int(manifest.model["vocab_size"])
        self._presents = {
            "key": [(f"present.{i}.key", x.kv_heads, x.key_size) for i, x in enumerate(self.layers)],
            "value": [(f"present.{i}.value", x.kv_heads, x.value_size) for i, x in enumerate(self.layers)],
        }
        """Name, heads and size of the outputs that hold new keys and values."""
        self._torn = False  # what cannot be brought back is being overwritten
        self._allocate(1, 0)

    def _allocate(self, batch: int, capacity: int) -> None:
        self._capacity = capacity
        self.keys: list[Array] = [
            np.zeros((batch, x.kv_heads, capacity, x.key_size), self._storage) for x in self.layers
        ]
        self.values: list[Array] = [
            np.zeros((batch, x.kv_heads, capacity, x.value_size), self._storage) for x in self.layers
        ]
        self.mask = np.full((batch, 1, 1, capacity), MASKED)
        """Added to the scores of each slot, float32: 0 where a key may be seen."""
        self.positions = np.zeros((batch, capacity), np.int64)
        """Where the key of each slot stands."""

    @property
    def capacity(self) -> int:
        return self._capacity

    def begin(self, lengths: Sequence[int]) -> None:
        self.clear()  # the old buffers go before the new ones come
        self._allocate(len(lengths), self._room(max(lengths)))

    def clear(self) -> None:
        self._allocate(1, 0)
        self._torn = False

    def make_room(self, row: int, tokens: int) -> None:
        del row  # all have the same
        if tokens > self._capacity:
            self._grow(self._room(tokens, growing=True))

    def _room(self, tokens: int, *, growing: bool = False) -> int:
        """Slots for ``tokens`` tokens; more of them if there have just become too few."""
        return self._graphs.capacity(tokens, growing=growing)

    def _past_slots(self, tokens: int) -> int:
        """Slots that a tail looks at, of which the first ``tokens`` are in use."""
        return self._graphs.past_slots(tokens, self._capacity)

    def _slice_length(self, past: int) -> int:
        """New tokens that one run of a tail takes."""
        return self._graphs.slice_length(past)

    def _grow(self, capacity: int) -> None:
        for buffers in (self.keys, self.values):
            for index, old in enumerate(buffers):
                buffers[index] = np.zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
                buffers[index][:, :, : self._capacity] = old
        mask = np.full((*self.mask.shape[:3], capacity), MASKED)
        mask[..., : self._capacity] = self.mask
        positions = np.zeros((len(self.positions), capacity), np.int64)
        positions[:, : self._capacity] = self.positions
        self.mask, self.positions, self._capacity = mask, positions, capacity

    def head(self, row: int, tokens: Sequence[int], span: Span) -> None:
        ids, positions = _ids(tokens, [span]), ORDINARY.positions(span.start, span.stop)[None]
        past = [np.zeros((1, x.kv_heads, 0, x.key_size), self._storage) for x in self.layers]
        past_values = [np.zeros((1, x.kv_heads, 0, x.value_size), self._storage) for x in self.layers]
        none = np.zeros((1, 1, 1, 0), np.float32)
        nowhere = np.zeros((1, 0), np.int64)
        _, keys, values = self._run("head", ids, positions, none, nowhere, _past_feeds(past, past_values))
        self._write(row, span.start, [k[0] for k in keys], [v[0] for v in values], positions[0])

    def chunks(self, row: int, tokens: Sequence[int], spans: Sequence[Span], head: Positions) -> None:
        size = self.config.head_length
        local = ORDINARY.positions(0, size)
        head_keys = [k[row : row + 1, :, :size] for k in self.keys]
        if not np.array_equal(head, local):  # a later turn: the head stands on stairs
            head_keys = [
                keys if info.place is None else np.array(_turn(self._places[info.place], keys, head, local))
                for keys, info in zip(head_keys, self.layers, strict=True)
            ]
        head_values = [v[row : row + 1, :, :size] for v in self.values]
        limit = self._graphs.chunk_slice(self.config.chunk_length)
        for batch in _batches(spans, self._graphs.chunk_batch(self.config.chunk_length)):
            ids, count = _ids(tokens, batch), len(batch)
            keys, values = ([np.repeat(x, count, axis=0) for x in arrays] for arrays in (head_keys, head_values))
            for start in range(0, ids.shape[1], limit):
                new = ids[:, start : start + limit]
                past, stop = size + start, size + start + new.shape[1]
                positions = ORDINARY.positions(past, stop)
                _, new_keys, new_values = self._run(
                    "chunk",
                    new,
                    np.tile(positions, (count, 1)),
                    np.zeros((count, 1, 1, past), np.float32),
                    np.tile(ORDINARY.positions(0, past), (count, 1)),
                    _past_feeds(keys, values),
                )
                for place, span in enumerate(batch):
                    written = [x[place] for x in new_keys], [x[place] for x in new_values]
                    self._write(row, span.start + start, *written, positions)
                if stop < size + ids.shape[1]:
                    keys = [np.concatenate(pair, axis=2) for pair in zip(keys, new_keys, strict=True)]
                    values = [np.concatenate(pair, axis=2) for pair in zip(values, new_values, strict=True)]

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
        part = slice(row, row + 1)
        pieces = []
        start = span.start
        while start < span.stop:
            past = self._past_slots(start)
            piece = Span(start, min(start + self._slice_length(past), span.stop))
            start = piece.stop
            here = slice(piece.start - span.start, piece.stop - span.start)
            logits, keys, values = self._run(
                "tail",
                _ids(tokens, [piece]),
                positions[None, here],
                self.mask[part, ..., :past],
                self.positions[part, :past],
                _past_feeds([k[part, :, :past] for k in self.keys], [v[part, :, :past] for v in self.values]),
                scales[None, here],
                range(len(piece)) if all_logits else (len(piece) - 1,),
            )
            if all_logits or piece.stop == span.stop:
                pieces.append(np.array(logits[0]))
            self._write(row, piece.start, [k[0] for k in keys], [v[0] for v in values], positions[here])
        return np.concatenate(pieces)

    def step(self, tokens: Sequence[NextToken | None]) -> NDArray[np.float32]:
        together = self._graphs.step_batch or len(tokens)
        rows = [range(i, min(i + together, len(tokens))) for i in range(0, len(tokens), together)]
        # All rows are computed before any is written: a row may lose a key to its new one.
        parts = [self._step(tokens, part, last=part.stop == len(tokens)) for part in rows]
        for part, (_, keys, values) in zip(rows, parts, strict=True):
            for place, row in enumerate(part):
                token = tokens[row]
                if token is not None:
                    here = np.array([token.position], np.int64)
                    self._write(row, token.slot, [k[place] for k in keys], [v[place] for v in values], here)
        return parts[0][0] if len(parts) == 1 else np.concatenate([logits for logits, _, _ in parts])

    def _step(
        self, tokens: Sequence[NextToken | None], rows: range, *, last: bool
    ) -> tuple[NDArray[np.float32], list[Array], list[Array]]:
        """Logits ``[B, V]``, new keys and values of some rows, which stay as they are even if others run after them."""
        part = slice(rows.start, rows.stop)
        fed = [token or NextToken(0, 0, 0, 1.0) for token in tokens[part]]  # a row without one runs along
        logits, keys, values = self._run(
            "step",
            np.array([[row.token] for row in fed], dtype=np.int64),
            np.array([[row.position] for row in fed], dtype=np.int64),
            self.mask[part],
            self.positions[part],
            _past_feeds([k[part] for k in self.keys], [v[part] for v in self.values]),
            np.array([[row.scale] for row in fed], dtype=np.float32),
        )
        if not last:  # the engine writes its next result to the same place
            keys, values = ([np.array(array) for array in arrays] for arrays in (keys, values))
        return np.array(logits[:, -1]), keys, values

    def move(self, row: int, old: Positions, new: Positions) -> None:
        moved = np.flatnonzero(old != new)
        if not len(moved):
            return
        span = slice(int(moved[0]), int(moved[-1]) + 1)
        turned: list[tuple[str, Array]] = []
        try:
            for layer, info in enumerate(self.layers):
                if info.place is not None:
                    keys = self.keys[layer][row : row + 1, :, span]
                    result = _turn(self._places[info.place], keys, old[span], new[span])
                    self._torn = True
                    keys[:] = result
                    turned.append((info.place, keys))
                    self._torn = False
        except BaseException:
            torn, self._torn = self._torn, True  # until all are back
            for place, keys in turned:
                keys[:] = _turn(self._places[place], keys, new[span], old[span])
            self._torn = torn
            raise
        self.positions[row, span] = new[span]

    def keep(self, row: int, tokens: int) -> Callable[[], None]:
        del row, tokens  # new tokens have slots of their own
        return lambda: None

    def forget(self, row: int, start: int) -> None:
        self._require_whole()
        self.mask[row, ..., start:] = MASKED

    def _require_whole(self) -> None:
        if self._torn:
            raise EngineError("keys of the cache are half written")

    def snapshot(self, row: int) -> tuple[list[Array], list[Array]]:
        return [key[row].copy() for key in self.keys], [value[row].copy() for value in self.values]

    def close(self) -> None:
        self._allocate(1, 0)

    def _write(self, row: int, start: int, keys: list[Array], values: list[Array], positions: Positions) -> None:
        """Stores new keys and values ``[K, S, D]`` of one row from slot ``start`` on, which may be seen from now on.

        ``positions``: where the keys stand, int64 ``[S]``.
        """
        stop = start + keys[0].shape[1]
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.keys[layer][row, :, start:stop] = key
            self.values[layer][row, :, start:stop] = value
        self.positions[row, start:stop] = positions
        self.mask[row, ..., start:stop] = 0

    def _run(
        self,
        role: Role,
        ids: NDArray[np.int64],
        positions: Positions,
        past_mask: NDArray[np.float32],
        past_positions: Positions,
        past: dict[str, Array],
        scales: NDArray[np.float32] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> tuple[Array, list[Array], list[Array]]:
        """Runs a role on ``[B, S]`` new tokens, filled up at the end to what the graph takes."""
        batch, new = ids.shape
        scales = np.ones((batch, new), np.float32) if scales is None else scales
        size = self._graphs.padded(role, new)
        if size > new:
            padding = ((0, 0), (0, size - new))
            ids, positions = np.pad(ids, padding), np.pad(positions, padding)
            scales = np.pad(scales, padding, constant_values=1)
        feeds: dict[str, Array] = {
            "input_ids": ids,
            "position_ids": positions,
            "past_mask": past_mask,
            "past_position_ids": past_positions,
            "new_mask": _causal(batch, size),
            "query_scale": scales[:, None, :, None],
            "logits_at": np.array(wanted if wanted is not None else [new - 1], np.int64),
            **past,
        }
        outputs = self._graphs.run(role, self._bucket(past_mask.shape[-1]), feeds)
        logits, keys, values = self._outputs(outputs, role, batch, size, len(feeds["logits_at"]))
        require_numbers(logits, role, self.manifest)
        keys, values = ([array[:, :, :new] for array in arrays] for arrays in (keys, values))
        require_keys(keys, role, self.manifest)
        require_keys(values, role, self.manifest)
        return logits, keys, values

    def _outputs(
        self, outputs: dict[str, Array], role: Role, batch: int, new: int, wanted: int
    ) -> tuple[Array, list[Array], list[Array]]:
        """Logits, keys and values, if they are what was asked for: an engine's word alone is not enough."""
        logits = _of_shape(outputs.get("logits"), (batch, wanted, self._vocabulary), "logits", role)
        keys, values = (
            [
                _of_shape(outputs.get(name), (batch, heads, new, size), name, role)
                for name, heads, size in self._presents[kind]
            ]
            for kind in ("key", "value")
        )
        return logits, keys, values

    def _bucket(self, capacity: int) -> int:
        return next((b.chunks for b in self.manifest.buckets if b.max_tokens >= capacity), -1)


def _turn(place: Graph, keys: Array, old: Positions, new: Positions) -> Array:
    """Keys ``[B, K, S, D]`` turned from positions ``old`` to ``new``, int64 ``[S]`` both."""
    from_ids, to_ids = (np.broadcast_to(ids, (len(keys), len(ids))) for ids in (old, new))
    feeds = {"key": np.ascontiguousarray(keys), "from_ids": np.array(from_ids), "to_ids": np.array(to_ids)}
    return _of_shape(place(feeds).get("moved"), keys.shape, "moved", "place")


def _of_shape(array: Array | None, shape: tuple[int, ...], name: str, role: Role) -> Array:
    """An engine's output, if there is one of that shape."""
    if array is None:
        raise BundleError(f"the graph of the {role} has no output {name!r}; export the bundle again")
    if array.shape != shape:
        raise EngineError(
            f"the engine gave {name} of the {role} as {list(array.shape)} where {list(shape)} was asked for: the graph "
            "is not this bundle's, or the engine is out of memory; export again, or use fewer rows or shorter prompts"
        )
    return array


def _causal(batch: int, size: int) -> NDArray[np.float32]:
    """The mask of new tokens among themselves, ``[B, 1, S, S]``."""
    if size == 1:
        return np.zeros((batch, 1, 1, 1), np.float32)  # of every step
    mask: NDArray[np.float32] = np.triu(np.full((size, size), MASKED), 1)
    return mask[None, None].repeat(batch, axis=0)


def _past_feeds(keys: list[Array], values: list[Array]) -> dict[str, Array]:
    """The inputs ``past_key_values.N.key`` and ``.value``."""
    feeds = {f"past_key_values.{index}.key": key for index, key in enumerate(keys)}
    feeds.update({f"past_key_values.{index}.value": value for index, value in enumerate(values)})
    return feeds


def _ids(tokens: Sequence[int], spans: Sequence[Span]) -> NDArray[np.int64]:
    return np.array([tokens[span.start : span.stop] for span in spans], dtype=np.int64)


def _batches(chunks: Sequence[Span], limit: int) -> list[list[Span]]:
    """Chunks of one length together, at most ``limit``."""
    batches = []
    for _, same in groupby(chunks, key=len):
        group = list(same)
        batches += [group[i : i + limit] for i in range(0, len(group), limit)]
    return batches

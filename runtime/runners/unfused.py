"""Graphs that take a past and give new keys and values: what every engine and every model can do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.bundle.names import (
    INPUT_IDS,
    KINDS,
    LOGITS,
    LOGITS_AT,
    MASKED,
    NEW_MASK,
    PAST_MASK,
    PAST_POSITION_IDS,
    POSITION_IDS,
    QUERY_SCALE,
    Phase,
    past_name,
    present_name,
)
from mesart.runtime.graphs import PhaseGraphs
from mesart.runtime.kv.slab import SlabKv, SlabStore
from mesart.runtime.kv.store import Array
from mesart.runtime.runners.rows import Rows, in_rows
from mesart.runtime.runners.runner import Logits, Segment, of_shape, require_keys, require_numbers

_RING_ROWS = 256
"""Tokens of a slice that products with weights need to be fast."""


class UnfusedRunner:
    """Runs the symbolic graph, or those of fixed shapes; see :class:`~mesart.runtime.runners.runner.Runner`."""

    def __init__(self, manifest: Manifest, store: SlabStore, graphs: PhaseGraphs) -> None:
        self._manifest, self._store, self._graphs = manifest, store, graphs
        self.last_logits_only = self.whole_slices = graphs.is_static
        self._vocabulary = int(manifest.model["vocab_size"])
        self._past = {
            kind: [(present_name(i, kind), x.kv_heads, size) for i, (x, size) in enumerate(sizes)]
            for kind, sizes in zip(
                KINDS,
                ([(x, x.key_size) for x in manifest.layers], [(x, x.value_size) for x in manifest.layers]),
                strict=True,
            )
        }
        """Name, heads and size of the outputs that hold new keys and values."""

    def slice_length(self, phase: Phase, past: int) -> int:
        config = self._manifest.config
        if phase in ("prefix", "chunk"):
            return self._graphs.chunk_slice(config.head_length if phase == "prefix" else config.chunk_length)
        sink_window = self._manifest.config.sink_window
        length = self._graphs.slice_length(past)
        if sink_window is None:
            return length
        # What it writes may drop nothing that it has to see. Each of its tokens has scores with a window and with the
        # slice, of which those of a window are needed: short slices waste less.
        return min(length, sink_window.window, max(sink_window.window // 4, _RING_ROWS))

    def run(self, segments: Sequence[Segment]) -> list[Logits]:
        results: list[Logits | None] = [None] * len(segments)
        written: list[tuple[Segment, list[Array], list[Array]]] = []
        groups = list(in_rows(segments, self._graphs.decode_batch))
        # All are computed before any is written: a text may lose a key to its new one.
        for rows in groups:
            logits, keys, values = self._run(rows)
            given = iter(rows.indices)
            for row, segment in enumerate(rows.segments):
                if segment is not None:
                    wanted = logits[row, max(0, logits.shape[1] - segment.wanted) :]
                    results[next(given)] = np.array(wanted[: segment.wanted])
                    new, others = [x[row] for x in keys], [x[row] for x in values]
                    if len(groups) > 1:  # the engine writes its next result to the same place
                        new, others = [x.copy() for x in new], [x.copy() for x in others]
                    written.append((segment, new, others))
        for segment, keys, values in written:
            assert isinstance(segment.kv, SlabKv)
            self._store.write(segment.kv, keys, values, segment.positions)
        return [logits for logits in results if logits is not None]

    def _run(self, rows: Rows) -> tuple[Array, list[Array], list[Array]]:
        """Runs a phase on ``[B, S]`` new tokens, filled up at the end to what the graph takes."""
        phase, new, batch = rows.given[0].phase, rows.size, len(rows.segments)
        ids, positions, scales = rows.ids(), rows.positions(), rows.scales()
        size = self._graphs.padded(phase, new)
        if size > new:
            padding = ((0, 0), (0, size - new))
            ids, positions = np.pad(ids, padding), np.pad(positions, padding)
            scales = np.pad(scales, padding, constant_values=1)
        wanted = max(1, *(segment.wanted for segment in rows.given))
        past = self._past_slots(rows, phase)
        feeds: dict[str, Array] = {
            INPUT_IDS: ids,
            POSITION_IDS: positions,
            PAST_MASK: self._mask(rows, past),
            PAST_POSITION_IDS: self._past_positions(rows, past),
            NEW_MASK: _causal(batch, size),
            QUERY_SCALE: scales[:, None, :, None],
            LOGITS_AT: np.arange(new - wanted, new, dtype=np.int64),
        }
        for kind, arrays in zip(KINDS, (rows.slab.keys, rows.slab.values), strict=True):
            feeds.update({past_name(i, kind): array[rows.part, :, :past] for i, array in enumerate(arrays)})
        outputs = self._graphs.run(phase, self._bucket(rows.slab.capacity), feeds)
        logits, keys, values = self._outputs(outputs, phase, batch, size, wanted)
        live = [row for row, segment in enumerate(rows.segments) if segment is not None]
        require_numbers(logits[live], phase, self._manifest)
        keys, values = ([array[:, :, :new] for array in arrays] for arrays in (keys, values))
        for arrays in (keys, values):
            require_keys(arrays if len(live) == batch else [x[live] for x in arrays], phase, self._manifest)
        return logits, keys, values

    def _past_slots(self, rows: Rows, phase: Phase) -> int:
        used = max(self._in_use(text) for text in rows.slab.texts[rows.part] if text is not None)
        if phase in ("prefix", "chunk"):
            return used
        if phase == "decode" or self._manifest.config.sink_window is not None:
            # All of them, for they lie as they are. And in a ring the graph looks for the first tokens in the first.
            return rows.slab.capacity
        return self._graphs.past_slots(used, rows.slab.capacity)

    def _mask(self, rows: Rows, slots: int) -> Array:
        """Added to the scores of each slot, float32 ``[B, 1, 1, P]``: 0 where there is a key."""
        used = [0 if text is None else self._in_use(text) for text in rows.slab.texts[rows.part]]
        seen = np.arange(slots)[None] < np.array(used)[:, None]
        mask: Array = np.where(seen, np.float32(0), np.float32(MASKED))
        return mask[:, None, None]

    def _past_positions(self, rows: Rows, slots: int) -> Array:
        if not self._manifest.looks_at_positions:
            return np.zeros((len(rows.segments), slots), np.int64)
        texts = rows.slab.texts[rows.part]
        nowhere = np.zeros(slots, np.int64)
        return np.stack([nowhere if text is None else self._store.slot_positions(text, slots) for text in texts])

    def _in_use(self, kv: SlabKv) -> int:
        return self._store.slots_in_use(kv)

    def _outputs(
        self, outputs: dict[str, Array], phase: Phase, batch: int, new: int, wanted: int
    ) -> tuple[Array, list[Array], list[Array]]:
        """Logits, keys and values, if they are what was asked for."""
        logits = of_shape(outputs.get(LOGITS), (batch, wanted, self._vocabulary), LOGITS, phase)
        keys, values = (
            [
                of_shape(outputs.get(name), (batch, heads, new, size), name, phase)
                for name, heads, size in self._past[kind]
            ]
            for kind in KINDS
        )
        return logits, keys, values

    def _bucket(self, capacity: int) -> int:
        return next((b.chunks for b in self._manifest.buckets if b.max_tokens >= capacity), -1)

    def close(self) -> None:
        self._graphs.close()


def _causal(batch: int, size: int) -> Array:
    """The mask of new tokens among themselves, float32 ``[B, 1, S, S]``."""
    if size == 1:
        return np.zeros((batch, 1, 1, 1), np.float32)  # of every decoding step
    mask = np.triu(np.full((size, size), MASKED, np.float32), 1)
    return mask[None, None].repeat(batch, axis=0)


__all__ = ["UnfusedRunner"]

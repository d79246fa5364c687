"""Rows of a slab that the engine writes in place: onnxruntime's GroupQueryAttention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.bundle.names import (
    INPUT_IDS,
    KINDS,
    LOGITS,
    LOGITS_AT,
    POSITION_IDS,
    QUERY_SCALE,
    SEQLENS_K,
    TOTAL_SEQUENCE_LENGTH,
    Phase,
    past_name,
)
from mesart.runtime.graphs import GRANULE
from mesart.runtime.kv.store import Array
from mesart.runtime.runners.rows import Rows, in_rows
from mesart.runtime.runners.runner import Logits, Segment, of_shape, require_keys, require_numbers

_TOKENS = 512
"""New tokens that fill a CPU."""

_SCORES = 1 << 21
"""Scores a head that a run may hold: the operator holds those of all heads at once."""


def capacity_in_place(tokens: int, growing: bool) -> int:
    """Slots for so many tokens; one more at least, for what a row writes that only runs along."""
    # Slots that are not used take no memory, and copying to a larger buffer does.
    return ((tokens + tokens // 2 if growing else tokens) // GRANULE + 1) * GRANULE


class InPlaceGraph(Protocol):
    """A loaded graph that writes into the caches that it is given."""

    def __call__(self, feeds: Mapping[str, Array], caches: Mapping[str, Array], /) -> dict[str, Array]:
        """``caches``: by the ends of their names, such as ``0.key``; read, and written."""
        ...


class GroupedRunner:
    """Runs the bundle's grouped graph; see :class:`~mesart.runtime.runners.runner.Runner`.

    Args:
        check: asked before each run that reads a prompt: whether weights are what they were.
    """

    last_logits_only = False
    whole_slices = False

    def __init__(self, manifest: Manifest, graph: InPlaceGraph, check: Callable[[], None]) -> None:
        self._manifest, self._graph, self._check = manifest, graph, check
        self._vocabulary = int(manifest.model["vocab_size"])

    def slice_length(self, phase: Phase, past: int) -> int:
        del phase
        return max(32, min(_TOKENS, _SCORES // (past + _TOKENS)))

    def run(self, segments: Sequence[Segment]) -> list[Logits]:
        if any(segment.phase != "decode" for segment in segments):
            self._check()
        results: list[Logits | None] = [None] * len(segments)
        for rows in in_rows(segments, None):
            for index, logits in zip(rows.indices, self._run(rows), strict=True):
                results[index] = logits
        for segment in segments:
            segment.kv.append(segment.positions)
        return [logits for logits in results if logits is not None]

    def _run(self, rows: Rows) -> list[Logits]:
        phase, size = rows.given[0].phase, rows.size
        wanted = max(1, *(segment.wanted for segment in rows.given))
        totals = rows.lengths() + np.int32(size)
        # A row that runs along writes behind its text, where nothing looks.
        feeds: dict[str, Array] = {
            INPUT_IDS: rows.ids(),
            POSITION_IDS: rows.positions(),
            QUERY_SCALE: rows.scales()[:, None, :, None],
            LOGITS_AT: np.arange(size - wanted, size, dtype=np.int64),
            SEQLENS_K: totals - np.int32(1),
            TOTAL_SEQUENCE_LENGTH: totals.max(),
        }
        caches = {}
        for kind, arrays in zip(KINDS, (rows.slab.keys, rows.slab.values), strict=True):
            caches.update({past_name(layer, kind): array[rows.part] for layer, array in enumerate(arrays)})
        outputs = self._graph(feeds, caches)
        logits = of_shape(outputs.get(LOGITS), (len(rows.segments), wanted, self._vocabulary), LOGITS, phase)
        results = []
        for row, segment in enumerate(rows.segments):
            if segment is not None:
                start = segment.kv.length
                new = [cache[row, :, start : start + size] for cache in caches.values()]
                require_keys(new, segment.phase, self._manifest)
                require_numbers(logits[row], segment.phase, self._manifest)
                results.append(np.array(logits[row, wanted - segment.wanted :]))
        return results

    def close(self) -> None:
        self._graph = _closed


def _closed(feeds: Mapping[str, Array], caches: Mapping[str, Array]) -> dict[str, Array]:
    raise ValueError("the runner was closed")


__all__ = ["GroupedRunner", "InPlaceGraph", "capacity_in_place"]

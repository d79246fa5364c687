"""Any mix of segments in one run, on blocks: for engines with an operator for paged attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.bundle.names import (
    BLOCK,
    BLOCK_INDICES,
    BLOCK_INDICES_BEGINS,
    INPUT_IDS,
    LOGITS,
    LOGITS_AT,
    MAX_CONTEXT_LEN,
    PAST_LENS,
    POSITION_IDS,
    QUERY_SCALE,
    SUBSEQUENCE_BEGINS,
    Phase,
)
from mesart.runtime.kv.paged import PagedKv, PagedStore
from mesart.runtime.kv.store import Array
from mesart.runtime.runners.runner import Logits, Segment, of_shape, require_keys, require_numbers

_TOKENS = 1024
"""New tokens that fill a CPU; the operator holds no scores of them all, so more would cost activations only."""


class PagedRunner:
    """Runs the bundle's paged graph; see :class:`~mesart.runtime.runners.runner.Runner`.

    Args:
        graph: maps the small inputs to outputs; the blocks of ``store`` are bound to it.
        check: asked before each run that reads a prompt: whether weights are what they were.
        kept: the dtype of keys and values, if it is not the bundle's.
    """

    last_logits_only = False
    whole_slices = False

    def __init__(
        self,
        manifest: Manifest,
        store: PagedStore,
        graph: Callable[[Mapping[str, Array]], dict[str, Array]],
        check: Callable[[], None],
        kept: str | None = None,
    ) -> None:
        self._kept = kept
        self._manifest, self._store, self._graph, self._check = manifest, store, graph, check
        self._vocabulary = int(manifest.model["vocab_size"])

    def slice_length(self, phase: Phase, past: int) -> int:
        del phase, past
        return _TOKENS

    def run(self, segments: Sequence[Segment]) -> list[Logits]:
        if any(segment.phase != "decode" for segment in segments):
            self._check()
        phase = segments[0].phase
        wanted = _wanted(segments)
        logits = of_shape(
            self._graph(_feeds(segments, wanted)).get(LOGITS), (1, len(wanted), self._vocabulary), LOGITS, phase
        )[0]
        spans = ((segment.kv, segment.kv.length, segment.kv.length + len(segment)) for segment in segments)
        require_keys(self._store.written(spans), phase, self._manifest, self._kept)
        require_numbers(logits, phase, self._manifest)
        results, at = [], 0
        for segment in segments:
            results.append(np.array(logits[at : at + segment.wanted]))
            at += segment.wanted
        for segment in segments:
            segment.kv.append(segment.positions)
        return results

    def close(self) -> None:
        self._graph = _closed


def _closed(feeds: Mapping[str, Array]) -> dict[str, Array]:
    raise ValueError("the runner was closed")


def _wanted(segments: Sequence[Segment]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Indices of the tokens whose logits are wanted, among those of all segments; at least one."""
    ends = np.cumsum([len(segment) for segment in segments])
    parts = [np.arange(end - segment.wanted, end) for end, segment in zip(ends, segments, strict=True)]
    indices = np.concatenate(parts).astype(np.int64)
    return indices if len(indices) else np.array([ends[-1] - 1], np.int64)


def _feeds(segments: Sequence[Segment], wanted: Array) -> dict[str, Array]:
    lengths = [segment.kv.length + len(segment) for segment in segments]
    blocks = []
    for segment, length in zip(segments, lengths, strict=True):
        assert isinstance(segment.kv, PagedKv)
        blocks.append(segment.kv.blocks[: -(-length // BLOCK)])
    return {
        INPUT_IDS: np.concatenate([segment.ids for segment in segments])[None],
        POSITION_IDS: np.concatenate([segment.positions for segment in segments])[None],
        QUERY_SCALE: np.concatenate([segment.scales for segment in segments])[None, None, :, None],
        LOGITS_AT: wanted,
        PAST_LENS: np.array([segment.kv.length for segment in segments], np.int32),
        SUBSEQUENCE_BEGINS: _edges(map(len, segments)),
        BLOCK_INDICES: np.concatenate(blocks),
        BLOCK_INDICES_BEGINS: _edges(map(len, blocks)),
        MAX_CONTEXT_LEN: np.array(max(lengths), np.int32),
    }


def _edges(sizes: Iterable[int]) -> Array:
    """Where each of consecutive parts begins, and the last ends."""
    return np.cumsum([0, *sizes]).astype(np.int32)


__all__ = ["PagedRunner"]

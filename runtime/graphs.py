"""Which graph computes a phase, and in what shapes: one symbolic graph for all, or one specialised for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from mesart.graphs.bundle.files import BundleFiles
from mesart.graphs.bundle.manifest import GraphInfo, Manifest
from mesart.graphs.bundle.names import FROM_IDS, INPUT_IDS, KEY, ROTATED, TO_IDS, Phase
from mesart.graphs.errors import InputError
from mesart.runtime.backends import STORAGE, Array, Backend, Graph
from mesart.runtime.external_data import check_locations
from mesart.runtime.kv.store import Positions
from mesart.runtime.runners.runner import of_shape

G = TypeVar("G")

GRANULE = 64
"""Slots by which a cache grows where the graph leaves its length free."""

_SCORES = 1 << 21
"""Scores a head that one run of a tail may hold: bounds the memory of long prompts at little cost in speed."""

_ROWS = 1024
"""Tokens that fill the matrix units of a CPU; more at a time gain nothing."""

_CHUNK_ROWS = 512
"""Tokens of a chunk at a time: those of a slice do not see what comes behind, and need no scores with it."""


class PhaseGraphs(Protocol):
    """Runs phases; says what shapes it wants."""

    decode_batch: int | None
    """Rows that one decoding step takes; ``None``: any number."""
    is_static: bool
    """Whether shapes are fixed: heads and chunks have to be whole, and only the last token's logits are there."""

    def run(self, phase: Phase, bucket: int | None, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def capacity(self, tokens: int, growing: bool) -> int:
        """Slots for a cache that holds ``tokens`` tokens; more of them if it has just become too small."""
        ...

    def past_slots(self, tokens: int, capacity: int) -> int:
        """Slots that a run of a tail looks at, of a cache of ``capacity`` whose first ``tokens`` are in use."""
        ...

    def slice_length(self, past: int) -> int:
        """New tokens that one run of a tail takes behind so many slots."""
        ...

    def chunk_slice(self, chunk_length: int) -> int:
        """Tokens of a chunk that one run takes."""
        ...

    def padded(self, phase: Phase, new: int) -> int:
        """Tokens to which a run of ``new`` tokens is filled up."""
        ...

    def close(self) -> None:
        """Frees the engines."""
        ...


class SymbolicGraphs:
    """One graph with free axes serves every phase: compiled once, weights in memory once, nothing padded."""

    decode_batch: int | None = None
    is_static = False

    def __init__(self, files: GraphFiles) -> None:
        manifest, backend = files.manifest, files.backend
        kind = backend.graph_kind if manifest.has(backend.graph_kind) else "symbolic"
        self._files = files
        self._graph: Graph | None = files.open(manifest.graph(kind).file)

    def run(self, phase: Phase, bucket: int | None, feeds: Mapping[str, Array]) -> dict[str, Array]:
        del bucket
        if phase != "decode":
            self._files.require_weights()
        assert self._graph is not None
        return self._graph(feeds)

    def capacity(self, tokens: int, growing: bool) -> int:
        # Growing by an eighth, so that copies to larger buffers cost O(1) a token.
        slots = tokens + tokens // 8 if growing else tokens
        return (slots // GRANULE + 1) * GRANULE

    def past_slots(self, tokens: int, capacity: int) -> int:
        # A part of the slots has to be copied out, which is worth it where it spares scores of many empty slots.
        slots = -(-tokens // GRANULE) * GRANULE
        return slots if slots <= capacity * 3 // 4 else capacity

    def slice_length(self, past: int) -> int:
        return max(32, min(_ROWS, _SCORES // max(past, 1)))

    def chunk_slice(self, chunk_length: int) -> int:
        return min(chunk_length, _CHUNK_ROWS)

    def padded(self, phase: Phase, new: int) -> int:
        del phase
        return new

    def close(self) -> None:
        self._graph = None


class SpecialisedGraphs:
    """A graph of fixed shapes for each phase and bucket, as engines with static shapes run them.

    On a CPU each holds weights of its own: opened when first needed, and only the latest ``keep`` stay open.
    """

    decode_batch: int | None = 1
    is_static = True

    def __init__(self, files: GraphFiles, keep: int = 3) -> None:
        self._files, self._manifest, self._keep = files, files.manifest, keep
        self._open: dict[str, Graph] = {}

    def run(self, phase: Phase, bucket: int | None, feeds: Mapping[str, Array]) -> dict[str, Array]:
        info = self._manifest.graph(phase, bucket if phase in ("tail", "decode") else None)
        if phase != "decode":
            self._files.require_weights()
        graph = self._open.pop(info.file, None) or self._files.open(info.file)
        self._open[info.file] = graph
        while len(self._open) > self._keep:
            del self._open[next(iter(self._open))]
        return graph(feeds)

    def capacity(self, tokens: int, growing: bool) -> int:
        del growing  # to the next bucket
        for bucket in self._manifest.buckets:
            if bucket.max_tokens >= tokens:
                return bucket.max_tokens
        raise InputError(
            f"prompt and generated text reach {tokens} tokens, more than the largest bucket's "
            f"{self._manifest.buckets[-1].max_tokens}; export again with a larger --max-tokens"
        )

    def past_slots(self, tokens: int, capacity: int) -> int:
        del tokens
        return capacity

    def slice_length(self, past: int) -> int:
        del past
        return self.padded("tail", 1)

    def chunk_slice(self, chunk_length: int) -> int:
        return chunk_length

    def padded(self, phase: Phase, new: int) -> int:
        del new
        info = self._manifest.graph(phase, self._manifest.buckets[0].chunks if phase in ("tail", "decode") else None)
        return int(info.size(INPUT_IDS, 1))

    def close(self) -> None:
        self._open.clear()


class GraphFiles:
    """Opens the graphs of a bundle on a backend, now or later, as they were verified."""

    def __init__(self, files: BundleFiles, manifest: Manifest, backend: Backend) -> None:
        self._files, self.manifest, self.backend = files, manifest, backend
        self._infos = {info.file: info for info in manifest.graphs}

    def open(self, file: str) -> Graph:
        return self.open_by(file, self.backend.open)

    def open_by(self, file: str, opened: Callable[[Path, GraphInfo | None], G]) -> G:
        """What a function makes of a graph's file."""
        with self._files.unchanged(file, *self.manifest.weight_files, *self._code()):
            path = self._files.folder / file
            check_locations(path, self.manifest.weight_files)
            return opened(path, self._infos.get(file))

    def require_weights(self) -> None:
        """Weights are mapped from their files, so whoever writes into them changes the model; asked for each prompt."""
        self._files.require_not_overwritten(self.manifest.weight_files)

    def _code(self) -> list[str]:
        """What PyTorch reads beside graphs and weights."""
        return (
            [name for name in self._files.infos if name.endswith((".json", ".py"))]
            if self.backend.name == "torch"
            else []
        )


class Rotation:
    """Rotates keys of any layer by the bundle's graphs; see :data:`~mesart.runtime.kv.store.Rotate`.

    It computes in the bundle's dtype; keys that are kept in another are rounded to theirs again.
    """

    def __init__(self, files: GraphFiles) -> None:
        self._layers, self._dtype = files.manifest.layers, STORAGE[files.manifest.dtype]
        self._graphs = {file: files.open(file) for file in {x.rerotate for x in self._layers} if file is not None}

    def __call__(self, layer: int, keys: Array, old: Positions, new: Positions) -> Array:
        file = self._layers[layer].rerotate
        if file is None:
            return keys
        feeds = {
            KEY: np.ascontiguousarray(keys, self._dtype),
            FROM_IDS: np.ascontiguousarray(old),
            TO_IDS: np.ascontiguousarray(new),
        }
        rotated = of_shape(self._graphs[file](feeds).get(ROTATED), keys.shape, ROTATED, "rerotate")
        return rotated.astype(keys.dtype, copy=False)


__all__ = ["GraphFiles", "PhaseGraphs", "Rotation", "SpecialisedGraphs", "SymbolicGraphs"]

"""Which graph computes a role, and in what shapes: one symbolic graph for all, or one specialised for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from mesart.graphs.errors import MesaError
from mesart.graphs.manifest import Manifest, Role
from mesart.runtime.backends import Array, Backend, Graph

GRANULE = 64
"""Slots by which a cache grows where the graph leaves its length free."""

_SCORES = 1 << 21
"""Scores a head that one run of a tail may hold: bounds the memory of long prompts at little cost in speed."""

_ROWS = 1024
"""Tokens that fill the matrix units of a CPU; more at a time gain nothing."""


class RoleGraphs(Protocol):
    """Runs roles; says what shapes it wants."""

    step_batch: int | None
    """Rows that one decoding step takes; ``None``: any number."""
    last_logits_only: bool

    def run(self, role: Role, bucket: int | None, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def place(self, file: str) -> Graph: ...

    def capacity(self, tokens: int, *, growing: bool = False) -> int:
        """Slots for a cache that holds ``tokens`` tokens; more of them if it has just become too small."""
        ...

    def slice_length(self, capacity: int) -> int:
        """New tokens that one run of a tail takes."""
        ...

    def chunk_batch(self, chunk_length: int) -> int:
        """Chunks that one run takes."""
        ...

    def padded(self, role: Role, new: int) -> int:
        """Tokens to which a run of ``new`` tokens is filled up."""
        ...


class SymbolicGraphs:
    """One graph with free axes serves every role: compiled once, weights in memory once, nothing padded."""

    step_batch: int | None = None
    last_logits_only = False

    def __init__(self, bundle: Path, manifest: Manifest, backend: Backend) -> None:
        # A bundle of an earlier version has one for all backends.
        role = backend.graph_role if manifest.has(backend.graph_role) else "any"
        self._graph = backend.open(bundle / manifest.graph(role).file)
        self._place = _Places(bundle, backend)

    def run(self, role: Role, bucket: int | None, feeds: Mapping[str, Array]) -> dict[str, Array]:
        del role, bucket
        return self._graph(feeds)

    def place(self, file: str) -> Graph:
        return self._place(file)

    def capacity(self, tokens: int, *, growing: bool = False) -> int:
        # Growing by an eighth, so that copies to larger buffers cost O(1) a token.
        slots = tokens + tokens // 8 if growing else tokens
        return (slots // GRANULE + 1) * GRANULE

    def slice_length(self, capacity: int) -> int:
        return max(32, min(_ROWS, _SCORES // max(capacity, 1)))

    def chunk_batch(self, chunk_length: int) -> int:
        return max(1, _ROWS // chunk_length)

    def padded(self, role: Role, new: int) -> int:
        del role
        return new


class SpecialisedGraphs:
    """A graph of fixed shapes for each role and bucket, as engines with static shapes run them.

    On a CPU each holds weights of its own: opened when first needed, and only the latest ``keep`` stay open.
    """

    step_batch: int | None = 1
    last_logits_only = True

    def __init__(self, bundle: Path, manifest: Manifest, backend: Backend, keep: int = 3) -> None:
        self._bundle, self._manifest, self._backend, self._keep = bundle, manifest, backend, keep
        self._open: dict[str, Graph] = {}
        self._place = _Places(bundle, backend)

    def run(self, role: Role, bucket: int | None, feeds: Mapping[str, Array]) -> dict[str, Array]:
        info = self._manifest.graph(role, bucket if role in ("tail", "step") else None)
        graph = self._open.pop(info.file, None) or self._backend.open(self._bundle / info.file)
        self._open[info.file] = graph
        while len(self._open) > self._keep:
            del self._open[next(iter(self._open))]
        return graph(feeds)

    def place(self, file: str) -> Graph:
        return self._place(file)

    def capacity(self, tokens: int, *, growing: bool = False) -> int:
        del growing  # to the next bucket
        for bucket in self._manifest.buckets:
            if bucket.max_tokens >= tokens:
                return bucket.max_tokens
        raise MesaError(
            f"prompt and generated text reach {tokens} tokens, more than the largest bucket's "
            f"{self._manifest.buckets[-1].max_tokens}; export again with a larger --max-tokens"
        )

    def slice_length(self, capacity: int) -> int:
        del capacity
        return self.padded("tail", 1)

    def chunk_batch(self, chunk_length: int) -> int:
        del chunk_length
        return 1

    def padded(self, role: Role, new: int) -> int:
        del new
        info = self._manifest.graph(role, self._manifest.buckets[0].chunks if role in ("tail", "step") else None)
        return int(info.size("input_ids", 1))


class _Places:
    """The graphs that move keys, opened when first needed."""

    def __init__(self, bundle: Path, backend: Backend) -> None:
        self._bundle, self._backend = bundle, backend
        self._open: dict[str, Graph] = {}

    def __call__(self, file: str) -> Graph:
        if file not in self._open:
            self._open[file] = self._backend.open(self._bundle / file)
        return self._open[file]

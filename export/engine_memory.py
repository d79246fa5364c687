"""What engines need on the card: exact for weights and caches, estimated for what TensorRT allocates inside a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesart.export.engine_graphs import EngineShapes
from mesart.graphs.bundle.manifest import Manifest, ProfileInfo, Weights
from mesart.graphs.errors import InputError
from mesart.graphs.memory_size import GIB

_CONTEXT = 400 << 20
"""What CUDA and TensorRT take for themselves."""


@dataclass(frozen=True)
class Memory:
    """Device memory for one live prompt in the largest bucket, bytes."""

    chunks: int
    """The bucket."""
    weights: int
    """Of one engine for each phase if the weights are embedded, else one copy."""
    cache: int
    scratch: int
    """The head and a chunk, and where keys are re-rotated."""
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.scratch + self.activations + _CONTEXT

    def __str__(self) -> str:
        return (
            f"{self.total / GIB:.1f} GiB for {self.chunks} chunks (weights {self.weights / GIB:.1f}, "
            f"cache {self.cache / GIB:.2f}, scratch {self.scratch / GIB:.2f}, "
            f"activations about {self.activations / GIB:.2f}, CUDA {_CONTEXT / GIB:.1f})"
        )


def estimate(bundle: Path, manifest: Manifest, engines: Sequence[EngineShapes], weights: Weights) -> list[Memory]:
    """The memory of each bucket, smallest first."""
    steps = {p.bucket: p for engine in engines for p in engine.profiles if p.phase == "decode"}
    return [_estimate(bundle, manifest, engines, weights, step) for step in steps.values()]


def _estimate(
    bundle: Path, manifest: Manifest, engines: Sequence[EngineShapes], weights: Weights, step: ProfileInfo
) -> Memory:
    config = manifest.config
    slot = 2 * sum(x.kv_heads * (x.key_size + x.value_size) for x in manifest.layers)
    rotated = 2 * sum(x.kv_heads * x.key_size for x in manifest.layers if x.rerotate)
    runs = [p for e in engines for p in e.profiles if p.phase in ("prefix", "chunk") or p.bucket == step.bucket]
    cut = step.bucket and any(p.phase == "chunk" for p in runs)
    scratch = config.head_length + config.chunk_length if cut else 0
    at_a_time = next((p.new for e in engines for p in e.profiles if p.phase == "rerotate"), 0)
    stored, how = manifest.weight_bytes, manifest.quantisation
    phases = len({p.phase for p in runs if p.phase != "rerotate"})
    return Memory(
        chunks=step.bucket or 0,
        # Whole numbers are never shared.
        weights=stored * (phases if weights == "embedded" or (how is not None and how.scheme != "fp8") else 1),
        cache=step.slots * slot,
        scratch=scratch * slot + 2 * at_a_time * rotated,
        activations=max(_activations(bundle, manifest, run) for run in runs),
    )


def _activations(bundle: Path, manifest: Manifest, run: ProfileInfo) -> int:
    """The widest moment of a layer: hidden states, queries, keys, values, both halves of the MLP; mask and logits."""
    fields: dict[str, Any] = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    hidden = int(fields.get("hidden_size") or 0)
    inner = int(fields.get("intermediate_size") or 4 * hidden)
    wide = (
        max(inner, hidden) * 3
        + hidden * 4
        + 2 * sum(x.kv_heads * (x.key_size + x.value_size) for x in manifest.layers[:1])
    )
    return 2 * run.new * wide + 2 * run.new * run.kv_length + 4 * int(manifest.model["vocab_size"])


def require_fit(memory: Memory, available: int, name: str) -> None:
    """Refuses what does not fit on a card.

    Raises:
        MesaError: says by how much.
    """
    if memory.total > available:
        raise InputError(
            f"{name} has {available / GIB:.1f} GiB, the bucket of {memory.chunks} chunks needs "
            f"{(memory.total - available) / GIB:.1f} GiB more: {memory}; give a smaller --max-tokens or a larger card"
        )


__all__ = ["Memory", "estimate", "require_fit"]

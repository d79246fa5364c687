"""The graphs that TensorRT engines are built from: which shapes each phase and bucket needs, and the ONNX for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes

from mesart.export.forms import attend_to_all_slots
from mesart.export.fp8 import pair_single_rows
from mesart.export.specialise import TAIL_SLICE
from mesart.graphs.bundle.manifest import (
    ENGINE_FILE,
    ENGINE_REROTATE_FILE,
    Layout,
    Manifest,
    ProfileInfo,
    WeightInfo,
    Weights,
)
from mesart.graphs.bundle.names import LOGITS, EnginePhase
from mesart.graphs.method.plan import Bucket

SHARED_BYTES = 16 << 10
"""Weights from this size on become inputs; smaller ones (norms, biases) are worth a constant that can be fused."""

REROTATE_SLICE = 1024
"""Keys that are rotated together where there are no chunks, which give their number."""

_SLOTS = 64
"""Caches have a multiple of this many slots, which is what attention kernels work on."""


@dataclass(frozen=True)
class EngineShapes:
    """One engine to build."""

    name: str
    graph: str
    """The file of the bundle that it is made from."""
    profiles: tuple[ProfileInfo, ...]

    @property
    def all_fixed(self) -> bool:
        """Whether no axis is free: attention looks at all slots of the cache."""
        return all(profile.kv_length == profile.slots for profile in self.profiles)


def engine_shapes(manifest: Manifest, layout: Layout, buckets: Sequence[Bucket]) -> list[EngineShapes]:
    """The engines of a layout: prefix, chunk, rerotate, and tail and decode of every bucket.

    A cache has room for a whole slice behind the last slot that a slice may begin at, because TensorRT writes all of
    a slice, also the tokens that fill it up.
    """
    config = manifest.config
    scratch = config.head_length + config.chunk_length
    tail = min(TAIL_SLICE, config.train_length)
    slots = {bucket.chunks: _round_up(bucket.max_tokens + tail - 1) for bucket in buckets}
    largest = max(slots.values())

    def profile(phase: EnginePhase, bucket: Bucket, new: int) -> ProfileInfo:
        kv_length = slots[bucket.chunks]
        return ProfileInfo(phase, bucket.chunks, new, kv_length if layout == "bucket" else largest, kv_length)

    engines = []
    if buckets[-1].chunks and any(graph.kind == "prefix" for graph in manifest.graphs):
        for phase, new in (("prefix", config.head_length), ("chunk", config.chunk_length)):
            engines.append(EngineShapes(phase, ENGINE_FILE, (ProfileInfo(phase, None, new, scratch, scratch),)))  # type: ignore[arg-type]
    if any(graph.kind == "engine_rerotate" for graph in manifest.graphs):
        # Also without chunks: a long generation rotates keys.
        keys = config.chunk_length or min(REROTATE_SLICE, config.train_length // 2)
        rerotate = ProfileInfo("rerotate", None, keys, 0, 0)
        engines.append(EngineShapes("rerotate", ENGINE_REROTATE_FILE, (rerotate,)))
    for phase, new in (("tail", tail), ("decode", 1)):
        profiles = tuple(profile(phase, bucket, new) for bucket in buckets)  # type: ignore[arg-type]
        if layout == "profile":
            engines.append(EngineShapes(phase, ENGINE_FILE, profiles))
        else:
            engines += [EngineShapes(f"{phase}-{x.bucket}", ENGINE_FILE, (x,)) for x in profiles]
    return engines


def _round_up(slots: int) -> int:
    return -(-slots // _SLOTS) * _SLOTS


def engine_graph(bundle: Path, shapes: EngineShapes, weights: Weights) -> tuple[ir.Model, list[WeightInfo]]:
    """The ONNX graph of an engine, and the weights that are inputs of it.

    All axes are fixed but A, slots attended to, where several profiles differ in it.
    """
    model = ir.load(bundle / shapes.graph)
    first = shapes.profiles[0]
    if first.phase in ("prefix", "chunk"):  # nobody reads their logits
        model.graph.outputs.remove(next(value for value in model.graph.outputs if value.name == LOGITS))
    sizes = {"B": 1, "S": first.new, "P": first.slots, "M": 1}
    if shapes.all_fixed:
        sizes["A"] = first.kv_length
    if weights == "shared":
        pair_single_rows(model.graph, sizes)
    ends = [*model.graph.inputs, *model.graph.outputs]
    for value in ends:
        assert value.shape is not None
        value.shape = ir.Shape([_fixed(dim, sizes) for dim in value.shape])
    known = {id(value) for value in ends}
    for node in model.graph:
        for value in node.outputs:
            if id(value) not in known:
                value.shape = None  # TensorRT infers it
    if "A" in sizes and first.phase != "rerotate":
        attend_to_all_slots(model)
    passes.RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):
        if not value.uses():
            model.graph.inputs.remove(value)
    return model, (_share_weights(model) if weights == "shared" else [])


def _fixed(dim: int | ir.SymbolicDim, sizes: dict[str, int]) -> int | ir.SymbolicDim:
    return sizes.get(str(dim.value), dim) if isinstance(dim, ir.SymbolicDim) else dim


def _share_weights(model: ir.Model) -> list[WeightInfo]:
    """Turns large weights into inputs, so that all engines can read one copy of them on the device.

    Whole numbers stay constants: only for those has TensorRT a product that reads them as they are. As inputs they
    would be dequantised as a whole in front of each product. Products of E4M3 numbers read either.
    """
    shared = []
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        dequantised = any(use.node.op_type == "DequantizeLinear" for use in value.uses())
        if dequantised and value.dtype != ir.DataType.FLOAT8E4M3FN:
            continue
        if isinstance(tensor, ir.ExternalTensor) and (tensor.length or 0) >= SHARED_BYTES:
            del model.graph.initializers[name]
            value.shape, value.type, value.const_value = tensor.shape, ir.TensorType(tensor.dtype), None
            model.graph.inputs.append(value)
            shared.append(WeightInfo(name, tensor.offset or 0, tensor.length or 0, str(tensor.location)))
    return shared


__all__ = ["EngineShapes", "engine_graph", "engine_shapes"]

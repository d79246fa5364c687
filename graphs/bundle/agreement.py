"""What the parts of a manifest say about each other: the graphs' shapes, the configuration, the layers, the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from mesart.graphs.bundle.names import (
    BLOCK,
    FROM_IDS,
    INPUT_IDS,
    KEY,
    LOGITS,
    NEW_MASK,
    PAGED_INPUTS,
    PAST,
    PAST_MASK,
    POSITION_IDS,
    PRESENT,
    QUERY_SCALE,
    ROTATED,
    SEQLENS_K,
    TO_IDS,
    TOTAL_SEQUENCE_LENGTH,
    Kind,
    key_name,
    past_name,
    present_name,
    rotated_name,
)
from mesart.graphs.bundle.records import Mismatch, shown
from mesart.graphs.errors import MesaError
from mesart.graphs.method.config import AUTO
from mesart.graphs.method.plan import buckets_up_to

if TYPE_CHECKING:
    from mesart.graphs.bundle.manifest import EngineInfo, EngineSet, GraphInfo, LayerInfo, Manifest, TensorInfo

Shape: TypeAlias = "list[int | str]"
"""An axis is a number, or a letter: one that the graph leaves free, or that another graph or input decides."""

_NAMES = {"float": "float32"}
"""How ONNX calls a dtype, where TensorRT has another name."""


def check_agreement(manifest: Manifest) -> None:
    """Raises a :class:`~mesart.graphs.bundle.records.Mismatch` if two parts of a manifest contradict each other."""
    _check_config(manifest)
    _check_files(manifest)
    if manifest.graphs:  # else there is nothing to run, and whoever asks for a graph is told so
        _check_kinds(manifest)
        _check_rerotations(manifest)
        for index, graph in enumerate(manifest.graphs):
            step = f".graphs[{index}]"
            _check_tensors(graph.inputs, _inputs(manifest, graph), f"{step}.inputs", outputs=False)
            _check_tensors(graph.outputs, _outputs(manifest, graph), f"{step}.outputs", outputs=True)
    for index, engines in enumerate(manifest.engines):
        _check_engines(manifest, engines, f".engines[{index}]")


def _check_config(manifest: Manifest) -> None:
    config = manifest.config
    for name, value in config.to_dict().items():
        if value == AUTO:
            raise Mismatch("is not chosen", f".config.{name}")
    try:
        fitted = config.up_to(manifest.buckets[-1].max_tokens).to_dict()
        expected = buckets_up_to(config, manifest.max_tokens)
    except (MesaError, ArithmeticError) as error:
        raise Mismatch(f"does not go with the configuration: {error}", ".max_tokens") from error
    for name, value in config.to_dict().items():
        _require(value, fitted[name], "the largest bucket", f".config.{name}")
    for index, (bucket, right) in enumerate(zip(manifest.buckets, expected, strict=False)):
        if bucket != right:
            raise Mismatch(f"is {bucket}, the configuration gives {right}", f".buckets[{index}]")
    if len(manifest.buckets) != len(expected):
        raise Mismatch(f"are {len(manifest.buckets)}, the configuration gives {len(expected)}", ".buckets")
    if manifest.graphs and len(manifest.filler) != config.head_length:
        raise Mismatch(f"has {len(manifest.filler)} ids, the head {config.head_length}", ".filler")
    vocabulary = manifest.model["vocab_size"]
    if any(index >= vocabulary for index in manifest.filler):
        raise Mismatch(f"has ids beyond the vocabulary of {vocabulary}", ".filler")


def _check_files(manifest: Manifest) -> None:
    graph_files = [graph.file for graph in manifest.graphs]
    for step, names in ((".graphs", graph_files), (".weight_files", manifest.weight_files)):
        _require_distinct(names, step)
        for index, name in enumerate(names):
            if name not in manifest.files or (names is graph_files and name in manifest.weight_files):
                where = f"{step}[{index}]" + ".file" * (names is graph_files)
                raise Mismatch(f"is {shown(name)}, which is none of the files for this", where)


def _check_kinds(manifest: Manifest) -> None:
    """Each graph that is needed is there, once."""
    found = [
        (graph.kind, graph.bucket) for graph in manifest.graphs if graph.kind != "rerotate" or graph.bucket is not None
    ]
    _require_distinct([_called(*graph) for graph in found], ".graphs")
    needed: list[tuple[str, int | None]] = [("symbolic", None)]
    if manifest.config.chunk_length:
        needed += [("prefix", None), ("chunk", None)]
    needed += [(phase, bucket.chunks) for bucket in manifest.buckets for phase in ("tail", "decode")]
    if manifest.config.sink_window is None:
        needed.append(("engine", None))
    if any(layer.rerotate for layer in manifest.layers):
        needed.append(("engine_rerotate", None))
    for graph in needed:
        if graph not in found:
            raise Mismatch(f"have no {_called(*graph)}", ".graphs")
    optional = {("onnxruntime", None), ("paged", None), ("grouped", None)}
    for graph in found:
        if graph not in needed and graph not in optional:
            raise Mismatch(f"have {_called(*graph)}, which such a bundle does not need", ".graphs")


def _called(name: str, bucket: int | None) -> str:
    return name + ("" if bucket is None else f" for {bucket} chunks")


def _check_rerotations(manifest: Manifest) -> None:
    """The layers that rotate their keys are those that engine_rerotate rotates, each by a graph of its sizes."""
    rerotations = {graph.file: graph for graph in manifest.graphs if graph.kind == "rerotate"}
    rotated = {
        tensor.name
        for graph in manifest.graphs
        if graph.kind == "engine_rerotate"
        for tensor in graph.inputs
        if tensor.name.startswith(f"{KEY}.")
    }
    for index, layer in enumerate(manifest.layers):
        step = f".layers[{index}].rerotate"
        if (layer.rerotate is not None) != (key_name(index) in rotated):
            raise Mismatch(f"is {shown(layer.rerotate)}, and the graph engine_rerotate says otherwise", step)
        if layer.rerotate is None:
            continue
        if layer.rerotate not in rerotations:
            raise Mismatch(f"is {shown(layer.rerotate)}, which is no graph for that", step)
        shape = next((tensor.shape for tensor in rerotations[layer.rerotate].inputs if tensor.name == KEY), None)
        if shape is None or shape[1::2] != [layer.kv_heads, layer.key_size]:
            raise Mismatch(f"is {shown(layer.rerotate)}, which rotates keys of other sizes", step)


def _sizes(manifest: Manifest, graph: GraphInfo) -> dict[str, int]:
    """The axes that a graph has fixed: B rows, S new tokens, P past slots, M logits."""
    config = manifest.config
    if graph.kind == "prefix":
        return {"B": 1, "S": config.head_length, "P": 0, "M": 1}
    if graph.kind == "chunk":
        return {"B": 1, "S": config.chunk_length, "P": config.head_length, "M": 1}
    if graph.kind == "paged":
        return {"B": 1}
    if graph.kind not in ("tail", "decode"):
        return {}
    past = next(bucket.max_tokens for bucket in manifest.buckets if bucket.chunks == graph.bucket)
    if config.sink_window is not None:
        past = min(past, config.sink_window.slots)
    return {"B": 1, "S": 1 if graph.kind == "decode" else _tail_slice(manifest), "P": past, "M": 1}


def _tail_slice(manifest: Manifest) -> int:
    """New tokens of every tail graph: those of the first, which the positions bound."""
    first = manifest.graph("tail", manifest.buckets[0].chunks)
    found = next((tensor.shape[-1] for tensor in first.inputs if tensor.name == INPUT_IDS and tensor.shape), None)
    most = manifest.config.train_length if manifest.config.sink_window is None else manifest.config.sink_window.window
    if not isinstance(found, int) or not 1 <= found <= most:
        raise Mismatch(
            f"has {shown(found)} new tokens, expected 1 to {most}", f".graphs[{manifest.graphs.index(first)}].inputs"
        )
    return found


def _inputs(manifest: Manifest, graph: GraphInfo) -> dict[str, tuple[str, Shape]]:
    """Dtype and shape of the inputs of a graph; it must have them, but a head may leave out the empty past."""
    kind = _dtype(manifest)
    if graph.kind in ("rerotate", "engine_rerotate"):
        ids: dict[str, tuple[str, Shape]] = {name: ("int64", ["B", "S"]) for name in (FROM_IDS, TO_IDS)}
        return ids | _rotated(manifest, graph, KEY, key_name)
    sizes = _sizes(manifest, graph)
    tensors: dict[str, tuple[str, Shape]] = {
        INPUT_IDS: ("int64", ["B", "S"]),
        POSITION_IDS: ("int64", ["B", "S"]),
        QUERY_SCALE: ("float", ["B", 1, "S", 1]),
    }
    if graph.kind == "paged":
        tensors |= {name: ("int32", [axis] if axis else []) for name, axis in PAGED_INPUTS.items()}
    elif graph.kind == "grouped":
        tensors |= {SEQLENS_K: ("int32", ["B"]), TOTAL_SEQUENCE_LENGTH: ("int32", [])}
    elif graph.kind != "engine":
        tensors[NEW_MASK] = ("float", ["B", 1, "S", "S"])
        tensors[PAST_MASK] = ("float", ["B", 1, 1, "P"])
    for name, shape in _cache(manifest.layers, past_name, "P"):
        tensors[name] = (kind, shape if graph.kind != "paged" else ["N", shape[1], BLOCK, shape[3]])
    return _fixed(tensors, sizes)


def _outputs(manifest: Manifest, graph: GraphInfo) -> dict[str, tuple[str, Shape]]:
    """Dtype and shape of the outputs that a graph must have."""
    if graph.kind in ("rerotate", "engine_rerotate"):
        return _rotated(manifest, graph, ROTATED, rotated_name)
    tensors: dict[str, tuple[str, Shape]] = {LOGITS: ("float", ["B", "M", manifest.model["vocab_size"]])}
    if graph.kind == "paged":
        return _fixed(tensors, _sizes(manifest, graph))
    for name, shape in _cache(manifest.layers, present_name, "P" if graph.kind in ("engine", "grouped") else "S"):
        tensors[name] = (_dtype(manifest), shape)
    return _fixed(tensors, _sizes(manifest, graph))


def _rotated(
    manifest: Manifest, graph: GraphInfo, name: str, name_of: Callable[[int], str]
) -> dict[str, tuple[str, Shape]]:
    """The keys that a graph which rotates them takes or gives."""
    if graph.kind == "rerotate":
        layers = [(name, layer) for layer in manifest.layers if layer.rerotate == graph.file][:1]
    else:
        layers = [(name_of(i), layer) for i, layer in enumerate(manifest.layers) if layer.rerotate is not None]
    return {key: (_dtype(manifest), ["B", layer.kv_heads, "S", layer.key_size]) for key, layer in layers}


def _cache(layers: Sequence[LayerInfo], name_of: Callable[[int, Kind], str], axis: str) -> Iterator[tuple[str, Shape]]:
    for index, layer in enumerate(layers):
        yield name_of(index, "key"), ["B", layer.kv_heads, axis, layer.key_size]
        yield name_of(index, "value"), ["B", layer.kv_heads, axis, layer.value_size]


def _dtype(manifest: Manifest) -> str:
    return "float" if manifest.dtype == "float32" else manifest.dtype


def _fixed(tensors: Mapping[str, tuple[str, Shape]], sizes: Mapping[str, int]) -> dict[str, tuple[str, Shape]]:
    return {
        name: (kind, [sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in shape])
        for name, (kind, shape) in tensors.items()
    }


def _check_tensors(
    found: Sequence[TensorInfo], expected: Mapping[str, tuple[str, Shape]], step: str, *, outputs: bool
) -> None:
    """The tensors that are expected are there, once, with that dtype and shape; an output may leave more axes free."""
    names = [tensor.name for tensor in found]
    _require_distinct(names, step)
    for index, tensor in enumerate(found):
        kind, shape = expected.get(tensor.name, (tensor.dtype, tensor.shape))
        if tensor.shape != shape or tensor.dtype != kind:
            try:
                _check_tensor(tensor, kind, shape, outputs=outputs)
            except Mismatch as error:
                error.steps.insert(0, f"{step}[{index}]")
                raise
    for name in names:
        if name.startswith((PAST, PRESENT)) and name not in expected:
            raise Mismatch(f"have {shown(name)}, of a layer that is not among the layers", step)
    missing = {name for name, (_, shape) in expected.items() if 0 not in shape} - set(names)
    if missing:
        raise Mismatch(f"lack {min(missing)}", step)


def _check_tensor(tensor: TensorInfo, kind: str, shape: Shape, *, outputs: bool) -> None:
    _require(_NAMES.get(tensor.dtype, tensor.dtype), _NAMES.get(kind, kind), tensor.name, ".dtype")
    if len(tensor.shape) != len(shape):
        raise Mismatch(f"has {len(tensor.shape)} axes, {tensor.name} has {len(shape)}", ".shape")
    for axis, (extent, right) in enumerate(zip(tensor.shape, shape, strict=True)):
        free = isinstance(extent, str), isinstance(right, str)
        if all(free) or (outputs and any(free)) or extent == right:
            continue
        raise Mismatch(
            f"is {shown(extent)}, {tensor.name} has {'a free axis' if free[1] else right} there", f".shape[{axis}]"
        )


def _check_engines(manifest: Manifest, engines: EngineSet, step: str) -> None:
    _require_distinct([engine.file for engine in engines.engines], f"{step}.engines")
    buckets = {bucket.chunks for bucket in manifest.buckets}
    for index, engine in enumerate(engines.engines):
        here = f"{step}.engines[{index}]"
        for i, profile in enumerate(engine.profiles):
            known = buckets if profile.phase in ("tail", "decode") else {None}
            if profile.phase not in ("prefix", "chunk", "tail", "decode", "rerotate") or profile.bucket not in known:
                raise Mismatch(f"is for {_called(profile.phase, profile.bucket)}", f"{here}.profiles[{i}]")
            if profile.kv_length > profile.slots:
                raise Mismatch(f"is {profile.kv_length}, of {profile.slots} slots", f"{here}.profiles[{i}].kv_length")
        for i, weight in enumerate(engine.weights):
            if weight.file not in manifest.weight_files:
                raise Mismatch(f"is {shown(weight.file)}, which is no weight file", f"{here}.weights[{i}].file")
            if weight.offset + weight.bytes > manifest.files[weight.file].bytes:
                raise Mismatch(f"ends behind the end of {weight.file}", f"{here}.weights[{i}]")
        _check_engine_tensors(manifest, engine, here)


def _check_engine_tensors(manifest: Manifest, engine: EngineInfo, step: str) -> None:
    """Keys and values of an engine have the sizes of the layers, for which memory is allocated."""
    first, kind = engine.profiles[0], _dtype(manifest)
    cache = dict(_cache(manifest.layers, past_name, "P")) | dict(_cache(manifest.layers, present_name, "P"))
    for part in ("inputs", "outputs"):
        tensors: list[TensorInfo] = getattr(engine, part)
        here = _fixed({x.name: (kind, cache[x.name]) for x in tensors if x.name in cache}, {"B": 1, "P": first.slots})
        _check_tensors(tensors, here, f"{step}.{part}", outputs=part == "outputs")


def _require(found: object, expected: object, of: str, step: str) -> None:
    if found != expected:
        raise Mismatch(f"is {shown(found)}, {of} has {shown(expected)}", step)


def _require_distinct(values: Sequence[Hashable], step: str) -> None:
    if len(set(values)) < len(values):
        twice = next(value for value, count in Counter(values).items() if count > 1)
        raise Mismatch(f"have {shown(twice)} twice", step)


__all__ = ["check_agreement"]

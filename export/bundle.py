"""torch -> bundle: traces a checkpoint, specialises its graphs, stores the weights once; writes all or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from mesart.export.calibrate import calibrated
from mesart.export.checkpoint import check_checkpoint, local_folder
from mesart.export.contents import bundle_entries
from mesart.export.disk import explained, require_space, write_new
from mesart.export.folders import atomic, check_target, require_apart, require_own
from mesart.export.forms import with_attention
from mesart.export.paged_forms import with_grouped_attention, with_paged_attention
from mesart.export.quantise import EXPERT, check_groups, choose_quantisation, quantise_products
from mesart.export.quantised_checkpoint import read_scheme
from mesart.export.rerotation import rerotation_of_layers
from mesart.export.rotary_operator import with_rotary_operator
from mesart.export.specialise import TAIL_SLICE, specialise
from mesart.export.stage import real_place, staged
from mesart.export.texts import read_texts
from mesart.export.trace import no_collection, trace_phases, trace_rerotation
from mesart.export.weights import WeightFiles, WeightMode, open_network
from mesart.graphs.bundle.manifest import (
    DTYPES,
    ENGINE_FILE,
    ENGINE_REROTATE_FILE,
    GROUPED_FILE,
    MANIFEST_FILE,
    ONNXRUNTIME_FILE,
    PAGED_FILE,
    SYMBOLIC_FILE,
    FileInfo,
    GraphInfo,
    LayerInfo,
    Manifest,
    Quantisation,
    TensorInfo,
    sha256,
)
from mesart.graphs.bundle.names import GraphKind
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig
from mesart.graphs.method.plan import Bucket, buckets_up_to
from mesart.graphs.method.protocol import StaticMethod
from mesart.graphs.model.phase_module import PhaseModule
from mesart.graphs.model.rotary import LayerSpec
from mesart.graphs.model.torch_weights import expert_weights
from mesart.graphs.user_data import user_data

_TOOLS = ("mesart", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")
_GRAPH_BYTES = 2 << 20
"""What one graph may take on disk, for the estimate of free space."""

Report = Callable[[str], None]


def export_model(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: StaticMethod | None = None,
    *,
    max_tokens: int | None = None,
    dtype: str = "float32",
    weights: WeightMode = "auto",
    quantise: str | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    calibrate: str | None = None,
    calibration_text: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: bool = False,
    report: Report | None = None,
) -> Path:
    """Exports a checkpoint as a bundle: ONNX graphs for every phase and bucket, weights, manifest, tokenizer.

    Args:
        model: a checkpoint folder or hub id of a causal language model with rotary embeddings. Weights that a library
            quantised (:mod:`mesart.export.quantised_checkpoint`) stay the whole numbers that they are.
        output: the bundle's folder. A bundle that is there is replaced; another folder is only with ``force``.
        config: the method; Mesa, chosen from the model's config, if left out: :class:`~mesart.graphs.MesaConfig`.
        max_tokens: the longest prompt, in tokens; 16 times the trained length if left out.
        dtype: of weights, cache and computation: float32, float16 or bfloat16.
        weights: ``auto`` leaves the weights that have the dtype in files like the checkpoint's: clones, where the
            file system has such, or copies, up to 1 GiB; larger ones are hard links, which survive the
            checkpoint's deletion, but not that somebody writes into its files. ``link``: always hard links; ``copy``:
            all weights in one file of the bundle's own.
        quantise: store the weights of linear layers as ``int8`` or ``int4``; whatever else has ``dtype`` keeps it.
        group_size: inputs of a layer that share a scale; if left out, 32 for int4 and all of them for int8.
        symmetric: without zero points, which TensorRT refuses.
        calibrate: quantise by ``auto-round`` or ``awq`` (:mod:`mesart.export.calibrate`), all but the language head,
            instead of rounding to nearest. It needs the extra ``calibrate``, and the model in memory.
        calibration_text: what the quantised model shall stay good at; needed with ``calibrate``.
        trust_remote_code: run the Python code that the checkpoint brings, if it does.
        force: replace ``output`` whatever it is.
        progress: show a bar while weights are converted.
        report: called with a line for each stage.

    Returns:
        The bundle's folder.

    Raises:
        MesaError: the checkpoint, the configuration or the output cannot be used; nothing is left half written.
        ModuleNotFoundError: the extra ``calibrate`` is missing, and needed.
    """
    say = report or (lambda line: None)
    target = Path(output)
    check_target(
        output,
        MANIFEST_FILE,
        "bundle",
        force=force,
        entries=bundle_entries,
        keep=[Path(model)] if os.path.isdir(model) else [],
        report=say,
    )
    config = (config or MesaConfig()).for_model(model)
    limit = max_tokens if max_tokens is not None else 16 * config.train_length
    buckets = buckets_up_to(config.up_to(limit), limit)
    config = config.up_to(buckets[-1].max_tokens)
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    quantisation = choose_quantisation(quantise, group_size, symmetric=symmetric)
    checked = check_checkpoint(model, trust_remote_code=trust_remote_code)
    scheme = read_scheme(os.fspath(model), checked)
    if scheme is not None and quantisation is not None:
        raise InputError(f"{model} is quantised already ({scheme.name}); leave --quantise out")
    if calibrate is not None and quantisation is None:
        raise InputError("a calibration belongs to a quantisation; give --quantise int8 or int4 too")
    if calibrate is not None and quantise == "fp8":
        raise InputError("fp8 needs no calibration; leave --calibrate out")
    if (calibrate is None) != (calibration_text is None):
        raise InputError("a calibration is a method and a text; give --calibrate with --calibration-text")
    source = local_folder(model)
    require_apart(target, source)
    texts = read_texts(source, checked, say, trust_remote_code=trust_remote_code)
    network = open_network(source, dtype, checked, say, trust_remote_code=trust_remote_code)
    if quantisation is None:
        quantisation = network.quantisation
    else:
        linear = [(name, part) for name, part in network.module.named_modules() if isinstance(part, nn.Linear)]
        inputs = {f"{name}.weight": part.in_features for name, part in linear}
        if calibrate is None:  # which leaves experts alone
            shapes = {name: parameter.shape for name, parameter in network.module.named_parameters()}
            experts = expert_weights(network.module)
            inputs |= {name: shapes[name][1 if inputs_first else 2] for name, inputs_first in experts.items()}
        check_groups(inputs, quantisation)
        if calibrate is not None and calibration_text is not None:
            tokens = config.train_length
            say(f"calibrating {model} by {calibrate}, on {tokens} tokens at a time")
            how = quantisation
            with (
                explained(target),
                staged(real_place(target), MANIFEST_FILE) as stage,
                calibrated(source, stage.folder, how, calibrate, calibration_text, tokens, checked) as made,
            ):
                return export_model(
                    made,
                    output,
                    config,
                    max_tokens=limit,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    force=force,
                    progress=progress,
                    report=report,
                )

    def accept(replaced: Path) -> None:
        if not force:  # which may have become another while the model was traced
            require_own(replaced, target, MANIFEST_FILE, "bundle", bundle_entries)

    graph_bytes = _GRAPH_BYTES * (2 * len(buckets) + 4)
    with (
        no_collection(),
        atomic(target, "bundle", graph_bytes, accept=accept) as folder,
        closing(WeightFiles(network, folder, weights, quantisation)) as files,
    ):
        require_space(folder, target, "bundle", graph_bytes + files.bytes_to_write)
        files.bring()
        say(f"tracing {model} in {dtype}")
        with user_data(f"{model} cannot be traced"):  # models fail in the middle of their code on odd configs
            graphs = _trace(network.module, config, buckets)
        layers = _layer_infos(graphs)
        say(f"writing weights and {len(graphs.files)} graphs")
        _name_weights(files, graphs)
        if quantisation is not None:
            _quantise(files, graphs, quantisation, network.packed or None)
        places = files.write(progress=progress)
        for file, graph in graphs.files.items():
            _attach(graph, folder, places)
            write_new(folder / file, ir.to_proto(graph).SerializeToString())
        texts.write(folder, network.module)
        weight_infos = files.infos()
        others = sorted(path for path in folder.iterdir() if path.name not in weight_infos)
        manifest = Manifest(
            model={
                "architecture": type(network.module).__name__,
                "model_type": graphs.module.config.model_type,
                "vocab_size": graphs.module.config.get_text_config().vocab_size,
                "parameters": sum(p.numel() for p in network.module.parameters()),
            },
            dtype=dtype,
            config=graphs.module.method,
            max_tokens=limit,
            buckets=list(buckets),
            layers=layers,
            graphs=[_describe(file, *graphs.kinds[file], graph) for file, graph in graphs.files.items()],
            tools={name: version(name) for name in _TOOLS},
            files=weight_infos | {path.name: FileInfo(path.stat().st_size, sha256(path)) for path in others},
            weight_files=list(weight_infos),
            quantisation=quantisation,
            filler=texts.filler(config.head_length),
        )
        write_new(folder / MANIFEST_FILE, manifest.to_json())
        shared = files.shared
    if shared:
        say(
            f"{len(shared)} weight files are the checkpoint's own (hard links): deleting the checkpoint is safe, but "
            "writing into its files in place changes the bundle too; --weights copy keeps them apart"
        )
    say(f"wrote {target}")
    return target


class _Graphs:
    """All graphs of a bundle before they are written."""

    def __init__(self, module: PhaseModule, *, rerotates: bool = True) -> None:
        self.module, self._rerotates = module, rerotates
        self.files: dict[str, ir.Model] = {}
        self.kinds: dict[str, tuple[GraphKind, int | None]] = {}

    def rerotation_files(self) -> dict[str, LayerSpec]:
        """A file name for each kind of rotation in the model, if keys are re-rotated at all."""
        kinds = dict.fromkeys(spec for spec in self.module.layers if spec.layout is not None and self._rerotates)
        return {f"rerotate{f'-{i}' if i else ''}.onnx": spec for i, spec in enumerate(kinds)}

    def add(self, file: str, kind: GraphKind, bucket: int | None, graph: ir.Model) -> None:
        self.files[file], self.kinds[file] = graph, (kind, bucket)


def _trace(network: Any, config: StaticMethod, buckets: tuple[Bucket, ...]) -> _Graphs:
    module = PhaseModule(network, config, "traced")
    graphs = _Graphs(module, rerotates=config.rerotates)
    with torch.no_grad():
        traced = trace_phases(module)
        rerotations: dict[LayerSpec, ir.Model] = {}
        for name, spec in graphs.rerotation_files().items():
            dtype = next(network.parameters()).dtype
            rerotations[spec] = trace_rerotation(module.rerotation(spec), spec.kv_heads, spec.key_size, dtype)
            graphs.add(name, "rerotate", None, rerotations[spec])
    if rerotations:
        each = {index: rerotations[spec] for index, spec in enumerate(module.layers) if spec in rerotations}
        graphs.add(ENGINE_REROTATE_FILE, "engine_rerotate", None, rerotation_of_layers(each))
    graphs.add(SYMBOLIC_FILE, "symbolic", None, with_attention(traced, "unfused"))
    paged = with_paged_attention(traced) if config.sink_window is None else None
    if paged is not None:
        graphs.add(PAGED_FILE, "paged", None, paged)
    if next(network.parameters()).dtype != torch.bfloat16:  # which onnxruntime does not compute on CPUs
        grouped = with_grouped_attention(traced) if config.sink_window is None else None
        graph = grouped if grouped is not None else with_attention(traced, "unfused_per_head")
        with_rotary_operator(graph)
        if grouped is not None:
            graphs.add(GROUPED_FILE, "grouped", None, graph)
        else:
            graphs.add(ONNXRUNTIME_FILE, "onnxruntime", None, graph)
    if config.sink_window is None:  # engines write a cache that grows
        graphs.add(ENGINE_FILE, "engine", None, with_attention(traced, "kv_in_place"))
    fixed = with_attention(traced, "attention_op")
    head, chunk = config.head_length, config.chunk_length
    if chunk:
        graphs.add("prefix.onnx", "prefix", None, specialise(fixed, {"B": 1, "S": head, "P": 0, "M": 1}))
        graphs.add("chunk.onnx", "chunk", None, specialise(fixed, {"B": 1, "S": chunk, "P": head, "M": 1}))
    tail = min(TAIL_SLICE, config.train_length if config.sink_window is None else config.sink_window.window)
    for bucket in buckets:
        n, past = bucket.chunks, bucket.max_tokens
        if config.sink_window is not None:
            past = min(past, config.sink_window.slots)
        graphs.add(f"tail-{n}.onnx", "tail", n, specialise(fixed, {"B": 1, "S": tail, "P": past, "M": 1}))
        graphs.add(f"decode-{n}.onnx", "decode", n, specialise(fixed, {"B": 1, "S": 1, "P": past, "M": 1}))
    return graphs


def _layer_infos(graphs: _Graphs) -> list[LayerInfo]:
    files = {spec: file for file, spec in graphs.rerotation_files().items()}
    return [LayerInfo(s.kv_heads, s.key_size, s.value_size, files.get(s)) for s in graphs.module.layers]


def _name_weights(files: WeightFiles, graphs: _Graphs) -> None:
    """Notes at each weight of the graphs under which name it will be stored."""
    for file, graph in graphs.files.items():
        table = graphs.kinds[file][0] in ("rerotate", "engine_rerotate")
        prefix = f"{Path(file).stem}." if table else ""
        for name, value in graph.graph.initializers.items():
            raw = getattr(value.const_value, "raw", None)
            if isinstance(raw, Tensor):
                value.metadata_props["weight"] = files.place(raw, prefix + name, table=table)


def _quantise(files: WeightFiles, graphs: _Graphs, how: Quantisation, only: Collection[str] | None) -> None:
    """The same weights in all graphs; a tied table of embeddings is used as it is too."""
    names = set().union(*(quantise_products(graph, how, files.experts, only) for graph in graphs.files.values()))
    if not names:
        raise InputError(f"{type(graphs.module.model).__name__} has no linear layer of two dimensions to quantise")
    values = (value for graph in graphs.files.values() for value in graph.graph.initializers.values())
    files.quantise(names, {value.metadata_props.get("weight", "") for value in values})


def _attach(graph: ir.Model, folder: Path, places: dict[str, tuple[str, int, int]]) -> None:
    """Points a graph's weights into the weight files, at the offset and length of each."""
    for value in graph.graph.initializers.values():
        name = value.metadata_props.pop("weight", None)
        if name is not None:
            file, offset, length = places[name]
            assert value.const_value is not None
            expert = value.metadata_props.pop(EXPERT, None)
            if expert is not None:
                length = value.const_value.nbytes
                offset += int(expert) * length
            value.const_value = ir.ExternalTensor(
                file,
                offset,
                length,
                value.const_value.dtype,
                shape=ir.Shape(value.const_value.shape.numpy()),
                name=value.name or name,
                base_dir=folder,
            )


def _describe(file: str, kind: GraphKind, bucket: int | None, graph: ir.Model) -> GraphInfo:
    return GraphInfo(file, kind, bucket, [*map(_tensor, graph.graph.inputs)], [*map(_tensor, graph.graph.outputs)])


def _tensor(value: ir.Value) -> TensorInfo:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape: list[int | str] = [
        (str(dim.value) if dim.value is not None else "?") if isinstance(dim, ir.SymbolicDim) else int(dim)
        for dim in value.shape
    ]
    return TensorInfo(value.name, value.dtype.name.lower(), shape)


__all__ = ["Report", "export_model"]

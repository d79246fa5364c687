"""Bundle -> model repository of NVIDIA's Triton Inference Server: a model that clients talk to, and one for each graph.

The models of graphs are the *static* ones, caches in, new keys and values out, rather than those that ``mesart build``
makes engines from. Two things that those live on, Triton cannot give them:

* The cache in place: ``KVCacheUpdate`` wants an output at its input's address, and Triton's TensorRT backend
  allocates outputs itself.
* Weights once for all engines: they would be inputs, and a Triton client has no memory that it could bind to
  them. So each plan holds its own.

Whoever wants text takes the model that runs :class:`~mesart.runtime.MesaModel`, which has both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir
import onnx_ir.passes.common as passes
from tqdm import tqdm

from mesart.export.copies import link_or_copy
from mesart.export.disk import write_new
from mesart.export.engines import Report, buckets_for, check_brain, check_dtype, find_targets, ticker
from mesart.export.folders import atomic, check_target, require_own
from mesart.export.gpus import local_gpu
from mesart.export.specialise import specialise
from mesart.export.tensorrt_builder import NoKernelError, TensorRtBuilder
from mesart.export.triton_model import BUNDLE_FOLDER, MODEL, MODEL_FILE
from mesart.graphs.bundle.manifest import MANIFEST_FILE, GraphInfo, Manifest, TensorInfo
from mesart.graphs.bundle.names import GraphKind
from mesart.graphs.errors import InputError, MesaError
from mesart.graphs.method.config import MesaConfig

TritonEngine = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]

MARKER_FILE = ".mesart-triton"
"""In a repository that this module wrote, and may therefore replace: a JSON list of its files."""

KIND = "Triton repository of mesart"

VERSION = "1"
"""The one version of each model, which is the name of its folder."""

_TYPES = {
    "int64": "TYPE_INT64",
    "float": "TYPE_FP32",  # as ONNX calls it; TensorRT's, float32, is the next
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
}

_TEXT_INPUTS = (
    # name, type, dims, whether a request may leave it out
    ("text_input", "TYPE_STRING", 1, False),
    ("max_tokens", "TYPE_INT32", 1, True),
    ("temperature", "TYPE_FP32", 1, True),
    ("top_p", "TYPE_FP32", 1, True),
    ("seed", "TYPE_INT64", 1, True),
    ("stop", "TYPE_STRING", -1, True),
)


def export_triton_repository(
    bundle: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    engine: TritonEngine = "tensorrt",
    gpus: str | None = None,
    name: str = "mesart",
    max_tokens: int | None = None,
    force: bool = False,
    progress: bool = True,
    report: Report | None = None,
) -> Path:
    """Writes a model repository for NVIDIA's Triton Inference Server from a bundle.

    It holds ``NAME``, which streams text and runs a copy of the bundle (its files are hard links where the file system
    allows), and ``NAME_prefix``, ``NAME_chunk``, ``NAME_tail_4``, ``NAME_decode_4``, ``NAME_rerotate``: one graph each,
    for clients that keep the cache themselves. Their weights are in every plan, and their caches go in and come
    out: Triton allocates the outputs, so a plan cannot update a cache in place, and its clients cannot bind weights.

    Args:
        bundle: a folder made by :func:`~mesart.export.export_model`.
        output: the repository's folder. One that is there is replaced; another folder is only with ``force``.
        engine: what the graphs run on. ``tensorrt``: plans for this machine's GPU, which Triton serves if it has the
            version of TensorRT that is installed here; ``tensorrt-rtx``: plans for other GPUs, which only a backend
            of your own can load; ``onnxruntime``.
        gpus: such as ``sm89,rtx5090``, for ``tensorrt-rtx``; this machine's if left out.
        name: of the model that clients talk to, and the beginning of the others' names.
        max_tokens: only the graphs of the buckets that prompts up to this length need; all if left out.
        force: replace ``output`` whatever it is.
        progress: show a bar.
        report: called with a line for each model.

    Returns:
        The repository's folder.

    Raises:
        MesaError: an unusable bundle, engine, dtype, GPU, name or output; TensorRT cannot build a graph; the disk is
            full. Nothing is left half written.
    """
    say = report or (lambda line: None)
    source, target = Path(bundle), Path(output)
    if engine not in get_args(TritonEngine):
        raise InputError(f"unknown engine {engine!r}; there are {', '.join(get_args(TritonEngine))}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise InputError(f"{name!r} cannot name a model; use letters, digits, '_', '-' and '.'")
    manifest = Manifest.read(source)
    check_target(output, MARKER_FILE, KIND, force=force, entries=repository_entries, keep=[source], report=say)
    if not isinstance(manifest.config, MesaConfig):
        raise InputError(
            f"{source} holds {manifest.config.name}, exported to compare Mesa with; a Triton repository serves "
            "Mesa only"
        )
    manifest.verify(source)
    graphs = _graphs(manifest, max_tokens)
    capabilities = _capabilities(manifest, engine, gpus)

    def accept(replaced: Path) -> None:
        if not force:  # which may have become another meanwhile
            require_own(replaced, target, MARKER_FILE, KIND, repository_entries)

    needed = _needed_bytes(source, target, manifest, graphs, engine)
    with atomic(target, "repository", needed, marker=MARKER_FILE, accept=accept) as folder:
        copy = _write_text_model(folder, name, source, manifest)
        timing = folder / "timing"
        builder = TensorRtBuilder(engine, capabilities, timing) if engine != "onnxruntime" else None
        models = [f"{name}_{Path(graph.file).stem.replace('-', '_')}" for graph in graphs]
        with tqdm(total=len(graphs), desc="triton", unit="model", disable=not progress) as bar:
            for model, graph in zip(models, graphs, strict=True):
                bar.set_postfix_str(model)
                if builder is None:
                    file = _write_onnx_model(folder / model, graph, manifest, copy)
                else:
                    file = _write_plan_model(folder / model, graph, manifest, copy, builder, bar)
                bar.update()
                say(f"{model}: {file.stat().st_size / 1e6:.1f} MB")
        timing.unlink(missing_ok=True)
        note = (
            "" if builder is None else f" They are plans of {engine} {builder.version} for {', '.join(capabilities)}."
        )
        write_new(folder / "README.txt", _readme(name, models, note))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        write_new(folder / MARKER_FILE, json.dumps([*files, MARKER_FILE], indent=1))
    say(f"wrote {target}: {name} and {len(models)} models of graphs")
    return target


def repository_entries(repository: Path) -> Collection[str]:
    """The files of a repository, by their paths in it.

    Raises:
        MesaError: it does not say which those are; earlier versions wrote no list.
    """
    path = repository / MARKER_FILE
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} holds no list of files") from error
    if not isinstance(names, list):
        raise InputError(f"{path} holds no list of files")
    return {name for name in names if isinstance(name, str)}


def _graphs(manifest: Manifest, max_tokens: int | None) -> list[GraphInfo]:
    """The static graphs of the buckets that are needed, and those that rotate keys, which a long generation needs."""
    chunks = [bucket.chunks for bucket in buckets_for(manifest, max_tokens)]
    kinds: tuple[GraphKind, ...] = ("prefix", "chunk", "rerotate") if chunks[-1] else ("rerotate",)
    return [
        graph
        for graph in manifest.graphs
        if graph.kind in kinds or (graph.kind in ("tail", "decode") and graph.bucket in chunks)
    ]


def _capabilities(manifest: Manifest, engine: TritonEngine, gpus: str | None) -> list[str]:
    """What plans are built for; none for onnxruntime, which builds none."""
    if engine == "onnxruntime":
        if gpus:
            raise InputError("--gpu says what TensorRT builds for; leave it out with --engine onnxruntime")
        return []
    check_dtype(manifest)
    if engine == "tensorrt" and local_gpu() is None:
        raise InputError(
            "TensorRT builds on the GPU that will serve the plans, and there is none here (or no driver, or no "
            "cuda-python: pip install 'mesart[tensorrt]'); --engine onnxruntime needs none"
        )
    targets = find_targets(engine, gpus)
    check_brain(manifest, targets)
    return list(dict.fromkeys(gpu.capability for gpu in targets))


def _needed_bytes(
    bundle: Path, target: Path, manifest: Manifest, graphs: Sequence[GraphInfo], engine: TritonEngine
) -> int:
    """What is more than a link: plans, each with all weights; the bundle, if it lies in another file system."""
    plans = 0 if engine == "onnxruntime" else sum(graph.kind != "rerotate" for graph in graphs)
    beside = next(parent for parent in Path(os.path.realpath(target)).parents if parent.exists())
    linked = beside.stat().st_dev == bundle.stat().st_dev
    copied = 0 if linked else sum(info.bytes for info in manifest.files.values())
    return plans * manifest.weight_bytes + copied


def _write_plan_model(
    model: Path, graph: GraphInfo, manifest: Manifest, bundle: Path, builder: TensorRtBuilder, bar: Any
) -> Path:
    """Builds a plan; returns its file."""

    show = ticker(bar, model.name)
    onnx = ir.to_proto(_static_graph(bundle, graph, manifest)).SerializeToString(deterministic=True)
    try:
        plan = builder.build(onnx, bundle, [], show)
    except NoKernelError as error:
        if graph.kind != "decode":
            raise NoKernelError(f"{model.name}: {error}") from error
        raise NoKernelError(
            f"{model.name}: TensorRT {builder.version} has no attention kernel for one query behind "
            f"{graph.size('past_mask', 3)} tokens of such heads; give a smaller --max-tokens, which does not shorten "
            f"what the model of text takes, or --engine onnxruntime"
        ) from error
    except MesaError as error:
        raise InputError(f"{model.name}: {error}") from error
    file = _version_folder(model) / "model.plan"
    write_new(file, plan.data)
    _write_config(model, "tensorrt_plan", file.name, plan.inputs, plan.outputs, "KIND_GPU")
    return file


def _static_graph(bundle: Path, graph: GraphInfo, manifest: Manifest) -> ir.Model:
    """A graph without free axes, and without inputs that nothing reads: an engine has no such."""
    model = ir.load(bundle / graph.file)
    if graph.kind == "rerotate":
        model = specialise(model, {"B": 1, "S": manifest.config.chunk_length})
    passes.RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):
        if not value.uses():
            model.graph.inputs.remove(value)
    return model


def _write_onnx_model(model: Path, graph: GraphInfo, manifest: Manifest, bundle: Path) -> Path:
    """Links a graph and its weights, which onnxruntime reads from beside the graph only; returns the graph's file."""
    file = _version_folder(model) / "model.onnx"
    link_or_copy(bundle / graph.file, file)
    for name in manifest.weight_files:
        link_or_copy(bundle / name, file.with_name(name))
    # onnxruntime's CPU kernels compute no bfloat16.
    kind = "KIND_GPU" if manifest.dtype == "bfloat16" else "KIND_AUTO"
    _write_config(model, "onnxruntime_onnx", file.name, graph.inputs, graph.outputs, kind)
    return file


def _write_text_model(folder: Path, name: str, bundle: Path, manifest: Manifest) -> Path:
    """The model that clients talk to; returns its copy of the bundle."""
    version = _version_folder(folder / name)
    engines = [info for built in manifest.engines for info in built.engines]
    for info in engines:
        info.read(bundle)  # checks it
    copy = version / BUNDLE_FOLDER
    for file in (MANIFEST_FILE, *manifest.files, *(info.file for info in engines)):
        link_or_copy(bundle / file, copy / file)
    write_new(version / MODEL_FILE, MODEL)
    inputs = [_entry(key, kind, [size], optional=optional) for key, kind, size, optional in _TEXT_INPUTS]
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "python"',
        f"default_model_filename: {json.dumps(MODEL_FILE)}",
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }  # streams",
        *_block("input", inputs),
        *_block("output", [_entry("text_output", "TYPE_STRING", [1])]),
        "# auto, tensorrt, tensorrt-rtx, openvino, onnxruntime or torch",
        'parameters { key: "backend" value { string_value: "auto" } }',
        "# One process, whatever it runs on: it finds a GPU itself.",
        *_common("KIND_CPU"),
    ]
    _write_lines(folder / name / "config.pbtxt", lines)
    return copy


def _version_folder(model: Path) -> Path:
    folder = model / VERSION
    folder.mkdir(parents=True)
    return folder


def _write_config(
    model: Path, platform: str, file: str, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], kind: str
) -> None:
    lines = [
        f"name: {json.dumps(model.name)}",
        f"platform: {json.dumps(platform)}",
        f"default_model_filename: {json.dumps(file)}",
        "max_batch_size: 0",
        *_block("input", [_tensor(tensor) for tensor in inputs]),
        *_block("output", [_tensor(tensor) for tensor in outputs]),
        *_common(kind),
    ]
    _write_lines(model / "config.pbtxt", lines)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_new(path, "\n".join([*lines, ""]))


def _common(kind: str) -> list[str]:
    return [f"instance_group [ {{ kind: {kind} count: 1 }} ]", "version_policy { latest { num_versions: 1 } }"]


def _block(field: str, entries: Sequence[str]) -> list[str]:
    return [f"{field} [", ",\n".join(f"  {entry}" for entry in entries), "]"]


def _tensor(tensor: TensorInfo) -> str:
    return _entry(tensor.name, _TYPES[tensor.dtype], [-1 if isinstance(axis, str) else axis for axis in tensor.shape])


def _entry(name: str, kind: str, dims: Sequence[int], *, optional: bool = False) -> str:
    end = " optional: true" if optional else ""
    return f"{{ name: {json.dumps(name)} data_type: {kind} dims: {list(dims)}{end} }}"


def _readme(name: str, models: Sequence[str], note: str) -> str:
    """Three lines."""
    return (
        f"Start: tritonserver --model-repository=THIS_FOLDER --model-control-mode=explicit --load-model={name}, "
        "with mesart in the server's Python, and its extra tensorrt, onnxruntime or openvino.\n"
        f"{name}: text_input in, text_output out piece by piece, e.g. POST /v2/models/{name}/generate_stream "
        '{"text_input": "Hello", "max_tokens": 64}; its config.pbtxt chooses the backend.\n'
        f"{', '.join(models)}: one graph each, for clients that keep the cache themselves; each loads its own "
        f"weights, so load only those you call, with --load-model=NAME.{note}\n"
    )


__all__ = ["MARKER_FILE", "TritonEngine", "export_triton_repository"]

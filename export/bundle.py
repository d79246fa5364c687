"""torch -> bundle: traces a checkpoint, specialises its graphs, stores the weights once; writes all or nothing."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from mesart.export.checkpoint import TOKENIZER_FILES, check_checkpoint, load_model, tensor_offsets
from mesart.export.forms import with_attention
from mesart.export.specialise import specialise
from mesart.export.trace import trace_place, trace_places, trace_roles
from mesart.graphs.config import MesaConfig
from mesart.graphs.errors import MesaError, first_line
from mesart.graphs.manifest import (
    ENGINE_FILE,
    ENGINE_PLACE_FILE,
    MANIFEST_FILE,
    SYMBOLIC_FILE,
    WEIGHTS_FILE,
    FileInfo,
    GraphInfo,
    LayerInfo,
    Manifest,
    Role,
    TensorInfo,
    sha256,
)
from mesart.graphs.plan import Bucket, buckets_up_to
from mesart.graphs.role import RoleModule
from mesart.graphs.rotary import LayerSpec

_TOOLS = ("mesart", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")
_GRAPH_BYTES = 2 << 20
"""What one graph may take on disk, for the estimate of free space."""

TAIL_SLICE = 256
"""New tokens of a specialised tail graph; longer tails run in slices."""

Report = Callable[[str], None]


def export_model(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: MesaConfig | None = None,
    *,
    max_tokens: int | None = None,
    dtype: str = "float32",
    force: bool = False,
    report: Report | None = None,
) -> Path:
    """Exports a checkpoint as a bundle: ONNX graphs for every role and bucket, weights, manifest, tokenizer.

    Args:
        model: a checkpoint folder or hub id of a causal language model with rotary embeddings.
        output: the bundle's folder. A bundle that is there is replaced; another folder is only with ``force``.
        config: chosen from the model's config if left out, see :class:`~mesart.graphs.MesaConfig`.
        max_tokens: the longest prompt, in tokens; 16 times the trained length if left out.
        dtype: of weights, cache and computation: float32, float16 or bfloat16.
        force: replace ``output`` whatever it is.
        report: called with a line for each stage.

    Returns:
        The bundle's folder.

    Raises:
        MesaError: the checkpoint, the configuration or the output cannot be used; nothing is left half written.
    """
    say = report or (lambda line: None)
    target = Path(output)
    _check_target(target, force=force)
    config = (config or MesaConfig()).for_model(model)
    limit = max_tokens if max_tokens is not None else 16 * config.train_length
    buckets = buckets_up_to(config, limit)
    checked = check_checkpoint(model)
    say(f"loading {model} in {dtype}")
    network = load_model(model, dtype, checked)
    with _atomic(target, _weight_bytes(network) + _GRAPH_BYTES * (2 * len(buckets) + 4)) as folder:
        say("tracing the model")
        graphs = _trace(network, config, buckets)
        layers = _layer_infos(graphs.module)
        say(f"writing weights and {len(graphs.files)} graphs")
        _write_weights(folder / WEIGHTS_FILE, graphs)
        offsets = tensor_offsets(folder / WEIGHTS_FILE)
        for file, graph in graphs.files.items():
            _attach(graph, folder, offsets)
            ir.save(graph, folder / file)
        _write_texts(model, network, folder)
        manifest = Manifest(
            model={
                "architecture": type(network).__name__,
                "model_type": graphs.module.config.model_type,
                "vocab_size": graphs.module.config.get_text_config().vocab_size,
                "parameters": sum(p.numel() for p in network.parameters()),
            },
            dtype=dtype,
            config=config,
            max_tokens=limit,
            buckets=list(buckets),
            layers=layers,
            graphs=[_describe(file, *graphs.roles[file], graph) for file, graph in graphs.files.items()],
            tools={name: version(name) for name in _TOOLS},
            files={path.name: FileInfo(path.stat().st_size, sha256(path)) for path in sorted(folder.iterdir())},
        )
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    say(f"wrote {target}")
    return target


class _Graphs:
    """All graphs of a bundle before they are written."""

    def __init__(self, module: RoleModule) -> None:
        self.module = module
        self.files: dict[str, ir.Model] = {}
        self.roles: dict[str, tuple[Role, int | None]] = {}

    def add(self, file: str, role: Role, bucket: int | None, graph: ir.Model) -> None:
        self.files[file], self.roles[file] = graph, (role, bucket)


def _trace(network: Any, config: MesaConfig, buckets: tuple[Bucket, ...]) -> _Graphs:
    module = RoleModule(network, config.train_length, "traced")
    graphs = _Graphs(module)
    with torch.no_grad():
        traced = trace_roles(module)
        for name, spec in _place_files(module).items():
            dtype = next(network.parameters()).dtype
            place = trace_place(module.place(spec), spec.kv_heads, spec.key_size, dtype)
            graphs.add(name, "place", None, place)
        places = trace_places(module)
        if places is not None:
            graphs.add(ENGINE_PLACE_FILE, "engine_place", None, places)
    graphs.add(SYMBOLIC_FILE, "any", None, with_attention(traced, "split"))
    graphs.add(ENGINE_FILE, "engine", None, with_attention(traced, "in_place"))
    fused = with_attention(traced, "fused")
    head, chunk = config.head_length, config.chunk_length
    graphs.add("head.onnx", "head", None, specialise(fused, {"B": 1, "S": head, "P": 0, "M": 1}))
    graphs.add("chunk.onnx", "chunk", None, specialise(fused, {"B": 1, "S": chunk, "P": head, "M": 1}))
    tail = min(TAIL_SLICE, config.train_length)
    for bucket in buckets:
        n, past = bucket.chunks, bucket.max_tokens
        graphs.add(f"tail-{n}.onnx", "tail", n, specialise(fused, {"B": 1, "S": tail, "P": past, "M": 1}))
        graphs.add(f"step-{n}.onnx", "step", n, specialise(fused, {"B": 1, "S": 1, "P": past, "M": 1}))
    return graphs


def _place_files(module: RoleModule) -> dict[str, LayerSpec]:
    """A file name for each kind of rotation in the model."""
    kinds = dict.fromkeys(spec for spec in module.layers if spec.layout is not None)
    return {f"place{f'-{i}' if i else ''}.onnx": spec for i, spec in enumerate(kinds)}


def _layer_infos(module: RoleModule) -> list[LayerInfo]:
    files = {spec: file for file, spec in _place_files(module).items()}
    return [LayerInfo(s.kv_heads, s.key_size, s.value_size, files.get(s)) for s in module.layers]


def _write_weights(path: Path, graphs: _Graphs) -> None:
    """All weights of the model and its graphs, each once, under the checkpoint's names."""
    tensors: dict[str, Tensor] = {}
    tables: dict[str, Tensor] = {}
    stored: set[int] = set()
    for file, graph in graphs.files.items():
        prefix = f"{Path(file).stem}." if graphs.roles[file][0] in ("place", "engine_place") else ""
        for name, value in graph.graph.initializers.items():
            raw = getattr(value.const_value, "raw", None)
            if isinstance(raw, Tensor):
                # The graphs that move keys have tables of their own, with the same numbers.
                equal = (known for known in tables if torch.equal(tables[known], raw)) if prefix else iter(())
                where = next(equal, prefix + name)
                value.metadata_props["weight"] = where
                tensors[where] = raw.detach().contiguous()
                stored.add(raw.data_ptr())
                if prefix:
                    tables[where] = raw
    # Also those that folding has taken out of the graphs: the torch backend runs the model's own code.
    for name, parameter in graphs.module.model.named_parameters():
        if parameter.data_ptr() not in stored:
            tensors[name] = parameter.detach().contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable by its owner only


def _attach(graph: ir.Model, folder: Path, offsets: dict[str, tuple[int, int]]) -> None:
    """Points a graph's weights into the weight file, at the offset and length of each."""
    for value in graph.graph.initializers.values():
        name = value.metadata_props.pop("weight", None)
        if name is not None:
            offset, length = offsets[name]
            assert value.const_value is not None
            value.const_value = ir.ExternalTensor(
                WEIGHTS_FILE,
                offset,
                length,
                value.const_value.dtype,
                shape=ir.Shape(value.const_value.shape.numpy()),
                name=value.name or name,
                base_dir=folder,
            )


def _describe(file: str, role: Role, bucket: int | None, graph: ir.Model) -> GraphInfo:
    return GraphInfo(file, role, bucket, [*map(_tensor, graph.graph.inputs)], [*map(_tensor, graph.graph.outputs)])


def _tensor(value: ir.Value) -> TensorInfo:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape: list[int | str] = [
        (str(dim.value) if dim.value is not None else "?") if isinstance(dim, ir.SymbolicDim) else int(dim)
        for dim in value.shape
    ]
    return TensorInfo(value.name, value.dtype.name.lower(), shape)


def _write_texts(model: str | os.PathLike[str], network: Any, folder: Path) -> None:
    """The model's config, generation config and tokenizer, written by transformers.

    Saved anew instead of copied: transformers repairs old tokenizer files while it reads them, and the runtime, which
    has no transformers, must find them repaired.
    """
    network.config.save_pretrained(folder)
    if getattr(network, "generation_config", None) is not None:
        network.generation_config.save_pretrained(folder)
    source = os.fspath(model)
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
        return  # driven by token ids
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise MesaError(f"{source} has a tokenizer that cannot be loaded: {first_line(error)}") from error
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise MesaError(f"{source} has no fast tokenizer (tokenizer.json); convert it with transformers first")


def _weight_bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def _check_target(target: Path, *, force: bool) -> None:
    if not target.exists() or force:
        return
    if not target.is_dir():
        raise MesaError(f"{target} is a file; give another output folder, or --force to replace it")
    if any(target.iterdir()) and not (target / MANIFEST_FILE).is_file():
        raise MesaError(f"{target} exists and is no bundle; give another output folder, or --force to replace it")


@contextmanager
def _atomic(target: Path, needed: int) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place when all went well, and vanishes otherwise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise MesaError(f"cannot write to {target.parent}: {error.strerror}") from error
    free = shutil.disk_usage(target.parent).free
    try:
        if free < needed:
            raise MesaError(f"{target.parent} has {free >> 20} MiB free, the bundle needs about {needed >> 20} MiB")
        folder.chmod(0o755)
        yield folder
        _replace(folder, target)
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            raise MesaError(f"the disk is full: {target.parent} needs about {needed >> 20} MiB") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"os error {number})" in str(error) for number in full)  # safetensors gives the number in its text


def _replace(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    old = folder.with_suffix(".replaced")
    target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        old.rename(target)
        raise
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink()


__all__ = ["Report", "export_model"]

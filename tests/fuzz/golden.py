"""The whole checkpoints and bundles that cases begin from: small ones of the tests' families, made anew each time."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from mesart.graphs.bundle.manifest import EngineInfo, EngineSet, Manifest, ProfileInfo, TensorInfo, WeightInfo
from mesart.graphs.method.config import MesaConfig
from tests.conftest import CHAT_TEMPLATE, FAMILIES, SMALL, TRAIN_LENGTH, _train_tokenizer

MAX_TOKENS = 344
GENERATION = {"bos_token_id": 0, "eos_token_id": [1, 300], "repetition_penalty": 1.1, "max_length": 60}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "positions": ("gpt_oss", {}),  # graphs look at positions: windows, sinks
    "ring": ("llama", {"method": "streaming-llm"}),  # keys are dropped
    "int4": ("llama", {"quantise": "int4", "group_size": 16}),
}
"""Kinds of bundles, with the family that they are of and how they are exported."""


def make_checkpoint(folder: Path, family: str = "tied_llama") -> Path:
    """A checkpoint with a tokenizer, a chat template and generation settings; random weights, always the same."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    fields = {**SMALL, **FAMILIES[family]}
    config = AutoConfig.for_model(fields.pop("model_type", family), **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().save_pretrained(folder)
    _train_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "bos_token": "<|begin|>", "model_max_length": TRAIN_LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def make_bundle(
    folder: Path, kind: str = "llama", *, options: dict[str, Any] | None = None, max_tokens: int = MAX_TOKENS
) -> Path:
    """An exported bundle, traced: about 10 s. ``folder`` is where the checkpoint lies too."""
    from mesart.evaluation.methods import parse_method
    from mesart.export import export_model

    family, fixed = KINDS[kind]
    options = {**fixed, **(options or {})}
    config: Any = MesaConfig(TRAIN_LENGTH, head_length=8, chunk_length=40, tail_min=16, linear_window=8)
    if method := options.pop("method", None):
        config = parse_method(method, TRAIN_LENGTH, max_tokens).static()
    model = make_checkpoint(folder / "checkpoint", family)
    return export_model(model, folder / "bundle", config, max_tokens=max_tokens, weights="copy", **options)


def with_engines(bundle: Path, copy: Path) -> Path:
    """A copy of the bundle with records of engines, which no TensorRT would run: loading and inspecting reads them."""
    shutil.copytree(bundle, copy)
    manifest = Manifest.read(copy)
    if manifest.config.sink_window is not None or manifest.engines:
        return copy
    place = "engines/tensorrt-rtx-1.7.1.116-sm89-bucket-shared"
    (copy / place).mkdir(parents=True)
    graph = next(graph for graph in manifest.graphs if graph.kind == "engine")
    weight = _first_weight(copy, manifest.weight_files[0])
    engines = []
    for bucket in manifest.buckets[:2]:
        plan = Random(bucket.chunks).randbytes(3000)
        packed = gzip.compress(plan, mtime=0)
        file = f"{place}/tail-{bucket.chunks}.plan.gz"
        (copy / file).write_bytes(packed)
        new, slots = 32, bucket.max_tokens + 32
        inputs, outputs = (_fixed(tensors, new, slots) for tensors in (graph.inputs, graph.outputs))
        engines.append(
            EngineInfo(
                file=file,
                bytes=len(packed),
                sha256=hashlib.sha256(packed).hexdigest(),
                unpacked=len(plan),
                key=hashlib.sha256(plan).hexdigest(),
                inputs=inputs,
                outputs=outputs,
                weights=[weight],
                profiles=[ProfileInfo("tail", bucket.chunks, new, slots, slots)],
                seconds=1.5,
            )
        )
    built = EngineSet("tensorrt-rtx", "1.7.1.116", ["sm89"], "bucket", "shared", engines)
    replace(manifest, engines=[built]).write(copy)
    return copy


def _fixed(tensors: list[TensorInfo], new: int, slots: int) -> list[TensorInfo]:
    """Inputs or outputs of a graph as those of an engine: every axis fixed, types as numpy calls them."""
    axes = {"B": 1, "S": new, "P": slots, "M": 1}
    return [
        TensorInfo(
            tensor.name,
            {"float": "float32"}.get(tensor.dtype, tensor.dtype),
            [axes[axis] if isinstance(axis, str) else axis for axis in tensor.shape],
        )
        for tensor in tensors
        if tensor.name != "attended"
    ]


def _first_weight(bundle: Path, file: str) -> WeightInfo:
    """A weight as an engine would read it, from the bytes of its file."""
    with (bundle / file).open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    name = next(name for name in header if name != "__metadata__")
    start, stop = header[name]["data_offsets"]
    return WeightInfo(name, 8 + size + start, stop - start, file)

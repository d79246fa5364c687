"""What a bundle holds: standard graphs, weights once, everything that the manifest says, the same bytes each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from mesart.export.safetensors_file import read_header
from mesart.graphs.bundle.manifest import MANIFEST_FILE, Manifest, sha256
from mesart.graphs.bundle.names import GraphKind

BUNDLES = [("llama", "float32"), ("tied_llama", "bfloat16")]


@pytest.fixture(params=BUNDLES, ids="-".join)
def folder(request, bundle) -> Path:
    return bundle(*request.param)


def graphs(folder: Path) -> dict[str, onnx.ModelProto]:
    return {
        graph.file: onnx.load(folder / graph.file, load_external_data=False) for graph in Manifest.read(folder).graphs
    }


# The operators of attention that are not ONNX's, and may be in these graphs only.
OWN_DOMAINS = {"model-paged.onnx": {"mesart"}, "model-grouped.onnx": {"com.microsoft"}}


def test_the_graphs_are_standard(folder):
    for name, model in graphs(folder).items():
        domains = {"", *OWN_DOMAINS.get(name, ())}
        assert {entry.domain for entry in model.opset_import} == domains, name
        assert {entry.version for entry in model.opset_import if not entry.domain} <= {23, 24}
        assert model.ir_version <= 12
        assert {node.domain for node in model.graph.node} == domains
        assert not model.functions
        for tensor in model.graph.initializer:  # the checker reads no file that has a second name, as linked ones have
            if tensor.external_data:
                length = next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
                tensor.raw_data, tensor.data_location = bytes(length), onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
        onnx.checker.check_model(model, full_check=True)


def test_weights_are_stored_once_for_all_graphs(folder):
    manifest = Manifest.read(folder)
    stored = sum(tensor.bytes for name in manifest.weight_files for tensor in read_header(folder / name).values())
    width = 4 if manifest.dtype == "float32" else 2
    parameters = manifest.model["parameters"] * width
    rotary = 2 * 2 * 4 * manifest.config.train_length * max(layer.key_size for layer in manifest.layers)
    assert parameters <= stored <= parameters + rotary  # cos and sin, for the phases and for rotating keys
    for name, model in graphs(folder).items():
        inside = sum(tensor.ByteSize() for tensor in model.graph.initializer)
        assert inside <= 0.1 * parameters, name  # a weight would be more
        places = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
        assert places <= set(manifest.weight_files)


def test_size(folder):
    manifest = Manifest.read(folder)
    weights = manifest.model["parameters"] * (4 if manifest.dtype == "float32" else 2)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= 1.02 * weights + len(manifest.graphs) * (2 << 20)
    # These models are small: what a graph takes beside the weights is far below its allowance.
    assert max((folder / graph.file).stat().st_size for graph in manifest.graphs) < 64 << 10


def test_the_manifest_lists_every_file(folder):
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    assert set(manifest.files) >= {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert {graph.file for graph in manifest.graphs} == {n for n in manifest.files if n.endswith(".onnx")}
    assert set(manifest.tools) >= {"mesart", "torch", "transformers", "onnx"}


def test_the_manifest_names_inputs_and_outputs(folder):
    models = graphs(folder)
    for info in Manifest.read(folder).graphs:
        for described, actual in (
            (info.inputs, models[info.file].graph.input),
            (info.outputs, models[info.file].graph.output),
        ):
            assert [tensor.name for tensor in described] == [value.name for value in actual]
            for tensor, value in zip(described, actual, strict=True):
                dims = value.type.tensor_type.shape.dim
                assert len(tensor.shape) == len(dims)
                for said, dim in zip(tensor.shape, dims, strict=True):
                    assert said == (dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?")
                kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
                assert tensor.dtype == kind


def test_every_axis_has_a_size_or_a_name(folder):
    axes = {
        "symbolic": {"B", "S", "P", "M"},
        "onnxruntime": {"B", "S", "P", "M"},
        "paged": {"S", "M", "N", "texts", "text_edges", "blocks"},
        "grouped": {"B", "S", "P", "M"},
        "engine": {"B", "S", "P", "M", "A"},
        "rerotate": {"B", "S"},
        "engine_rerotate": {"B", "S"},
    }
    for graph in Manifest.read(folder).graphs:
        for tensor in [*graph.inputs, *graph.outputs]:
            for dim in tensor.shape:
                assert isinstance(dim, int) or dim in axes.get(graph.kind, set()), (graph.file, tensor)


def test_every_phase_and_bucket_has_a_graph_of_fixed_shapes(folder):
    manifest = Manifest.read(folder)
    config = manifest.config
    expected: dict[tuple[GraphKind, int | None], tuple[int, int]] = {
        ("prefix", None): (config.head_length, 0),
        ("chunk", None): (config.chunk_length, config.head_length),
    }
    for bucket in manifest.buckets:
        expected["tail", bucket.chunks] = (config.train_length, bucket.max_tokens)
        expected["decode", bucket.chunks] = (1, bucket.max_tokens)
    symbolic = ("symbolic", "onnxruntime", "paged", "grouped", "rerotate", "engine", "engine_rerotate")
    specialised = {(g.kind, g.bucket): g for g in manifest.graphs if g.kind not in symbolic}
    assert set(specialised) == set(expected)
    for key, (new, past) in expected.items():
        graph = specialised[key]
        assert graph.size("input_ids", 1) == new
        if past:
            assert graph.size("past_key_values.0.key", 2) == past
            assert graph.size("past_key_values.0.value", 2) == past
        else:
            assert not any(tensor.name.startswith("past_") for tensor in graph.inputs), graph.file


def test_buckets_reach_the_length_asked_for(bundle):
    manifest = Manifest.read(bundle())
    assert manifest.max_tokens == 344
    assert [bucket.chunks for bucket in manifest.buckets] == [0, 2, 3, 4, 6, 8]
    assert manifest.buckets[-1].max_tokens == 344


def test_the_same_input_gives_the_same_bytes(bundle, checkpoint, mesa_config, tmp_path):
    """In another process, with another order of its sets."""
    code = """
import json, sys
from mesart.export import export_model
from mesart.graphs import MesaConfig
export_model(*sys.argv[1:3], MesaConfig(**json.loads(sys.argv[3])), max_tokens=104, dtype="bfloat16")
"""
    fields = json.dumps(mesa_config.to_dict())
    arguments = [os.fspath(checkpoint("tied_llama")), os.fspath(tmp_path / "again"), fields]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment, timeout=300)
    first, again = (
        {path.name: sha256(path) for path in folder.iterdir()}
        for folder in (bundle("tied_llama", "bfloat16"), tmp_path / "again")
    )
    assert again == first

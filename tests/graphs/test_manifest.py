"""The manifest: the same after writing and reading, and a check of every file that it lists."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mesart.graphs import Bucket, MesaConfig, MesaError
from mesart.graphs import manifest as manifest_module
from mesart.graphs.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    FileInfo,
    GraphInfo,
    LayerInfo,
    Manifest,
    TensorInfo,
    sha256,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    tensors = [TensorInfo("input_ids", "int64", ["B", "S"]), TensorInfo("logits", "float32", ["B", 1, 320])]
    manifest = Manifest(
        model={"architecture": "LlamaForCausalLM", "vocab_size": 320},
        dtype="float32",
        config=MesaConfig(64, stair_width=3),
        max_tokens=100,
        buckets=[Bucket(0, 64, 1), Bucket(2, 104, 3)],
        layers=[LayerInfo(2, 8, 8, "place.onnx"), LayerInfo(2, 8, 8, None)],
        graphs=[
            GraphInfo("model.onnx", "any", None, tensors[:1], tensors[1:]),
            GraphInfo("tail-2.onnx", "tail", 2, tensors[:1], tensors[1:]),
        ],
        tools={"mesart": "0"},
        files={path.name: FileInfo(path.stat().st_size, sha256(path)) for path in sorted(tmp_path.iterdir())},
    )
    (tmp_path / MANIFEST_FILE).write_text(manifest.to_json())
    return tmp_path


def change(folder: Path, **fields: object) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_round_trip(folder):
    manifest = Manifest.read(folder)
    assert manifest.to_json() == (folder / MANIFEST_FILE).read_text()
    assert manifest.config == MesaConfig(64, stair_width=3)
    assert manifest.buckets[1] == Bucket(2, 104, 3)
    assert manifest.graph("tail", 2).size("input_ids", 1) == "S"
    manifest.verify(folder)


def test_a_graph_that_is_not_there(folder):
    with pytest.raises(MesaError, match="the bundle holds no tail graph for 9 chunks"):
        Manifest.read(folder).graph("tail", 9)


def test_sha256_is_that_of_the_content(folder):
    assert sha256(folder / "model.onnx") == hashlib.sha256(b"graph").hexdigest()


@pytest.mark.parametrize("larger_than_memory", [False, True])
@pytest.mark.parametrize("size", [0, 1, 3000, 10_000])
def test_sha256_of_blocks(tmp_path, monkeypatch, size, larger_than_memory):
    monkeypatch.setattr(manifest_module, "_BLOCK_BYTES", 3000)
    monkeypatch.setattr(manifest_module, "_is_larger_than_memory", lambda _: larger_than_memory)
    content = bytes(i * i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "file").read_bytes() == content


def test_no_bundle(tmp_path):
    with pytest.raises(MesaError, match=r"is no bundle: it holds no manifest\.json; make one with `mesart export`"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("version", "says"),
    [(SCHEMA_VERSION + 1, "upgrade mesart"), (0, "export the model again"), ("two", "export the model again")],
)
def test_another_schema(folder, version, says):
    change(folder, schema_version=version)
    with pytest.raises(MesaError, match=says) as error:
        Manifest.read(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "model": {}, "dtype": "float32", "config": 3}',
    ],
)
def test_a_broken_manifest(folder, content):
    (folder / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(MesaError, match=r"cannot be read .*; export the model again") as error:
        Manifest.read(folder)
    assert "\n" not in str(error.value)


def test_a_field_of_the_config_that_is_unknown_here(folder):
    change(folder, config={"train_length": 64, "spiral_width": 2})
    with pytest.raises(MesaError, match="unknown configuration field 'spiral_width'"):
        Manifest.read(folder)


class TestVerify:
    def test_a_missing_file(self, folder):
        (folder / "weights.safetensors").unlink()
        with pytest.raises(MesaError, match=r"weights\.safetensors is missing; export the model again"):
            Manifest.read(folder).verify(folder, contents=False)

    def test_a_truncated_file(self, folder):
        (folder / "weights.safetensors").write_bytes(b"weigh")
        with pytest.raises(MesaError, match=r"weights\.safetensors has 5 bytes instead of 7; export the model again"):
            Manifest.read(folder).verify(folder, contents=False)

    def test_an_altered_file(self, folder):
        (folder / "weights.safetensors").write_bytes(b"wEights")
        manifest = Manifest.read(folder)
        manifest.verify(folder, contents=False)  # the quick check sees sizes only
        with pytest.raises(MesaError, match=r"weights\.safetensors was altered .*; export the model again"):
            manifest.verify(folder)

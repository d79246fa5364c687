"""The manifest: the same after writing and reading, checked completely, and a check of every file that it lists."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from mesart.graphs import Bucket, BundleError, MesaConfig, MesaError
from mesart.graphs.bundle import files as files_module
from mesart.graphs.bundle.files import BundleFiles
from mesart.graphs.bundle.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    FileInfo,
    LayerInfo,
    Manifest,
    sha256,
)
from mesart.graphs.bundle.records import shown
from mesart.graphs.method.plan import buckets_up_to
from mesart.graphs.method.registry import STATIC_METHODS, method_to_json
from mesart.graphs.method.yarn import YarnConfig

CONFIG = MesaConfig(64, stair_width=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle without graphs: whatever can be said of types, files and the configuration can be said of it."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in ("rerotate.onnx", "weights.safetensors"):
        (folder / name).write_bytes(name[:7].encode())
    manifest = Manifest(
        model={"architecture": "LlamaForCausalLM", "model_type": "llama", "vocab_size": 320, "parameters": 1},
        dtype="float32",
        config=CONFIG,
        max_tokens=80,
        buckets=list(buckets_up_to(CONFIG, 80)),
        layers=[LayerInfo(2, 8, 8, "rerotate.onnx"), LayerInfo(2, 8, 8, None)],
        graphs=[],
        tools={"mesart": "0"},
        files={path.name: FileInfo(path.stat().st_size, sha256(path)) for path in sorted(folder.iterdir())},
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(MesaError) as error:
        Manifest.read(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def test_round_trip(folder):
    manifest = Manifest.read(folder)
    assert manifest.to_json() == (folder / MANIFEST_FILE).read_text()
    assert manifest.config == CONFIG
    assert manifest.buckets == [Bucket(0, 64, 1), Bucket(2, 86, 5)]
    manifest.verify(folder)


def test_a_method_has_fields_of_its_own(folder, reseal):
    config = YarnConfig(64, 4.0, max_tokens=86)
    buckets = [dataclasses.asdict(bucket) for bucket in buckets_up_to(config, 80)]
    reseal(folder, config=method_to_json(config), buckets=buckets)
    assert Manifest.read(folder).config == config
    assert json.loads(Manifest.read(folder).to_json())["config"]["method"] == "yarn"
    for field, value, says in (
        ("max_tokens", 87, "config.max_tokens is 87, the largest bucket has 86"),
        ("max_tokens", -1, "config cannot be: max_tokens is -1; it must be at least 1"),
        ("factor", 0, "config cannot be: yarn: factor is 0; it must be a number from 1 to"),
        ("method", "origin", "config has the unknown field 'factor'; known are train_length, log_n"),
        ("method", "mesa", "config lacks the field 'head_length'"),
    ):
        reseal(folder, config={**method_to_json(config), field: value})
        assert says in refused(folder)


@pytest.mark.parametrize("method", ["mesa-2", "", None, 3, ["mesa"]])
def test_an_unknown_method(folder, reseal, method):
    """What came, what is known, what to do."""
    reseal(folder, config={**method_to_json(CONFIG), "method": method})
    with pytest.raises(BundleError) as error:
        Manifest.read(folder)
    expected = f"config.method is {shown(method)}, expected one of {', '.join(STATIC_METHODS)}); export the model again"
    assert str(error.value).endswith(expected)


def test_a_method_that_is_not_named(folder, reseal):
    reseal(folder, config=CONFIG.to_dict())
    assert "config lacks the field 'method', one of mesa, origin, dynamic-ntk, yarn" in refused(folder)


def test_a_graph_that_is_not_there(folder):
    with pytest.raises(MesaError, match="the bundle holds no tail graph for 9 chunks"):
        Manifest.read(folder).graph("tail", 9)


def test_sha256_is_that_of_the_content(folder):
    assert sha256(folder / "rerotate.onnx") == hashlib.sha256(b"rerotat").hexdigest()


@pytest.mark.parametrize("larger_than_memory", [False, True])
@pytest.mark.parametrize("size", [0, 1, 3000, 10_000])
def test_sha256_of_blocks(tmp_path, monkeypatch, size, larger_than_memory):
    monkeypatch.setattr(files_module, "_BLOCK_BYTES", 3000)
    monkeypatch.setattr(files_module, "_is_larger_than_memory", lambda _: larger_than_memory)
    content = bytes(i * i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "file").read_bytes() == content


def test_no_bundle(tmp_path):
    with pytest.raises(MesaError, match=r"is no bundle: it holds no manifest\.json; make one with `mesart export`"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (SCHEMA_VERSION + 1, "upgrade mesart"),
        (1, "export the model again"),
        (2, "export the model again"),
        ("two", "export the model again"),
    ],
)
def test_another_schema(folder, reseal, version, says):
    reseal(folder, schema_version=version)
    path = folder / MANIFEST_FILE
    assert refused(folder) == f"{path} has schema {shown(version)}, this version of mesart reads 3; {says}"


def test_a_bundle_of_schema_2(folder, reseal):
    """Its configuration named no method."""
    reseal(folder, schema_version=2, config=CONFIG.to_dict())
    assert refused(folder).endswith("has schema 2, this version of mesart reads 3; export the model again")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"schema_version": 3}',
        b'{"schema_version": 3, "schema_version": 3}',
        b'{"schema_version": 3, "rho": NaN}',
        b'{"schema_version": 3, "rho": 1' + b"0" * 10_000 + b"}",
        b'{"schema_version": 3, "model": {}, "dtype": "float32", "config": 3}',
    ],
    ids=range(11),
)
def test_a_broken_manifest(folder, content):
    (folder / MANIFEST_FILE).write_bytes(content)
    assert "manifest.json cannot be read" in refused(folder)


def test_an_altered_manifest(folder):
    path = folder / MANIFEST_FILE
    path.write_text(path.read_text().replace('"log_n": true', '"log_n": false'))
    assert "manifest.json was altered (its SHA-256 differs); export the model again" in refused(folder)


def test_a_manifest_without_its_hash(folder):
    path = folder / MANIFEST_FILE
    fields = json.loads(path.read_text())
    del fields["sha256"]
    path.write_text(json.dumps(fields))
    assert "manifest.json was altered" in refused(folder)


HASH = {"bytes": 0, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "int4"}, "dtype is 'int4', expected one of float32, float16, bfloat16"),
        ({"buckets": []}, "buckets is a list of 0, expected a list that is not empty"),
        ({"buckets": [{"chunks": 0, "max_tokens": 64, "stair_width": True}]}, "buckets[0].stair_width is true"),
        ({"buckets": [{"chunks": 0, "max_tokens": 64, "stair_width": 1}]}, "buckets are 1, the configuration gives 2"),
        (
            {"layers": [{"kv_heads": 0, "key_size": 8, "value_size": 8, "rerotate": None}]},
            "layers[0].kv_heads is 0, exp",
        ),
        (
            {"layers": [{"kv_heads": 2**63, "key_size": 8, "value_size": 8, "rerotate": None}]},
            "layers[0].kv_heads is 92",
        ),
        ({"layers": [{"kv_heads": 2, "key_size": 8, "value_size": 8}]}, "layers[0] lacks the field 'rerotate'"),
        ({"wings": 2}, "has the unknown field 'wings'"),
        ({"model": {"architecture": "", "model_type": "", "vocab_size": 3, "parameters": 1}}, "model.architecture is"),
        ({"tools": {"mesart": "\x1b[2J"}}, r"tools['mesart'] is '\x1b[2J', expected a printable string"),
        ({"tools": {"mesart": "\ud800"}}, "expected a printable string"),
        ({"weight_files": ["weights.safetensors", "../../x"]}, "weight_files[1] is '../../x', expected the plain name"),
        ({"weight_files": ["other.safetensors"]}, "weight_files[0] is 'other.safetensors', which is none of the files"),
        ({"weight_files": ["weights.safetensors"] * 2}, "weight_files have 'weights.safetensors' twice"),
        ({"files": {"manifest.json": HASH}}, "files['manifest.json'] is 'manifest.json', expected a file other than"),
        ({"files": {"/etc/hostname": HASH}}, "is '/etc/hostname', expected the plain name"),
        ({"files": {"weights.safetensors": {"bytes": 1, "sha256": "0" * 63}}}, "expected 64 hexadecimal digits"),
        ({"max_tokens": 10**5}, "max_tokens does not go with the configuration: stair_width = 5"),
        ({"config": {"method": "mesa", "train_length": 64, "wide": 2}}, "config lacks the field 'head_length'"),
        ({"quantisation": {"scheme": "int8", "bits": 3, "group_size": None, "symmetric": True}}, "bits is 3, expected"),
    ],
    ids=range(20),
)
def test_a_field_that_cannot_be(folder, reseal, change, says):
    reseal(folder, **change)
    assert says in refused(folder)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("log_n", "no", "config.log_n is 'no', expected true or false"),
        ("rho", 1e308, "config cannot be: rho"),
        ("head_length", -1, "config"),
        ("chunk_length", 20, "buckets[1] is Bucket(chunks=2, max_tokens=86, stair_width=5), the configuration gives"),
    ],
)
def test_a_configuration_that_cannot_be(folder, reseal, field, value, says):
    reseal(folder, config={**method_to_json(CONFIG), field: value})
    assert says in refused(folder)


def test_the_digest_covers_everything(folder):
    manifest = Manifest.read(folder)
    assert manifest.digest == f"sha256:{json.loads((folder / MANIFEST_FILE).read_text())['sha256']}"
    assert dataclasses.replace(manifest, files={}).digest != manifest.digest


class TestWrite:
    def test_a_link_that_waits_leads_nowhere(self, folder, tmp_path):
        victim = tmp_path / "victim"
        victim.write_text("ten years")
        (folder / "manifest.partial").symlink_to(victim)
        manifest = Manifest.read(folder)
        (folder / MANIFEST_FILE).unlink()
        (folder / MANIFEST_FILE).symlink_to(victim)
        before = {path.name for path in folder.iterdir()}
        manifest.write(folder)
        assert victim.read_text() == "ten years"
        assert Manifest.read(folder) == manifest
        assert {path.name for path in folder.iterdir()} == before

    def test_a_full_disk_leaves_the_old_one(self, folder, monkeypatch):
        manifest, before = Manifest.read(folder), sorted(path.name for path in folder.iterdir())

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            dataclasses.replace(manifest, tools={}).write(folder)
        assert Manifest.read(folder) == manifest
        assert sorted(path.name for path in folder.iterdir()) == before


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

    def test_links_are_followed(self, folder, tmp_path):
        """As huggingface_hub keeps its files."""
        (folder / "rerotate.onnx").rename(tmp_path / "blob")
        (folder / "rerotate.onnx").symlink_to("../blob")
        Manifest.read(folder).verify(folder)

    @pytest.mark.parametrize("contents", [True, False])
    @pytest.mark.parametrize(
        "make",
        [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name)],
        ids=["fifo", "folder", "device", "loop"],
    )
    def test_no_regular_file(self, folder, make, contents):
        (folder / "rerotate.onnx").unlink()
        make(folder / "rerotate.onnx")
        with pytest.raises(MesaError, match=r"rerotate\.onnx (is no regular file|cannot be read)"):
            Manifest.read(folder).verify(folder, contents=contents)

    @pytest.mark.parametrize(
        "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "folder", "device"]
    )
    def test_a_manifest_that_is_no_regular_file(self, folder, make):
        (folder / MANIFEST_FILE).unlink()
        make(folder / MANIFEST_FILE)
        assert "no regular file" in refused(folder)


class TestLaterOpening:
    """Files that are opened after they were verified."""

    @pytest.fixture
    def files(self, folder) -> BundleFiles:
        files = Manifest.read(folder).open_files(folder)
        files.verify(keep=["rerotate.onnx"])
        return files

    def test_unchanged(self, files):
        with files.unchanged("rerotate.onnx", "weights.safetensors"):
            pass
        assert files.read("rerotate.onnx") == b"rerotat"
        files.require_not_overwritten(["weights.safetensors"])

    @pytest.mark.parametrize("how", ["overwritten", "replaced", "gone"])
    def test_changed(self, folder, files, how):
        path = folder / "rerotate.onnx"
        if how == "overwritten":
            path.write_bytes(b"REROTAT")
        else:
            path.unlink()
        if how == "replaced":
            path.write_bytes(b"rerotat")
        with pytest.raises(MesaError, match=r"rerotate\.onnx has changed since the bundle was loaded; load it again"):
            files.unchanged("weights.safetensors", "rerotate.onnx").__enter__()
        assert files.read("rerotate.onnx") == b"rerotat"  # what was verified

    def test_changed_while_it_is_opened(self, folder, files):
        with pytest.raises(MesaError, match="has changed"), files.unchanged("rerotate.onnx"):
            (folder / "rerotate.onnx").write_bytes(b"REROTAT")

    def test_no_file_of_the_bundle(self, folder, files):
        (folder / "other.onnx").write_bytes(b"")
        with pytest.raises(MesaError, match=r"other\.onnx is none of the files that its manifest lists"):
            files.unchanged("other.onnx").__enter__()

    def test_a_mapped_file_may_go_but_not_change(self, folder, files):
        path = folder / "weights.safetensors"
        os.utime(path, ns=(1, 1))
        with pytest.raises(MesaError, match="has changed"):
            files.require_not_overwritten([path.name])
        path.unlink()
        files.require_not_overwritten([path.name])

"""Bundles of links, as the Hugging Face hub's cache keeps them: on every backend; nothing beside them is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mesart.graphs import MesaError
from mesart.runtime import MesaModel, present_backends
from mesart.runtime.linked_weights import IN_MEMORY, MappedGraph

IDS = [3 + index % 300 for index in range(150)]


@pytest.fixture
def snapshot(bundle, tmp_path: Path) -> Path:
    """Every file a link to another name in another folder."""
    folder, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(sorted(bundle().iterdir())):
        shutil.copyfile(file, blobs / f"{index:064x}")
        (folder / file.name).symlink_to(Path("..", "..", "blobs", f"{index:064x}"))
    return folder


@pytest.mark.parametrize("backend", present_backends())
@pytest.mark.parametrize("specialised", [False, True])
def test_they_load_and_compute_the_same(bundle, snapshot, backend, specialised):
    before = {path: path.lstat().st_mtime_ns for path in snapshot.parent.parent.rglob("*")}
    with (
        MesaModel.load(snapshot, backend, specialised=specialised) as linked,
        MesaModel.load(bundle(), backend, specialised=specialised, verify=False) as plain,
    ):
        assert np.array_equal(linked.prefill(IDS), plain.prefill(IDS))
        assert np.array_equal(linked.step(5), plain.step(5))
    assert {path: path.lstat().st_mtime_ns for path in snapshot.parent.parent.rglob("*")} == before


def test_a_link_to_the_folder_is_no_matter(bundle, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(bundle())
    with MesaModel.load(link, verify=False) as model:
        model.prefill(IDS)


class TestMappedGraph:
    def test_what_it_is_not_is_one_line(self, bundle_copy):
        path = bundle_copy / "model.onnx"
        content = path.read_bytes()
        damaged = [content[:-7], content[:100], b"\x3a\xff\xff\xff\xff\x0f", b"\x0f", b"\xff" * 40]
        damaged += [content.replace(b"weights.safetensors", b"/eights.safetensors")]
        damaged += [content.replace(b"weights.safetensors", b"weightx.safetensors")]
        for number, wrong in enumerate(damaged):
            path.write_bytes(wrong)
            with pytest.raises(MesaError) as error:
                MappedGraph(path).serialised()
            assert "\n" not in str(error.value), number
            assert str(bundle_copy) in str(error.value)

    def test_no_byte_behind_a_file_is_read(self, bundle_copy):
        for name in ("weights.safetensors", "model.safetensors"):
            file = bundle_copy / name
            content = file.read_bytes()
            file.write_bytes(content[:-4])
            with pytest.raises(MesaError, match=f"wants bytes .* of {name}, which has"):
                MappedGraph(bundle_copy / "model.onnx").serialised()
            file.write_bytes(content)


@pytest.mark.parametrize("backend", [name for name in present_backends() if name != "torch"])
def test_no_file_may_name_an_address(bundle_copy, backend):
    """Engines would read whatever there is in the process's memory."""
    for name in ("model.onnx", "model-grouped.onnx", "model-paged.onnx"):
        path = bundle_copy / name
        path.write_bytes(path.read_bytes().replace(b"weights.safetensors\x12", IN_MEMORY + b"x\x12"))
        path.write_bytes(path.read_bytes().replace(b"weights.safetensors", IN_MEMORY + b"x"))
    with pytest.raises(MesaError, match="_ORT_MEM_ADDR_.*is no weight file of the bundle"):
        MesaModel.load(bundle_copy, backend, verify=False)

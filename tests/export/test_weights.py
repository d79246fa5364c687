"""How weights come into a bundle: linked, copied or converted, and always those of the checkpoint."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mesart.export import bundle as bundle_module
from mesart.export import export_model
from mesart.export.safetensors_file import Pending, read_header, write_file
from mesart.export.weights import WeightFiles
from mesart.graphs.bundle.manifest import WEIGHTS_FILE, Manifest
from mesart.graphs.errors import MesaError
from mesart.graphs.model.phase_module import PhaseModule
from mesart.graphs.model.torch_graph import load_bundle_model


@pytest.fixture
def no_graphs(monkeypatch):
    """Exports without the seconds that tracing takes."""
    monkeypatch.setattr(
        bundle_module, "_trace", lambda model, config, *_: bundle_module._Graphs(PhaseModule(model, config))
    )


def weights_of(bundle: Path) -> dict[str, torch.Tensor]:
    """All parameters of a bundle's model, as the torch backend reads them."""
    return dict(load_bundle_model(bundle, Manifest.read(bundle)).named_parameters())


def same(bundle: Path, checkpoint: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> bool:
    found = weights_of(bundle)
    return bool(found) and all(torch.equal(value, checkpoint[name].to(dtype)) for name, value in found.items())


@pytest.fixture
def original(checkpoint_copy) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_copy / "model.safetensors")


def shard(folder: Path, weights: dict[str, torch.Tensor]) -> list[str]:
    """Splits a checkpoint into two files."""
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    where = {name: files[index % 2] for index, name in enumerate(names)}
    for file in files:
        save_file({name: weights[name] for name in names if where[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return files


@pytest.mark.usefixtures("no_graphs")
class TestAuto:
    def test_writing_into_the_checkpoint_does_not_change_the_bundle(self, checkpoint_copy, tmp_path):
        bundle = export_model(checkpoint_copy, tmp_path / "bundle")
        file = checkpoint_copy / "model.safetensors"
        with file.open("r+b") as stream:  # in place, as cp does
            stream.write(bytes(file.stat().st_size))
        Manifest.read(bundle).verify(bundle)

    def test_large_files_are_linked(self, checkpoint_copy, tmp_path, monkeypatch):
        monkeypatch.setattr("mesart.export.weights.SMALL_BYTES", 1000)
        monkeypatch.setattr("mesart.export.copies._clone", lambda source, target: False)
        bundle = export_model(checkpoint_copy, tmp_path / "bundle")
        assert (bundle / "model.safetensors").samefile(checkpoint_copy / "model.safetensors")


@pytest.mark.usefixtures("no_graphs")
class TestLink:
    def test_the_files_are_the_checkpoints_own(self, checkpoint_copy, original, tmp_path):
        lines: list[str] = []
        bundle = export_model(checkpoint_copy, tmp_path / "bundle", weights="link", report=lines.append)
        assert sum("1 weight files are the checkpoint's own (hard links)" in line for line in lines) == 1
        linked = bundle / "model.safetensors"
        assert linked.stat().st_ino == (checkpoint_copy / "model.safetensors").stat().st_ino
        assert Manifest.read(bundle).weight_files == ["model.safetensors", WEIGHTS_FILE]
        assert (bundle / WEIGHTS_FILE).stat().st_size < 0.1 * linked.stat().st_size
        shutil.rmtree(checkpoint_copy)
        Manifest.read(bundle).verify(bundle)
        assert same(bundle, original)

    def test_shards(self, checkpoint_copy, original, tmp_path):
        files = shard(checkpoint_copy, original)
        bundle = export_model(checkpoint_copy, tmp_path / "bundle")
        assert Manifest.read(bundle).weight_files == [*files, WEIGHTS_FILE]
        assert same(bundle, original)

    def test_shards_of_one_name(self, checkpoint_copy, original, tmp_path):
        """Neither may be written over the other, nor through its link into the checkpoint."""
        files = shard(checkpoint_copy, original)
        index = checkpoint_copy / "model.safetensors.index.json"
        text = index.read_text()
        for i, file in enumerate(files):
            (checkpoint_copy / f"part{i}").mkdir()
            (checkpoint_copy / file).rename(checkpoint_copy / f"part{i}" / "model.safetensors")
            text = text.replace(file, f"part{i}/model.safetensors")
        index.write_text(text)
        before = {path: path.read_bytes() for path in checkpoint_copy.rglob("*.safetensors")}
        for mode in ("auto", "link"):
            bundle = export_model(checkpoint_copy, tmp_path / mode, weights=mode)
            names = ["model.safetensors", "checkpoint-model.safetensors", WEIGHTS_FILE]
            assert Manifest.read(bundle).weight_files == names
            assert same(bundle, original)
        assert before == {path: path.read_bytes() for path in checkpoint_copy.rglob("*.safetensors")}

    def test_a_checkpoint_that_is_changed_meanwhile(self, checkpoint_copy, original, tmp_path, monkeypatch):
        def change(files: WeightFiles) -> None:
            del original["model.norm.weight"]
            save_file(original, checkpoint_copy / "model.safetensors", {"format": "pt"})
            bring(files)

        bring = WeightFiles.bring
        monkeypatch.setattr(WeightFiles, "bring", change)
        with pytest.raises(MesaError, match="was changed while it was exported"):
            export_model(checkpoint_copy, tmp_path / "bundle")

    def test_symbolic_links_as_in_the_hub_cache(self, checkpoint_copy, original, tmp_path):
        blob = tmp_path / "blob"
        (checkpoint_copy / "model.safetensors").rename(blob)
        (checkpoint_copy / "model.safetensors").symlink_to(blob)
        bundle = export_model(checkpoint_copy, tmp_path / "bundle")
        assert not (bundle / "model.safetensors").is_symlink()
        assert same(bundle, original)

    def test_another_file_system_gets_a_copy(self, checkpoint_copy, original, tmp_path, monkeypatch):
        def refuse(*_: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr("os.link", refuse)
        lines: list[str] = []
        bundle = export_model(checkpoint_copy, tmp_path / "bundle", weights="link", report=lines.append)
        assert not any("hard link" in line for line in lines)
        assert (bundle / "model.safetensors").stat().st_nlink == 1
        assert same(bundle, original)

    def test_a_weight_of_another_dtype_is_converted_and_only_that(self, checkpoint_copy, original, tmp_path):
        mixed = dict(original)
        mixed["model.norm.weight"] = mixed["model.norm.weight"].half()
        save_file(mixed, checkpoint_copy / "model.safetensors", {"format": "pt"})
        bundle = export_model(checkpoint_copy, tmp_path / "bundle")
        assert read_header(bundle / WEIGHTS_FILE).keys() >= {"model.norm.weight"}
        assert "lm_head.weight" not in read_header(bundle / WEIGHTS_FILE)
        assert same(bundle, mixed)

    def test_a_file_of_the_name_that_the_bundle_uses(self, checkpoint_copy, original, tmp_path):
        (checkpoint_copy / "model.safetensors").rename(checkpoint_copy / WEIGHTS_FILE)
        index = {"weight_map": dict.fromkeys(original, WEIGHTS_FILE)}
        (checkpoint_copy / "model.safetensors.index.json").write_text(json.dumps(index))
        bundle = export_model(checkpoint_copy, tmp_path / "bundle")
        assert Manifest.read(bundle).weight_files == [f"checkpoint-{WEIGHTS_FILE}", WEIGHTS_FILE]
        assert same(bundle, original)


@pytest.mark.usefixtures("no_graphs")
class TestCopy:
    def test_asked_for(self, checkpoint_copy, original, tmp_path):
        bundle = export_model(checkpoint_copy, tmp_path / "bundle", weights="copy")
        assert Manifest.read(bundle).weight_files == [WEIGHTS_FILE]
        assert [path.name for path in bundle.glob("*.safetensors")] == [WEIGHTS_FILE]
        assert same(bundle, original)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_another_dtype(self, checkpoint_copy, original, tmp_path, dtype):
        bundle = export_model(checkpoint_copy, tmp_path / "bundle", dtype=dtype)
        assert Manifest.read(bundle).weight_files == [WEIGHTS_FILE]
        assert same(bundle, original, getattr(torch, dtype))

    def test_pickled_tensors(self, checkpoint_copy, original, tmp_path):
        (checkpoint_copy / "model.safetensors").unlink()
        torch.save(original, checkpoint_copy / "pytorch_model.bin")
        bundle = export_model(checkpoint_copy, tmp_path / "bundle")
        assert Manifest.read(bundle).weight_files == [WEIGHTS_FILE]
        assert same(bundle, original)

    def test_a_checkpoint_without_the_base_models_prefix(self, checkpoint_copy, original, tmp_path):
        bare = {name.removeprefix("model."): tensor for name, tensor in original.items()}
        save_file(bare, checkpoint_copy / "model.safetensors", {"format": "pt"})
        assert same(export_model(checkpoint_copy, tmp_path / "bundle"), original)


def test_weights_that_transformers_builds_from_others(make_model, tmp_path, mesa_config):
    """Experts lie in checkpoints one by one, in the model as one tensor."""
    model = make_model("mixtral", num_local_experts=4)
    model.save_pretrained(tmp_path / "mixtral")
    assert any(".experts.0." in name for name in load_file(tmp_path / "mixtral" / "model.safetensors"))
    lines: list[str] = []
    bundle = export_model(tmp_path / "mixtral", tmp_path / "bundle", mesa_config, max_tokens=64, report=lines.append)
    assert any("transformers converts them, in memory" in line for line in lines)
    assert same(bundle, dict(model.named_parameters()))


class TestFile:
    def test_what_is_written_is_read(self, tmp_path):
        tensors: dict[str, Any] = {
            "bytes": torch.arange(5, dtype=torch.uint8),
            "brain": torch.randn(3, 4).bfloat16(),
            "single": torch.randn(7),
            "nothing": torch.zeros(0, 3),
        }
        pending = {n: Pending(t.dtype, tuple(t.shape), partial(torch.clone, t)) for n, t in tensors.items()}
        written: list[int] = []
        write_file(tmp_path / "file.safetensors", pending, written.append)
        assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())
        loaded = load_file(tmp_path / "file.safetensors")
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
        content = (tmp_path / "file.safetensors").read_bytes()
        for name, stored in read_header(tmp_path / "file.safetensors").items():
            tensor = tensors[name].contiguous().reshape(-1).view(torch.uint8)
            assert stored.offset % tensors[name].element_size() == 0
            assert np.array_equal(np.frombuffer(content, np.uint8, stored.bytes, stored.offset), tensor.numpy())

    def test_only_one_tensor_is_held_at_a_time(self, tmp_path):
        alive: list[int] = []

        def make() -> torch.Tensor:
            alive.append(1)
            assert len(alive) == 1
            return torch.zeros(10)

        pending = {str(i): Pending(torch.float32, (10,), make) for i in range(3)}
        write_file(tmp_path / "file.safetensors", pending, lambda _: alive.clear())

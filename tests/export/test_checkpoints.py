"""Checkpoints as they come from elsewhere: what transformers 5 reads is exported as it reads it, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mesart.export import bundle as bundle_module
from mesart.export import checkpoint as checkpoint_module
from mesart.export import export_model
from mesart.export.checkpoint import load_config, load_model, local_folder
from mesart.export.checkpoint_weights import open_weights
from mesart.export.quantised_checkpoint import read_scheme
from mesart.export.safetensors_file import read_header
from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.model.phase_module import PhaseModule
from mesart.graphs.model.torch_graph import load_bundle_model
from mesart.graphs.user_data import user_data

Header = dict[str, Any]
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def no_graphs(monkeypatch):
    """Exports without the seconds that tracing takes."""
    monkeypatch.setattr(
        bundle_module, "_trace", lambda model, config, *_: bundle_module._Graphs(PhaseModule(model, config))
    )


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_header(file: Path, change: Callable[[Header], object]) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def refuses(action: Callable[[], object], *says: str) -> None:
    with pytest.raises(MesaError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    assert all(text in message for text in says), message


class TestHeaders:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda h: h[UP]["data_offsets"].reverse(), "has the data_offsets"),
            (lambda h: h[UP].update(data_offsets=[v + 4 for v in h[UP]["data_offsets"]]), "which begins at"),
            (lambda h: h[UP].update(data_offsets=h[DOWN]["data_offsets"]), "overlap"),
            (lambda h: h[UP].update(data_offsets=[-8, 8]), "has the data_offsets [-8, 8]"),
            (lambda h: h[UP].update(data_offsets=[float(v) for v in h[UP]["data_offsets"]]), "has the data_offsets"),
            (lambda h: h[UP].update(shape=[True, *h[UP]["shape"]]), "has the shape [True"),
            (lambda h: h[UP].update(shape=[2**62, 2**62]), "takes"),
            (lambda h: h[UP].update(dtype="F16"), "of F16 does not"),
            (lambda h: h[UP].update(dtype="float32"), "the unknown dtype 'float32'"),
            (lambda h: h[UP].pop("shape"), "must have a dtype, a shape and data_offsets"),
            (lambda h: h.pop(UP), "a hole before"),
            (lambda h: h.update(__metadata__={"format": 1}), "__metadata__"),
            (lambda h: h.update(more=[]), "'more' must have"),
        ],
    )
    def test_what_the_library_refuses(self, checkpoint_copy, change, says):
        file = checkpoint_copy / "model.safetensors"
        edit_header(file, change)
        refuses(lambda: read_header(file), str(file), says)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "it is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "Git LFS pointer"),
            (b"<!DOCTYPE html><html>", "web page"),
            (b'{"error": "Access to this model is gated"}', "JSON file"),
            (b"GGUF\x03\x00\x00\x00\x01", "GGUF file"),
            (b"PK\x03\x04\x00\x00\x08\x08\x00", "zip archive"),
            (struct.pack("<Q", 200_000_000) + b"{}", "its header ends behind the file"),
            (struct.pack("<Q", 2) + b"[]", "no JSON object"),
            (struct.pack("<Q", 11) + b'{"a": {"b":', "not valid"),
            (struct.pack("<Q", 17) + b'{"a": 1, "a": 2} ', "'a' is there twice"),
            (struct.pack("<Q", 10) + b'{"a": NaN}', "NaN is no number"),
            (struct.pack("<Q", 60_000) + b"[" * 60_000, "nested too deep"),
        ],
    )
    def test_files_that_are_something_else(self, tmp_path, content, says):
        (tmp_path / "model.safetensors").write_bytes(content)
        refuses(lambda: read_header(tmp_path / "model.safetensors"), "no safetensors file", says)

    @pytest.mark.usefixtures("no_graphs")
    def test_a_tensor_of_a_dtype_that_nobody_uses_may_be_there(self, checkpoint_copy, tmp_path):
        file = checkpoint_copy / "model.safetensors"
        weights = load_file(file)
        save_file({**weights, "unused": torch.zeros(3, dtype=torch.uint32)}, file)
        lines: list[str] = []
        export_model(checkpoint_copy, tmp_path / "bundle", report=lines.append)
        assert any("has no place for unused" in line for line in lines)
        save_file({**weights, UP: weights[UP].to(torch.int32)}, file)
        refuses(lambda: export_model(checkpoint_copy, tmp_path / "other"), UP, "int32", "floating point")

    def test_each_header_is_read_once(self, checkpoint_copy, tmp_path, monkeypatch, no_graphs):
        seen: list[Path] = []

        def counted(file: Path) -> Any:
            seen.append(file)
            return read_header(file)

        monkeypatch.setattr("mesart.export.checkpoint_weights.read_header", counted)
        export_model(checkpoint_copy, tmp_path / "bundle")
        assert seen == [checkpoint_copy / "model.safetensors"]


class TestIndex:
    @pytest.fixture
    def shards(self, checkpoint_copy) -> Path:
        weights = load_file(checkpoint_copy / "model.safetensors")
        (checkpoint_copy / "model.safetensors").unlink()
        names = sorted(weights)
        for file, part in {"a.safetensors": names[::2], "b.safetensors": names[1::2]}.items():
            save_file({name: weights[name] for name in part}, checkpoint_copy / file)
        self.write(checkpoint_copy, {n: "ab"[i % 2] + ".safetensors" for i, n in enumerate(names)})
        return Path(checkpoint_copy)

    @staticmethod
    def write(folder: Path, where: Any) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    @pytest.mark.parametrize(
        "entry",
        ["../victim/a.safetensors", "/a.safetensors", "x/../../a.safetensors", "config.json", "", "a\\b", 5, None],
    )
    def test_only_files_of_the_checkpoint(self, shards, entry):
        self.write(shards, {UP: entry})
        refuses(lambda: open_weights(shards), "model.safetensors.index.json", "expected a file")

    @pytest.mark.parametrize("metadata", [{"metadata": ""}, {"metadata": None}])
    def test_metadata_that_transformers_cannot_read(self, shards, metadata):
        path = shards / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"], **metadata}))
        refuses(lambda: open_weights(shards), "metadata is", "must be an object")

    def test_a_link_that_leads_to_itself(self, shards, tmp_path):
        (shards / "a.safetensors").unlink()
        (shards / "a.safetensors").symlink_to("a.safetensors")
        refuses(lambda: export_model(shards, tmp_path / "bundle"), "a.safetensors")

    def test_a_link_may_only_lead_to_the_hubs_blobs(self, shards, tmp_path):
        repository = tmp_path / "models--a--b"
        snapshot, blobs = repository / "snapshots" / "1", repository / "blobs"
        snapshot.parent.mkdir(parents=True)
        shards.rename(snapshot)
        blobs.mkdir()
        for file in [*snapshot.iterdir()]:
            file.rename(blobs / file.name)
            file.symlink_to(Path("..", "..", "blobs", file.name))
        assert UP in open_weights(snapshot).tensors
        (blobs / "a.safetensors").rename(tmp_path / "a.safetensors")
        (snapshot / "a.safetensors").unlink()
        (snapshot / "a.safetensors").symlink_to(tmp_path / "a.safetensors")
        refuses(lambda: open_weights(snapshot), "outside of the checkpoint")

    def test_a_tensor_that_moved_is_found_and_one_that_is_gone_is_named(self, shards):
        where = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
        swapped = {name: {"a.safetensors": "b.safetensors"}.get(file, "a.safetensors") for name, file in where.items()}
        self.write(shards, swapped)
        assert open_weights(shards).tensors.keys() == where.keys()
        self.write(shards, {**where, "gone": "a.safetensors"})
        refuses(lambda: open_weights(shards), "names gone in a.safetensors, which does not hold it")

    def test_a_tensor_in_two_files(self, shards):
        shutil.copy(shards / "a.safetensors", shards / "c.safetensors")
        where = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
        first = next(name for name, file in where.items() if file == "a.safetensors")
        self.write(shards, {**where, first: "c.safetensors"})
        assert open_weights(shards).tensors.keys() == where.keys()
        weights = load_file(shards / "c.safetensors")
        save_file({**weights, first: weights[first] + 1}, shards / "c.safetensors")
        refuses(lambda: open_weights(shards), first, "and differs")

    def test_a_whole_file_beside_an_index_counts(self, shards, checkpoint):
        shutil.copy(checkpoint("tied_llama") / "model.safetensors", shards)
        (shards / "a.safetensors").unlink()
        assert [file.name for file in open_weights(shards).files] == ["model.safetensors"]

    def test_the_config_may_name_the_file(self, shards, checkpoint):
        shutil.copy(checkpoint("tied_llama") / "model.safetensors", shards / "other.safetensors")
        edit_config(shards, transformers_weights="other.safetensors")
        config = load_config(str(shards))
        assert [file.name for file in open_weights(shards, config).files] == ["other.safetensors"]
        config.transformers_weights = "../other.safetensors"
        refuses(lambda: open_weights(shards, config), "transformers_weights is '../other.safetensors'")


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
            ({"num_hidden_layers": 7}, "num_hidden_layers is 7, but the weights have 1"),
            ({"num_hidden_layers": True}, "num_hidden_layers is True"),
            ({"hidden_size": -4}, "hidden_size is -4"),
            ({"vocab_size": 10**6}, "vocab_size is 1000000, but the longest axis"),
            ({"head_dim": 10**6}, "self_attn.q_proj.weight: [32, 32] instead of"),
            ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
            ({"max_position_embeddings": 10**9}, "max_position_embeddings is 1000000000"),
            ({"max_position_embeddings": True}, "max_position_embeddings is true"),
            ({"max_position_embeddings": "64"}, 'max_position_embeddings is "64"'),
            ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
            ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
            ({"hidden_act": "nosuch"}, "'nosuch'"),
            ({"eos_token_id": 1.5}, "eos_token_id"),
            ({"num_attention_heads": 3}, "config.json"),
            ({"num_attention_heads": 0}, "num_attention_heads is 0"),
            ({"num_labels": 10**9}, "num_labels"),
            ({"rope_parameters": {"rope_type": "su", "factor": 2.0}}, "config.json"),
            ({"rope_parameters": []}, "config.json"),
            ({"text_config": 5}, "text_config is 5"),
            ({"sliding_window": 1e9}, "sliding_window is 1000000000.0"),
            ({"text_config": {}}, "text_config is an object"),
            ({"model_type": [1]}, "model_type is a list"),
            ({"model_type": [1], "auto_map": {"AutoConfig": "own.Config"}}, "model_type is a list"),
            ({"auto_map": 5}, "config.json"),
            ({"quantization_config": 5}, "quantization_config is 5"),
        ],
    )
    def test_fields_that_no_model_has(self, checkpoint_copy, tmp_path, no_graphs, changes, says):
        edit_config(checkpoint_copy, **changes)
        refuses(lambda: export_model(checkpoint_copy, tmp_path / "bundle"), says)
        assert not (tmp_path / "bundle").exists()

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"\xff\xfe", "no UTF-8"),
            (b"[" * 10**5, "nested too deep"),
            (b"[]", "a list where"),
            (b'{"a": 1e999}', "inf"),
        ],
    )
    def test_files_that_are_no_config(self, checkpoint_copy, tmp_path, content, says):
        (checkpoint_copy / "config.json").write_bytes(content)
        refuses(lambda: export_model(checkpoint_copy, tmp_path / "bundle"), "config.json", says)

    @pytest.mark.parametrize(
        "changes",
        [
            {"_attn_implementation": "flash_attention_2", "output_attentions": True},
            {"attn_implementation": "someone/kernel", "dtype": "auto"},
            {"torch_dtype": "torch.bfloat16", "device_map": "auto", "quantization_config": None},
            {"return_dict": False, "use_cache": False, "output_hidden_states": True},
        ],
    )
    def test_settings_of_running_are_ignored(self, checkpoint_copy, tmp_path, no_graphs, changes):
        edit_config(checkpoint_copy, **changes)
        bundle = export_model(checkpoint_copy, tmp_path / "bundle")
        written = json.loads((bundle / "config.json").read_text())
        assert not {"_attn_implementation", "attn_implementation", "device_map"} & written.keys()
        assert load_config(str(checkpoint_copy))._attn_implementation is None

    def test_what_a_library_raises_is_one_line_and_the_cause(self):
        for error in (KeyError("x"), RecursionError("deep"), MemoryError(), ZeroDivisionError("by zero\nmore")):
            with pytest.raises(MesaError, match="file: .+") as found, user_data("file"):
                raise error
            assert found.value.__cause__ is error
        with pytest.raises(KeyboardInterrupt), user_data("file"):
            raise KeyboardInterrupt


class TestTies:
    """What transformers 5 makes of a config and weights that do not agree about the language head."""

    def test_two_tables_that_differ_stay_two(self, checkpoint_copy, tmp_path, no_graphs):
        file = checkpoint_copy / "model.safetensors"
        weights = load_file(file)
        embeddings = next(weights[name] for name in ("model.embed_tokens.weight", "lm_head.weight") if name in weights)
        both = {**weights, "model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings.flip(0).contiguous()}
        save_file(both, file, {"format": "pt"})
        bundle = export_model(checkpoint_copy, tmp_path / "bundle")
        found = dict(load_bundle_model(bundle, Manifest.read(bundle)).named_parameters())
        assert torch.equal(found["lm_head.weight"], both["lm_head.weight"])
        assert torch.equal(found["model.embed_tokens.weight"], both["model.embed_tokens.weight"])
        loaded = dict(load_model(checkpoint_copy, "float32").named_parameters())
        assert torch.equal(loaded["lm_head.weight"].detach(), both["lm_head.weight"])

    def test_a_head_that_is_neither_tied_nor_there(self, checkpoint_copy, tmp_path):
        edit_config(checkpoint_copy, tie_word_embeddings=False)
        refuses(lambda: export_model(checkpoint_copy, tmp_path / "bundle"), "lacks the weight")


class TestPickles:
    @pytest.fixture
    def weights(self, checkpoint_copy) -> dict[str, torch.Tensor]:
        weights = load_file(checkpoint_copy / "model.safetensors")
        (checkpoint_copy / "model.safetensors").unlink()
        return weights

    def test_the_format_before_torch_1_6(self, checkpoint_copy, weights):
        file = checkpoint_copy / "pytorch_model.bin"
        torch.save({**weights, "epoch": 3}, file, _use_new_zipfile_serialization=False)
        opened = open_weights(checkpoint_copy)
        assert all(torch.equal(opened.read(opened.tensors[name]), tensor) for name, tensor in weights.items())

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda w: {"state_dict": w}, "under 'state_dict'"),
            (lambda w: [*w.values()], "holds a list"),
            (lambda w: {**w, UP: w[UP].to_sparse()}, "sparse"),
            (lambda w: {**w, UP: w[UP].to("meta")}, "meta"),
        ],
    )
    def test_other_contents(self, checkpoint_copy, weights, change, says):
        torch.save(change(weights), checkpoint_copy / "pytorch_model.bin")
        refuses(lambda: open_weights(checkpoint_copy), "pytorch_model.bin", says)

    def test_a_safetensors_file_of_another_name(self, checkpoint_copy, weights):
        save_file(weights, checkpoint_copy / "pytorch_model.bin")
        refuses(lambda: open_weights(checkpoint_copy), "is a safetensors file")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_named(checkpoint_copy, tmp_path, name, alone):
    (checkpoint_copy / name).write_text("{}")
    if alone:
        (checkpoint_copy / "config.json").unlink()
    refuses(lambda: load_config(str(checkpoint_copy)), name, "merge")


@pytest.mark.parametrize(
    "fields",
    [
        {"quant_method": ["gptq"]},
        {"quant_method": "gptq", "bits": "4", "group_size": 32},
        {"quant_method": "gptq", "bits": 4.0, "group_size": 32},
        {"quant_method": "gptq", "bits": 4, "group_size": [32]},
        {"quant_method": "awq", "bits": True},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": 1}},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {"weights": 5}}},
        {"quant_method": "compressed-tensors", "format": ["pack-quantized"]},
        [],
        "gptq",
    ],
)
def test_fields_of_a_quantisation(fields):
    class Config:
        quantization_config = fields

    refuses(lambda: read_scheme("model", Config()), "model")


class TestHub:
    FILES = (
        *("config.json", "tokenizer.json", "README.md", "original/tokenizer.model", "original/params.json"),
        *("onnx/model.onnx", "original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"),
    )

    @pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json", None])
    def test_each_weight_is_fetched_once(self, monkeypatch, tmp_path, weights):
        from types import SimpleNamespace

        from huggingface_hub.utils._paths import filter_repo_objects

        files = [*self.FILES, "model.fp32-00001-of-00001.safetensors", *([weights] if weights else [])]
        info = SimpleNamespace(sha="1" * 40, siblings=[SimpleNamespace(rfilename=name) for name in files])
        api = SimpleNamespace(model_info=lambda name: info)
        (tmp_path / "index").write_text('{"weight_map": {"a": "model.fp32-00001-of-00001.safetensors"}}')
        index = tmp_path / "model.safetensors.index.json"
        (tmp_path / "index").rename(index)
        asked: list[Any] = []

        def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
            asked.append((name, revision, set(filter_repo_objects(files, allow_patterns=allow_patterns))))
            return os.fspath(tmp_path)

        monkeypatch.setattr(checkpoint_module, "HfApi", lambda: api)
        monkeypatch.setattr(checkpoint_module, "hf_hub_download", lambda *_, **__: os.fspath(index))
        monkeypatch.setattr(checkpoint_module, "snapshot_download", download)
        local_folder("someone/model")
        expected = {
            "model.safetensors": {"model.safetensors"},
            "model.safetensors.index.json": {index.name, "model.fp32-00001-of-00001.safetensors"},
            None: {"pytorch_model.bin"},
        }[weights]
        assert asked == [("someone/model", "1" * 40, {"config.json", "tokenizer.json"} | expected)]

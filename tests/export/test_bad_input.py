"""What export refuses: one line that names the way out, and nothing left behind or lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mesart.export import bundle as bundle_module
from mesart.export import export_model
from mesart.graphs import MesaConfig, MesaError
from mesart.graphs.bundle.manifest import MANIFEST_FILE, Manifest, sha256
from mesart.graphs.model.phase_module import PhaseModule


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The folder that the exports of a test write to, and into which nothing else is put."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def refused(model: Any, work: Path, *says: str, **options: Any) -> None:
    """The export fails with one line that says all of that, and leaves ``work`` as it was."""
    before = contents(work)
    with pytest.raises(MesaError) as error:
        export_model(model, options.pop("output", work / "bundle"), **options)
    message = str(error.value)
    assert "\n" not in message
    for text in says:
        assert text in message
    assert contents(work) == before


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) if path.is_file() else "" for path in folder.rglob("*")}


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestCheckpoint:
    def test_not_there(self, work, tmp_path):
        refused(tmp_path / "nowhere", work, str(tmp_path / "nowhere"))
        refused(tmp_path / "nowhere", work, "does not exist", config=MesaConfig(64))

    def test_no_hub_id_that_loads(self, work):
        refused("nobody/nothing", work, "nobody/nothing")
        refused("nobody/nothing", work, "nobody/nothing", config=MesaConfig(64))

    def test_without_config(self, work, checkpoint_copy):
        (checkpoint_copy / "config.json").unlink()
        refused(checkpoint_copy, work, "holds no config.json")
        refused(checkpoint_copy, work, "holds no config.json", config=MesaConfig(64))

    @pytest.mark.parametrize("config", [None, MesaConfig(64)])
    def test_config_is_broken(self, work, checkpoint_copy, config):
        (checkpoint_copy / "config.json").write_text('{"model_type": "llama",')
        refused(checkpoint_copy, work, "config.json", config=config)

    def test_unknown_model_type(self, work, checkpoint_copy):
        edit_config(checkpoint_copy, model_type="transmogrifier")
        refused(checkpoint_copy, work, "transmogrifier")

    @pytest.mark.parametrize("kind", ["t5", "vit", "clip"])
    def test_no_causal_language_model(self, work, checkpoint_copy, kind):
        edit_config(checkpoint_copy, model_type=kind)
        refused(checkpoint_copy, work, "no causal language model", config=MesaConfig(64))

    def test_an_encoder(self, work, tmp_path):
        from transformers import BertConfig, BertModel

        config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        BertModel(config).save_pretrained(tmp_path / "bert")
        refused(tmp_path / "bert", work, "bert", config=MesaConfig(64))

    def test_no_weights(self, work, checkpoint_copy):
        (checkpoint_copy / "model.safetensors").unlink()
        refused(checkpoint_copy, work, "has no model.safetensors and no pytorch_model.bin")

    def test_a_pickle_with_code_in_it(self, work, checkpoint_copy):
        (checkpoint_copy / "model.safetensors").unlink()
        torch.save({"lm_head.weight": Path("/")}, checkpoint_copy / "pytorch_model.bin")
        refused(checkpoint_copy, work, "pytorch_model.bin is no file of tensors that is safe to load")

    def test_quantised(self, work, checkpoint_copy):
        edit_config(checkpoint_copy, quantization_config={"quant_method": "abracadabra"})
        refused(checkpoint_copy, work, "is quantised (abracadabra), which")

    @pytest.mark.parametrize("keep", [0, 4, 1000, -1])
    def test_truncated(self, work, checkpoint_copy, keep):
        file = checkpoint_copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        refused(checkpoint_copy, work, "model.safetensors is truncated or no safetensors file")

    def test_a_shard_is_missing(self, work, checkpoint_copy):
        weights = load_file(checkpoint_copy / "model.safetensors")
        (checkpoint_copy / "model.safetensors").unlink()
        index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
        (checkpoint_copy / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(checkpoint_copy, work, "has no model-00001-of-00001.safetensors")
        (checkpoint_copy / "model.safetensors.index.json").write_text("{")
        refused(checkpoint_copy, work, "is not a valid index of weights")

    @pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', "null"])
    def test_an_index_of_another_form(self, work, checkpoint_copy, index):
        (checkpoint_copy / "model.safetensors").unlink()  # which would count
        (checkpoint_copy / "model.safetensors.index.json").write_text(index)
        refused(checkpoint_copy, work, "is not a valid index of weights")

    def test_a_weight_is_missing(self, work, checkpoint_copy):
        file = checkpoint_copy / "model.safetensors"
        weights = load_file(file)
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, file, metadata={"format": "pt"})
        refused(checkpoint_copy, work, "lacks the weight model.layers.0.mlp.up_proj.weight")

    def test_a_weight_of_another_shape(self, work, checkpoint_copy):
        edit_config(checkpoint_copy, intermediate_size=40)
        refused(checkpoint_copy, work, "model.layers.0.mlp.")

    def test_an_architecture_without_rotary_embeddings(self, work, make_model, tmp_path):
        make_model("gpt2").save_pretrained(tmp_path / "gpt2")
        refused(tmp_path / "gpt2", work, "GPT2LMHeadModel has no rotary embedding module", "RoPE models")

    def test_an_architecture_that_attends_in_a_way_of_its_own(self, work, make_model, tmp_path):
        make_model("diffllama").save_pretrained(tmp_path / "diffllama")
        refused(tmp_path / "diffllama", work, "layer 0 (DiffLlamaAttention) attends more than once")

    def test_an_architecture_that_onnx_cannot_say(self, work, checkpoint, monkeypatch):
        from transformers.models.llama.modeling_llama import LlamaMLP

        monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: torch.special.airy_ai(x))
        part = "LlamaForCausalLM cannot be traced: model.layers.0.mlp (LlamaMLP): No ONNX function"
        refused(checkpoint("tied_llama"), work, part)


class TestRemoteCode:
    CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""

    @pytest.fixture
    def own(self, checkpoint_copy):
        (checkpoint_copy / "modeling_own.py").write_text(self.CODE)
        classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
        edit_config(checkpoint_copy, model_type="own", architectures=["OwnForCausalLM"], auto_map=classes)
        return checkpoint_copy

    def test_it_is_refused(self, work, own):
        refused(own, work, "brings Python code of its own; read it, and pass --trust-remote-code to run it")

    def test_it_runs_when_it_is_trusted(self, work, own):
        bundle = export_model(own, work / "bundle", max_tokens=10, trust_remote_code=True)
        manifest = Manifest.read(bundle)
        assert manifest.model["architecture"] == "OwnForCausalLM"
        assert manifest.weight_files[0] == "model.safetensors"


class TestOptions:
    def test_unknown_dtype(self, work, checkpoint):
        refused(checkpoint("tied_llama"), work, "unknown dtype 'float8'; there are float32, float16", dtype="float8")

    @pytest.mark.parametrize("max_tokens", [0, -1])
    def test_max_tokens(self, work, checkpoint, max_tokens):
        refused(checkpoint("tied_llama"), work, "it must be at least 1", max_tokens=max_tokens)

    def test_stairs_that_leave_the_trained_range(self, work, checkpoint):
        config = MesaConfig(64, stair_width=3)
        refused(checkpoint("tied_llama"), work, "stair_width = 3", "or more would do", config=config, max_tokens=4096)


class TestOutput:
    def test_a_folder_that_is_no_bundle_is_never_overwritten(self, work, checkpoint):
        (work / "bundle").mkdir()
        (work / "bundle" / "thesis.txt").write_text("ten years")
        refused(checkpoint("tied_llama"), work, "exists and is no bundle", "--force")

    def test_a_file_is_never_overwritten(self, work, checkpoint):
        (work / "bundle").write_text("ten years")
        refused(checkpoint("tied_llama"), work, "is a file", "--force")

    def test_a_parent_that_is_a_file(self, work, checkpoint):
        (work / "file").write_text("ten years")
        refused(checkpoint("tied_llama"), work, "file", output=work / "file" / "bundle")

    @pytest.mark.parametrize("force", [False, True])
    def test_the_checkpoint_is_never_overwritten(self, work, checkpoint_copy, force):
        source = work / "checkpoint"
        shutil.copytree(checkpoint_copy, source)
        for output in (source, work, source / "out"):
            refused(source, work, "the source", output=output, force=force)

    def test_no_name_at_all(self, work, checkpoint, monkeypatch):
        """It would mean the working folder, with --force too."""
        monkeypatch.chdir(work)
        (work / "thesis.txt").write_text("ten years")
        refused(checkpoint("tied_llama"), work, "'' is no name of a folder", output="", force=True)

    def test_too_little_space_is_noticed_before_the_work(self, work, checkpoint, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1 << 20))
        monkeypatch.setattr(bundle_module, "_trace", lambda *_: pytest.fail("traced although the disk is full"))
        refused(checkpoint("tied_llama"), work, "has 1 MiB free, the bundle needs about")


@pytest.fixture
def no_graphs(monkeypatch):
    """Exports without the ten seconds that tracing takes: a bundle with no graphs."""
    monkeypatch.setattr(
        bundle_module, "_trace", lambda model, config, *_: bundle_module._Graphs(PhaseModule(model, config))
    )


def fail_with(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.usefixtures("no_graphs")
class TestAllOrNothing:
    FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # As safetensors reports a full disk.
    FULL_WEIGHTS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    @pytest.mark.parametrize(
        ("stage", "error"),
        [("weights.write_file", FULL_WEIGHTS), ("weights.write_file", FULL), ("bundle.sha256", FULL)],
        ids=str,
    )
    def test_the_disk_fills_up(self, work, checkpoint, monkeypatch, stage, error):
        monkeypatch.setattr(f"mesart.export.{stage}", fail_with(error))
        refused(checkpoint("tied_llama"), work, "the disk is full", "MiB")

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("unforeseen")])
    def test_whatever_happens_the_old_bundle_stays(self, work, checkpoint, monkeypatch, error):
        export_model(checkpoint("tied_llama"), work / "bundle")
        before = contents(work)
        with monkeypatch.context() as patch:
            patch.setattr(bundle_module, "sha256", fail_with(error))  # all but the manifest is written then
            with pytest.raises(type(error)):
                export_model(checkpoint("tied_llama"), work / "bundle", dtype="float16")
        assert contents(work) == before
        export_model(checkpoint("tied_llama"), work / "bundle", dtype="float16")
        assert Manifest.read(work / "bundle").dtype == "float16"
        assert [path.name for path in work.iterdir()] == ["bundle"]

    def test_the_old_bundle_stays_if_the_new_one_cannot_take_its_place(self, work, checkpoint, monkeypatch):
        export_model(checkpoint("tied_llama"), work / "bundle")
        before = contents(work)
        rename = Path.rename

        def refuse_the_new_one(self: Path, target: Path) -> Path:
            if self.name == "new":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse_the_new_one)
        with pytest.raises(MesaError, match=f"cannot write .*: {os.strerror(errno.EIO)}"):
            export_model(checkpoint("tied_llama"), work / "bundle", dtype="float16")
        assert contents(work) == before

    def test_force_replaces_what_is_there(self, work, checkpoint):
        (work / "bundle").mkdir()
        (work / "bundle" / "draft.txt").write_text("an hour")
        export_model(checkpoint("tied_llama"), work / "bundle", force=True)
        Manifest.read(work / "bundle").verify(work / "bundle")
        assert not (work / "bundle" / "draft.txt").exists()
        assert [path.name for path in work.iterdir()] == ["bundle"]

    def test_an_empty_folder_may_be_the_output(self, work, checkpoint):
        (work / "bundle").mkdir()
        assert export_model(checkpoint("tied_llama"), work / "bundle") == work / "bundle"
        assert (work / "bundle" / MANIFEST_FILE).is_file()


def test_a_killed_export_leaves_nothing_that_loads(work, checkpoint, monkeypatch):
    """The process is killed when all but the manifest is written; the next export clears what it has left."""
    code = """
import os, signal, sys
from mesart.export import bundle
from mesart.graphs.model.phase_module import PhaseModule
bundle._trace = lambda model, config, *_: bundle._Graphs(PhaseModule(model, config))
bundle.sha256 = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
bundle.export_model(sys.argv[1], sys.argv[2])
"""
    arguments = [os.fspath(checkpoint("tied_llama")), os.fspath(work / "bundle")]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], check=False, timeout=300, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (left,) = work.iterdir()
    with pytest.raises(MesaError, match="is no bundle"):
        Manifest.read(left)
    monkeypatch.setattr(bundle_module, "_trace", fail_with(MesaError("later")))
    lines: list[str] = []
    with pytest.raises(MesaError, match="later"):
        export_model(checkpoint("tied_llama"), work / "bundle", report=lines.append)
    assert any(f"removed {left}" in line for line in lines)
    assert not list(work.iterdir())

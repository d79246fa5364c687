"""A bundle that is another one than was meant, or that changes while a model has it open."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import onnx
import pytest

from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import Manifest
from mesart.runtime import MesaModel

PROMPT = [(i * 37 + 11) % 320 for i in range(100)]


def overwrite(path):
    """In place, as ``cp`` does over a hard link."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)


class TestChanges:
    @pytest.mark.parametrize("specialised", [False, True])
    def test_weights_that_are_overwritten(self, bundle_copy, specialised):
        with MesaModel.load(bundle_copy, "onnxruntime", threads=1, specialised=specialised) as model:
            model.prefill(PROMPT)
            overwrite(bundle_copy / model.manifest.weight_files[0])
            with pytest.raises(MesaError, match="has changed since the bundle was loaded; load it again"):
                model.prefill(PROMPT)

    def test_a_graph_that_is_opened_late(self, bundle_copy):
        with MesaModel.load(bundle_copy, "onnxruntime", threads=1, specialised=True) as model:
            (bundle_copy / "chunk.onnx").write_bytes((bundle_copy / "prefix.onnx").read_bytes())
            with pytest.raises(MesaError, match=r"chunk\.onnx has changed since the bundle was loaded; load it again"):
                model.prefill(PROMPT)

    def test_what_is_open_needs_no_folder(self, bundle_copy):
        with MesaModel.load(bundle_copy, "onnxruntime", threads=1) as model:
            before = model.prefill(PROMPT)
            shutil.rmtree(bundle_copy)
            assert np.array_equal(model.prefill(PROMPT), before)
            assert model.tokenizer.decode(model.tokenizer.encode("The sky is blue.")) == "The sky is blue."
            assert model.default_sampling.temperature == 0
            assert model.eos_token_ids

    def test_texts_are_those_that_were_verified(self, bundle_copy):
        with MesaModel.load(bundle_copy, "torch") as model:
            path = bundle_copy / "tokenizer.json"
            fields = json.loads(path.read_text())
            path.write_text(json.dumps({**fields, "model": {**fields["model"], "merges": []}}))
            assert len(model.tokenizer.encode("The grass is green.")) < len("The grass is green.")

    def test_a_text_that_is_not_listed_is_not_read(self, bundle_copy):
        (bundle_copy / "special_tokens_map.json").write_text("no JSON")
        with MesaModel.load(bundle_copy, "torch") as model:
            assert model.tokenizer.encode("The")


class TestDigest:
    def test_the_right_one(self, bundle):
        digest = Manifest.read(bundle()).digest
        MesaModel.load(bundle(), "onnxruntime", threads=1, digest=digest).close()

    @pytest.mark.parametrize(
        ("digest", "verify", "says"),
        [
            ("sha256:" + "0" * 64, True, "is not the bundle that was asked for: its digest is sha256:"),
            ("0" * 64, True, "give what `mesart inspect --digest` prints"),
            (None, False, "verify=False does not read"),
        ],
    )
    def test_refused(self, bundle, digest, verify, says):
        digest = digest or Manifest.read(bundle()).digest
        with pytest.raises(MesaError, match=says):
            MesaModel.load(bundle(), "onnxruntime", digest=digest, verify=verify)


class TestGraphs:
    """Graphs that are not what the manifest says, which has their hashes all the same."""

    @pytest.mark.parametrize(
        ("backend", "file", "shape"),
        [("onnxruntime", "model-grouped.onnx", "[B, S]"), ("openvino", "model-paged.onnx", "[1, S]")],
    )
    def test_another_graph(self, bundle_copy, reseal, backend, file, shape):
        shutil.copyfile(bundle_copy / "tail-0.onnx", bundle_copy / file)
        reseal(bundle_copy, file)
        says = f"has an input input_ids of shape [1, 64], the manifest says {shape}"
        with pytest.raises(MesaError, match=re.escape(says)):
            MesaModel.load(bundle_copy, backend, threads=1)

    def test_weights_in_another_file(self, bundle_copy, reseal):
        file = "model-grouped.onnx"
        model = onnx.load(bundle_copy / file, load_external_data=False)
        for weight in model.graph.initializer:
            for entry in weight.external_data:
                if entry.key == "location":
                    entry.value = "tokenizer.json"
        (bundle_copy / file).write_bytes(model.SerializeToString())
        reseal(bundle_copy, file)
        with pytest.raises(MesaError, match=r"has weights in 'tokenizer\.json', which is no weight file of the bundle"):
            MesaModel.load(bundle_copy, "onnxruntime", threads=1)


class TestCode:
    """Python that a bundle brings."""

    @pytest.fixture
    def coded(self, bundle_copy, reseal):
        config = json.loads((bundle_copy / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
        (bundle_copy / "config.json").write_text(json.dumps(config))
        (bundle_copy / "own.py").write_text(
            "import pathlib\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
            f"pathlib.Path({str(bundle_copy.parent / 'ran')!r}).touch()\n"
            "class Config(LlamaConfig):\n    model_type = 'own'\n"
            "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        )
        reseal(bundle_copy, "config.json", "own.py")
        return bundle_copy

    def test_it_does_not_run(self, coded, monkeypatch):
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        with pytest.raises(MesaError, match="brings Python code of its own, .*; read it, and pass --trust-remote-code"):
            MesaModel.load(coded, "torch")
        MesaModel.load(coded, "onnxruntime", threads=1).close()  # which needs none
        assert not (coded.parent / "ran").exists()

    def test_it_runs_when_it_is_trusted(self, coded):
        with MesaModel.load(coded, "torch", trust_remote_code=True) as model:
            model.prefill([3, 4])
        assert (coded.parent / "ran").exists()

    def test_what_is_not_listed_never_runs(self, coded):
        (coded / "more.py").write_text("")
        with pytest.raises(MesaError, match=r"more\.py is none of the bundle's files, and could run; remove it"):
            MesaModel.load(coded, "torch", trust_remote_code=True)
        assert not (coded.parent / "ran").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**6},
        {"vocab_size": 7},
        {"hidden_act": "wavy"},
        {"hidden_size": "x"},
        {"model_type": "x"},
    ],
    ids=str,
)
def test_a_config_that_makes_another_model(bundle_copy, reseal, fields):
    config = json.loads((bundle_copy / "config.json").read_text())
    (bundle_copy / "config.json").write_text(json.dumps({**config, **fields}))
    reseal(bundle_copy, "config.json")
    with pytest.raises(MesaError, match=r"config\.json") as error:
        MesaModel.load(bundle_copy, "torch")
    assert "\n" not in str(error.value)

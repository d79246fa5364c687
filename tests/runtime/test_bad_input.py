"""What the runtime refuses: one line that names the way out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import MANIFEST_FILE, Manifest
from mesart.runtime import MesaModel, present_backends


@pytest.fixture
def model(bundle) -> Iterator[MesaModel]:
    with MesaModel.load(bundle(), "torch", verify=False) as loaded:
        yield loaded


def one_line(error: pytest.ExceptionInfo[MesaError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


class TestBundle:
    def test_no_folder(self, tmp_path):
        with pytest.raises(MesaError, match=r"is no bundle: it holds no manifest\.json; make one with `mesart export`"):
            MesaModel.load(tmp_path / "nowhere")

    def test_a_checkpoint_is_no_bundle(self, checkpoint):
        with pytest.raises(MesaError, match="make one with `mesart export`"):
            MesaModel.load(checkpoint("llama"))

    def test_every_file_is_needed(self, bundle_copy):
        for path in sorted(bundle_copy.iterdir()):
            content = path.read_bytes()
            path.unlink()
            with pytest.raises(MesaError, match=path.name) as error:
                MesaModel.load(bundle_copy)
            one_line(error)
            path.write_bytes(content)

    def test_every_file_must_be_whole(self, bundle_copy):
        for path in sorted(bundle_copy.iterdir()):
            content = path.read_bytes()
            path.write_bytes(content[:-1] if path.name != MANIFEST_FILE else content[:-20])
            with pytest.raises(MesaError, match=path.name) as error:
                MesaModel.load(bundle_copy, verify=False)
            one_line(error)
            path.write_bytes(content)

    def test_every_file_must_be_as_it_was_written(self, bundle_copy):
        for path in sorted(bundle_copy.iterdir()):
            if path.name == MANIFEST_FILE:
                continue
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(MesaError, match=f"{path.name} was altered") as error:
                MesaModel.load(bundle_copy)
            one_line(error)
            path.write_bytes(content)

    def test_a_newer_schema(self, bundle_copy):
        path = bundle_copy / MANIFEST_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
        with pytest.raises(MesaError, match="has schema 99, .*; upgrade mesart") as error:
            MesaModel.load(bundle_copy)
        one_line(error)

    @pytest.mark.parametrize("backend", present_backends())
    def test_nan_in_the_logits(self, bundle_copy, backend):
        file = bundle_copy / Manifest.read(bundle_copy).weight_files[0]
        weights = load_file(file)
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
        save_file(weights, file, metadata={"format": "pt"})
        with (
            MesaModel.load(bundle_copy, backend, verify=False) as model,
            pytest.raises(MesaError, match="NaN in the logits of the tail: .*`mesart validate`") as error,
        ):
            model.prefill([3, 4, 5])
        one_line(error)


class TestPrompt:
    @pytest.mark.parametrize("prompt", [[], [[]], [[3], []], np.zeros((1, 0), int), np.zeros((0, 5), int)], ids=str)
    def test_empty(self, model, prompt):
        with pytest.raises(MesaError, match="the prompt is empty; give at least one token"):
            model.prefill(prompt)

    @pytest.mark.parametrize("text", ["", []])
    def test_empty_text(self, model, text):
        with pytest.raises(MesaError, match="the prompt is empty"):
            model.generate(text)

    @pytest.mark.parametrize("token", [-1, 320, 2**40])
    def test_outside_the_vocabulary(self, model, token):
        for call in (model.prefill, model.extend, model.step):
            model.prefill([3, 4])
            argument = token if call == model.step else [3, token]
            with pytest.raises(MesaError, match=f"token id {token} is outside the vocabulary of 320") as error:
                call(argument)
            one_line(error)

    @pytest.mark.parametrize(
        "prompt", [[1.5, 2.0], ["a", "b"], [[[1, 2]]], [[1, 2], [1.5]], [True, False], None, 3.5], ids=str
    )
    def test_no_token_ids(self, model, prompt):
        with pytest.raises(MesaError, match="token ids must be integers") as error:
            model.prefill(prompt)
        one_line(error)

    def test_too_long(self, model):
        with pytest.raises(MesaError, match="345 tokens is longer than the largest bucket of this bundle, 344 tokens;"
                           " export again with --max-tokens 345"):  # fmt: skip
            model.prefill([3] * 345)

    def test_a_first_turn_that_is_too_long(self, bundle):
        """Appended to nothing, it is a first prompt."""
        with (
            MesaModel.load(bundle(), "torch", verify=False) as fresh,
            pytest.raises(MesaError, match="export again with --max-tokens 345"),
        ):
            fresh.extend([3] * 345)

    def test_a_million_tokens(self, model):
        with pytest.raises(MesaError, match="export again with --max-tokens 1000000"):
            model.prefill(np.full(10**6, 3))

    def test_step_without_a_prompt(self, model):
        with pytest.raises(MesaError, match="call prefill first"):
            model.step(3)

    def test_another_number_of_rows(self, model):
        model.prefill([[3, 4], [5, 6]])
        for call in (model.extend, model.step):
            with pytest.raises(MesaError, match="the cache holds 2 prompts, got tokens for 1"):
                call([3])

    def test_all_logits_of_tails_of_different_lengths(self, model):
        with pytest.raises(MesaError, match="run the prompts one by one"):
            model.prefill([[3, 4], [5, 6, 7]], all_logits=True)

    def test_all_logits_of_specialised_graphs(self, bundle):
        with (
            MesaModel.load(bundle(), "onnxruntime", specialised=True) as model,
            pytest.raises(MesaError, match="all_logits") as error,
        ):
            model.prefill([3, 4, 5], all_logits=True)
        one_line(error)

    @pytest.mark.parametrize("token", ["x", 2.5, None, {}, [[1], [2, 3]], 10**30, b"ab", True], ids=repr)
    def test_a_step_by_no_token(self, model, token):
        model.prefill([3, 4])
        with pytest.raises(MesaError, match="token ids must be integers") as error:
            model.step(token)
        one_line(error)

    @pytest.mark.parametrize("prompt", [[1, [2, 3]], [[1, [2]], [3]], {3: 4}, 10**30, "text", [10**30]], ids=repr)
    def test_prompts_that_numpy_makes_nothing_of(self, model, prompt):
        for call in (model.prefill, lambda ids: next(model.generate_ids(ids, 2))):
            with pytest.raises(MesaError, match="token ids must be integers") as error:
                call(prompt)
            one_line(error)

    @pytest.mark.parametrize("prompt", [[1.5], [None], 5.5, None, b"text", ["text", 3], [[3, 4], [5, 6]]], ids=repr)
    def test_no_text(self, model, prompt):
        with pytest.raises(
            MesaError, match="token ids must be integers|a batch is a list of texts|one list of tok"
        ) as error:
            model.generate(prompt, 2)
        one_line(error)

    @pytest.mark.parametrize("count", [2.5, "3", True, None, [3]], ids=repr)
    def test_no_number_of_new_tokens(self, model, count):
        with pytest.raises(MesaError, match="max_new_tokens is .*; it must be a whole number") as error:
            model.generate([3, 4], count)
        one_line(error)

    @pytest.mark.parametrize("count", [0, -1])
    def test_no_new_tokens(self, model, count):
        with pytest.raises(MesaError, match="max_new_tokens is .*; it must be at least 1"):
            model.generate([3, 4], count)

    def test_an_unknown_option(self, model):
        with pytest.raises(MesaError, match="unknown sampling option: .*warmth") as error:
            model.generate([3, 4], 2, warmth=3)
        one_line(error)

    def test_a_closed_model(self, bundle):
        model = MesaModel.load(bundle(), "torch", verify=False)
        model.prefill([3])
        model.close()
        calls: list[Any] = [
            lambda: model.prefill([3]),
            lambda: model.extend([3]),
            lambda: model.step(3),
            lambda: model.generate([3]),
            lambda: model.snapshot(0),
        ]
        for call in calls:
            with pytest.raises(MesaError, match="the model was closed; load it again"):
                call()

    def test_no_tokenizer(self, bundle_copy):
        manifest = Manifest.read(bundle_copy)
        kept = {name: info for name, info in manifest.files.items() if "token" not in name}
        for name in manifest.files.keys() - kept.keys():
            (bundle_copy / name).unlink()
        replace(manifest, files=kept).write(bundle_copy)
        with MesaModel.load(bundle_copy, "torch") as model:
            assert len(list(model.generate_ids([[3, 4]], 3))) == 3  # driven by ids it needs none
            with pytest.raises(MesaError, match=r"tokenizer\.json") as error:
                model.generate("text")
        one_line(error)


def test_specialised_graphs_end_with_the_largest_bucket(bundle):
    with MesaModel.load(bundle(), "onnxruntime", specialised=True) as model:
        model.prefill([3] * 343)
        model.step(3)
        with pytest.raises(MesaError, match="more than the largest bucket's 344; export again with a larger --max-tok"):
            model.step(3)
        assert model.lengths == [344]

"""Which runner a bundle gets on a backend, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mesart.graphs import MesaConfig
from mesart.graphs.errors import EngineError, InputError
from mesart.runtime import MesaModel, present_backends
from mesart.runtime.kv.paged import PagedStore
from mesart.runtime.load import load_bundle
from mesart.runtime.runners.grouped import GroupedRunner
from mesart.runtime.runners.paged import PagedRunner
from mesart.runtime.runners.runner import require_keys
from mesart.runtime.runners.unfused import UnfusedRunner

needs_openvino = pytest.mark.skipif("openvino" not in present_backends(), reason="openvino is not installed")
needs_onnxruntime = pytest.mark.skipif("onnxruntime" not in present_backends(), reason="onnxruntime is not installed")


def tokens(count: int) -> list[int]:
    ids: list[int] = np.random.default_rng(0).integers(2, 320, count).tolist()
    return ids


@pytest.mark.parametrize(
    ("backend", "family", "runner"),
    [
        pytest.param("openvino", "llama", PagedRunner, marks=needs_openvino),
        pytest.param("openvino", "gemma2", UnfusedRunner, marks=needs_openvino),  # capped scores, windows
        pytest.param("onnxruntime", "llama", GroupedRunner, marks=needs_onnxruntime),
        pytest.param("onnxruntime", "gemma2", UnfusedRunner, marks=needs_onnxruntime),
        ("torch", "llama", UnfusedRunner),
    ],
)
def test_a_model_runs_in_place_where_its_attention_and_the_engine_allow_it(bundle, backend, family, runner):
    with MesaModel.load(bundle(family), backend, verify=False) as model:
        assert type(model.engine.runner) is runner
        assert model.choice == "asked for"


@needs_openvino
def test_without_the_operator_the_unfused_graph_runs_and_says_so(bundle, monkeypatch):
    import openvino

    with MesaModel.load(bundle(), "openvino", verify=False) as model:
        expected = model.prefill(tokens(150))
    monkeypatch.delattr(openvino.op, "_PagedAttentionExtension")
    with MesaModel.load(bundle(), "openvino", verify=False) as model:
        assert type(model.engine.runner) is UnfusedRunner
        assert "without paged attention: OpenVINO" in model.choice
        assert "has no operator for paged attention" in model.choice
        assert np.abs(model.prefill(tokens(150)) - expected).max() < 1e-4


@needs_openvino
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_keys_are_kept_in_the_dtype_of_the_bundle_or_not_paged(bundle, dtype):
    with MesaModel.load(bundle("llama", dtype), "openvino", verify=False) as model:
        store = model.engine.store
        if isinstance(store, PagedStore):
            assert store.keys[0].array.dtype.itemsize == 2
        else:
            assert "without paged attention" in model.choice
        model.prefill(tokens(150))
        model.extend(tokens(30))


@needs_openvino
class TestKeysAndValuesInFloat16:
    """Of a float32 bundle, where it is asked for."""

    def test_half_the_memory_and_nearly_the_numbers(self, bundle):
        """In a prompt with chunks, a turn behind it, and steps past the trained positions, where keys move."""
        found = []
        for kv_dtype in (None, "float16"):
            with MesaModel.load(bundle(), "openvino", verify=False, kv_dtype=kv_dtype) as model:
                store = model.engine.store
                assert isinstance(store, PagedStore)
                logits = [model.prefill(tokens(150)), model.extend(tokens(30)), *(model.step(5) for _ in range(70))]
                found.append((store.keys[0].array.dtype.name, store.bytes_per_token, np.stack(logits), model.choice))
        (dtype, size, exact, _), (half, half_size, rounded, choice) = found
        assert (dtype, half) == ("float32", "float16")
        assert half_size * 2 == size
        assert "keys and values in float16" in choice
        assert 0 < np.abs(rounded - exact).max() < 5e-3 * np.abs(exact).max()

    @pytest.mark.parametrize(
        ("backend", "family", "dtype", "specialised", "why"),
        [
            ("onnxruntime", "llama", "float32", False, "backend 'onnxruntime' keeps them"),
            ("torch", "llama", "float32", False, "backend 'torch' keeps them"),
            ("tensorrt", "llama", "float32", False, "backend 'tensorrt' keeps them"),
            ("openvino", "llama", "float32", True, "the graphs of fixed shapes"),
            ("openvino", "llama", "bfloat16", False, "the bundle computes in bfloat16"),
            ("auto", "gemma2", "float32", False, "this model's attention is not paged"),
        ],
    )
    def test_who_cannot_says_so(self, bundle, backend, family, dtype, specialised, why):
        with pytest.raises(InputError, match=f"OpenVINO's paged attention: {why}.*; leave kv_dtype out"):
            MesaModel.load(bundle(family, dtype), backend, verify=False, specialised=specialised, kv_dtype="float16")

    def test_another_dtype(self, bundle):
        with pytest.raises(InputError, match="kept in float16 or the bundle's dtype: 'int8'"):
            MesaModel.load(bundle(), "openvino", verify=False, kv_dtype="int8")  # type: ignore[arg-type]

    def test_no_other_graph_steps_in(self, bundle, monkeypatch):
        import openvino

        monkeypatch.delattr(openvino.op, "_PagedAttentionExtension")
        with pytest.raises(EngineError, match="no operator for paged attention"):
            MesaModel.load(bundle(), "openvino", verify=False, kv_dtype="float16")

    def test_numbers_that_overflow(self, bundle):
        with MesaModel.load(bundle(), "openvino", verify=False) as model:
            large = np.full((2, 2), 7e4, np.float32)
            require_keys([large], "tail", model.manifest)
            with np.errstate(over="ignore"), pytest.raises(EngineError, match="float16 overflows; leave kv_dtype out"):
                require_keys([large.astype(np.float16)], "tail", model.manifest, "float16")


@pytest.mark.parametrize("memory", ["", "2x", "-1", "0", 0, -5, True, 1.5, "1" * 40, "GiB", []])
def test_sizes_that_are_none(bundle, memory):
    with pytest.raises(InputError, match="kv_memory is .*; give a number of bytes above 0, or a text such as '2GiB'"):
        MesaModel.load(bundle(), "torch", verify=False, kv_memory=memory)


@pytest.mark.parametrize(
    ("memory", "size"), [("1MiB", 1 << 20), ("2 M", 2 << 20), ("1.5mib", 3 << 19), (1 << 20, 1 << 20)]
)
def test_sizes_as_people_write_them(bundle, memory, size):
    with MesaModel.load(bundle(), "torch", verify=False, kv_memory=memory) as model:
        assert model.engine.store.free_bytes == size


@needs_onnxruntime
def test_a_bundle_runs_other_configurations_of_its_trained_length(bundle, mesa_config):
    _, loaded = load_bundle(bundle(), "onnxruntime", verify=False)
    changed = loaded.under(replace(mesa_config, chunk_length=24), 500)
    assert changed.store is loaded.store
    assert changed.runner is loaded.runner
    assert changed.manifest.config == replace(mesa_config, chunk_length=24)
    assert changed.manifest.buckets[-1].max_tokens >= 500 > loaded.manifest.buckets[-1].max_tokens
    with pytest.raises(InputError, match="tables are for train_length = 64"):
        loaded.under(MesaConfig(128), 100)
    _, fixed = load_bundle(bundle(), "onnxruntime", specialised=True, verify=False)
    with pytest.raises(InputError, match="graphs of fixed shapes"):
        fixed.under(mesa_config, 100)

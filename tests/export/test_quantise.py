"""Quantised weights: the numbers themselves, and bundles that hold them on every engine."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mesart.evaluation.validate import validate
from mesart.export import build_engines, export_model
from mesart.export.quantise import GROUP_SIZES, choose_quantisation, pending, quantise
from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import Manifest, Quantisation
from mesart.graphs.model.torch_graph import load_bundle_model
from mesart.graphs.model.torch_weights import dequantise
from mesart.runtime import MesaModel
from mesart.runtime.backends import OnnxRuntimeBackend
from mesart.scripts.cli import summary

SCHEMES = st.builds(
    Quantisation, *(st.just(x) for x in ("int4", 4)), st.sampled_from([16, 32]), st.booleans()
) | st.builds(Quantisation, st.just("int8"), st.just(8), st.sampled_from([None, 16]), st.booleans())


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """``[out, in]``: odd numbers of outputs too, blocks of zeros, weights of one sign."""
    outputs, inputs = draw(st.integers(1, 5)), 32 * draw(st.integers(1, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-4, 4))
    weight = generator.standard_normal((outputs, inputs)) * scale
    weight = {"any": weight, "positive": abs(weight), "zero": 0 * weight}[
        draw(st.sampled_from(["any", "positive", "zero"]))
    ]
    return torch.from_numpy(weight).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


class TestNumbers:
    @given(weights(), SCHEMES)
    def test_error_is_half_a_scale(self, weight, how):
        packed = quantise(weight, how)
        groups = weight.shape[1] // (how.group_size or weight.shape[1])
        scales = packed.scales.float().reshape(groups, -1).t().repeat_interleave(weight.shape[1] // groups, 1)
        error = (weight.float() - dequantise(packed, tuple(weight.shape), how).float()).abs()
        # A scale of 8 bits may be rounded down, and a product of 8 bits is rounded.
        allowed = scales / 2 + weight.float().abs() * (1e-5 if weight.dtype == torch.float32 else 2**-7)
        assert (error <= allowed).all()

    @given(weights(), SCHEMES)
    def test_round_trip(self, weight, how):
        packed = quantise(weight.float(), how)
        once = dequantise(packed, tuple(weight.shape), how)
        again = quantise(once, how)
        assert torch.allclose(dequantise(again, tuple(weight.shape), how), once, rtol=1e-5, atol=0)

    @given(weights(), SCHEMES)
    def test_onnx_reads_them_the_same(self, weight, how):
        """The packing is ONNX's own: its reference unpacks the same numbers."""
        packed = quantise(weight, how)
        kind = {(8, True): "INT8", (8, False): "UINT8", (4, True): "INT4", (4, False): "UINT4"}[how.bits, how.symmetric]
        shape = ir.Shape(tuple(reversed(weight.shape)))
        stored = packed.numbers.numpy().reshape(-1)
        tensor = ir.PackedTensor if how.bits == 4 else ir.Tensor
        numbers = tensor(
            stored if how.bits == 4 else stored.reshape(shape.numpy()), ir.DataType[kind], shape=shape
        ).numpy()
        scale = packed.scales.float().numpy().reshape(-1, 1, weight.shape[0])
        zeros = np.zeros_like(scale)
        if packed.zero_points is not None:
            raw = packed.zero_points.numpy().reshape(-1)
            flat = ir.Shape((scale.size,))
            zeros = tensor(raw, ir.DataType[kind], shape=flat).numpy().astype(np.float32).reshape(scale.shape)
        whole = (numbers.astype(np.float32).reshape(len(scale), -1, weight.shape[0]) - zeros) * scale
        expected = torch.from_numpy(whole.reshape(weight.shape[1], -1).T.copy()).to(weight.dtype)
        assert torch.equal(expected, dequantise(packed, tuple(weight.shape), how))

    @given(weights(), SCHEMES)
    def test_experts_are_quantised_one_by_one(self, weight, how):
        stack = torch.stack([weight, -3 * weight, 0 * weight])
        packed = quantise(stack, how)
        each = [quantise(expert, how) for expert in stack]
        for i, expert in enumerate(each):
            assert torch.equal(packed.numbers[i], expert.numbers)
            assert torch.equal(packed.scales[i], expert.scales)
            assert (packed.zero_points is None) == (expert.zero_points is None)
            if packed.zero_points is not None and expert.zero_points is not None:
                assert torch.equal(packed.zero_points[i], expert.zero_points)
        whole = torch.stack([dequantise(expert, tuple(weight.shape), how) for expert in each])
        assert torch.equal(dequantise(packed, tuple(stack.shape), how), whole)
        parts = pending("w", tuple(stack.shape), stack.dtype, lambda: packed, how)
        assert len(parts) == (2 if how.symmetric else 3)
        for part in parts.values():
            made = part.make()
            assert (made.dtype, tuple(made.shape)) == (part.dtype, part.shape)

    def test_zero_stays_zero(self):
        weight = torch.randn(8, 32)
        weight[:, ::3] = 0
        for how in (Quantisation("int4", 4, 32, symmetric=False), Quantisation("int8", 8, None, symmetric=True)):
            assert (dequantise(quantise(weight, how), (8, 32), how)[:, ::3] == 0).all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("scheme", "group_size", "symmetric", "says"),
        [
            ("int3", None, True, "unknown quantisation 'int3'; there are int8, int4"),
            ("int4", 48, True, "engines take groups of 16, 32, 64, 128, 256 inputs, not of 48"),
            (None, 32, True, "belong to a quantisation; give --quantise"),
            (None, None, False, "belong to a quantisation; give --quantise"),
        ],
    )
    def test_options(self, scheme, group_size, symmetric, says):
        with pytest.raises(MesaError, match="^[^\n]*$") as error:
            choose_quantisation(scheme, group_size, symmetric=symmetric)
        assert says in str(error.value)

    @pytest.mark.parametrize(
        ("family", "weight"),
        [("tied_llama", "down_proj.weight"), ("mixtral", "experts.down_proj"), ("gpt_oss", "experts.down_proj")],
    )
    def test_groups_that_do_not_divide(self, checkpoint, mesa_config, tmp_path, family, weight):
        """Says which layer, and which group would do; leaves nothing."""
        with pytest.raises(MesaError, match=rf"groups of 32 do not divide the 48 inputs of .*{weight}; 16 "):
            export_model(checkpoint(family), tmp_path / "b", mesa_config, max_tokens=64, quantise="int4")
        assert not list(tmp_path.iterdir())

    def test_zero_points_on_tensorrt(self, bundle, tmp_path):
        folder = shutil.copytree(bundle("wide_llama", "bfloat16"), tmp_path / "bundle")
        how = Quantisation("int4", 4, 16, symmetric=False)
        replace(Manifest.read(folder), quantisation=how).write(folder)
        with pytest.raises(MesaError, match="takes no quantised weights with zero points; export again without"):
            build_engines(folder, "tensorrt-rtx", "sm89", progress=False)


@pytest.fixture(scope="module")
def quantised(checkpoint, shared_folder, mesa_config) -> Callable[..., Path]:
    """``quantised(family, dtype, scheme, group_size, symmetric)``: a bundle with buckets of 0 and 2 chunks."""

    def make(family: str, dtype: str, scheme: str, group_size: int | None, *, symmetric: bool = True) -> Path:
        def export(folder: Path) -> None:
            export_model(
                checkpoint(family),
                folder,
                mesa_config,
                max_tokens=104,
                dtype=dtype,
                quantise=scheme,
                group_size=group_size,
                symmetric=symmetric,
            )

        return shared_folder(f"{family}-{dtype}-{scheme}-{group_size}-{symmetric}-bundle", export)

    return make


BUNDLES = {
    "int4": ("tied_llama", "float32", "int4", 16, True),  # the table of embeddings is the head too
    "int4 asymmetric": ("qwen2", "float32", "int4", 16, False),  # biases
    "int8": ("llama", "float32", "int8", None, True),
    "int4 experts": ("mixtral", "float32", "int4", 16, True),
    "int8 experts asymmetric": ("deepseek_v3", "float32", "int8", None, False),  # some weights have as many in as out
    "int4 transposed experts asymmetric": ("gpt_oss", "float32", "int4", 16, False),  # weights [E, in, out], biases
    "int8 transposed experts": ("gpt_oss", "float32", "int8", None, True),
}


@pytest.fixture(params=BUNDLES)
def each(request, quantised) -> Path:
    family, dtype, scheme, group_size, symmetric = BUNDLES[request.param]
    return quantised(family, dtype, scheme, group_size, symmetric=symmetric)


class TestBundles:
    @pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
    def test_engines_equal_the_dequantised_model(self, each, backend):
        """Symbolic and specialised graphs, no further off than float32 itself."""
        result = validate(each, backend=backend, steps=3, progress=False)
        assert result.passed, result.table()
        assert {check.graphs for check in result.checks} == {"symbolic", "specialised"}

    @pytest.mark.parametrize("name", ["int4", "int4 experts", "int8 transposed experts"])
    def test_the_checkpoint_differs_by_the_quantisation(self, quantised, checkpoint, name):
        family, dtype, scheme, group_size, symmetric = BUNDLES[name]
        bundle = quantised(family, dtype, scheme, group_size, symmetric=symmetric)
        result = validate(bundle, checkpoint(family), backend="onnxruntime", steps=2, progress=False)
        assert result.passed, result.table()
        assert all(check.relative_error > 1e-3 for check in result.checks)

    @pytest.mark.parametrize("name", ["int4 experts", "int8 transposed experts"])
    def test_all_weights_of_experts_are_quantised(self, quantised, name):
        """Nothing of them is left in the dtype, in the files or in the graphs."""
        family, dtype, scheme, group_size, symmetric = BUNDLES[name]
        bundle = quantised(family, dtype, scheme, group_size, symmetric=symmetric)
        with safe_open(bundle / "weights.safetensors", framework="pt") as file:
            stored = {key.partition(".mlp.experts.")[2] for key in file.keys()} - {""}  # noqa: SIM118  (no mapping)
            biases = {"gate_up_proj_bias", "down_proj_bias"} if family == "gpt_oss" else set()
            wanted = {f"{w}.{part}" for w in ("gate_up_proj", "down_proj") for part in ("quantised", "scales")}
            assert stored == wanted | biases
            numbers = file.get_slice("model.layers.0.mlp.experts.down_proj.quantised")
            assert numbers.get_shape() == ([4, 48, 32] if scheme == "int8" else [4, 48 * 32 // 2])
        for path in bundle.glob("*.onnx"):
            shapes = [value.shape.numpy() for value in ir.load(path).graph.initializers.values() if value.shape]
            assert not any(len(shape) == 3 and min(shape[1:]) > 1 for shape in shapes), path.name

    def test_onnxruntime_multiplies_whole_numbers(self, each, tmp_path):
        """No product is left with a weight that was dequantised."""
        backend = OnnxRuntimeBackend("float32", 1)
        for file in ("model.onnx", "decode-2.onnx"):
            target = tmp_path / file
            backend._options.optimized_model_filepath = str(target)
            backend._options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{file}.data"
            )
            backend.open(each / file)
            operators = [node.op_type for node in ir.load(target).graph]
            assert "DequantizeLinear" not in operators
            assert operators.count("MatMulNBits") == ir_count(each / file, "DequantizeLinear")

    def test_onnxruntime_unpacks_8_bits(self, each, monkeypatch):
        """Its kernel for them and float32 activations is far slower than the plain product."""
        asked: list[str] = []
        monkeypatch.setattr(OnnxRuntimeBackend, "unpack_weights", lambda self: asked.append(self.name))
        how = Manifest.read(each).quantisation
        assert how is not None
        with MesaModel.load(each, "onnxruntime", verify=False):
            assert len(asked) == (how.bits == 8)

    def test_manifest(self, each):
        manifest = Manifest.read(each)
        how = manifest.quantisation
        assert how is not None
        assert f"linear layers in {how}" in summary(each, manifest)

    def test_only_what_is_multiplied(self, quantised):
        """A tied table stays for its rows, and has a quantised form for the product; norms stay as they are."""
        bundle = quantised("tied_llama", "float32", "int4", 16)
        with safe_open(bundle / "weights.safetensors", framework="pt") as file:
            names = set(file.keys())
            table = "model.embed_tokens.weight"
            assert {table, table + ".quantised", table + ".scales"} <= names
            down = "model.layers.0.mlp.down_proj.weight"
            assert down not in names
            assert file.get_tensor(down + ".quantised").shape == (48 * 32 // 2,)
            assert file.get_tensor(down + ".scales").shape == (48 // 16, 32)
            assert not any("norm" in name and name.endswith(".quantised") for name in names)

    def test_a_checkpoint_in_parts(self, make_model, quantised, mesa_config, tmp_path):
        """Weights that are read from several files, converted to another dtype, give a bundle of its own."""
        make_model("llama").save_pretrained(tmp_path / "parts", max_shard_size="20KB")
        assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
        bundle = export_model(tmp_path / "parts", tmp_path / "b", mesa_config, max_tokens=64, quantise="int8")
        assert Manifest.read(bundle).weight_files == ["weights.safetensors"]
        whole = load_bundle_model(quantised("llama", "float32", "int8", None), Manifest.read(bundle))
        parts = load_bundle_model(bundle, Manifest.read(bundle))
        for (name, one), (_, other) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
            assert torch.equal(one, other), name

    def test_bfloat16(self, quantised):
        """Numbers with scales in bfloat16, on the engine that computes it."""
        bundle = quantised("wide_llama", "bfloat16", "int4", 16)
        result = validate(bundle, backend="openvino", steps=2, progress=False)
        assert result.passed, result.table()
        with MesaModel.load(bundle, "torch") as model:
            assert np.isfinite(model.prefill([1, 2, 3])).all()


def ir_count(file: Path, operator: str) -> int:
    return sum(node.op_type == operator for node in ir.load(file).graph)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
@pytest.mark.parametrize(
    ("family", "scheme", "group_size"),
    [("wide_llama", "int4", 16), ("wide_llama", "int8", None), ("wide_mixtral", "int4", 16)],
)
def test_tensorrt_builds(quantised, family, scheme, group_size):
    """Quantised weights are constants of each engine, smaller than those of the dtype."""
    bundle = quantised(family, "bfloat16", scheme, group_size)
    built = build_engines(bundle, "tensorrt-rtx", "sm89", max_tokens=64, progress=False)
    assert all(not any("quantised" in weight.name for weight in engine.weights) for engine in built.engines)
    assert {profile.phase for engine in built.engines for profile in engine.profiles} >= {"tail", "decode"}


def test_group_sizes_hold_whole_bytes():
    assert all(size % 2 == 0 for size in GROUP_SIZES)

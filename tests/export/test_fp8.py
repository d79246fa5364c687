"""Linear layers in fp8: the numbers, the graphs, and the engines that TensorRT makes of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from safetensors import safe_open

from mesart.evaluation.validate import validate
from mesart.export import build_engines, export_model
from mesart.export.engine_graphs import engine_graph, engine_shapes
from mesart.export.fp8 import computed_products, count_products, pair_single_rows, quantise_fp8, round_inputs
from mesart.export.quantise import choose_quantisation
from mesart.export.tensorrt_builder import TensorRtBuilder
from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.model.torch_fp8 import UNIT, rounded
from mesart.runtime import MesaModel

NUMBERS = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
NUMBERS = np.unique(NUMBERS[np.isfinite(NUMBERS)])
"""All of E4M3."""

needs_tensorrt = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")


def distance(values: np.ndarray) -> np.ndarray:
    """To the nearest number of E4M3, each."""
    return np.abs(values[..., None] - NUMBERS).min(-1)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    numbers = generator.standard_normal((draw(st.integers(1, 5)), draw(st.integers(1, 9)))) * 10.0 ** draw(
        st.integers(-4, 4)
    )
    numbers[:, generator.random(numbers.shape[1]) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    return torch.from_numpy(numbers).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


class TestNumbers:
    def test_e4m3(self):
        """The format of arXiv 2209.05433, Table 1: 448 the largest, 2^-9 the smallest, 4 significant bits."""
        assert NUMBERS.max() == 448
        assert NUMBERS[NUMBERS > 0].min() == 2**-9
        assert {256.0, 288.0} <= set(NUMBERS)
        assert not ((NUMBERS > 256) & (NUMBERS < 288)).any()

    @given(matrices())
    def test_weights_are_the_nearest_numbers(self, weight):
        packed = quantise_fp8(weight)
        assert packed.scales.shape == ()
        scale = float(packed.scales)
        assert np.frexp(scale)[0] == 0.5  # a power of two
        wanted = weight.double().numpy().T / scale
        got = packed.numbers.double().numpy()
        assert (np.abs(got - wanted) == distance(wanted)).all()
        assert np.abs(wanted).max() <= 448
        assert np.abs(wanted).max() > 224 or not weight.any()
        assert torch.equal((packed.numbers.to(weight.dtype) * packed.scales).double(), packed.numbers.double() * scale)

    @given(matrices())
    def test_inputs_are_the_nearest_numbers(self, inputs):
        inputs = inputs.float()
        peaks = inputs.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        wanted = (inputs / peaks).double().numpy() / UNIT
        got = (rounded(inputs).double() / peaks.double()).numpy() / UNIT
        np.testing.assert_allclose(np.abs(got - wanted), distance(wanted), rtol=0, atol=3e-5)  # float32 of 256

    @given(matrices(), st.integers(-3, 3))
    def test_a_row_is_rounded_by_itself(self, inputs, power):
        """No token changes another, and its size changes nothing but its own."""
        once = rounded(inputs)
        for row, its in zip(inputs, once, strict=True):
            assert torch.equal(rounded(row[None] * 2.0**power)[0], its * 2.0**power)


def products(rows: int) -> tuple[ir.Model, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two products of one input, and one of the first's result; the input, and what they give, in float64."""
    generator = np.random.default_rng(rows)
    shapes = {"a": (16, 12), "b": (16, 5), "c": (12, 7)}
    weights = {name: quantise_fp8(torch.from_numpy(generator.standard_normal(s[::-1]))) for name, s in shapes.items()}
    text = """<ir_version: 11, opset_import: ["": 23]>
        g (float[1, S, 16] x) => (float[1, S, 5] yb, float[1, S, 7] yc)
        { da = DequantizeLinear(a, sa)  ya = MatMul(x, da)
           db = DequantizeLinear(b, sb)  yb = MatMul(x, db)
           dc = DequantizeLinear(c, sc)  yc = MatMul(ya, dc) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("ya", onnx.TensorProto.FLOAT, [1, "S", 12]))
    for name, packed in weights.items():
        numbers = packed.numbers.float().numpy().astype(ml_dtypes.float8_e4m3fn)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers, name))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(packed.scales.float().numpy(), f"s{name}"))
    x = generator.standard_normal((1, rows, 16)).astype(np.float32)

    def product(inputs: np.ndarray, name: str) -> np.ndarray:
        peaks = np.abs(inputs).max(-1, keepdims=True)
        numbers = (inputs / peaks * 256).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return numbers / 256 * peaks @ (weights[name].numbers.double().numpy() * float(weights[name].scales))

    model = ir.from_proto(proto)
    round_inputs(model.graph, [node for node in model.graph if node.op_type == "MatMul"])
    return model, {"x": x}, {"yb": product(x, "b"), "yc": product(product(x, "a"), "c")}


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By ONNX's own reference."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    names = [output.name for output in proto.graph.output]
    return dict(zip(names, ReferenceEvaluator(proto).run(names, feeds), strict=True))


class TestGraphs:
    @pytest.mark.parametrize("rows", [1, 3])
    def test_reference_computes_the_same(self, rows):
        model, feeds, wanted = products(rows)
        for name, got in run(model, feeds).items():
            np.testing.assert_allclose(got, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
        assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 2  # what is read twice is rounded once
        assert count_products(ir.to_proto(model).SerializeToString()) == 3

    def test_a_single_row_gets_a_second(self):
        model, feeds, wanted = products(1)
        pair_single_rows(model.graph, {"S": 1})
        assert [node.op_type for node in model.graph].count("Expand") == 2
        for name, got in run(model, feeds).items():
            assert got.shape == wanted[name].shape
            np.testing.assert_allclose(got, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)

    @pytest.mark.parametrize("sizes", [{"S": 3}, {}])
    def test_others_do_not(self, sizes):
        model, _, _ = products(3)
        pair_single_rows(model.graph, sizes)
        assert not any(node.op_type in ("Expand", "Slice") for node in model.graph)


@pytest.fixture(scope="module")
def fp8_bundle(checkpoint, shared_folder, mesa_config) -> Callable[[str, str], Path]:
    def make(family: str, dtype: str) -> Path:
        def export(folder: Path) -> None:
            export_model(checkpoint(family), folder, mesa_config, max_tokens=104, dtype=dtype, quantise="fp8")

        return shared_folder(f"{family}-{dtype}-fp8-bundle", export)

    return make


class TestBundles:
    @pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
    def test_engines_equal_pytorch(self, fp8_bundle, backend):
        result = validate(fp8_bundle("tied_llama", "float32"), backend=backend, steps=2, progress=False)
        assert result.passed, result.table()
        assert max(check.relative_error for check in result.checks) < 1e-5

    def test_the_checkpoint_differs_by_the_rounding(self, fp8_bundle, checkpoint):
        bundle = fp8_bundle("tied_llama", "float32")
        result = validate(bundle, checkpoint("tied_llama"), backend="onnxruntime", steps=2, progress=False)
        assert result.passed, result.table()
        assert all(check.relative_error > 1e-3 for check in result.checks)

    def test_stored(self, fp8_bundle):
        """A tied table stays for its rows, in the dtype."""
        bundle = fp8_bundle("tied_llama", "float32")
        with safe_open(bundle / "weights.safetensors", framework="pt") as file:
            table, down = "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"
            assert {table, f"{table}.quantised", f"{table}.scales"} <= set(file.keys())
            assert down not in file.keys()  # noqa: SIM118  (no mapping)
            assert file.get_tensor(f"{down}.quantised").dtype == torch.float8_e4m3fn
            assert file.get_tensor(f"{down}.quantised").shape == (48, 32)
            assert file.get_tensor(f"{down}.scales").shape == ()
        assert "fp8" in str(Manifest.read(bundle).quantisation)

    @pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
    def test_experts_keep_the_dtype(self, fp8_bundle, family):
        bundle = fp8_bundle(family, "float32")
        with safe_open(bundle / "weights.safetensors", framework="pt") as file:
            names = {name.removeprefix("model.layers.0.") for name in file.keys()}  # noqa: SIM118  (no mapping)
        assert {"self_attn.q_proj.weight.quantised", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= names
        assert not any("experts" in name and name.endswith((".quantised", ".scales")) for name in names)


class TestRefusals:
    def test_gpus_without_fp8(self, fp8_bundle):
        with pytest.raises(MesaError, match=r"^rtx3090 computes no fp8, which needs sm89 .*[^\n]*$"):
            build_engines(fp8_bundle("wide_llama", "bfloat16"), "tensorrt-rtx", "sm89,rtx3090", progress=False)

    def test_openvino(self, fp8_bundle):
        with pytest.raises(MesaError, match="^OpenVINO rounds to fp8 otherwise"):
            MesaModel.load(fp8_bundle("tied_llama", "float32"), "openvino")

    def test_auto_takes_one_that_can(self, fp8_bundle):
        with MesaModel.load(fp8_bundle("wide_llama", "bfloat16"), verify=False) as model:
            assert model.backend == "torch"

    @pytest.mark.parametrize(("group", "symmetric"), [(32, True), (None, False)])
    def test_groups_and_zero_points(self, group, symmetric):
        with pytest.raises(MesaError, match="^fp8 has one scale for each weight and no zero points[^\n]*$"):
            choose_quantisation("fp8", group, symmetric=symmetric)


@needs_tensorrt
class TestEngines:
    def test_all_products_are_in_fp8(self, fp8_bundle):
        """By what TensorRT says of its layers; the weights are inputs, which all engines share."""
        lines: list[str] = []
        bundle = fp8_bundle("wide_llama", "bfloat16")
        built = build_engines(bundle, "tensorrt-rtx", "sm89", max_tokens=64, progress=False, report=lines.append)
        told = {line.split(":")[0]: line for line in lines}
        for name in ("tail-0", "decode-0"):
            assert told[name].endswith("8 of 8 products in fp8"), told[name]
        shared = {weight.name for engine in built.engines for weight in engine.weights}
        assert any(name.endswith(".quantised") for name in shared)

    @pytest.mark.parametrize("weights", ["shared", "embedded"])
    def test_no_weight_is_copied_or_unpacked(self, fp8_bundle, weights, tmp_path):
        """Of a step, where TensorRT would copy them; nothing but products reads a weight of 8 bits."""
        bundle = fp8_bundle("wide_llama", "bfloat16")
        manifest = Manifest.read(bundle)
        step = next(x for x in engine_shapes(manifest, "bucket", manifest.buckets) if x.name == "decode-2")
        model, _ = engine_graph(bundle, step, weights)
        graph = ir.to_proto(model).SerializeToString()
        builder = TensorRtBuilder("tensorrt-rtx", ["sm120"], tmp_path / "timing")
        layers = builder.build(graph, bundle, [], lambda phase, done, steps: None).layers
        assert computed_products(layers) == count_products(graph) == 8
        others = [layer for layer in layers if "LayerType: gemm" not in layer]
        assert others
        assert not any(".quantised" in layer.split("Outputs:")[0] for layer in others)
        assert not any("runtime_fusion" in layer and "FP8" in layer for layer in layers)

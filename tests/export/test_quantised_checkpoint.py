"""Checkpoints that a library quantised: packed here as the formats are described, number by number, with numpy."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from mesart.evaluation.validate import validate
from mesart.export import bundle as bundle_module
from mesart.export import calibrate, export_model
from mesart.export.checkpoint import load_model
from mesart.export.quantised_checkpoint import open_packed, read_scheme
from mesart.export.safetensors_file import Stored
from mesart.export.texts import Texts
from mesart.export.weights import open_network
from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import Manifest, Quantisation
from mesart.graphs.model.torch_graph import load_bundle_model
from mesart.graphs.model.torch_weights import Packed, dequantise
from mesart.scripts.cli import main


@dataclass
class Weight:
    """What a packed weight ``[out, in]`` consists of."""

    numbers: np.ndarray
    """``[in, out]``, from 0."""
    zeros: np.ndarray
    """``[groups, out]``"""
    scales: torch.Tensor
    """``[groups, out]``"""
    bits: int

    @classmethod
    def draw(cls, shape: tuple[int, int], bits: int, group: int | None, *, symmetric: bool, seed: int) -> Weight:
        outputs, inputs = shape
        random = np.random.default_rng(seed)
        groups = inputs // (group or inputs)
        zeros = random.integers(0, 2**bits, (groups, outputs))
        scales = torch.from_numpy(random.uniform(1e-3, 3e-2, zeros.shape)).half()
        numbers = random.integers(0, 2**bits, (inputs, outputs))
        return cls(numbers, np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros, scales, bits)

    @property
    def whole(self) -> torch.Tensor:
        """float32 ``[out, in]``."""
        rows = len(self.numbers) // len(self.zeros)
        numbers = torch.from_numpy(self.numbers - self.zeros.repeat(rows, 0)).float()
        return (numbers * self.scales.float().repeat_interleave(rows, 0)).t()


def words(numbers: np.ndarray, bits: int) -> torch.Tensor:
    """``[..., k * n]`` to int32 ``[..., k]``: n numbers in a word, the first lowest."""
    n = 32 // bits
    packed = sum(numbers[..., i::n].astype(np.uint64) << np.uint64(bits * i) for i in range(n))
    return torch.from_numpy(np.asarray(packed, np.uint64).astype(np.uint32).view(np.int32).copy())


def gptq(weight: Weight, *, less_one: bool = True) -> dict[str, torch.Tensor]:
    rows = len(weight.numbers) // len(weight.zeros)
    zeros = words(weight.zeros, weight.bits)
    if less_one:  # taken from the words, as GPTQModel does
        one = words(np.ones(32 // weight.bits, int), weight.bits).numpy().view(np.uint32)
        zeros = torch.from_numpy((zeros.numpy().view(np.uint32) - one).view(np.int32))
    return {
        "qweight": words(weight.numbers.T, weight.bits).t().contiguous(),
        "qzeros": zeros,
        "scales": weight.scales,
        "g_idx": torch.arange(len(weight.numbers), dtype=torch.int32) // rows,
    }


def awq(weight: Weight) -> dict[str, torch.Tensor]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that each place of a word holds, from the lowest

    def interleaved(numbers: np.ndarray) -> torch.Tensor:
        return words(numbers.reshape(len(numbers), -1, 8)[..., order].reshape(len(numbers), -1), 4)

    return {"qweight": interleaved(weight.numbers), "qzeros": interleaved(weight.zeros), "scales": weight.scales}


def compressed_tensors(weight: Weight) -> dict[str, torch.Tensor]:
    n = 32 // weight.bits

    def padded(numbers: np.ndarray) -> np.ndarray:
        return np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % n)))

    tensors = {
        "weight_packed": words(padded(weight.numbers.T), weight.bits),
        "weight_scale": weight.scales.t().contiguous(),
        "weight_shape": torch.tensor(weight.numbers.T.shape),
    }
    if (weight.zeros != 2 ** (weight.bits - 1)).any():
        tensors["weight_zero_point"] = words(padded(weight.zeros), weight.bits).t().contiguous()
    return tensors


def pack_quantized(bits: int, group: int | None, *, symmetric: bool) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group,
    }
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group_0}}


def describe(scheme: str, bits: int, group: int | None, *, symmetric: bool) -> dict[str, Any]:
    """``quantization_config``."""
    common = {"bits": bits, "group_size": group or -1, "sym": symmetric}
    return {
        "gptq": {"quant_method": "gptq", **common},
        "gptq_v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", **common},
        "awq": {"quant_method": "awq", "version": "gemm", "zero_point": not symmetric, **common},
        "auto-round": {"quant_method": "auto-round", "packing_format": "auto_round", **common},
        "auto-round awq": {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", **common},
        "auto-round gptq": {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", **common},
        "compressed-tensors": pack_quantized(bits, group, symmetric=symmetric),
    }[scheme]


PACK: dict[str, Callable[[Weight], dict[str, torch.Tensor]]] = {
    "gptq": gptq,
    "gptq_v2": lambda weight: gptq(weight, less_one=False),
    "awq": awq,
    "auto-round": lambda weight: gptq(weight, less_one=False),
    "auto-round awq": awq,
    "auto-round gptq": gptq,
    "compressed-tensors": compressed_tensors,
}


def opened(scheme: str, layers: dict[str, Weight], group: int | None, *, symmetric: bool) -> Any:
    """What :func:`open_packed` makes of layers that are packed so."""
    bits = next(iter(layers.values())).bits
    held = {f"{name}.{part}": t for name, weight in layers.items() for part, t in PACK[scheme](weight).items()}
    config = SimpleNamespace(quantization_config=describe(scheme, bits, group, symmetric=symmetric))
    read = read_scheme("here", config)
    assert read is not None
    tensors = {name: Stored(Path("here"), name, 0, t.nbytes, t.dtype, tuple(t.shape)) for name, t in held.items()}
    return open_packed(Path("here"), read, tensors, lambda stored: held[stored.name])


class TestNumbers:
    @given(st.data())
    def test_are_those_of_the_checkpoint(self, data):
        """Bit for bit; also as the bundle's parts, which its readers unpack."""
        scheme = data.draw(st.sampled_from(list(PACK)))
        bits = 4 if "awq" in scheme else data.draw(st.sampled_from([4, 8]))
        group = data.draw(st.sampled_from([None, 16, 32]))
        symmetric = data.draw(st.booleans())
        shape = (8 * data.draw(st.integers(1, 3)), 32 * data.draw(st.integers(1, 3)))
        weight = Weight.draw(shape, bits, group, symmetric=symmetric, seed=data.draw(st.integers(0, 2**32 - 1)))
        how, weights = opened(scheme, {"a.b": weight}, group, symmetric=symmetric)
        assert how == Quantisation(f"int{bits}", bits, group, symmetric)
        repacked = weights["a.b.weight"]
        assert repacked.shape == shape
        assert torch.equal(repacked.whole(), weight.whole)
        packed = Packed(repacked.numbers, repacked.scales.float(), repacked.zero_points)
        assert torch.equal(dequantise(packed, shape, how), weight.whole)

    def test_outputs_that_fill_no_word(self):
        """compressed-tensors pads."""
        weight = Weight.draw((5, 16), 4, 16, symmetric=False, seed=1)
        _, weights = opened("compressed-tensors", {"x": weight}, 16, symmetric=False)
        assert torch.equal(weights["x.weight"].whole(), weight.whole)

    @pytest.mark.parametrize("scheme", PACK)
    def test_one_asymmetric_layer_makes_all_asymmetric(self, scheme):
        layers = {str(i): Weight.draw((8, 32), 4, 16, symmetric=i == 0, seed=i) for i in range(2)}
        how, weights = opened(scheme, layers, 16, symmetric=False)
        assert not how.symmetric
        for name, weight in layers.items():
            assert torch.equal(weights[f"{name}.weight"].whole(), weight.whole)

    def test_known_words(self):
        """The formats' own order, written out: 1 to 8, and AWQ's 0 2 4 6 1 3 5 7."""
        numbers = np.arange(1, 9)[None].repeat(8, 0)
        weight = Weight(numbers, np.full((1, 8), 8), torch.ones(1, 8).half(), 4)
        assert (awq(weight)["qweight"].numpy().view(np.uint32) == 0x86427531).all()
        assert (gptq(weight)["qzeros"].numpy().view(np.uint32) == 0x77777777).all()
        assert compressed_tensors(weight)["weight_packed"].numpy().view(np.uint32)[0, 0] == 0x11111111
        for scheme in PACK:
            whole = opened(scheme, {"x": weight}, None, symmetric=True)[1]["x.weight"].whole()
            assert torch.equal(whole, torch.arange(-7.0, 1)[:, None].expand(8, 8))


@pytest.fixture
def quantised(checkpoint_copy) -> Callable[..., dict[str, torch.Tensor]]:
    """``quantised(scheme)``: packs the linear layers of ``checkpoint_copy``; what their weights are then."""

    def make(
        scheme: str = "gptq",
        *,
        bits: int = 4,
        group: int | None = 16,
        symmetric: bool = True,
        only: Callable[[str], bool] = lambda name: True,
        head: bool = False,
        change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
    ) -> dict[str, torch.Tensor]:
        tensors = load_file(checkpoint_copy / "model.safetensors")
        expected = dict(tensors)
        names = [name for name in tensors if name.endswith("_proj.weight") and only(name)]
        for seed, name in enumerate(names):
            weight = Weight.draw(tuple(tensors.pop(name).shape), bits, group, symmetric=symmetric, seed=seed)  # type: ignore[arg-type]
            expected[name] = weight.whole
            tensors |= {f"{name.removesuffix('.weight')}.{part}": t for part, t in PACK[scheme](weight).items()}
        if head:
            weight = Weight.draw((320, 32), bits, group, symmetric=symmetric, seed=99)
            expected["lm_head.weight"] = weight.whole
            tensors |= {f"lm_head.{part}": t for part, t in PACK[scheme](weight).items()}
        change(tensors)
        save_file(tensors, checkpoint_copy / "model.safetensors", {"format": "pt"})
        edit_config(checkpoint_copy, describe(scheme, bits, group, symmetric=symmetric))
        return expected

    return make


def edit_config(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


class TestBundles:
    @pytest.mark.parametrize(
        ("scheme", "options"),
        {
            "gptq, one layer not packed": ("gptq", {"only": lambda name: "down_proj" not in name}),
            "awq with zero points, the head packed": ("awq", {"symmetric": False, "head": True}),
            "compressed-tensors of 8 bits without groups": ("compressed-tensors", {"bits": 8, "group": None}),
        }.values(),
        ids=["gptq", "awq", "compressed-tensors"],
    )
    def test_the_weights_are_the_checkpoints(self, scheme, options, quantised, checkpoint_copy, mesa_config, tmp_path):
        expected = quantised(scheme, **options)
        bundle = export_model(checkpoint_copy, tmp_path / "bundle", mesa_config, max_tokens=64)
        manifest = Manifest.read(bundle)
        bits, group = options.get("bits", 4), options.get("group", 16)
        assert manifest.quantisation == Quantisation(f"int{bits}", bits, group, options.get("symmetric", True))
        assert "quantization_config" not in json.loads((bundle / "config.json").read_text())
        found = dict(load_bundle_model(bundle, manifest).named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
        packed = load_file(checkpoint_copy / "model.safetensors").keys()
        with safe_open(bundle / "weights.safetensors", framework="pt") as file:
            stored = {name.removesuffix(".quantised") for name in file.keys() if name.endswith(".quantised")}  # noqa: SIM118  (no mapping)
        table = {"model.embed_tokens.weight"} if options.get("head") else set()
        assert stored == {n for n in expected if n.endswith("_proj.weight") and n not in packed} | table
        result = validate(bundle, backend="onnxruntime", steps=2, progress=False)
        assert result.passed, result.table()


class TestRefusals:
    """All before anything is traced or written."""

    @pytest.fixture
    def refused(self, checkpoint_copy, mesa_config, tmp_path) -> Callable[..., None]:
        def check(*says: str, **options: Any) -> None:
            with pytest.raises(MesaError, match="^[^\n]*$") as error:
                export_model(checkpoint_copy, tmp_path / "bundle", mesa_config, max_tokens=64, **options)
            for text in says:
                assert text in str(error.value)
            assert not (tmp_path / "bundle").exists()

        return check

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
            ({"quant_method": "fp8"}, "fp8"),
            ({"quant_method": "mxfp4"}, "mxfp4"),
            ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "gptq, gptq, 3 bits"),
            ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "gptq, marlin"),
            ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "awq, gemv"),
            ({"quant_method": "awq", "bits": 8, "group_size": 32}, "awq, gemm, 8 bits"),
            (
                {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"},
                "auto_round:llm_compressor",
            ),
            (
                {"quant_method": "compressed-tensors", "format": "float-quantized"},
                "compressed-tensors, float-quantized",
            ),
            ({**pack_quantized(4, 32, symmetric=True), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
            ({**pack_quantized(4, 32, symmetric=True), "config_groups": {}}, "0 kinds of weights"),
        ],
    )
    def test_schemes(self, fields, says, refused, checkpoint_copy):
        edit_config(checkpoint_copy, fields)
        refused("is quantised (", says, "which export cannot read", "give the checkpoint that it was made from")

    def test_activations(self, refused, checkpoint_copy):
        fields = pack_quantized(8, None, symmetric=True)
        fields["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
        edit_config(checkpoint_copy, fields)
        refused("pack-quantized with activations")

    def test_quantised_twice(self, quantised, refused):
        quantised()
        refused("is quantised already (gptq, gptq); leave --quantise out", quantise="int4")

    def test_use_without_export(self, quantised, checkpoint_copy):
        quantised()
        with pytest.raises(MesaError, match="is quantised .gptq, gptq.; export it, and use the bundle"):
            load_model(checkpoint_copy, "float32")

    def test_groups_that_engines_do_not_know(self, quantised, refused):
        quantised(group=8)
        refused("groups of 8 inputs; engines take 16, 32, 64, 128, 256")

    def test_groups_that_do_not_divide(self, quantised, refused, checkpoint_copy):
        quantised()
        edit_config(checkpoint_copy, describe("gptq", 4, 32, symmetric=True))
        refused("groups of 32 do not divide the 48 inputs of model.layers.0.mlp.down_proj")

    def test_groups_other_than_the_configs(self, quantised, refused, checkpoint_copy):
        quantised(only=lambda name: "q_proj" in name)
        edit_config(checkpoint_copy, describe("gptq", 4, 32, symmetric=True))
        refused("the scales and zeros of model.layers.0.self_attn.q_proj are (2, 32) and (2, 32) instead of (1, 32)")

    def test_other_bits_than_the_configs(self, quantised, refused, checkpoint_copy):
        quantised(bits=8)
        edit_config(checkpoint_copy, describe("gptq", 4, 16, symmetric=True))
        refused("must have 4 bits")

    def test_act_order(self, quantised, refused):
        quantised(change=lambda tensors: tensors["model.layers.0.mlp.up_proj.g_idx"].copy_(torch.arange(32) % 2))
        refused("groups the inputs of model.layers.0.mlp.up_proj out of order (act-order)", "desc_act=False")

    def test_a_part_is_missing(self, quantised, refused):
        quantised(change=lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.qzeros"))
        refused("lacks model.layers.0.mlp.up_proj.qzeros")

    def test_scales_of_an_activation(self, quantised, refused):
        """AWQ has them where it could not move scales into a layer in front."""
        quantised("awq", change=lambda tensors: tensors.update({"model.layers.0.mlp.act_fn.scales": torch.ones(48)}))
        refused("has model.layers.0.mlp.act_fn.scales without model.layers.0.mlp.act_fn.qweight")

    def test_nothing_is_packed(self, quantised, refused):
        quantised(only=lambda name: False)
        refused("says that it is quantised (gptq, gptq), but holds no qweight")

    def test_a_bias_that_the_model_has_not(self, quantised, refused):
        bias = "model.layers.0.mlp.up_proj.bias"
        quantised(change=lambda tensors: tensors.update({bias: torch.ones(48)}))
        refused(f"has {bias}, which LlamaForCausalLM has not")

    def test_a_weight_that_the_model_holds_otherwise(self, quantised, refused):
        def rename(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if ".up_proj." in name]:
                tensors[name.replace("up_proj", "experts.0.up_proj")] = tensors.pop(name)

        quantised(change=rename)
        refused("packs model.layers.0.mlp.experts.0.up_proj.weight, which LlamaForCausalLM holds in another form")

    def test_a_weight_of_another_shape(self, quantised, refused):
        parts = gptq(Weight.draw((16, 32), 4, 16, symmetric=True, seed=0))
        name = "model.layers.0.mlp.up_proj"
        quantised(change=lambda tensors: tensors.update({f"{name}.{part}": t for part, t in parts.items()}))
        refused(f"packs {name}.weight as (16, 32), but the model's is (48, 32)")

    def test_a_weight_is_missing(self, quantised, refused):
        quantised(change=lambda tensors: tensors.pop("model.norm.weight"))
        refused("is quantised (gptq, gptq) and lacks weights that LlamaForCausalLM has")


class TestCalibrate:
    """With a library in the place of AutoRound that packs weights of its own; the last test has AutoRound itself."""

    @pytest.fixture
    def calls(self, monkeypatch) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        class Library:
            def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
                calls.append({"model": model, **options})

            def quantize_and_save(self, folder: str, format: str) -> tuple[None, list[str]]:  # noqa: A002  (theirs)
                call, target = calls[0], Path(folder) / "named-by-the-library"
                call["model"].save_pretrained(target)
                (target / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
                tensors = load_file(target / "model.safetensors")
                name = "model.layers.0.mlp.up_proj"
                weight = Weight.draw((48, 32), call["bits"], call["group_size"], symmetric=call["sym"], seed=3)
                del tensors[f"{name}.weight"]
                parts = PACK["auto-round"](weight).items()
                save_file(tensors | {f"{name}.{part}": t for part, t in parts}, target / "model.safetensors")
                edit_config(target, describe(format.replace("_", "-"), 4, 16, symmetric=call["sym"]))
                call["expected"] = weight.whole
                return None, [str(target)]

        monkeypatch.setitem(sys.modules, "auto_round", SimpleNamespace(AutoRound=Library))
        monkeypatch.setattr(
            calibrate, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda source, **_: count_words)
        )
        return calls

    def test_the_librarys_numbers_are_exported(self, calls, checkpoint_copy, mesa_config, tmp_path, monkeypatch):
        monkeypatch.setattr(bundle_module, "read_texts", lambda *_, **__: Texts({}))
        text = " ".join(map(str, range(100_000)))
        bundle = export_model(
            checkpoint_copy,
            tmp_path / "bundle",
            mesa_config,
            max_tokens=64,
            quantise="int4",
            group_size=16,
            symmetric=False,
            calibrate="awq",
            calibration_text=text,
        )
        call = calls[0]
        assert (call["bits"], call["group_size"], call["sym"], call["algorithm"]) == (4, 16, False, "awq")
        assert len(call["dataset"]) == call["nsamples"] == calibrate.EXCERPTS
        assert all(excerpt.shape == (1, call["seqlen"]) for excerpt in call["dataset"])
        starts = [int(excerpt[0, 1]) for excerpt in call["dataset"]]
        assert starts == sorted(set(starts))
        assert starts[0] < 1000
        assert starts[-1] > 90_000
        assert Manifest.read(bundle).quantisation == Quantisation("int4", 4, 16, symmetric=False)
        with safe_open(bundle / "weights.safetensors", framework="pt") as file:
            name = "model.layers.0.mlp.up_proj.weight"
            parts = [file.get_tensor(name + part) for part in (".quantised", ".scales", ".zero_points")]
            whole = dequantise(Packed(*parts), (48, 32), Quantisation("int4", 4, 16, symmetric=False))
        assert torch.equal(whole, call["expected"])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({}, "at least 64 are needed, so give a longer one"),
            ({"calibrate": "magic"}, "unknown calibration 'magic'; there are auto-round, awq"),
            ({"calibrate": None}, "give --calibrate with --calibration-text"),
            ({"calibration_text": None}, "give --calibrate with --calibration-text"),
            ({"quantise": None, "group_size": None}, "give --quantise int8 or int4 too"),
        ],
    )
    def test_refusals(self, options, says, calls, checkpoint_copy, mesa_config, tmp_path):
        given = {"quantise": "int4", "group_size": 16, "calibrate": "awq", "calibration_text": "1 2", **options}
        with pytest.raises(MesaError, match="^[^\n]*$") as error:
            export_model(checkpoint_copy, tmp_path / "b", mesa_config, **given)
        assert says in str(error.value)
        assert not calls

    def test_without_the_library(self, checkpoint_copy, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "auto_round", None)
        options = ["-o", str(tmp_path / "b"), "--quantise", "int4", "--group-size", "16", "--calibrate", "awq"]
        assert main(["export", str(checkpoint_copy), *options]) == 2
        assert "this needs auto_round: pip install 'mesart[calibrate]'" in capsys.readouterr().err

    @pytest.mark.skipif(importlib.util.find_spec("auto_round") is None, reason="needs auto_round")
    @pytest.mark.parametrize("method", calibrate.METHODS)
    def test_auto_round(self, method, make_model, checkpoint_copy, tmp_path, monkeypatch):
        """What it packs is read; by AWQ the norms have the scales that were taken from the weights."""
        model = make_model("tied_llama", hidden_size=64, intermediate_size=96, num_key_value_heads=4)
        model.save_pretrained(checkpoint_copy)
        monkeypatch.setattr(calibrate, "EXCERPTS", 8)
        text, how = " ".join(map(str, range(20_000))), Quantisation("int4", 4, 16, symmetric=True)
        with calibrate.calibrated(checkpoint_copy, tmp_path, how, method, text, 64, model.config) as folder:
            network = open_network(folder, "float32", AutoConfig.from_pretrained(folder), print)
            assert network.quantisation == how
            assert len(network.packed) == 7
            assert network.stored is not None
            norm = network.read(network.stored["model.layers.0.post_attention_layernorm.weight"])
            assert torch.equal(norm.float(), torch.ones(64)) == (method == "auto-round")


def count_words(text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
    """A tokenizer of numbers; the first and last of an excerpt may be cut."""
    assert not add_special_tokens
    return {"input_ids": [int(word) for word in text.split()]}

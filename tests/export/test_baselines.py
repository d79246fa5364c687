"""Methods to compare with as graphs: the same as their own rule in `mesart.evaluation.methods`, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesart.evaluation.methods import METHODS, Method, make_method
from mesart.evaluation.methods.dynamic_ntk import DynamicNTK
from mesart.evaluation.methods.system import MethodSystem
from mesart.evaluation.systems import open_systems
from mesart.evaluation.tuning import tune
from mesart.evaluation.validate import validate
from mesart.export import build_engines, export_model, export_triton_repository
from mesart.export.engine_graphs import engine_shapes
from mesart.export.engine_memory import estimate
from mesart.export.forms import with_attention
from mesart.export.trace import trace_phases
from mesart.graphs import MesaConfig, MesaError, TorchReference
from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.method.all_tail import AllTail
from mesart.graphs.method.registry import STATIC_METHODS
from mesart.graphs.model.phase_module import PhaseModule
from mesart.runtime import MesaModel
from mesart.runtime.backends import present_backends
from mesart.scripts.cli import main
from tests.runtime.faults import Faults, Interruption

TRAINED, LONGEST = 64, 300
COMPARED = [name for name in STATIC_METHODS if name != "mesa"]
WINDOWS = ("lm-infinite", "streaming-llm")


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, 320, count).tolist()
    return ids


def config_of(name: str, max_tokens: int = LONGEST, **parameters: Any) -> AllTail:
    config = make_method(name, TRAINED, max_tokens, **parameters).static()
    assert isinstance(config, AllTail)
    return config.up_to(max_tokens)


def rule_of(config: AllTail) -> Method:
    """What computes the method with no graph; Dynamic-NTK with the numbers of tokens that the graphs know."""
    if config.name != "dynamic-ntk":
        return make_method(config.name, TRAINED, config.max_tokens, **config.parameters)

    class InSteps(DynamicNTK):
        def turn(self, frequencies: Any, tokens: int) -> Any:
            return super().turn(frequencies, next(x for x in config.levels if x >= tokens))

    return InSteps.of(TRAINED, **config.parameters)


def answers(opened: Any, ids: list[int], steps: list[int]) -> np.ndarray:
    """Logits behind a prompt and behind each of the steps."""
    if isinstance(opened, MethodSystem):
        rows = [opened.prefill(ids, 1)[-1], *(opened.step(token) for token in steps)]
    else:
        rows = [np.asarray(opened.prefill([ids]))[0, -1], *(np.asarray(opened.step(token))[0, -1] for token in steps)]
    return np.stack(rows)


def assert_equal(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(got - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())


# Grouped queries; partial and interleaved rotary; ALiBi, of grouped queries too; capped scores and windows; sinks; a
# layer without positions.
FAMILIES = ("llama", "gpt_neox", "gptj", "mpt", "falcon", "gemma2", "gpt_oss", "smollm3", "deepseek_v3")


class TestReference:
    """`TorchReference` under these methods, which `mesart validate` takes for the truth."""

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("name", COMPARED)
    def test_is_the_rule(self, make_model, name, family):
        if METHODS[name].rotary_only and family in ("mpt", "falcon"):
            pytest.skip("it says nothing of ALiBi")
        changes = {"gemma2": {"sliding_window": 40}, "gpt_oss": {"sliding_window": 40}}.get(family, {})
        model, config = make_model(family, **changes), config_of(name)
        expected = answers(MethodSystem(model, rule_of(config)), tokens(150), tokens(8, seed=1))
        assert_equal(answers(TorchReference(model, config), tokens(150), tokens(8, seed=1)), expected)

    @settings(max_examples=25)
    @given(
        name=st.sampled_from(WINDOWS),
        window=st.integers(5, 80),
        first=st.integers(0, 9),
        prompt=st.integers(1, 170),
        log_n=st.booleans(),
    )
    def test_any_window(self, make_model, name, window, first, prompt, log_n):
        parameters = {"window": window, "log_n": log_n, "sinks" if name == "streaming-llm" else "first_tokens": first}
        model, config = make_model("tied_llama"), config_of(name, **parameters)
        expected = answers(MethodSystem(model, rule_of(config)), tokens(prompt), tokens(4, seed=1))
        assert_equal(answers(TorchReference(model, config), tokens(prompt), tokens(4, seed=1)), expected)

    @pytest.mark.parametrize("name", COMPARED)
    def test_within_the_window_it_is_the_model(self, make_model, name):
        model, ids = make_model("llama"), tokens(TRAINED)
        parameters = {"factor": 1} if name == "yarn" else {}
        with torch.no_grad():
            plain = model(torch.tensor([ids])).logits[0].numpy()
        got = TorchReference(model, config_of(name, **parameters)).prefill(ids, all_logits=True)[0].numpy()
        if name == "streaming-llm":  # a query in the last places does not see all
            plain, got = plain[:-4], got[:-4]
        assert_equal(got, plain)

    def test_dynamic_ntk_turns_all_keys_where_a_text_outgrows_its_bucket(self, make_model):
        model, config = make_model("tied_llama"), config_of("dynamic-ntk")
        edge = config.levels[1]
        expected = answers(MethodSystem(model, rule_of(config)), tokens(edge - 3), tokens(6, seed=1))
        assert_equal(answers(TorchReference(model, config), tokens(edge - 3), tokens(6, seed=1)), expected)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("family", ["llama", "falcon", "gemma2", "gpt_oss"])
def test_the_graph_is_the_module(make_model, family, name):
    """Where first tokens are seen from beyond the window, with all else that changes scores."""
    onnxruntime = pytest.importorskip("onnxruntime")
    changes = {"gemma2": {"sliding_window": 30}, "gpt_oss": {"sliding_window": 30}}.get(family, {})
    model, config = make_model(family, **changes), config_of(name, window=20)
    module, past, new = PhaseModule(model, config), 34, 5
    generator = torch.Generator().manual_seed(0)
    keys = [torch.randn(1, x.kv_heads, past, x.key_size, generator=generator) for x in module.layers]
    values = [torch.randn(1, x.kv_heads, past, x.value_size, generator=generator) for x in module.layers]
    assert config.sink_window is not None
    first = config.sink_window.sinks
    standing = torch.cat([torch.arange(first), torch.arange(first, past).roll(7)])[None]  # a ring
    feeds = {
        "input_ids": torch.arange(new)[None] + 7,
        "position_ids": torch.arange(new)[None] + past,
        "past_mask": torch.zeros(1, 1, 1, past),
        "new_mask": torch.full((new, new), -1e9).triu(1)[None, None],
        "query_scale": torch.full((1, 1, new, 1), 1.3),
        "logits_at": torch.arange(new),
        "past_position_ids": standing,
    }
    with torch.no_grad():
        expected = module(**feeds, past_keys=keys, past_values=values).logits.numpy()
        without = PhaseModule(model, config_of(name, 1200, window=1000))(
            **feeds, past_keys=keys, past_values=values
        ).logits.numpy()
        graph = with_attention(trace_phases(PhaseModule(model, config, "traced")), "unfused")
    assert np.abs(expected - without).max() > 1e-3, "the window changes nothing here"
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        feeds |= {f"past_key_values.{layer}.key": key, f"past_key_values.{layer}.value": value}
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    got = session.run(["logits"], {name: value.numpy() for name, value in feeds.items() if name in names})[0]
    assert_equal(got, expected)


@pytest.fixture(scope="session")
def baseline_bundle(checkpoint, shared_folder) -> Callable[[str], Path]:
    """``baseline_bundle(name)``: a llama of one layer under that method, for up to 300 tokens."""

    def make(name: str) -> Path:
        def export(folder: Path) -> None:
            config = make_method(name, TRAINED, LONGEST).static()
            export_model(checkpoint("tied_llama"), folder, config, max_tokens=LONGEST)

        return shared_folder(f"{name}-baseline-bundle", export)

    return make


@pytest.mark.parametrize("name", COMPARED)
class TestBundle:
    @pytest.mark.parametrize("specialised", [False, True])
    @pytest.mark.parametrize("backend", present_backends())
    def test_is_the_rule(self, baseline_bundle, make_model, name, backend, specialised):
        with MesaModel.load(baseline_bundle(name), backend, specialised=specialised, verify=False) as model:
            config = model.manifest.config
            assert isinstance(config, AllTail)
            rule = MethodSystem(make_model("tied_llama"), rule_of(config))
            for length in (1, 60, 114, 240):
                steps = tokens(12, seed=length)
                assert_equal(answers(model, tokens(length), steps), answers(rule, tokens(length), steps))

    def test_validates(self, baseline_bundle, checkpoint, name):
        result = validate(baseline_bundle(name), checkpoint("tied_llama"), backend="torch", progress=False)
        assert result.passed, result.verdict()

    def test_a_second_turn(self, baseline_bundle, name):
        with MesaModel.load(baseline_bundle(name), "torch", verify=False) as model:
            whole = model.prefill(tokens(200))
            model.prefill(tokens(200)[:70])
            assert_equal(model.extend(tokens(200)[70:]), whole)

    def test_rows_of_a_batch_are_apart(self, baseline_bundle, name):
        prompts = [tokens(150), tokens(90, seed=1)]
        with MesaModel.load(baseline_bundle(name), "torch", verify=False) as model:
            alone = [answers(model, prompt, [5, 6]) for prompt in prompts]
            model.prefill(prompts)
            model.step([5, 5])
            together = model.step([6, 6])[:, 0]
            assert_equal(together, np.stack([rows[-1] for rows in alone]))

    def test_ends_where_its_positions_end(self, baseline_bundle, name):
        with MesaModel.load(baseline_bundle(name), "torch", verify=False) as model:
            longest = model.max_tokens
            model.prefill(tokens(longest))
            with pytest.raises(MesaError, match=f"--max-tokens {longest + 1}"):
                model.step(5)
            with pytest.raises(MesaError, match="export again with --max-tokens"):
                model.prefill(tokens(longest + 1))
            assert model.lengths == [longest]


@pytest.mark.parametrize("name", WINDOWS)
class TestDroppedKeys:
    def test_the_cache_does_not_grow_with_the_text(self, baseline_bundle, name):
        with MesaModel.load(baseline_bundle(name), "torch", verify=False) as model:
            sink_window = model.manifest.config.sink_window
            assert sink_window is not None
            model.prefill(tokens(100))
            (text,) = model.texts
            assert text.require_kv().room == sink_window.slots
            taken = model.engine.store.bytes_in_use
            model.extend(tokens(200))
            assert model.engine.store.bytes_in_use == taken

    def test_a_failure_in_the_middle_loses_no_key(self, baseline_bundle, name):
        """Slices before the one that fails have dropped keys that the next turn has to see."""
        with MesaModel.load(baseline_bundle(name), "torch", verify=False) as model:
            model.prefill(tokens(100))
            expected = model.extend(tokens(150, seed=1))
            model.prefill(tokens(100))
            with Faults(model) as faults:
                faults.at(3, MesaError)
                with pytest.raises(MesaError, match="gave up"):
                    model.extend(tokens(150, seed=1))
                assert faults.phases == ["tail", "tail"]
            assert model.lengths == [100]
            assert np.array_equal(model.extend(tokens(150, seed=1)), expected)

    @pytest.mark.parametrize("specialised", [False, True])
    @pytest.mark.parametrize("call", ["extend", "step"])
    @pytest.mark.parametrize("row", [0, 1])
    def test_a_batch_that_fails_in_one_row_loses_no_key(self, baseline_bundle, name, specialised, call, row):
        """The other row has dropped keys by then."""
        prompts, turns = [tokens(100), tokens(120, seed=1)], [tokens(30, seed=2), tokens(7, seed=3)]
        arguments: Any = turns if call == "extend" else [3, 4]
        with MesaModel.load(baseline_bundle(name), "torch", specialised=specialised, verify=False) as model:
            model.prefill(prompts)
            expected = model.step([5, 6])  # sees as far back as can be seen
            model.prefill(prompts)
            with Faults(model) as faults:
                faults.in_runs(lambda segment: segment.kv is model.texts[row].kv)
                with pytest.raises(MesaError, match="gave up"):
                    getattr(model, call)(arguments)
                assert faults.phases, "the other row was computed"
                faults.none()
                getattr(model, call)(arguments)
                runs = faults.count
                for nth in range(1, runs + 1):
                    model.prefill(prompts)
                    faults.at(nth)
                    with pytest.raises(Interruption):
                        getattr(model, call)(arguments)
            assert model.lengths == [100, 120]
            assert np.array_equal(model.step([5, 6]), expected)

    def test_one_bucket_for_all(self, baseline_bundle, name):
        with MesaModel.load(baseline_bundle(name), "torch", verify=False) as model:
            assert {model.bucket(tokens) for tokens in (1, 100, 300)} == {0}
            with pytest.raises(MesaError, match="--max-tokens 301"):
                model.bucket(301)

    def test_no_engines(self, baseline_bundle, name):
        with pytest.raises(MesaError, match="run it with onnxruntime or openvino"):
            build_engines(baseline_bundle(name), gpus="sm89")


def test_engine_shapes_of_a_method_without_chunks(baseline_bundle):
    """No head and no chunks; its keys move, as many together as a chunk of Mesa would have."""
    folder = baseline_bundle("dynamic-ntk")
    manifest = Manifest.read(folder)
    shapes = engine_shapes(manifest, "bucket", manifest.buckets)
    new = {profile.phase: profile.new for engine in shapes for profile in engine.profiles}
    assert new == {"tail": TRAINED, "decode": 1, "rerotate": MesaConfig(TRAINED).chunk_length}
    keys = sum(layer.kv_heads * layer.key_size for layer in manifest.layers)
    assert {memory.scratch for memory in estimate(folder, manifest, shapes, "shared")} == {
        2 * new["rerotate"] * 2 * keys
    }


def test_engines_of_a_method_whose_cache_grows(checkpoint, tmp_path):
    """Dynamic-NTK: no head and no chunks; its keys rotate, so there is an engine for that."""
    pytest.importorskip("tensorrt_rtx")
    config = make_method("dynamic-ntk", TRAINED, LONGEST).static()
    folder = export_model(checkpoint("wide_llama"), tmp_path / "bundle", config, max_tokens=LONGEST, dtype="bfloat16")
    made = build_engines(folder, gpus="sm89", progress=False, max_tokens=TRAINED)
    phases = {profile.phase for info in made.engines for profile in info.profiles}
    assert phases == {"tail", "decode", "rerotate"}


def test_origin_and_mesa_have_the_same_buckets(baseline_bundle, checkpoint, tmp_path):
    with MesaModel.load(baseline_bundle("origin"), "torch", verify=False) as model:
        lengths = [bucket.max_tokens for bucket in model.manifest.buckets]
        assert not [graph.file for graph in model.manifest.graphs if graph.kind in ("prefix", "chunk", "rerotate")]
    export_model(checkpoint("tied_llama"), tmp_path / "mesa", MesaConfig(TRAINED), max_tokens=LONGEST)
    with MesaModel.load(tmp_path / "mesa", "torch", verify=False) as model:
        assert [bucket.max_tokens for bucket in model.manifest.buckets] == lengths


def test_what_measures_mesa_measures_no_other(baseline_bundle):
    for function in (open_systems, tune):
        with pytest.raises(MesaError, match="holds origin"):
            function(baseline_bundle("origin"))


def test_no_triton_repository(baseline_bundle, tmp_path):
    with pytest.raises(MesaError, match="serves Mesa only"):
        export_triton_repository(baseline_bundle("origin"), tmp_path / "repository", engine="onnxruntime")


class TestCommand:
    def test_parameters(self, checkpoint, tmp_path, capsys):
        arguments = ["export", str(checkpoint("tied_llama")), "-o", str(tmp_path / "b"), "--max-tokens", "80"]
        assert main([*arguments, "--method", "streaming-llm:sinks=2,log_n=true"]) == 0
        assert main(["inspect", str(tmp_path / "b")]) == 0
        out = capsys.readouterr().out
        assert "streaming-llm: sinks 2, window 62, log_n True" in out
        assert "stair" not in out

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("rerope", "cannot be exported"),
            ("nonsense", "unknown method 'nonsense'"),
            ("yarn:slope=3", "no parameter 'slope'"),
            ("yarn:factor=x", "is not PARAMETER=VALUE"),
        ],
    )
    def test_bad_methods(self, checkpoint, tmp_path, capsys, method, message):
        assert main(["export", str(checkpoint("tied_llama")), "-o", str(tmp_path / "b"), "--method", method]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "b").exists()

    def test_mesas_own_options_do_not_mix(self, checkpoint, tmp_path, capsys):
        arguments = ["export", str(checkpoint("tied_llama")), "-o", str(tmp_path / "b"), "--method", "origin"]
        assert main([*arguments, "--head-length", "9"]) == 2
        assert "--head-length with --method" in capsys.readouterr().err

    def test_alibi_has_no_frequencies(self, checkpoint, tmp_path, capsys):
        arguments = ["export", str(checkpoint("mpt")), "-o", str(tmp_path / "b"), "--method"]
        assert main([*arguments, "yarn"]) == 2
        assert "changes rotary positions" in capsys.readouterr().err

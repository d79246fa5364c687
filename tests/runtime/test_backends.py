"""Every backend, on every phase and bucket, computes what the PyTorch reference computes."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesart.graphs import MesaError, TorchReference
from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.bundle.names import GraphKind
from mesart.runtime import MesaModel, backend_names, present_backends
from mesart.runtime.backends import OnnxRuntimeBackend, OpenVinoBackend
from mesart.runtime.engines import PACKAGES
from mesart.runtime.runners.grouped import GroupedRunner
from mesart.runtime.runners.paged import PagedRunner
from mesart.runtime.runners.unfused import UnfusedRunner

CLOSE = 1e-4
NAMES = [name for name in backend_names() if name not in PACKAGES]  # TensorRT runs engines: test_engines.py
ENGINES = [
    pytest.param(
        (name, specialised),
        id=f"{name}-{'specialised' if specialised else 'symbolic'}",
        marks=pytest.mark.skipif(name not in present_backends(), reason=f"{name} is not installed"),
    )
    for specialised in (False, True)
    for name in NAMES
]
SYMBOLIC = ENGINES[: len(NAMES)]


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, 320, count).tolist()
    return ids


def difference(ours: Any, theirs: Any) -> float:
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    return float(np.abs(ours - theirs).max())


@pytest.fixture(scope="module", params=ENGINES)
def model(request, bundle) -> Iterator[MesaModel]:
    backend, specialised = request.param
    with MesaModel.load(bundle(), backend, specialised=specialised) as loaded:
        assert loaded.backend == backend
        yield loaded


@pytest.fixture(scope="module")
def reference(checkpoint, mesa_config) -> TorchReference:
    return TorchReference(checkpoint("llama"), mesa_config)


def takes_all_logits(model: MesaModel) -> bool:
    """Specialised graphs compute the last token's logits only."""
    return not model.engine.runner.last_logits_only


class TestEqualsTheReference:
    # Dense, the edge of the window, and for each bucket its longest prompt and the shortest of the next.
    @pytest.mark.parametrize("count", [1, 40, 63, 64, 65, 66, 104, 105, 144, 145, 184, 185, 264, 265, 344])
    def test_prefill(self, model, reference, count):
        ids = tokens(count, seed=count)
        every = takes_all_logits(model)
        assert difference(model.prefill(ids, all_logits=every), reference.prefill(ids, all_logits=every)) < CLOSE
        if every or count < model.max_tokens:  # specialised graphs end there
            assert difference(model.step(7), reference.step(7)) < CLOSE

    @pytest.mark.parametrize("count", [10, 100])
    def test_200_steps(self, model, reference, count):
        """From a dense prompt, which leaves the window on the way, and from one that is past it."""
        ids = tokens(count)
        model.prefill(ids)
        reference.prefill(ids)
        anchors, worst = set(), 0.0
        for token in tokens(200, seed=1):
            worst = max(worst, difference(model.step(token), reference.step(token)))
            anchors.add(reference.stairs)
        assert len(anchors) > 5, "the generation must move its anchor"
        assert worst < CLOSE
        assert model.lengths == [count + 200]

    @pytest.mark.parametrize("first", [20, 100])
    @pytest.mark.parametrize("second", [1, 5, 30, 150])
    def test_a_second_turn(self, model, reference, first, second):
        """Behind the cache, with a moved anchor, and cut into chunks of its own (150 tokens)."""
        ids, turn = tokens(first), tokens(second, seed=1)
        every = takes_all_logits(model)
        model.prefill(ids)
        reference.prefill(ids)
        got, expected = model.extend(turn, all_logits=every), reference.extend(turn, all_logits=every)
        assert difference(got, expected) < CLOSE
        for token in tokens(20, seed=2):
            assert difference(model.step(token), reference.step(token)) < CLOSE

    def test_a_batch_of_prompts_of_different_lengths(self, model, reference):
        """The rows take different paths and move their anchors at different times."""
        prompts = [tokens(count, seed=count) for count in (5, 150, 64, 90)]
        turns = [tokens(count, seed=count) for count in (3, 40, 80, 1)]
        chosen = [tokens(30, seed=row) for row in range(4)]
        got = [model.prefill(prompts)]
        got += [model.step([row[index] for row in chosen]) for index in range(30)]
        got += [model.extend(turns), model.step([9, 8, 7, 6])]
        for row in range(4):
            expected = [reference.prefill(prompts[row]), *map(reference.step, chosen[row])]
            expected += [reference.extend(turns[row]), reference.step(9 - row)]
            for ours, theirs in zip(got, expected, strict=True):
                assert difference(ours[row : row + 1], theirs) < CLOSE

    def test_a_prefill_forgets_what_was_before(self, model):
        first = model.prefill(tokens(150))
        model.prefill(tokens(300, seed=1))
        for token in tokens(20):
            model.step(token)
        assert np.array_equal(model.prefill(tokens(150)), first)

    def test_what_was_returned_stays_as_it_is(self, model):
        """Engines write to the same memory at each call."""
        kept = [model.prefill(tokens(100)), model.step(3), model.extend(tokens(5)), model.step(4)]
        copies = [logits.copy() for logits in kept]
        model.prefill(tokens(100, seed=1))
        model.step(9)
        for logits, copy in zip(kept, copies, strict=True):
            assert np.array_equal(logits, copy)


class TestOtherArchitectures:
    @pytest.mark.parametrize("engine", SYMBOLIC)
    @pytest.mark.parametrize("family", ["qwen3", "gemma2", "glm", "smollm3", "mixtral", "gpt_oss", "mpt", "gptj"])
    def test_equals_the_reference(self, bundle, checkpoint, mesa_config, family, engine):
        reference = TorchReference(checkpoint(family), mesa_config)
        with MesaModel.load(bundle(family), engine[0]) as model:
            for count in (20, 65, 100):
                ids = tokens(count)
                got, expected = model.prefill(ids, all_logits=True), reference.prefill(ids, all_logits=True)
                assert difference(got, expected) < CLOSE
            for token in tokens(40, seed=1):
                assert difference(model.step(token), reference.step(token)) < CLOSE


class TestOtherDtypes:
    @pytest.mark.parametrize(
        ("dtype", "backend"),
        [
            ("bfloat16", "openvino"),
            ("bfloat16", "torch"),
            ("float16", "onnxruntime"),
            ("float16", "openvino"),
            ("float16", "torch"),
        ],
    )
    def test_errors_are_those_of_the_dtype(self, bundle, checkpoint, mesa_config, dtype, backend):
        """At most three times as far from float32 as PyTorch is in that dtype."""
        if backend not in present_backends():
            pytest.skip(f"{backend} is not installed")
        import torch

        exact = TorchReference(checkpoint("tied_llama"), mesa_config)
        rounded = TorchReference(checkpoint("tied_llama"), mesa_config, dtype=getattr(torch, dtype))
        ours, theirs = [], []
        with MesaModel.load(bundle("tied_llama", dtype), backend) as model:
            for count in (40, 100):
                ids = tokens(count)
                right = exact.prefill(ids).numpy()
                ours.append(np.abs(model.prefill(ids) - right).mean())
                theirs.append(np.abs(rounded.prefill(ids).float().numpy() - right).mean())
                for token in tokens(20, seed=1):
                    right = exact.step(token).numpy()
                    ours.append(np.abs(model.step(token) - right).mean())
                    theirs.append(np.abs(rounded.step(token).float().numpy() - right).mean())
        assert np.mean(theirs) > 1e-5, "the dtype rounds"
        assert np.mean(ours) < 3 * np.mean(theirs)

    def test_onnxruntime_refuses_bfloat16_on_the_cpu(self, bundle):
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("there is a GPU")
        with pytest.raises(MesaError, match="use backend 'openvino', or export with --dtype float32") as error:
            MesaModel.load(bundle("tied_llama", "bfloat16"), "onnxruntime")
        assert "\n" not in str(error.value)


class TestChoice:
    def test_unknown_name(self, bundle):
        with pytest.raises(
            MesaError, match="unknown backend 'abacus'; there are auto, tensorrt, tensorrt-rtx, openvino, "
        ):
            MesaModel.load(bundle(), "abacus")

    @pytest.mark.parametrize(
        ("name", "extra"), [("openvino", "openvino"), ("onnxruntime", "onnxruntime"), ("torch", "export")]
    )
    def test_a_missing_package_names_the_extra(self, bundle, without, name, extra):
        without(name)
        with pytest.raises(MesaError) as error:
            MesaModel.load(bundle(), name)
        assert f"pip install 'mesart[{extra}]'" in str(error.value)
        assert "\n" not in str(error.value)

    def test_auto_says_which_and_why(self, bundle, without):
        present = present_backends()
        with MesaModel.load(bundle()) as model:
            assert model.backend in present
            assert "fastest" in model.choice
        if {"openvino", "onnxruntime"} <= set(present):
            without("openvino")
            with MesaModel.load(bundle()) as model:
                assert model.backend == "onnxruntime"

    def test_auto_with_nothing_installed(self, bundle, without):
        without("openvino", "onnxruntime", "torch")
        with pytest.raises(MesaError, match=r"no backend is installed: pip install 'mesart\[openvino\]'"):
            MesaModel.load(bundle())

    def test_auto_passes_over_a_backend_that_lacks_the_dtype(self, bundle, without):
        without("openvino")
        with MesaModel.load(bundle("tied_llama", "bfloat16")) as model:
            assert model.backend == "torch" or model.device == "cuda"

    @pytest.fixture
    def without(self, monkeypatch) -> Callable[..., None]:
        """``without(package, ...)``: as if they were not installed."""
        find = importlib.util.find_spec

        def hide(*packages: str) -> None:
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))

        return hide


@pytest.mark.parametrize("engine", ENGINES)
def test_a_graph_that_the_engine_cannot_load(bundle_copy, engine):
    backend, specialised = engine
    if backend == "torch":
        pytest.skip("runs the model's code, not the file")
    symbolic: tuple[GraphKind, ...] = ("grouped",) if backend == "onnxruntime" else ("paged", "symbolic")
    manifest = Manifest.read(bundle_copy)
    kinds: tuple[GraphKind, ...] = ("prefix",) if specialised else symbolic
    for kind in kinds:
        name = manifest.graph(kind).file
        (bundle_copy / name).write_bytes(b"\x08" * (bundle_copy / name).stat().st_size)
    with pytest.raises(MesaError, match=name) as error:
        MesaModel.load(bundle_copy, backend, specialised=specialised, verify=False).prefill(tokens(100))
    assert "\n" not in str(error.value)


def without_graphs(bundle: Path, *kinds: GraphKind) -> None:
    """Makes a bundle one of an earlier version, which had no such graphs."""
    manifest = Manifest.read(bundle)
    gone = {graph.file for graph in manifest.graphs if graph.kind in kinds}
    assert len(gone) == len(kinds)
    graphs = [graph for graph in manifest.graphs if graph.file not in gone]
    files = {name: info for name, info in manifest.files.items() if name not in gone}
    dataclasses.replace(manifest, graphs=graphs, files=files).write(bundle)
    for name in gone:
        (bundle / name).unlink()


class TestFormsOfAttention:
    """A graph that writes into the cache where it lies, where bundle and backend have one; else the symbolic one."""

    @pytest.mark.parametrize(("backend", "runner"), [("onnxruntime", GroupedRunner), ("openvino", PagedRunner)])
    def test_a_bundle_of_an_earlier_version(self, bundle_copy, backend, runner):
        if backend not in present_backends():
            pytest.skip(f"{backend} is not installed")
        with MesaModel.load(bundle_copy, backend) as model:
            assert isinstance(model.engine.runner, runner)
            before = model.prefill(tokens(100))
        without_graphs(bundle_copy, "paged", "grouped")
        with MesaModel.load(bundle_copy, backend) as model:
            assert isinstance(model.engine.runner, UnfusedRunner)
            assert np.abs(model.prefill(tokens(100)) - before).max() < 1e-5

    @pytest.mark.parametrize("backend", [name for name in present_backends() if name != "torch"])
    def test_each_graph_is_opened_once(self, bundle, monkeypatch, backend):
        kind = {"onnxruntime": OnnxRuntimeBackend, "openvino": OpenVinoBackend}[backend]
        opened: list[str] = []
        for name in ("open", "open_in_place" if backend == "onnxruntime" else "open_paged"):
            inner = getattr(kind, name)

            def noted(self: Any, path: Path, *others: Any, inner: Any = inner) -> Any:
                opened.append(path.name)
                return inner(self, path, *others)

            monkeypatch.setattr(kind, name, noted)
        MesaModel.load(bundle(), backend, verify=False).close()
        assert sorted(opened) == sorted(
            ["rerotate.onnx", f"model-{'grouped' if backend == 'onnxruntime' else 'paged'}.onnx"]
        )

    def test_a_paged_graph_that_openvino_cannot_load(self, bundle_copy):
        """Says so, and goes on with the symbolic graph."""
        pytest.importorskip("openvino")
        with MesaModel.load(bundle_copy, "openvino") as model:
            before = model.prefill(tokens(100))
        name = Manifest.read(bundle_copy).graph("paged").file
        (bundle_copy / name).write_bytes(b"\x08" * (bundle_copy / name).stat().st_size)
        with MesaModel.load(bundle_copy, "openvino", verify=False) as model:
            assert "without paged attention: OpenVINO cannot load" in model.choice
            assert isinstance(model.engine.runner, UnfusedRunner)
            assert np.abs(model.prefill(tokens(100)) - before).max() < 1e-5

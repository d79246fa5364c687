"""Engines that lie: what they give is looked at before anything goes on with it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mesart.graphs import MesaError
from mesart.graphs.bundle.names import Phase
from mesart.runtime import MesaModel, present_backends
from mesart.runtime.backends import OnnxRuntimeBackend, OpenVinoBackend, TorchBackend
from mesart.runtime.graphs import SymbolicGraphs
from mesart.runtime.runners.runner import require_keys

IDS = [3 + index % 300 for index in range(100)]
OUTPUTS = ["logits", "present.0.key", "present.1.value"]


@pytest.fixture(scope="module")
def model(bundle) -> Iterator[MesaModel]:
    """Of a graph that gives its new keys and values, and takes a past."""
    with MesaModel.load(bundle(), "torch", verify=False) as loaded:
        yield loaded


@pytest.fixture
def answer(monkeypatch):
    """``answer(name, change)``: an output of every graph is changed on its way, or missing if it becomes ``None``."""
    run = SymbolicGraphs.run

    def patch(name: str, change: Any) -> None:
        def changed(self: SymbolicGraphs, phase: Phase, bucket: int | None, feeds: Any) -> dict[str, Any]:
            outputs: dict[str, Any] = dict(run(self, phase, bucket, feeds))
            outputs[name] = change(np.array(outputs[name]))
            return {key: value for key, value in outputs.items() if value is not None}

        monkeypatch.setattr(SymbolicGraphs, "run", changed)

    return patch


def refused(call: Any) -> str:
    with pytest.raises(MesaError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", OUTPUTS)
class TestEveryOutput:
    def test_is_there(self, model, answer, name):
        model.prefill(IDS)
        answer(name, lambda array: None)
        assert f"has no output '{name}'" in refused(lambda: model.step(5))
        assert model.lengths == [100]

    @pytest.mark.parametrize(
        "change", [lambda x: x[:, :0], lambda x: np.repeat(x, 2, axis=-2), lambda x: x[..., :-1], lambda x: x[0]]
    )
    def test_has_the_shape_that_was_asked_for(self, model, answer, name, change):
        model.prefill(IDS)
        answer(name, change)
        assert f"the engine gave {name} of the decode as [" in refused(lambda: model.step(5))
        assert model.lengths == [100]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_holds_numbers(self, model, answer, monkeypatch, name, value):
        def spoil(array: Any) -> Any:
            array.reshape(-1)[7] = value
            return array

        model.prefill(IDS)
        expected = model.step(6)
        for call, length in (
            (lambda: model.step(5), 100),
            (lambda: model.extend([5, 6]), 100),
            (lambda: model.prefill(IDS), 0),
        ):
            model.prefill(IDS)
            answer(name, spoil)
            assert "mesart validate" in refused(call)
            monkeypatch.undo()
            assert model.lengths == [length]
            if length:
                assert np.abs(model.step(6) - expected).max() < 1e-5


class Liar:
    """A graph that writes keys and values where they lie, and what it then says, or has written, is changed."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.caches = graph, dict[str, Any]()
        self.lie: Callable[[dict[str, Any], Any], None] | None = None
        """Gets the outputs, and of the last new token the keys of the first layer, ``[K, D]``."""

    def bind(self, name: str, array: Any) -> None:
        self.caches[name] = array
        self.graph.bind(name, array)

    def __call__(self, feeds: Any, caches: Any = None) -> dict[str, Any]:
        outputs = dict(self.graph(feeds) if caches is None else self.graph(feeds, caches))
        if self.lie is not None:
            if caches is None:
                last = int(feeds["max_context_len"]) - 1
                keys = self.caches["past_key_values.0.key"][feeds["block_indices"][last // 32], :, last % 32]
            else:
                keys = caches["past_key_values.0.key"][0, :, int(feeds["seqlens_k"][0])]
            self.lie(outputs, keys)
        return outputs


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def lying(request, bundle) -> Iterator[tuple[MesaModel, Liar]]:
    """Models whose graphs write into the cache."""
    pytest.importorskip(request.param)
    liars = []

    def liar(graph: Any) -> Liar:
        liars.append(Liar(graph))
        return liars[-1]

    with pytest.MonkeyPatch.context() as patch:
        for kind, name in ((OnnxRuntimeBackend, "open_in_place"), (OpenVinoBackend, "open_paged")):
            opens = getattr(kind, name)
            patch.setattr(kind, name, lambda *arguments, opens=opens: liar(opens(*arguments)))
        model = MesaModel.load(bundle(), request.param, verify=False)
    (only,) = liars
    with model:
        yield model, only


class TestGraphsThatWriteInPlace:
    LIES: ClassVar[dict[str, tuple[Callable[[dict[str, Any], Any], None], str]]] = {
        "no logits": (lambda outputs, keys: outputs.__delitem__("logits"), "has no output 'logits'"),
        "fewer": (lambda outputs, keys: outputs.update(logits=outputs["logits"][..., :-1]), "the engine gave logits"),
        "an axis": (lambda outputs, keys: outputs.update(logits=outputs["logits"][0]), "the engine gave logits"),
        "NaN": (lambda outputs, keys: outputs.update(logits=outputs["logits"] * np.nan), "mesart validate"),
        "infinite": (lambda outputs, keys: outputs.update(logits=outputs["logits"] + np.inf), "mesart validate"),
        "a key": (lambda outputs, keys: keys.__setitem__((1, 7), np.nan), "NaN or infinite numbers in the keys"),
        "all keys": (lambda outputs, keys: keys.__setitem__(slice(None), np.inf), "NaN or infinite numbers in the key"),
    }

    @pytest.mark.parametrize(("lie", "says"), LIES.values(), ids=LIES)
    def test_are_looked_at_too(self, lying, lie, says):
        """And what they have written is not seen by what comes behind."""
        model, liar = lying
        model.prefill([IDS, IDS[:50]])
        expected = model.extend([[5, 6], [7]]), model.step([6, 7])
        for call, lengths in (
            (lambda: model.step([5, 6]), [100, 50]),
            (lambda: model.extend([[5, 6], [7] * 30]), [100, 50]),
            (lambda: model.prefill([IDS, IDS[:50]]), [0]),
        ):
            model.prefill([IDS, IDS[:50]])
            liar.lie = lie
            assert says in refused(call)
            liar.lie = None
            assert model.lengths == lengths
            if lengths != [0]:
                got = model.extend([[5, 6], [7]]), model.step([6, 7])
                assert all(np.abs(x - y).max() < 1e-5 for x, y in zip(got, expected, strict=True))
        model.prefill([IDS, IDS[:50]])
        got = model.extend([[5, 6], [7]]), model.step([6, 7])
        assert all(np.abs(x - y).max() < 1e-5 for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", present_backends())
def test_rotated_keys_have_their_shape(bundle, monkeypatch, backend):
    for one in (OnnxRuntimeBackend, OpenVinoBackend, TorchBackend):
        opens: Any = one.open

        def opened(self: Any, path: Path, info: Any = None, *, opens: Any = opens) -> Any:
            graph = opens(self, path, info)
            return (lambda feeds: {"rotated": feeds["key"][:, :, :1]}) if path.name == "rerotate.onnx" else graph

        monkeypatch.setattr(one, "open", opened)
    with MesaModel.load(bundle(), backend, verify=False) as model:
        model.prefill(IDS[:60])  # within the window, where no key is rotated
        assert "the engine gave rotated of the rerotate as [" in refused(lambda: model.extend(IDS))
        assert model.lengths == [60]


class TestKeys:
    """Numbers of every storage type: bfloat16 lies as its bits in uint16."""

    @pytest.mark.parametrize(
        ("number", "fine"),
        [  # 1, -2, 2**63, 2**64, infinity, minus infinity, NaN
            *((0x3F80, True), (0xC000, True), (0x5F00, True)),
            *((0x5F80, False), (0x7F80, False), (0xFF80, False), (0x7FC1, False)),
        ],
    )
    def test_bfloat16_and_float32(self, model, number, fine):
        bits = np.full((1, 2, 3, 8), 0x3F80, np.uint16)
        bits[0, 1, 2, 7] = number
        for array in (bits, (bits.astype(np.uint32) << 16).view(np.float32)):
            if fine:
                require_keys([array], "decode", model.manifest)
            else:
                refused(lambda array=array: require_keys([array], "decode", model.manifest))

    @pytest.mark.parametrize(("value", "fine"), [(65504, True), (-65504, True), (np.inf, False), (np.nan, False)])
    def test_float16(self, model, value, fine):
        array = np.zeros((1, 2, 4, 8), np.float16)[:, :, :3]  # not contiguous
        array[0, 1, 2, 7] = value
        if fine:
            require_keys([array], "decode", model.manifest)
        else:
            refused(lambda: require_keys([array], "decode", model.manifest))


def places(model: MesaModel) -> int:
    """The number of graphs that rotate keys, which are opened first."""
    return len({layer.rerotate for layer in model.manifest.layers})


class TestOpenVinoThatComputesNothing:
    """Short of memory it returns from a run as from any other, with the results of the run before."""

    @pytest.fixture(params=["llama", "gemma2"])  # by blocks, and by the symbolic graph
    def lazy(self, request, bundle, monkeypatch) -> Iterator[tuple[MesaModel, set[int]]]:
        """A model, and the numbers of its requests that do nothing, in the order in which they were made."""
        openvino = pytest.importorskip("openvino")
        make, idle, count = openvino.CompiledModel.create_infer_request, set[int](), itertools.count()

        def made(compiled: Any) -> Any:
            request, number = make(compiled), next(count)
            infer = request.infer
            request.infer = lambda *arguments, **options: None if number in idle else infer(*arguments, **options)
            return request

        monkeypatch.setattr(openvino.CompiledModel, "create_infer_request", made)
        with MesaModel.load(bundle(request.param), "openvino", verify=False) as loaded:
            yield loaded, idle

    def test_a_prompt_of_the_same_length(self, lazy):
        model, idle = lazy
        first = model.prefill(IDS[:30])
        idle |= set(range(places(model), 9))
        for _ in range(2):
            assert "OpenVINO computed nothing in model" in refused(lambda: model.prefill(IDS[30:60]))
        idle.clear()
        assert np.array_equal(model.prefill(IDS[:30]), first)

    def test_keys_that_move(self, lazy):
        model, idle = lazy
        model.prefill(IDS)
        expected = model.extend(IDS)
        model.prefill(IDS)
        idle |= set(range(places(model)))
        assert "OpenVINO computed nothing in rerotate.onnx" in refused(lambda: model.extend(IDS))
        idle.clear()
        assert np.abs(model.extend(IDS) - expected).max() < 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
@pytest.mark.parametrize(("backend", "rows"), [("onnxruntime", 20000), ("openvino", 1000)])
def test_little_memory_is_one_line_or_the_right_numbers(bundle, backend, rows):
    """And the model is usable afterwards. A pool of blocks has its address space before, and the rows may all fit."""
    pytest.importorskip(backend)
    code = """
import resource, sys
from mesart.graphs import MesaError
from mesart.runtime import MesaModel
ids = [3 + index % 300 for index in range(60)]
with MesaModel.load(sys.argv[1], sys.argv[2], threads=1, verify=False) as model:
    first = model.prefill(ids)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (24 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    try:
        assert abs(model.prefill([ids] * int(sys.argv[3])) - first).max() < 1e-4
    except MesaError as error:
        print("one line:", error)
    assert (model.prefill(ids) == first).all()
"""
    command = [sys.executable, "-c", code, os.fspath(bundle()), backend, str(rows)]
    done = subprocess.run(command, check=False, capture_output=True, timeout=120, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) <= 1
    assert all(line.startswith("one line: ") and "memory" in line for line in said)
    assert said or backend == "openvino"

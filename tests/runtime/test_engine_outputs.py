"""Engines that lie: what they give is looked at before anything goes on with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mesart.graphs import MesaError
from mesart.runtime import MesaModel
from mesart.runtime.runners.runner import require_keys

IDS = [3 + index % 300 for index in range(100)]
OUTPUTS = ["logits", "present.0.key", "present.1.value"]


@pytest.fixture(scope="module")
def model(bundle) -> Iterator[MesaModel]:
    pytest.importorskip("onnxruntime")
    with MesaModel.load(bundle(), "onnxruntime", verify=False) as loaded:
        yield loaded


@pytest.fixture
def answer(model, monkeypatch):
    """``answer(name, change)``: an output of every graph is changed on its way, or missing if it becomes ``None``."""

    def patch(name: str, change: Any) -> None:
        run = model.executor.cache._graphs.run

        def changed(role: str, bucket: int | None, feeds: Any) -> dict[str, Any]:
            outputs = dict(run(role, bucket, feeds))
            outputs[name] = change(np.array(outputs[name]))
            return {key: value for key, value in outputs.items() if value is not None}

        monkeypatch.setattr(model.executor.cache._graphs, "run", changed)

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
        assert f"the engine gave {name} of the step as [" in refused(lambda: model.step(5))
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


def test_moved_keys_have_their_shape(model, monkeypatch):
    cache: Any = model.executor.cache
    model.prefill(IDS)
    monkeypatch.setattr(cache, "_places", dict.fromkeys(cache._places, lambda feeds: {"moved": feeds["key"][:, :, :1]}))
    assert "the engine gave moved of the place as [" in refused(lambda: model.extend(IDS))
    assert model.lengths == [100]


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
                require_keys([array], "step", model.manifest)
            else:
                refused(lambda array=array: require_keys([array], "step", model.manifest))

    @pytest.mark.parametrize(("value", "fine"), [(65504, True), (-65504, True), (np.inf, False), (np.nan, False)])
    def test_float16(self, model, value, fine):
        array = np.zeros((1, 2, 4, 8), np.float16)[:, :, :3]  # not contiguous
        array[0, 1, 2, 7] = value
        if fine:
            require_keys([array], "step", model.manifest)
        else:
            refused(lambda: require_keys([array], "step", model.manifest))


class TestOpenVinoThatComputesNothing:
    """Short of memory it returns from a run as from any other, with the results of the run before."""

    @pytest.fixture
    def lazy(self, bundle) -> Iterator[MesaModel]:
        pytest.importorskip("openvino")
        with MesaModel.load(bundle(), "openvino", verify=False) as loaded:
            yield loaded

    class Idle:
        """A request whose runs do nothing."""

        def __init__(self, request: Any) -> None:
            self.get_tensor = request.get_tensor

        def infer(self, *arguments: Any, **options: Any) -> None:
            pass

    def test_a_prompt_of_the_same_length(self, lazy):
        first = lazy.prefill(IDS[:30])
        graph: Any = lazy.executor.cache._graphs._graph
        request, graph._request = graph._request, self.Idle(graph._request)
        for _ in range(2):
            assert "OpenVINO computed nothing in model.onnx" in refused(lambda: lazy.prefill(IDS[30:60]))
        graph._request = request
        assert np.array_equal(lazy.prefill(IDS[:30]), first)

    def test_keys_that_move(self, lazy):
        lazy.prefill(IDS)
        expected = lazy.extend(IDS)
        lazy.prefill(IDS)
        (place,) = set(lazy.executor.cache._places.values())
        request, place._request = place._request, self.Idle(place._request)
        assert "OpenVINO computed nothing in place.onnx" in refused(lambda: lazy.extend(IDS))
        place._request = request
        assert np.abs(lazy.extend(IDS) - expected).max() < 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_little_memory_is_one_line_or_the_right_numbers(bundle, backend):
    """And the model is usable afterwards."""
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
        model.prefill([ids] * 20000)
    except MesaError as error:
        print("one line:", error)
    assert (model.prefill(ids) == first).all()
"""
    command = [sys.executable, "-c", code, os.fspath(bundle()), backend]
    done = subprocess.run(command, check=False, capture_output=True, timeout=120, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("one line: ")
    assert "memory" in done.stdout

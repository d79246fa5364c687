"""Programs are decomposed operator by operator where that will do, and into what torch makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mesart.export import trace
from mesart.export.trace import trace_phases, trace_rerotation
from mesart.graphs import MesaConfig
from mesart.graphs.model.phase_module import PhaseModule

onnxruntime = pytest.importorskip("onnxruntime")


def expressions(model: ir.Model) -> list[tuple[str | None, str]]:
    """Each output as an expression of inputs, weights and constants: equal however inner values are called."""
    known: dict[ir.Value | None, str] = {None: ""}
    for value in model.graph.inputs:
        known[value] = str(value.name)
    for name, value in model.graph.initializers.items():
        number = value.const_value
        known[value] = repr(number.numpy()) if number is not None and number.size < 16 else name
    for node in model.graph:
        what = [node.op_type, *sorted(map(str, node.attributes.values())), *(known[value] for value in node.inputs)]
        digest = hashlib.sha256(repr(what).encode()).hexdigest()
        known.update({value: f"{digest} {i} {value.shape} {value.dtype}" for i, value in enumerate(node.outputs)})
    return [(value.name, known[value]) for value in model.graph.outputs]


@pytest.fixture
def by_torch(monkeypatch) -> list[ExportedProgram]:
    """The programs that torch decomposes as a whole."""
    programs: list[ExportedProgram] = []
    real = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, *arguments: Any, **options: Any) -> ExportedProgram:
        programs.append(program)
        return real(program, *arguments, **options)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", run)
    return programs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_the_graph_is_that_of_torch(make_model, monkeypatch, by_torch, family, dtype):
    module = PhaseModule(make_model(family).to(dtype), MesaConfig(64), "traced")
    with torch.no_grad():
        ours = trace_phases(module)
        assert by_torch == []
        monkeypatch.setattr(trace, "decomposed_one_by_one", lambda program: program)
        theirs = trace_phases(module)
    assert len(by_torch) == 1
    assert expressions(ours) == expressions(theirs)


class _Place(nn.Module):
    """In the place of a graph that re-rotates keys: any function of them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, key: Tensor, from_ids: Tensor, to_ids: Tensor) -> Tensor:
        return self.function(key) + 0 * (from_ids + to_ids)[:, None, :, None]


KEYS = torch.randn(3, 2, 7, 6, generator=torch.Generator().manual_seed(0))


def run(function: Callable[[Tensor], Tensor]) -> np.ndarray:
    """What onnxruntime makes of a function of keys ``[B, 2, S, 6]``."""
    with torch.no_grad():
        graph = trace_rerotation(_Place(function), 2, 6, torch.float32)
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.zeros((3, 7), dtype=np.int64)
    feeds = {"key": KEYS.numpy(), "from_ids": ids, "to_ids": ids}
    (result,) = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    return np.asarray(result)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda key: key.to(torch.float32) * 2, id="to-the-same"),
        pytest.param(lambda key: key.to(torch.float64).exp().to(torch.float32), id="to"),
        pytest.param(lambda key: key.transpose(1, 3).contiguous().transpose(1, 3), id="contiguous"),
        pytest.param(lambda key: key.transpose(1, 2).reshape(*key.shape[::2], -1)[:, None], id="reshape-of-a-view"),
        pytest.param(lambda key: torch.cat(key.chunk(4, -1)[::-1], -1), id="chunk"),  # 6 in fours: three twos
        pytest.param(lambda key: nn.functional.dropout(key, 0.5, training=False), id="dropout"),
    ],
)
def test_each_rule(by_torch, function):
    assert np.allclose(run(function), function(KEYS).numpy(), atol=1e-6)
    assert by_torch == []


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda key: key.clone().add_(1.0), id="in-place"),
        pytest.param(lambda key: key.flatten(2).unflatten(2, key.shape[2:]), id="without-a-rule"),
        pytest.param(lambda key: key.square(), id="in-the-table"),
    ],
)
def test_what_has_no_rule_is_left_to_torch(by_torch, function):
    assert np.allclose(run(function), function(KEYS).numpy(), atol=1e-6)
    assert len(by_torch) == 1

"""Chunks and tails in slices: the same numbers, however they are cut and however many slots are looked at."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from mesart.graphs import TorchReference
from mesart.graphs.manifest import Role
from mesart.runtime import MesaModel, graphs
from mesart.runtime.backends import Array
from mesart.runtime.graphs import SymbolicGraphs


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, 320, count).tolist()
    return ids


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, int]]:
    """Cut finely, so that short texts have many slices: role, rows, new and past tokens of each run."""
    for name, value in {"_ROWS": 32, "_CHUNK_ROWS": 12, "GRANULE": 8}.items():
        monkeypatch.setattr(graphs, name, value)
    seen = []
    run = SymbolicGraphs.run

    def noted(self: SymbolicGraphs, role: Role, bucket: int | None, feeds: Mapping[str, Array]) -> object:
        seen.append((role, *feeds["input_ids"].shape, feeds["past_mask"].shape[-1]))
        return run(self, role, bucket, feeds)

    monkeypatch.setattr(SymbolicGraphs, "run", noted)
    return seen


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mpt"])
def test_equal_to_the_reference(bundle, checkpoint, mesa_config, shapes, backend, family):
    """Within the window, far beyond it, and in a turn that needs chunks of its own."""
    reference = TorchReference(checkpoint(family), mesa_config)
    with MesaModel.load(bundle(family), backend, verify=False) as model:
        for count, more in ((64, 3), (104, 100)):
            expected = [reference.prefill(tokens(count), all_logits=True), reference.extend(tokens(more, 1))]
            got = [model.prefill(tokens(count), all_logits=True), model.extend(tokens(more, 1))]
            for ours, theirs in zip(got, expected, strict=True):
                assert ours.shape == theirs.shape
                assert np.abs(ours - theirs.numpy()).max() < 5e-5
    chunks = [shape for shape in shapes if shape[0] == "chunk"]
    assert {shape[3] for shape in chunks} == {8, 20, 32, 44}  # the head, and what came before in the chunk
    assert max(shape[1] for shape in chunks) == 2  # chunks side by side


def test_a_prompt_in_the_window_looks_at_no_empty_slots(bundle, shapes):
    with MesaModel.load(bundle(), "onnxruntime", verify=False) as model:
        model.prefill(tokens(64))
    assert shapes == [("tail", 1, 32, 0), ("tail", 1, 32, 32)]

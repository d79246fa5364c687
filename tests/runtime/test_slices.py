"""Prompts in slices: the same numbers, however they are cut and however many slots are looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from mesart.graphs import TorchReference
from mesart.graphs.bundle.names import Phase
from mesart.runtime import MesaModel, graphs, present_backends
from mesart.runtime.backends import Array
from mesart.runtime.graphs import SymbolicGraphs
from mesart.runtime.runners.runner import Logits, Segment
from tests.runtime.faults import Watched


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, 320, count).tolist()
    return ids


class Sliced(Watched):
    """Takes few tokens at a time, so that short texts have many slices; notes phases, new and past tokens of each."""

    def __init__(self, model: MesaModel) -> None:
        super().__init__(model.engine.runner)
        model.engine.runner = self
        self.runs: list[list[tuple[Phase, int, int]]] = []

    def slice_length(self, phase: Phase, past: int) -> int:
        return min(12 if phase in ("prefix", "chunk") else 32, self.inner.slice_length(phase, past))

    def run(self, segments: Sequence[Segment]) -> list[Logits]:
        self.runs.append([(segment.phase, len(segment), segment.kv.length) for segment in segments])
        return self.inner.run(segments)


@pytest.mark.parametrize("backend", present_backends())
@pytest.mark.parametrize("family", ["llama", "gemma2", "mpt"])
def test_equal_to_the_reference(bundle, checkpoint, mesa_config, backend, family):
    """Within the window, far beyond it, and in a turn that needs chunks of its own."""
    reference = TorchReference(checkpoint(family), mesa_config)
    with MesaModel.load(bundle(family), backend, verify=False) as model:
        sliced = Sliced(model)
        for count, more in ((64, 3), (104, 100)):
            expected = [reference.prefill(tokens(count), all_logits=True), reference.extend(tokens(more, 1))]
            got = [model.prefill(tokens(count), all_logits=True), model.extend(tokens(more, 1))]
            for ours, theirs in zip(got, expected, strict=True):
                assert ours.shape == theirs.shape
                assert np.abs(ours - theirs.numpy()).max() < 5e-5
    chunks = [segment for run in sliced.runs for segment in run if segment[0] == "chunk"]
    assert {past for _, _, past in chunks} == {8, 20, 32, 44}  # the head, and what came before in the chunk
    assert max(len(run) for run in sliced.runs) == 2  # chunks side by side
    assert [run for run in sliced.runs if run[0][0] == "tail"][:2] == [[("tail", 32, 0)], [("tail", 32, 32)]]


def test_a_prompt_in_the_window_looks_at_no_empty_slots(bundle, monkeypatch):
    shapes = []
    run = SymbolicGraphs.run

    def noted(self: SymbolicGraphs, phase: Phase, bucket: int | None, feeds: Mapping[str, Array]) -> object:
        shapes.append((phase, *feeds["input_ids"].shape, feeds["past_mask"].shape[-1]))
        return run(self, phase, bucket, feeds)

    monkeypatch.setattr(SymbolicGraphs, "run", noted)
    for name, value in {"_ROWS": 32, "GRANULE": 8}.items():
        monkeypatch.setattr(graphs, name, value)
    with MesaModel.load(bundle(), "torch", verify=False) as model:
        model.prefill(tokens(64))
    assert shapes == [("tail", 1, 32, 0), ("tail", 1, 32, 32)]

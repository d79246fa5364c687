"""A validation passes what is right, and sees what is not: a weight, a mask, a position."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mesart.evaluation.validate import Validation, validate
from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import FileInfo, Manifest, sha256
from mesart.graphs.bundle.names import Phase
from mesart.runtime import MesaModel, present_backends
from mesart.runtime.graphs import SymbolicGraphs
from mesart.runtime.runners.runner import Logits, Runner, Segment
from tests.runtime.faults import Watched

BUCKETS = [0, 3]
LAYER = 1


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_a_right_bundle_passes(bundle: Callable[..., Path], checkpoint: Callable[..., Path], backend: str) -> None:
    result = validate(bundle(), checkpoint("llama"), backend=backend, buckets=BUCKETS, progress=False)
    assert result.passed, result.table()
    # Every phase of every bucket, of both kinds of graphs; keys and values of each, logits of tail and step.
    assert {(c.graphs, c.bucket, c.phase) for c in result.checks} == {
        (graphs, bucket, phase)
        for graphs in ("symbolic", "specialised")
        for bucket, phases in ((0, ("tail", "decode")), (3, ("prefix", "chunk", "tail", "decode")))
        for phase in phases
    }
    assert all(c.top1 == 1.0 and c.kl is not None and c.kl < 1e-9 for c in result.checks if c.quantity == "logits")
    fields = json.loads(result.to_json())
    assert fields["passed"] is True
    assert len(fields["checks"]) == len(result.checks)
    assert result.table().splitlines()[-1] == result.verdict()


def test_bfloat16_is_judged_by_its_own_noise(bundle: Callable[..., Path], checkpoint: Callable[..., Path]) -> None:
    result = validate(
        bundle("llama", "bfloat16"),
        checkpoint("llama"),
        backend="openvino",
        graphs=("symbolic",),
        buckets=BUCKETS,
        progress=False,
    )
    assert result.passed, result.table()
    assert result.truth == "PyTorch float32"
    assert max(c.relative_error for c in result.checks) > 1e-4, "bfloat16 cannot be this exact"


def _with_weight(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Alters a bundle's weights and its manifest with them, as a faulty exporter would have written both."""
    file = Manifest.read(folder).weight_files[0]
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})
    manifest = Manifest.read(folder)
    info = FileInfo((folder / file).stat().st_size, sha256(folder / file))
    replace(manifest, files={**manifest.files, file: info}).write(folder)


def _check(folder: Path, checkpoint: Path, backend: str = "onnxruntime") -> Validation:
    return validate(folder, checkpoint, backend=backend, graphs=("symbolic",), buckets=BUCKETS, progress=False)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        (f"model.layers.{LAYER}.self_attn.k_proj.weight", LAYER),
        (f"model.layers.{LAYER - 1}.mlp.down_proj.weight", LAYER),  # seen by the keys of the next layer
    ],
)
def test_a_wrong_weight_is_seen_and_its_layer_named(
    bundle_copy: Path, checkpoint: Callable[..., Path], name: str, first: int
) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[name] = weights[name].copy()
        weights[name][0, 0] += 0.01

    _with_weight(bundle_copy, change)
    result = _check(bundle_copy, checkpoint("llama"))
    assert not result.passed
    assert {c.first_layer for c in result.checks if c.first_layer is not None} == {first}
    assert f"first at layer {first}" in result.verdict()


def test_a_wrong_head_is_seen_behind_the_last_layer(bundle_copy: Path, checkpoint: Callable[..., Path]) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights["lm_head.weight"] = weights["lm_head.weight"] * np.float32(1.001)

    _with_weight(bundle_copy, change)
    result = _check(bundle_copy, checkpoint("llama"))
    assert not result.passed
    assert "after the last layer's keys" in result.verdict()
    assert {c.quantity for c in result.checks if not c.passed} == {"logits"}


def _patch_feeds(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, dict[str, Any]], None]) -> None:
    plain = SymbolicGraphs.run

    def changed(self: SymbolicGraphs, phase: Phase, bucket: int | None, feeds: Mapping[str, Any]) -> Any:
        altered = dict(feeds)
        change(phase, altered)
        return plain(self, phase, bucket, altered)

    monkeypatch.setattr(SymbolicGraphs, "run", changed)


class _Displaced(Watched):
    """Computes a phase's new tokens one position further; their positions in the store are the right ones."""

    def __init__(self, inner: Runner, phase: Phase, by: int) -> None:
        super().__init__(inner)
        self.phase, self.by = phase, by

    def run(self, segments: Sequence[Segment]) -> list[Logits]:
        wrong = [replace(x, positions=x.positions + self.by) if x.phase == self.phase else x for x in segments]
        logits = self.inner.run(wrong)
        for segment in segments:
            segment.kv.place(segment.kv.length - len(segment), segment.positions)
        return logits


def test_a_mask_that_shows_one_token_of_the_future_is_seen(
    bundle: Callable[..., Path], checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(phase: str, feeds: dict[str, Any]) -> None:
        if phase == "chunk":
            feeds["new_mask"] = feeds["new_mask"].copy()
            feeds["new_mask"][..., 3, 4] = 0

    _patch_feeds(monkeypatch, change)
    result = _check(bundle(), checkpoint("llama"), "torch")
    assert not result.passed
    assert "chunk" in {c.phase for c in result.checks if not c.passed}
    assert "prefix" not in {c.phase for c in result.checks if not c.passed}


@pytest.mark.parametrize("backend", present_backends())
@pytest.mark.parametrize("phase", ["prefix", "chunk", "tail", "decode"])
def test_a_position_off_by_one_is_seen_in_its_phase(
    bundle: Callable[..., Path],
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    phase: Phase,
) -> None:
    load = MesaModel.load

    def displaced(*arguments: Any, **options: Any) -> MesaModel:
        model = load(*arguments, **options)
        # Downwards for steps: the last of them is at the last trained position.
        model.engine.runner = _Displaced(model.engine.runner, phase, -1 if phase == "decode" else 1)
        return model

    monkeypatch.setattr(MesaModel, "load", displaced)
    result = _check(bundle(), checkpoint("llama"), backend)
    assert not result.passed
    assert next(c.phase for c in result.checks if not c.passed and c.bucket == BUCKETS[1]) == phase


def test_a_bucket_that_is_not_there(bundle: Callable[..., Path]) -> None:
    with pytest.raises(MesaError, match="no bucket of 5 chunks; it has 0, "):
        validate(bundle(), buckets=[5], progress=False)

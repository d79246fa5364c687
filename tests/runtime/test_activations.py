"""Rounded activations: asked for, they round; not asked for, nothing is rounded; where they cannot be, an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesart.graphs import MesaError
from mesart.runtime import MesaModel, present_backends

ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(name not in present_backends(), reason=f"{name} is not installed"))
    for name in ("onnxruntime", "openvino")
]


@pytest.fixture(scope="module", params=["int4", "int8"])
def quantised(request, make_model, mesa_config, tmp_path_factory) -> Path:
    """Layers wide enough for OpenVINO, which rounds groups of 32 inputs."""
    from mesart.export import export_model

    folder: Path = tmp_path_factory.mktemp("rounded")
    make_model("tied_llama", hidden_size=64, intermediate_size=128).save_pretrained(folder / "model")
    bundle = folder / "bundle"
    export_model(folder / "model", bundle, mesa_config, max_tokens=104, quantise=request.param, group_size=32)
    return bundle


@pytest.fixture(scope="module")
def logits(quantised) -> Callable[..., Any]:
    """``logits(backend, **options)``: of a prompt with chunks, and of the steps behind it, ``[1, 9, V]``."""

    def run(backend: str, **options: Any) -> Any:
        with MesaModel.load(quantised, backend, threads=1, **options) as model:
            first = model.prefill(np.arange(90) % 300)
            return np.concatenate([first, *(model.step(token) for token in range(8))], axis=1)

    return run


def has_eight_bit_products() -> bool:
    """OpenVINO rounds where the CPU multiplies 8 bits faster, and computes exactly elsewhere."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8").split()) if info.is_file() else set()
    return bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"}) or not flags


def apart(ours: Any, theirs: Any) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("backend", ENGINES)
def test_they_round_only_where_asked_for(logits, backend):
    reference = logits("torch")
    assert apart(logits(backend), reference) < 1e-5
    if backend == "openvino" and not has_eight_bit_products():
        pytest.skip("OpenVINO rounds nothing on a CPU without 8-bit products")
    assert 1e-3 < apart(logits(backend, activations="int8"), reference) < 0.1


def test_a_bundle_without_quantised_weights(bundle):
    with pytest.raises(MesaError, match="in front of quantised weights only.*export with --quantise int4"):
        MesaModel.load(bundle("tied_llama"), activations="int8")


def test_unknown(quantised):
    with pytest.raises(MesaError, match="rounded to int8 or not at all: 'int4'"):
        MesaModel.load(quantised, activations="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "reason"), [("torch", "rounds no activations"), ("tensorrt", "runs engines as they were built")]
)
def test_backends_that_round_nothing(quantised, backend, reason):
    with pytest.raises(MesaError, match=reason):
        MesaModel.load(quantised, backend, activations="int8")

"""The benchmark's arithmetic, and one small run of all of it. No test looks at a time: the table is for that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mesart.evaluation.bench import needed_pairs, run_bench, token_bytes
from mesart.evaluation.bench_worker import peak_memory
from mesart.graphs import MesaConfig, MesaError, Plan
from mesart.graphs.manifest import Manifest


@pytest.mark.parametrize("tokens", [1, 64, 65, 300])
def test_pairs_are_those_that_the_plan_shows(tokens: int) -> None:
    """Counted token by token: what each query sees."""
    config = MesaConfig(64)
    plan = Plan.of(config, tokens)
    seen = 0
    for query in range(tokens):
        for span in plan.chunks:
            if span.start <= query < span.stop:
                seen += config.head_length + query - span.start + 1
                break
        else:
            seen += query + 1  # the head and the tail see everything before
    assert needed_pairs(config, tokens) == seen


def test_a_decoded_token_reads_weights_and_cache(bundle: Callable[..., Path]) -> None:
    manifest = Manifest.read(bundle())
    layer = manifest.layers[0]
    cache = len(manifest.layers) * layer.kv_heads * (layer.key_size + layer.value_size) * 100
    assert token_bytes(manifest, 100, 5000, "float32") == 4 * (5000 + cache)
    assert token_bytes(manifest, 100, 5000, "bfloat16") == 2 * (5000 + cache)


def test_peak_memory_is_that_of_the_largest_moment() -> None:
    with peak_memory(0.001) as before:
        pass
    with peak_memory(0.001) as peak:
        block = np.ones(64 << 17)  # 64 MiB, written to
        del block
    assert 60 << 20 <= peak[0] - before[0] <= 80 << 20


def test_all_systems_in_one_run(bundle: Callable[..., Path]) -> None:
    result = run_bench(bundle(), lengths=[100], new_tokens=2, backends=["onnxruntime", "openvino"], progress=False)
    assert [row.system.split()[0] for row in result.rows] == ["transformers", "mesart", "mesart"]
    for row in result.rows:
        assert row.tokens == 100
        assert row.first_token > 0
        assert row.per_token > 0
        assert row.memory > 20 << 20
    dense, ours = result.rows[0], result.rows[1]
    assert ours.flops < dense.flops, "Mesa needs fewer pairs"
    assert len(json.loads(result.to_json())["rows"]) == 3
    assert result.table().count("\n") == 5


def test_bad_options(bundle: Callable[..., Path]) -> None:
    with pytest.raises(MesaError, match="the bundle serves 1 to 344"):
        run_bench(bundle(), lengths=[345], progress=False)
    with pytest.raises(MesaError, match="unknown backend 'tvm'; there are openvino, onnxruntime, torch"):
        run_bench(bundle(), backends=["tvm"], progress=False)

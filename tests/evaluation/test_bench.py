"""The benchmark's arithmetic, and one small run of all of it. No test looks at a time: the table is for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from mesart.evaluation import bench_worker
from mesart.evaluation.bench import run_bench, run_worker, token_bytes
from mesart.evaluation.bench_worker import peak_device_memory, peak_memory, require_cuda_provider
from mesart.evaluation.pairs import needed_pairs
from mesart.evaluation.processes import ProcessError, process_error, run_process
from mesart.graphs import MesaConfig, MesaError, Plan
from mesart.graphs.bundle.manifest import Manifest


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
        block = np.ones(256 << 17)  # 256 MiB, written to: large beside what the process itself takes and gives back
        del block
    assert 200 << 20 <= peak[0] - before[0] <= 320 << 20


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
    with pytest.raises(MesaError, match="unknown backend 'tvm'; there are .*openvino, onnxruntime, torch"):
        run_bench(bundle(), backends=["tvm"], progress=False)


class FakeDriver:
    """CUDA's driver on a card of 100 bytes, of which ever more are in use."""

    used = 10

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == "cuMemGetInfo_v2":
                free, total = (argument._obj for argument in arguments)
                free.value, total.value = 100 - self.used, 100
            return 0

        return call


def test_peak_device_memory_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr("ctypes.CDLL", lambda name: driver)
    with peak_device_memory(0.001) as peak:
        driver.used = 70
        time.sleep(0.1)
        driver.used = 20
        time.sleep(0.01)
    assert peak == [70]


def test_without_a_driver_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MesaError, match=r"CUDA's driver \(libcuda.so.1\) is not here"):
        peak_device_memory()
    onnxruntime.InferenceSession(bench_worker._IDENTITY, providers=["CPUExecutionProvider"])  # loads
    with pytest.raises(MesaError, match="this onnxruntime has no CUDA provider"):
        require_cuda_provider()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    session = type("Session", (), {"__init__": lambda *_, **__: None, "get_providers": lambda _: ["CPU"]})
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(MesaError, match="CUDA provider does not load"):
        require_cuda_provider()


def test_a_system_that_runs_elsewhere_is_an_error(bundle: Callable[..., Path]) -> None:
    job = {"bundle": str(bundle()), "system": "onnxruntime", "threads": 1, "new_tokens": 1, "device": "cuda"}
    with pytest.raises(MesaError, match="onnxruntime runs on cpu here, not on cuda"):
        bench_worker._mesart(job)


def test_the_compiled_peer_decodes_what_transformers_decodes(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over its own static cache, twice; compilation itself is torch's."""
    model, prompt = make_model("llama"), list(range(2, 50))
    seen: list[int] = []

    def compile_(function: Any, **_: Any) -> Any:
        def step(token: Any) -> Any:
            result = function(token)
            seen.append(int(result))
            return result

        return step

    monkeypatch.setattr(torch, "compile", compile_)
    answer = bench_worker._compiled(model, {"tokens": 48, "new_tokens": 6}, lambda: None)
    answer(prompt)
    answer(prompt)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=7, do_sample=False, eos_token_id=None)
    assert seen == expected[0, 49:].tolist() * 2


def test_what_a_process_dies_of() -> None:
    def death(code: int, err: str) -> tuple[str, str]:
        error = process_error(subprocess.CompletedProcess([], code, "", err))
        return error.death, str(error)

    assert death(1, "Traceback\nValueError: no\n[W] bye\n") == ("failed", "ValueError: no")
    assert death(1, "mesart: error: no\n") == ("failed", "mesart: error: no")
    assert death(3, "just this") == ("failed", "just this")
    assert death(1, "") == ("failed", "no message")
    assert death(1, "torch.OutOfMemoryError: CUDA out of memory. Tried")[0] == "out of memory"
    assert death(1, "RuntimeError: Failed to allocate memory for requested buffer")[0] == "out of memory"
    assert (
        death(2, "mesart: error: T4 has 15.0 GiB, the bucket of 8 chunks needs 3.1 GiB more: ..")[0] == "out of memory"
    )
    assert death(-6, "what(): std::bad_alloc")[0] == "out of memory"
    assert death(-11, "") == ("failed", "killed by SIGSEGV")
    assert death(-9, "") == ("failed", "killed by SIGKILL (the host's memory may have been full)")


def test_a_process_ends_with_all_that_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    start = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); open(sys.argv[1], 'w').write(str(p.pid))"
    with pytest.raises(ProcessError, match="took longer than 2 s") as error:
        run_process([sys.executable, "-c", start + "; p.wait()", str(child)], 2)
    assert error.value.death == "time limit"
    status = Path("/proc", child.read_text(), "status")
    for _ in range(100):
        if not status.exists() or "zombie" in status.read_text():
            return
        time.sleep(0.02)
    os.kill(int(child.read_text()), 9)
    pytest.fail("what the process started is still running")


def test_a_worker_without_a_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesart.evaluation.bench._WORKER", [sys.executable, "-c", "print('hello')"])
    with pytest.raises(ProcessError, match="ended without a result"):
        run_worker({})

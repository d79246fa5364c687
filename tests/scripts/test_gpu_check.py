"""The GPU check on the CPU: what it prints, what it remembers, and that whatever dies becomes a row."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesart.evaluation import bench
from mesart.evaluation.journal import Journal
from mesart.evaluation.machine import cpu_name
from mesart.evaluation.provenance import versions
from mesart.scripts import gpu_check
from mesart.scripts.gpu_check import Model, main

Capture = pytest.CaptureFixture[str]
Check = Callable[..., list[str]]

FOUND = {
    "first_token": [2.0],
    "per_token": [0.5],
    "memory": 3_000_000_000,
    "load": 1.0,
    "warm_up": 4.0,
    "matrix_parameters": 1000,
    "head_parameters": 100,
    "heads": 4,
}
PEAKS = {"flops": dict.fromkeys(("float32", "bfloat16"), 1e6), "bandwidth": 1e6}


@pytest.fixture
def work(bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder in which one model's bundle is there already, and the machine's peaks are known."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "tiny-float32").symlink_to(bundle())
    Journal(folder / "rows.jsonl").add((cpu_name(), "peaks"), {"versions": versions(gpu_check.VERSIONS)}, PEAKS)
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"key": ["a line that was cut')
    monkeypatch.setattr(gpu_check, "MODELS", {"tiny": Model((100, 200), shape="none")})
    return folder


@pytest.fixture
def check(work: Path, capsys: Capture) -> Check:
    """``check(*options)``: a run on the CPU; the lines on standard output."""

    def run(*options: str, status: int = 0) -> list[str]:
        few = ["--backends", "onnxruntime", "transformers", "--new-tokens", "2"]
        assert main(["--cpu", "--work", str(work), *few, *options]) == status
        return capsys.readouterr().out.splitlines()

    return run


def worker(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(bench, "_WORKER", [sys.executable, "-c", code])


def test_measures_for_real(
    work: Path, check: Check, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "MODELS", {"tiny": Model((100,), checkpoint("llama"))})
    (work / "rows.jsonl").unlink()
    result = tmp_path / "result.json"
    lines = check("--json", str(result))
    assert lines[0].startswith("## 20")
    assert [line.split(" | ")[1:3] for line in lines if line.startswith("| tiny")] == [
        ["validation", "mesart onnxruntime float32"],
        ["100", "mesart onnxruntime float32"],
        ["100", "transformers bfloat16"],
    ]
    assert "| passed: " in next(line for line in lines if "validation" in line)
    assert lines[-1] == "Not run: nothing was left out."
    report = json.loads(result.read_text())
    assert report["versions"]["mesart"]
    assert report["peaks"]["bandwidth"] > 0
    ours, dense = (row["result"] for row in report["rows"][1:])
    assert ours["flops"] < dense["flops"], "Mesa needs fewer pairs"
    assert min(ours["first_token"], ours["per_token"], ours["memory"]) > 0

    worker(monkeypatch, "raise SystemExit('nothing is measured twice')")
    assert check() == lines


def test_what_other_versions_measured_is_refused(
    work: Path, check: Check, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    worker(monkeypatch, f"print({json.dumps(FOUND)!r})")
    check()
    rows = work / "rows.jsonl"
    rows.write_text(rows.read_text().replace(f'"torch": "{versions()["torch"]}"', '"torch": "1.0"'))
    assert main(["--cpu", "--work", str(work), "--backends", "onnxruntime"]) == 2
    assert "peaks from a run with another versions (torch: 1.0, now" in capsys.readouterr().err


def test_shares_are_of_the_peaks(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(monkeypatch, f"print('an engine says hello'); print({json.dumps(FOUND)!r})")
    row = next(line for line in check("--lengths", "10") if line.startswith("| tiny | 10 | transformers"))
    # 10 tokens of 1,000 parameters and 55 pairs in two layers of 4 heads of 8 + 8, in 2 s of 1e6 FLOP/s; 1,100
    # parameters and 10 tokens of 2 layers of 2 heads of 8 + 8 in bfloat16, in 0.5 s of 1e6 bytes/s.
    assert (2 * 1000 * 10 + 2 * 4 * 55 * 16 * 2, 2 * (1100 + 640)) == (34_080, 3_480)
    assert row == "| tiny | 10 | transformers bfloat16 | 2 s | 2% | 2.0 | 1% | 3.00 GB |"


def test_budget(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = check("--budget", "0")
    assert not [line for line in lines if line.startswith("| tiny")]
    assert lines[-1] == "Not run: tiny at 100, 200: the budget of 0 minutes was spent."
    worker(monkeypatch, f"print({json.dumps(FOUND)!r})")
    check("--lengths", "100", "--backends", "onnxruntime")
    lines = check("--budget", "0")
    assert [line for line in lines if line.startswith("| tiny | 100 | mesart onnxruntime float32 | 2 s |")], "is known"
    assert len([line for line in lines if line.startswith("| tiny")]) == 1
    assert lines[-1] == "Not run: tiny at 100 (transformers), 200: the budget of 0 minutes was spent."


def test_a_crash_is_a_row(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(monkeypatch, "import os; os.abort()")
    lines = check()
    assert len([line for line in lines if "| failed: killed by SIGABRT |" in line]) == 4
    worker(monkeypatch, f"print({json.dumps(FOUND)!r})")
    assert check() == lines, "a row that failed is there"
    again = check("--again", "--lengths", "200")
    assert len([line for line in again if "| 2 s |" in line]) == 2
    assert len([line for line in check() if "SIGABRT" in line]) == 2


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (
            "import sys; sys.exit('torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB')",
            "out of memory",
        ),
        ("import time; time.sleep(60)", "time limit"),
    ],
)
def test_what_does_not_fit_is_not_tried_longer(
    check: Check, monkeypatch: pytest.MonkeyPatch, code: str, status: str
) -> None:
    worker(monkeypatch, code)
    lines = check("--limit", "0.005" if status == "time limit" else "1")
    rows = [line for line in lines if line.startswith("| tiny")]
    for row in rows:
        assert f"| {status}: " in row
        assert ("not tried: so at 100 tokens" in row) == ("| 200 |" in row)


def answers(monkeypatch: pytest.MonkeyPatch, status: int, out: str, err: str) -> None:
    """What every command but a measurement answers."""

    def run(command: list[str], *_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, status, out, err)

    monkeypatch.setattr(gpu_check, "run_process", run)


def test_an_export_that_fails_is_a_row(work: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "tiny-float32").unlink()
    answers(monkeypatch, 2, "", "write: 80%|####\nmesart: error: the disk is full\n")
    rows = [line for line in check() if line.startswith("| tiny")]
    assert len([row for row in rows if "| failed: export: the disk is full |" in row]) == 4


def test_a_wrong_backend_gives_the_exit_status(
    check: Check, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "MODELS", {"tiny": Model((100,), checkpoint("llama"))})
    worker(monkeypatch, f"print({json.dumps(FOUND)!r})")
    answers(monkeypatch, 1, '{"passed": false, "verdict": "FAILED: 1 of 2 checks"}', "")
    assert "| FAILED: 1 of 2 checks |" in "\n".join(check(status=1))


def test_without_a_gpu(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--work", str(tmp_path / "work")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err
        == "gpu_check: error: there is no GPU here (nvidia-smi shows none); --cpu tries the same on the CPU\n"
    )
    assert not (tmp_path / "work").exists()
    assert main(["--cpu", "--work", str(tmp_path / "work"), "--backends", "tensorrt"]) == 2
    assert "tensorrt does not run on cpu; there are openvino, onnxruntime" in capsys.readouterr().err


def test_systems_that_do_not_run_here_say_why(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that shows a GPU, and packages that cannot use it."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.159.04, 9.0, 4, 81559'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    worker(
        monkeypatch,
        "import sys; sys.exit('mesart.graphs.errors.MesaError: TensorRT for RTX 1.7.1 builds for sm75, sm89, not for "
        "sm90; use --engine tensorrt on such a machine')",
    )
    monkeypatch.setitem(gpu_check.ENGINE_PACKAGES, "tensorrt", "no_such_package")
    options = ["--backends", "tensorrt", "tensorrt-rtx", "--models", "1b"]
    monkeypatch.setitem(gpu_check.ENGINE_PACKAGES, "tensorrt-rtx", "numpy")
    assert main(["--work", str(tmp_path / "work"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": NVIDIA H100 80GB HBM3, every backend")
    assert lines[2].startswith("driver 580.159.04, sm90, 4 of 81559 MiB in use before; python ")
    assert lines[-1] == (
        "Not run: tensorrt-rtx: TensorRT for RTX 1.7.1 builds for sm75, sm89, not for sm90; "
        "tensorrt: the package no_such_package is not installed."
    )

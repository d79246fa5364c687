"""MesaRT beside its peers: what is printed and computed, and that whatever fails is a row. No peer is needed here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesart.graphs.errors import MesaError
from mesart.scripts import bench_peers
from mesart.scripts.bench_peers import Bundle, Memory, Prompts, Row, System, main, prepare, table
from mesart.scripts.peer_worker import Answer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the standard library only so much as is needed."""
    monkeypatch.setattr(bench_peers, "library_text", lambda split: argparse.__doc__ * 20)


def system(label: str, kind: str) -> System:
    return System(label, kind, Path("model"), Path(sys.executable))


def found(first_token: float, per_token: float, memory: float) -> dict[str, Any]:
    return {"first_token": first_token, "per_token": per_token, "memory": memory, "resident": 2 * memory, "load": 1.0}


def test_bundles() -> None:
    assert Bundle.parse("b") == Bundle(Path("b"), "auto")
    assert Bundle.parse("some/b:openvino") == Bundle(Path("some/b"), "openvino")
    assert Bundle.parse("b:onnxruntime:int8") == Bundle(Path("b"), "onnxruntime", "int8")
    assert Bundle.parse("b:int8") == Bundle(Path("b"), "auto", "int8")
    assert Bundle.parse("c:/b") == Bundle(Path("c:/b"), "auto")
    for text in ("", ":openvino", ":int8"):
        with pytest.raises(argparse.ArgumentTypeError):
            Bundle.parse(text)


def test_table() -> None:
    rows = [
        Row(system("ours", "mesart"), 1024, [found(2, 0.01, 3e8), found(1, 0.03, 1e8), found(9, 0.02, 2e8)]),
        Row(system("a", "openvino-genai"), 1024, [found(4, 0.04, 1e8)]),
        Row(system("b", "llama.cpp"), 1024, [found(5, 0.01, 4e8)]),
        Row(system("c", "transformers"), 1024, [found(0.1, 0.001, 1e6)], failure="out of memory: a | b"),
        Row(system("a", "openvino-genai"), 4096, failure="failed: no"),
        Row(system("ours", "mesart"), 4096, [found(2, 0.01, 3e8)]),
    ]
    assert table(rows)[2:] == [
        "| 1,024 | ours | 2 s | 0.50 | 20 ms | 2.00 | 200 MB | 2.00 | 400 MB | 1.0 s |",
        "| 1,024 | a | 4 s | 1.00 | 40 ms | 4.00 | 100 MB | 1.00 | 200 MB | 1.0 s |",
        "| 1,024 | b | 5 s | 1.25 | 10 ms | 1.00 | 400 MB | 4.00 | 800 MB | 1.0 s |",
        "| 1,024 | c | out of memory: a / b |  |  |  |  |  |  |  |",
        "| 4,096 | a | failed: no |  |  |  |  |  |  |  |",
        "| 4,096 | ours | 2 s |  | 10 ms |  | 300 MB |  | 600 MB | 1.0 s |",
    ]
    assert len({line.count("|") for line in table(rows)}) == 1


def test_times_of_tokens() -> None:
    assert Answer(5, [(1, 2.0), (2, 2.5), (5, 4.0)]).per_token == 0.5
    assert Answer(5, [(1, 2.0), (5, 4.0)]).first_token == 2.0
    # Text that came two tokens late: the first token was there before it.
    assert Answer(5, [(3, 3.0), (5, 4.0)]).first_token == 2.0


def test_memory_is_the_peak() -> None:
    memory = Memory()
    for status in (
        "VmHWM:\t     900 kB\nRssAnon:\t     500 kB\n",
        "VmHWM:\t    1000 kB\nRssAnon:\t     300 kB\n",
        "State:\tZ",
    ):
        memory.read(status)
    assert (memory.anonymous, memory.resident) == (500 * 1024, 1000 * 1024)


def test_the_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, commands = tmp_path / "peers", list[list[str]]()

    def install(command: list[str]) -> None:
        commands.append(command)
        folder.mkdir(exist_ok=True)

    def fail(command: list[str]) -> None:
        raise MesaError("no network")

    with pytest.raises(MesaError, match="no network"):
        prepare(folder, fail)
    prepare(folder, install)
    assert [command[2] for command in commands] == ["venv", "pip"]
    assert {"openvino-genai==2026.4.1.0", "xllamacpp==2026.10.11549"} < set(commands[1])
    prepare(folder, fail)
    monkeypatch.setattr(bench_peers, "PACKAGES", {"llama.cpp": ("xllamacpp==9",)})
    (folder / "left").touch()
    prepare(folder, install)
    assert len(commands) == 4
    assert not (folder / "left").exists()


def test_prompts(checkpoint: Callable[[str], Path]) -> None:
    one, two = (Prompts.read(checkpoint("llama"), length, 20) for length in (100, 3000))
    assert two.longest[:100] == one.longest
    assert two.longest[100:120] == one.warm_up
    assert (len(two.longest), len(two.warm_up)) == (3000, 20)
    with pytest.raises(MesaError, match=r"the text has [1-9][\d,]+ tokens, fewer than"):
        Prompts.read(checkpoint("llama"), 10**9, 0)


def test_a_bundle(
    bundle: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    """Measured for real; a prompt that it does not serve is a row."""
    options = ["--bundle", f"{bundle()}:onnxruntime", "--checkpoint", str(checkpoint("llama")), "--peers"]
    options += ["--lengths", "100", "5000", "--new-tokens", "3", "--warm-up", "10", "--rounds", "2", "--threads", "1"]
    assert main([*options, "--json", str(tmp_path / "report.json")]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].endswith(", 1 threads")
    rows = [line for line in lines if "onnxruntime, float32" in line and line.startswith("|")]
    assert rows[0].startswith(f"| 100 | mesart {bundle().name} (onnxruntime, float32) | ")
    assert rows[0].count(" ms |") == 1
    assert "| failed: mesart.graphs.errors.InputError: " in rows[1]
    assert lines[-1].endswith(": on onnxruntime, computes and caches in float32")
    assert captured.err.count("round") == 3  # what failed is not tried again

    report = json.loads((tmp_path / "report.json").read_text())
    first, second = report["rows"]
    assert len(first["rounds"]) == 2
    assert first["medians"]["memory"] > 1 << 20
    assert first["medians"]["resident"] > first["medians"]["memory"]
    assert [len(found["answer"]["tokens"]) for found in first["rounds"]] == [4, 4]
    assert second["medians"] is None
    assert report["versions"]["onnxruntime"]
    assert isinstance(report["machine"]["flags"], list)


def test_what_fails_is_a_row(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(folder: Path) -> None:
        raise MesaError("the peers' environment cannot be made: no network")

    worker = tmp_path / "worker.py"
    worker.write_text("import sys; print('{'); sys.exit('RuntimeError: std::bad_alloc')")
    monkeypatch.setattr(bench_peers, "WORKER", worker)
    monkeypatch.setattr(bench_peers, "prepare", no_network)
    (tmp_path / "model.gguf").touch()
    options = ["--checkpoint", str(checkpoint("llama")), "--gguf", str(tmp_path / "model.gguf"), "--dtype", "float32"]
    assert main([*options, "--lengths", "50", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "| 50 | openvino-genai | failed: the peers' environment cannot be made: no network |" in out
    assert "| 50 | llama.cpp | failed: the peers' environment cannot be made: no network |" in out
    assert "| 50 | transformers (float32) | out of memory: RuntimeError: std::bad_alloc |" in out


def test_errors_of_the_input(checkpoint: Callable[[str], Path], tmp_path: Path, capsys: Capture) -> None:
    folder = str(checkpoint("llama"))
    for options, message in (
        (["--bundle", str(tmp_path), "--peers"], str(tmp_path)),
        (["--peers"], "nothing to measure: give --bundle or --peers"),
        (["--peers", "llama.cpp", "--gguf", "none.gguf"], "none.gguf is not there; scripts/real_models.py makes it"),
    ):
        assert main(["--checkpoint", folder, *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("bench_peers: error: ")
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--precision", "float64"])

"""The command line: what it prints, where, and its exit status. Errors are one line and status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mesart.graphs import MesaConfig
from mesart.graphs.bundle.manifest import MANIFEST_FILE, SCHEMA_VERSION, Manifest
from mesart.scripts.cli import main

Capture = pytest.CaptureFixture[str]


def fails(capsys: Capture, *arguments: str) -> str:
    """Runs a command that the user got wrong; its one line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mesart: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_export_takes_every_field_of_the_configuration(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "bundle"
    fields = {"train-length": 48, "head-length": 8, "chunk-length": 16, "tail-min": 8, "linear-window": 6}
    options = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    arguments = ["export", str(checkpoint("tied_llama")), "-o", str(output), "--max-tokens", "60", "--no-log-n"]
    assert main([*arguments, *options, "--rho", "0.6", "--stair-width", "9"]) == 0
    config = Manifest.read(output).config
    assert {name: getattr(config, name.replace("-", "_")) for name in fields} == fields
    assert isinstance(config, MesaConfig)
    assert (config.log_n, config.rho, config.stair_width) == (False, 0.6, 9)
    assert capsys.readouterr().out == "", "progress is not a result"


def test_inspect_tells_of_shared_files(bundle_copy: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["inspect", str(bundle_copy)]) == 0
    assert "hard links" not in capsys.readouterr().out
    (tmp_path / "other").hardlink_to(bundle_copy / "model.safetensors")
    assert main(["inspect", str(bundle_copy)]) == 0
    assert "shared with another folder (hard links): model.safetensors" in capsys.readouterr().out


def test_inspect(bundle: Callable[..., Path], capsys: Capture) -> None:
    assert main(["inspect", str(bundle()), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "LlamaForCausalLM" in text
    assert "float32" in text
    assert main(["inspect", str(bundle()), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema_version"] == SCHEMA_VERSION


def test_generate(bundle: Callable[..., Path], capsys: Capture) -> None:
    assert main(["generate", str(bundle()), "-p", "The grass is", "-n", "5", "--backend", "onnxruntime", "-v"]) == 0
    captured = capsys.readouterr()
    assert "backend onnxruntime on cpu: asked for" in captured.err
    assert captured.out.endswith("\n")
    chat = '[{"role": "user", "content": "Hi"}]'
    assert main(["generate", str(bundle()), "--chat", chat, "-n", "5", "--temperature", "0.7", "--seed", "1"]) == 0


def test_validate_exits_with_the_verdict(
    bundle: Callable[..., Path], checkpoint: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    result = tmp_path / "result.json"
    arguments = ["validate", str(bundle()), "--buckets", "0", "--graphs", "symbolic", "--json", str(result)]
    assert main([*arguments, "--against", str(checkpoint("llama"))]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("passed: ")
    assert json.loads(result.read_text())["passed"] is True
    other = Path(shutil.copytree(checkpoint("llama"), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * np.float32(1.001)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert main([*arguments, "--against", str(other)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_errors_of_the_user(
    bundle: Callable[..., Path], checkpoint: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    model, good, output = str(checkpoint("llama")), str(bundle()), str(tmp_path / "bundle")
    assert "holds no manifest.json" in fails(capsys, "inspect", str(tmp_path))
    assert "unknown backend 'tvm'" in fails(capsys, "generate", good, "-p", "a", "--backend", "tvm")
    assert "the prompt is empty" in fails(capsys, "generate", good, "-p", "")
    assert "is longer than the largest bucket" in fails(capsys, "generate", good, "-p", "The sun is yellow. " * 400)
    assert "not valid JSON" in fails(capsys, "generate", good, "--chat", "[")
    assert "cannot be read" in fails(capsys, "generate", good, "-f", str(tmp_path / "none"))
    assert "temperature" in fails(capsys, "generate", good, "-p", "a", "--temperature", "-1")
    assert "does not exist" in fails(capsys, "export", str(tmp_path / "none"), "-o", output, "--train-length", "64")
    window = fails(capsys, "export", model, "-o", output, "--head-length", "40", "--chunk-length", "40")
    assert "head_length + chunk_length = 40 + 40 = 80 is more than the trained 64" in window
    stairs = fails(capsys, "export", model, "-o", output, "--stair-width", "2", "--max-tokens", "1000")
    assert "or more would do" in stairs
    assert "unknown system 'x'" in fails(capsys, "eval", "passkey", good, "--systems", "x")
    assert "serves 1 to 344" in fails(capsys, "bench", good, "--lengths", "9999")
    suite = ("eval", "suite", model, "-o", output, "--lengths", "64")
    assert "unknown method 'x'; there are origin" in fails(capsys, *suite, "--methods", "x")
    assert "there is no task 'x'; there are passkey" in fails(capsys, *suite, "--tasks", "x")
    assert "unknown method 'x'; there are origin" in fails(
        capsys, "eval", "--model", model, "-o", output, "--methods", "x"
    )
    assert "name at least one model" in fails(capsys, "eval", "suite", "-o", output)
    cost = ("eval", "cost", model, "-o", output, "--lengths", "64")
    assert "unknown method 'x'; there are origin" in fails(capsys, *cost, "--methods", "x")
    assert "at least 1 evaluation" in fails(capsys, "tune", good, "--evaluations", "0")
    assert "activations" in fails(capsys, "generate", good, "-p", "a", "--activations", "int8")
    assert not Path(output).exists()


def test_threshold(checkpoint: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text.txt").write_text("The sun is yellow. The grass is green. " * 200)
    options = ["--max-tokens", "128", "--places", "4", "--tokens", "4", "--text", str(tmp_path / "text.txt")]
    files = ["--json", str(tmp_path / "result.json"), "--plot", str(tmp_path / "plot.png")]
    assert main(["eval", "threshold", str(checkpoint("llama")), *options, *files]) == 0
    assert "of layer" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["task"] == "threshold"
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_an_output_that_is_no_bundle_is_kept(checkpoint: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "--force" in fails(capsys, "export", str(checkpoint("llama")), "-o", str(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_altered_bundle_is_refused(bundle: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(), folder)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["schema_version"] = 99
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert "upgrade mesart" in fails(capsys, "generate", str(folder), "-p", "a")


def test_a_digest_names_one_bundle(bundle: Callable[..., Path], capsys: Capture) -> None:
    assert main(["inspect", str(bundle()), "--digest"]) == 0
    digest = capsys.readouterr().out.strip()
    assert digest == Manifest.read(bundle()).digest
    arguments = ["generate", str(bundle()), "-p", "a", "-n", "1", "--backend", "onnxruntime", "--digest"]
    assert main([*arguments, digest]) == 0
    capsys.readouterr()
    assert "is not the bundle that was asked for" in fails(capsys, *arguments, digest[:-4] + "0000")


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path) -> None:
    import builtins

    plain = builtins.__import__

    def without_torch(name: str, *arguments: object, **options: object) -> object:
        if name == "mesart.export":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return plain(name, *arguments, **options)  # type: ignore[arg-type]

    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    monkeypatch.setattr(builtins, "__import__", without_torch)
    error = fails(capsys, "export", str(tmp_path), "-o", str(tmp_path / "out"))
    assert "pip install 'mesart[export]'" in error

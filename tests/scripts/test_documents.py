"""`mesart documents`, and `mesart generate` about documents: what is kept, found again, and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mesart.graphs.bundle.manifest import Manifest
from mesart.runtime import ChunkStore, MesaModel
from mesart.scripts.cli import main

Capture = pytest.CaptureFixture[str]

BACKEND = ("--backend", "onnxruntime")


def runs(capsys: Capture, *arguments: object, status: int = 0) -> tuple[str, str]:
    """What a command wrote to both streams."""
    assert main([*map(str, arguments)]) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def fails(capsys: Capture, *arguments: object) -> str:
    """The one line of a command that the user got wrong."""
    out, error = runs(capsys, *arguments, status=2)
    assert out == ""
    assert error.startswith("mesart: error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "grass.txt", tmp_path / "sky.txt"
    first.write_text("The grass is green. " * 20)
    second.write_text("The sky is blue. " * 5)
    return first, second


@pytest.fixture
def model(bundle: Callable[..., Path]) -> str:
    return str(bundle())


def test_what_was_added_is_found_by_generate(
    model: str, files: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    store = tmp_path / "store"
    out, _ = runs(capsys, "documents", "add", store, model, *files, *BACKEND)
    grass, sky = out.splitlines()
    assert grass.startswith("grass.txt: ")
    assert grass.endswith(" computed, 0 reused")
    assert sky.endswith(" 8 reused"), "the head"
    again, _ = runs(capsys, "documents", "add", store, model, *files, *BACKEND)
    assert again.count("0 computed") == 2

    ask = ("generate", model, "-p", "What is green?", "-n", "5", *BACKEND, "-v", "--reuse", "always")
    about = ("--documents", files[1], files[0])
    warm, said = runs(capsys, *ask, *about, "--store", store)
    cold, said_cold = runs(capsys, *ask, *about)
    assert warm == cold
    (found,) = (line for line in said.splitlines() if line.startswith("prompt of "))
    (computed,) = (line for line in said_cold.splitlines() if line.startswith("prompt of "))
    assert found.endswith(" on disk)")
    assert not found.endswith(" 0 on disk)")
    assert "0 cached" in computed
    assert found.partition(":")[0] == computed.partition(":")[0]
    off, said_off = runs(capsys, *ask[:-1], "off", *about, "--store", store)
    assert "0 cached" in said_off
    with MesaModel.load(model, "onnxruntime") as loaded:
        texts = [files[1].read_text(), files[0].read_text()]
        assert warm == f"{loaded.generate('What is green?', 5, documents=texts, reuse='always')}\n"
        assert off == f"{loaded.generate('What is green?', 5, documents=texts, reuse='off')}\n"


def test_a_chat_about_documents(model: str, files: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    chat = '[{"role": "user", "content": "What is green?"}]'
    store = tmp_path / "store"
    runs(capsys, "documents", "add", store, model, *files, *BACKEND, "--chat", chat)
    ask = ("generate", model, "--chat", chat, "-n", "5", *BACKEND, "-v", "--reuse", "always")
    answer, said = runs(capsys, *ask, "--documents", *files, "--store", store)
    assert ", 0 on disk" not in said
    with MesaModel.load(model, "onnxruntime") as loaded:
        texts = [path.read_text() for path in files]
        assert answer == "".join([*loaded.chat(json.loads(chat), 5, documents=texts, reuse="always"), "\n"])


def test_a_lead_and_a_salt_name_what_is_kept(
    model: str, files: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    store = tmp_path / "store"
    named = ("--lead", "Here we go. ", "--cache-salt", "mine")
    runs(capsys, "documents", "add", store, model, files[0], *BACKEND, *named)
    ask = ("generate", model, "-p", "Hi", "-n", "1", *BACKEND, "-v", "--reuse", "always", "--store", store)
    about = ("--documents", files[0])
    assert ", 0 on disk" not in runs(capsys, *ask, *about, *named)[1]
    for other in (named[:2], named[2:], ("--lead", "Here we go. ", "--cache-salt", "yours")):
        assert "0 cached" in runs(capsys, *ask, *about, *other)[1]


def test_the_store_keeps_to_its_sizes(model: str, files: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    store = tmp_path / "store"
    sizes = ("--store-memory", "1KiB", "--store-disk", "8KiB")
    _, said = runs(capsys, "documents", "add", store, model, files[0], *BACKEND, *sizes)
    assert said.startswith("grass.txt: only ")
    assert said.endswith("; is --store-disk enough?\n")
    assert sum(path.stat().st_size for path in (store / "chunks").iterdir()) <= 8 << 10


def test_list(model: str, files: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    store = tmp_path / "store"
    ChunkStore(path=store).close()
    assert runs(capsys, "documents", "list", store)[0] == "name  tokens  chunks  MiB  last used  bundle\n"
    assert runs(capsys, "documents", "list", store, "--json")[0] == "[]\n"
    runs(capsys, "documents", "add", store, model, *files, *BACKEND)
    head, grass, sky = runs(capsys, "documents", "list", store)[0].splitlines()
    digest = Manifest.read(Path(model)).digest
    assert head.split() == ["name", "tokens", "chunks", "MiB", "last", "used", "bundle"]
    assert sky.startswith("sky.txt ")
    assert grass.split()[-1] == digest.removeprefix("sha256:")[:12]
    found, _ = json.loads(runs(capsys, "documents", "list", store, "--json")[0])
    assert found["name"] == "grass.txt"
    assert found["bundle"] == digest
    assert found["chunks_there"] == len(found["chunks"]) > 1
    (store / "chunks" / f"{found['chunks'][0]}.safetensors").unlink()
    _, grass, _ = runs(capsys, "documents", "list", store)[0].splitlines()
    assert f"{len(found['chunks']) - 1} / {len(found['chunks'])}" in grass


def test_drop(model: str, files: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    store = tmp_path / "store"
    runs(capsys, "documents", "add", store, model, *files, *BACKEND)
    error = fails(capsys, "documents", "drop", store, "grass.txt", "sea.txt")
    assert "no document is called 'sea.txt'; there are 'grass.txt', 'sky.txt'" in error
    there = len(list((store / "chunks").iterdir()))
    out, _ = runs(capsys, "documents", "drop", store, "grass.txt")
    assert out.startswith("removed 1 document: ")
    left = len(list((store / "chunks").iterdir()))
    assert f": {there - left} entries, " in out
    again, _ = runs(capsys, "documents", "add", store, model, files[1], *BACKEND)
    assert "with the head 0 computed, " in again, "what the other document needs is there"
    assert runs(capsys, "documents", "drop", store, "sky.txt")[0].startswith("removed 1 document: ")
    assert not list((store / "chunks").iterdir())


def test_verify(model: str, files: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    store = tmp_path / "store"
    runs(capsys, "documents", "add", store, model, *files, *BACKEND)
    count = len(list((store / "chunks").iterdir()))
    out, _ = runs(capsys, "documents", "verify", store)
    assert out == (
        f"chunks and heads: {count} whole, 0 damaged and removed\n"
        "records: 2 whole, 0 damaged and removed\ndocuments that miss chunks: 0\n"
    )
    found, _ = json.loads(runs(capsys, "documents", "list", store, "--json")[0])
    damaged = store / "chunks" / f"{found['chunks'][0]}.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    out, _ = runs(capsys, "documents", "verify", store, status=1)
    assert out == (
        f"chunks and heads: {count - 1} whole, 1 damaged and removed\n"
        "records: 2 whole, 0 damaged and removed\ndocuments that miss chunks: 1: grass.txt\n"
    )
    assert not damaged.exists()
    runs(capsys, "documents", "verify", store)
    for record in (store / "documents").iterdir():
        record.write_text("{")
    assert "records: 0 whole, 2 damaged and removed\n" in runs(capsys, "documents", "verify", store, status=1)[0]


@pytest.mark.parametrize("verb", [("list",), ("drop", "a.txt"), ("verify",)])
def test_a_store_that_is_none(tmp_path: Path, capsys: Capture, verb: tuple[str, ...]) -> None:
    name, *rest = verb
    assert "is no store of chunks: there is nothing" in fails(capsys, "documents", name, tmp_path / "none", *rest)
    assert not (tmp_path / "none").exists()
    (tmp_path / "thesis.txt").write_text("mine")
    assert "it holds no store.json" in fails(capsys, "documents", name, tmp_path, *rest)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_looking_after_a_store_needs_no_engine(tmp_path: Path) -> None:
    ChunkStore(path=tmp_path / "store").close()
    code = """
import sys
from mesart.scripts.cli import main

for verb in ("list", "verify"):
    assert main(["documents", verb, sys.argv[1]]) == 0
assert not {"torch", "transformers", "onnxruntime", "openvino"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_errors_of_the_user(model: str, files: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_text("The sun is yellow. " * 400)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sky.txt").write_text("x")
    bad = {"none.txt": "cannot be read: No such file", "empty.txt": "is empty", "latin.txt": "is no UTF-8 text"}
    store = tmp_path / "store"
    add, ask = ("documents", "add", store, model), ("generate", model, "-p", "Hi", *BACKEND)
    for name, reason in bad.items():
        for command in ((*add, files[0], tmp_path / name), (*ask, "--documents", files[0], tmp_path / name)):
            assert f"{tmp_path / name} {reason}" in fails(capsys, *command)
    error = fails(capsys, *add, *files, tmp_path / "other" / "sky.txt")
    assert f"{files[1]} and {tmp_path / 'other' / 'sky.txt'} are both called sky.txt" in error
    assert not store.exists(), "all is looked at before anything is made"
    assert f"{tmp_path / 'long.txt'}: a document has" in fails(capsys, *add, tmp_path / "long.txt", *BACKEND)
    assert "'2GB2' is no size of memory" in fails(capsys, *add, files[0], "--store-disk", "2GB2")
    assert "is no store of chunks" in fails(capsys, "documents", "add", tmp_path, model, files[0])
    assert "is no store of chunks" in fails(capsys, *ask, "--store", tmp_path)
    for option in (("--store-memory", "1GiB"), ("--store-disk", "1GiB"), ("--cache-salt", "x")):
        assert f"{option[0]} is of a store: give --store too" in fails(capsys, *ask, *option)
    assert "the question about the documents is empty" in fails(
        capsys, "generate", model, "-p", "", *BACKEND, "--reuse", "always", "--documents", files[0]
    )
    chat = '[{"role": "user", "content": "Hi"}]'
    assert "--lead with --chat" in fails(capsys, "generate", model, "--chat", chat, "--lead", "x")
    assert "not allowed with" in fails(capsys, *add, files[0], "--lead", "x", "--chat", chat)
    assert "--cache-salt is no UTF-8 text" in fails(capsys, *add, files[0], "--cache-salt", "\ud800")
    assert "invalid choice" in fails(capsys, *ask, "--reuse", "never")
    system = '[{"role": "system", "content": "Be brief."}]'
    assert "documents need a message of the user" in fails(
        capsys, "generate", model, "--chat", system, "--documents", files[0], *BACKEND
    )

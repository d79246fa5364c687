"""Exports, builds and journals that are killed at any time: what is there is the old or the new, whole.

    python -m tests.fuzz.kills --seed 7 --cases 500 [--only INDEX]

Half of them die at a certain moment: right before the n-th time that a file is opened for writing, renamed, linked or
removed. The others die by the clock.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from mesart.evaluation.journal import Journal
from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.errors import MesaError
from tests.fuzz.golden import make_bundle, make_checkpoint
from tests.fuzz.mesart_command import import_ahead, leave_out_tracing, run_command
from tests.fuzz.workers import SAME, Case, Fault, differences, make_in_fork, snapshot

CHANGES = (
    "os.rename",
    "os.link",
    "os.symlink",
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "os.truncate",
    "os.chmod",
    "ctypes.dlsym",
)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Kills:
    """The target: what writes a bundle, what replaces a manifest, what appends to a journal."""

    name = "kills"
    writes: Sequence[str] = ("work", "tmp")
    limit = 60.0

    def __init__(self, folder: Path, half: Path | None = None) -> None:
        self.folder, self.half = folder, half or folder / "half" / "bundle"

    def prepare(self) -> None:
        import_ahead()
        make_in_fork(lambda: make_checkpoint(self.folder / "checkpoint"))
        if not self.half.exists():
            make_in_fork(lambda: make_bundle(self.folder / "half", options={"dtype": "float16"}, max_tokens=104))

    def run(self, case: Case) -> str:
        return case.rng.choices((_export, _build, _journal), (6, 2, 1))[0](self, case)


def _export(self: Kills, case: Case) -> str:
    rng = case.rng
    inputs = case.folder / "inputs"
    shutil.copytree(self.folder / "checkpoint", inputs)
    leave_out_tracing()
    has_old = rng.random() < 0.7
    old, new = _plan(rng, "200"), _plan(rng, "104")
    case.said([f"export {'over a bundle' if has_old else ''} {new}"])
    changes = 60
    if has_old:
        changes = _count_changes(lambda: run_command(["export", "../inputs", "-o", "out", *old]))
    checkpoint = snapshot(inputs)
    case.stage("killed")
    status = _killed(rng, changes, lambda: run_command(["export", "../inputs", "-o", "out", *new]))
    case.stage("after")
    if differences(checkpoint, snapshot(inputs)):
        raise Fault("checkpoint changed", "export", str(differences(checkpoint, snapshot(inputs))))
    out = case.work / "out"
    if not out.exists():
        if has_old:
            raise Fault("the old bundle is gone", "export", str(os.listdir(case.work)))
        if status == 0:
            raise Fault("done, and no bundle", "export")
    else:
        _require_whole(out, ("200", "104") if has_old else ("104",))
        if status == 0 and _max_tokens(out) != "104":
            raise Fault("done, and the old bundle", "export")
    case.stage("again")
    status = _killed(None, 0, lambda: run_command(["export", "../inputs", "-o", "out", *new]))
    if status != 0:
        raise Fault("the next export fails", "export", str(status))
    _require_whole(out, ("104",))
    left = [path.name for path in case.work.iterdir() if path.name != "out"]
    if left:
        raise Fault("left behind after the next export", "export", str(left))
    if differences(checkpoint, snapshot(inputs)):
        raise Fault("checkpoint changed", "the next export")
    return SAME


def _plan(rng: Random, tokens: str) -> list[str]:
    return ["--max-tokens", tokens, *rng.choice(([], ["--weights", "copy"], ["--dtype", "float16"]))]


def _build(self: Kills, case: Case) -> str:
    """Builds with a stand-in for TensorRT, whose engines are the graphs themselves."""
    from tests.runtime.fake_cuda import FakeBuilder

    rng = case.rng
    bundle = case.work / "bundle"
    shutil.copytree(self.half, bundle)
    engines: Any = importlib.import_module("mesart.export.engines")
    engines.TensorRtBuilder = FakeBuilder
    case.said(["build"])
    arguments = ["build", "bundle", "--gpu", "sm89"]
    before = snapshot(bundle)
    case.stage("killed")
    _killed(rng, 40, lambda: run_command(arguments))
    case.stage("after")
    gone = [name for name in differences(before, snapshot(bundle)) if name in before and name != "manifest.json"]
    if gone:
        raise Fault("files of the bundle changed", "build", str(gone))
    manifest = _read(bundle)
    for engine in (engine for built in manifest.engines for engine in built.engines):
        engine.read(bundle)
    status = _killed(None, 0, lambda: run_command(arguments))
    if status != 0:
        raise Fault("the next build fails", "build", str(status))
    manifest = _read(bundle)
    if len(manifest.engines) != 1:
        raise Fault("the next build recorded nothing", "build")
    for engine in manifest.engines[0].engines:
        engine.read(bundle)
    left = [str(path) for path in bundle.rglob("*") if "partial" in path.name]
    if left:
        raise Fault("left behind after the next build", "build", str(left))
    return SAME


def _journal(self: Kills, case: Case) -> str:
    """What a journal has acknowledged is in it when it is read again; the next run goes on."""
    rng = case.rng
    path = case.work / "journal.jsonl"
    case.said(["journal"])
    acknowledged, to_parent = os.pipe()
    result = "x" * rng.choice((1, 100, 20_000))

    def add() -> None:
        journal = Journal(path)
        for number in range(10_000):
            journal.add(("a", number), {"seed": 1}, result)
            os.write(to_parent, b".")

    _killed(rng, 0, add, longest=0.1)
    os.close(to_parent)
    count = 0
    while block := os.read(acknowledged, 1 << 16):
        count += len(block)
    journal = Journal(path)
    for number in range(count):
        if journal.find(("a", number), {"seed": 1}) != result:
            raise Fault("a result is lost", "journal", str(number))
    journal.add(("b",), {"seed": 1}, 3)
    if Journal(path).find(("b",), {"seed": 1}) != 3 or Journal(path).find(("a", count + 1), {"seed": 1}) not in (None,):
        raise Fault("the next run does not go on", "journal")
    return SAME


def _read(bundle: Path) -> Manifest:
    try:
        manifest = Manifest.read(bundle)
        manifest.verify(bundle)
    except MesaError as error:
        raise Fault("a broken bundle", "after a kill", str(error)) from error
    return manifest


def _max_tokens(out: Path) -> str:
    return str(json.loads((out / "manifest.json").read_text())["max_tokens"])


def _require_whole(out: Path, expected: Sequence[str]) -> None:
    _read(out)
    if _max_tokens(out) not in expected:
        raise Fault("a bundle that nobody made", "export", _max_tokens(out))


def _count_changes(do: Callable[[], Any]) -> int:
    """Runs ``do`` in a process of its own; how often it changes files."""
    reader, writer = os.pipe()
    counter = _Counter(0, 0)

    def count() -> None:
        sys.addaudithook(counter)
        do()
        os.write(writer, str(counter.count).encode())

    make_in_fork(count)
    os.close(writer)
    with open(reader, "rb") as file:
        return int(file.read())


class _Counter:
    """An audit hook that counts changes of files, and sends its own process a signal right before one of them."""

    def __init__(self, moment: int, number: int) -> None:
        self.count, self.moment, self.number = 0, moment, number

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
        if event in CHANGES or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.count += 1
            if self.count == self.moment:
                os.kill(os.getpid(), self.number)


def _killed(rng: Random | None, changes: int, do: Callable[[], Any], longest: float = 0.6) -> int | None:
    """Runs ``do`` in a process that gets a signal at some time; its exit status, ``None`` if the signal ended it."""
    number = rng.choice(SIGNALS) if rng is not None else None
    moment = rng.randint(1, max(2, changes + 3)) if rng is not None and changes and rng.random() < 0.7 else 0
    delay = rng.uniform(0, longest) if rng is not None else 0.0
    if (pid := os.fork()) == 0:
        code = 9
        try:
            os.setpgid(0, 0)
            if moment and number is not None:
                sys.addaudithook(_Counter(moment, number))
            do()
            code = 0
        except MesaError:
            code = 2
        except Fault as fault:
            code = 100 if "130" in fault.kind or "143" in fault.kind else 8
            print(fault, file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            code = 100
        finally:
            os._exit(code)
    if number is not None and not moment:
        time.sleep(delay)
        os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in (8, 9):
        raise Fault("the command fails", f"signal {number}", str(code))
    return code if code >= 0 else None


if __name__ == "__main__":
    from tests.fuzz.command import main

    sys.exit(main(["kills", *sys.argv[1:]]))

"""Command lines of every verb, with odd options and values: one line and status 2, or the work is done.

    python -m tests.fuzz.commands --seed 7 --cases 500 [--only INDEX]

The options are found by walking the command's own parser, so that a new one is tried without a change here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.golden import make_checkpoint
from tests.fuzz.mesart_command import import_ahead, leave_out_tracing, run_command
from tests.fuzz.values import STRINGS
from tests.fuzz.workers import REFUSED, SAME, Case, make_in_fork

Verb = tuple[str, ...]

SMALL: dict[tuple[str, ...], tuple[str, ...]] = {
    ("export",): ("--max-tokens", "104"),
    ("build",): ("--gpu", "sm89"),
    ("inspect",): (),
    ("validate",): ("--buckets", "0", "--graphs", "symbolic", "--steps", "1", "--backend", "onnxruntime"),
    ("generate",): ("-n", "3", "--backend", "onnxruntime"),
    ("documents", "add"): ("--backend", "onnxruntime"),
    ("documents", "list"): (),
    ("documents", "drop"): (),
    ("documents", "verify"): (),
    ("bench",): ("--lengths", "40", "--new-tokens", "2", "--no-transformers", "--backends", "onnxruntime"),
    ("eval", "passkey"): ("--lengths", "64", "--prompts", "1", "--backend", "onnxruntime", "--fillers", "random"),
    ("eval", "perplexity"): ("--lengths", "64", "--places", "1", "--tokens", "2", "--backend", "onnxruntime"),
    ("eval", "suite"): ("--methods", "origin", "--tasks", "perplexity", "--lengths", "64", "--prompts", "1",
        "--places", "1"),
    ("eval", "cost"): ("--methods", "origin", "--lengths", "64", "--repeat", "1", "--new-tokens", "1"),
    ("eval", "threshold"): ("--places", "2", "--tokens", "2", "--max-tokens", "80"),
    ("tune",): ("--lengths", "96", "--prompts", "1", "--places", "1", "--evaluations", "1", "--final-prompts", "1",
        "--final-places", "1", "--finalists", "1", "--backend", "onnxruntime"),
}  # fmt: skip
"""Options that keep the work of each verb small; what is given behind them counts."""

OFTEN: dict[Verb, int] = {("generate",): 8, ("export",): 8, ("inspect",): 3, ("build",): 2}
WORK = (
    "prompts",
    "places",
    "tokens",
    "repeat",
    "new_tokens",
    "max_new_tokens",
    "evaluations",
    "steps",
    "jobs",
    "finalists",
)
"""Options that say how much work is to be done: what is much is no fault, so they get no large values."""

INTEGERS = (
    "0",
    "1",
    "2",
    "-1",
    "-0",
    "x",
    "",
    "1e3",
    "1.5",
    "nan",
    " 3 ",
    "\u0663",
    "0x10",
    "1_0",
    "+2",
    "--",
    "1" * 5000,
)
LARGE = ("64", "104", "65", "2147483648", "-2147483649", "99999999999999999999", "1" + "0" * 400, "100000")
FLOATS = ("0", "0.5", "1", "-1", "nan", "inf", "-inf", "1e308", "1e-320", "-0.0", "x", "", "1e999", "2", "1,5")
PATHS = (
    "out",
    "out/new/deep",
    "",
    ".",
    "..",
    "/dev/null",
    "/dev/null/x",
    "/dev/full",
    "nowhere/x",
    "x" * 300,
    "taken",
    "folder",
    "-",
    "\udcff",
    "é",
    "link",
    "loop",
)
TEXTS = (
    "",
    "Hi",
    "é" * 50,
    "a" * 20_000,
    "-",
    "--help",
    "[]",
    "{",
    "[{}]",
    '[{"role": "user", "content": "Hi"}]',
    '[{"role": "user"}]',
    "[1]",
    "null",
    '[{"role": 3, "content": [[]]}]',
    '[{"role":"user","content":"\\ud800"}]',
    "[" * 50_000,
    "\udcff",
    "\0",
)
NAMES = (
    "nope",
    "",
    "origin",
    "mesa",
    "onnxruntime",
    "openvino",
    "torch",
    "auto",
    "tensorrt",
    "tensorrt-rtx",
    "int8",
    "int4",
    "fp8",
    "awq",
    "sm89",
    "sm1",
    "rtx5090",
    "a/b",
    "passkey",
    "random",
    "yarn:factor=x",
    "yarn:nope=1",
    "origin:",
    ":",
    "dynamic-ntk:factor=nan",
    "streaming-llm:sinks=-1",
    "cuda",
    "meta",
    "cpu:99",
)


class Commands:
    """The target: every verb, on a good bundle and a good checkpoint."""

    name = "commands"
    writes: Sequence[str] = ("work", "tmp")
    limit = 10.0

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.verbs: dict[Verb, argparse.ArgumentParser] = {}

    def prepare(self) -> None:
        import_ahead()
        if not self.folder.exists():
            make_in_fork(lambda: make_checkpoint(self.folder))
        self.verbs = dict(_verbs(_parser()))

    def run(self, case: Case) -> str:
        rng = case.rng
        inputs = case.folder / "inputs"
        inputs.mkdir()
        shutil.copytree(self.bundle, inputs / "bundle")
        shutil.copytree(self.folder, inputs / "checkpoint")
        (case.work / "taken").write_text("thesis")
        (case.work / "folder").mkdir()
        (case.work / "folder" / "thesis.txt").write_text("x")
        (case.work / "link").symlink_to("folder")
        (case.work / "loop").symlink_to("loop")
        (case.work / "text.txt").write_text("The grass is green. " * 400)
        (case.work / "short.txt").write_text("The sky is blue. " * 20)
        _make_store(case.work / "store")
        verbs = list(self.verbs)
        verb = rng.choices(verbs, [OFTEN.get(verb, 1) for verb in verbs])[0]
        arguments = [*verb, *self._arguments(rng, verb)]
        words = rng.choice((b"", b"Hi", b"\xff\xfe", b"y\n", b"x" * 100_000, b"\0"))
        (case.work / "input").write_bytes(words)
        os.dup2(os.open(case.work / "input", os.O_RDONLY), 0)
        leave_out_tracing()
        case.limit = 10.0 if verb[0] in ("generate", "inspect", "export", "build") else 60.0
        case.said([repr(arguments)[:500]])
        statuses = (0, 1, 2, 130) if verb[-1] in ("validate", "verify") else (0, 2, 130)
        done = case.attempt(" ".join(verb), lambda: run_command(arguments, statuses=statuses))
        return REFUSED if done is None else SAME

    def _arguments(self, rng: Random, verb: Verb) -> list[str]:
        """Those that the verb needs, right ones mostly, and a few odd ones."""
        parser = self.verbs[verb]
        groups = {id(a): group for group in parser._mutually_exclusive_groups for a in group._group_actions}
        arguments: list[str] = list(SMALL.get(verb, ())) if rng.random() < 0.95 else []
        served: set[int] = set()
        behind: list[str] = []
        for action in parser._actions:
            group = groups.get(id(action))
            if not action.option_strings:
                right = rng.random() < 0.85
                behind.append(
                    self._input(rng, verb, action.dest)
                    if right
                    else rng.choice((*PATHS[2:], "nobody/nothing", *self._inputs()))
                )
            elif action.required or (group is not None and group.required and id(group) not in served):
                if group is not None:
                    served.add(id(group))
                    action = rng.choice(group._group_actions)
                right = rng.random() < 0.8
                arguments += [*self._option(rng, action, right=right)]
        optional = [action for action in parser._actions if action.option_strings and not action.required]
        for action in rng.sample(optional, min(len(optional), rng.choice((0, 1, 1, 2, 3)))):
            if not isinstance(action, argparse._HelpAction) and id(action) not in groups:
                arguments += self._option(rng, action, right=rng.random() < 0.2)
        if rng.random() < 0.03:
            arguments.insert(rng.randint(0, len(arguments)), rng.choice(("--nope", "--", "-", "-x", "stray", "")))
        return [*behind, *arguments]  # in front: a list of values would take them

    def _inputs(self) -> list[str]:
        return [
            "../inputs/bundle",
            "../inputs/checkpoint",
            "../inputs/bundle/manifest.json",
            "../inputs/checkpoint/config.json",
        ]

    def _input(self, rng: Random, verb: Verb, dest: str) -> str:
        bundle, checkpoint = self._inputs()[:2]
        if dest in ("store", "files", "names"):
            return {"store": rng.choice(("out", "store")), "files": "short.txt", "names": "text.txt"}[dest]
        if verb in (("export",), ("eval", "suite"), ("eval", "cost"), ("eval", "threshold")):
            return checkpoint
        return rng.choice((bundle, checkpoint)) if verb[0] in ("eval", "tune") else bundle

    def _option(self, rng: Random, action: argparse.Action, *, right: bool) -> list[str]:
        name = rng.choice(action.option_strings)
        if action.nargs == 0:
            return [name]
        count = 1 if action.nargs is None or isinstance(action.nargs, int) else rng.choice((0, 1, 1, 1, 2))
        return [name, *(self._value(rng, action, right=right) for _ in range(count))]

    def _value(self, rng: Random, action: argparse.Action, *, right: bool) -> str:
        dest = action.dest
        kind = _number(action)
        if action.choices is not None and rng.random() < 0.85:
            return str(rng.choice(list(action.choices)))
        if dest in ("output", "json", "plot", "journal", "store"):
            return "out" if right else rng.choice(PATHS)
        if dest == "documents" and right:
            return "short.txt"
        if dest in ("text", "file", "calibration_text", "documents"):
            return "text.txt" if right else rng.choice(PATHS)
        if dest in ("prompt", "chat", "stop", "lead", "cache_salt"):
            return rng.choice(TEXTS[1:3]) if right and dest != "chat" else rng.choice(TEXTS)
        if kind is int:
            return rng.choice(INTEGERS if dest in WORK or right else (*INTEGERS, *LARGE))
        if kind is float:
            return rng.choice(FLOATS)
        return rng.choice((*NAMES, *STRINGS[:12]))


def _make_store(path: Path) -> None:
    """A store that has a document of one chunk, which no bundle would find."""
    from mesart.runtime.chunk_store.folder import ChunkFolder
    from mesart.runtime.chunk_store.records import DocumentRecord, DocumentRecords
    from mesart.runtime.kv.block import BlockLayout, KvBlock

    folder, key = ChunkFolder(path, 1 << 20), "0" * 64
    folder.write(key, KvBlock(BlockLayout(((1, 2), (1, 2)), np.dtype(np.float32)), 4, np.zeros(64, np.uint8)))
    added = "2026-11-28T04:00:00+00:00"
    DocumentRecords(folder).put(DocumentRecord("text.txt", key, 4, key, (key,), f"sha256:{key}", key, added))


def _number(action: argparse.Action) -> type | None:
    """int or float for an option that is a number; a parser may have functions of its own that check it."""
    if action.type in (int, float):
        return action.type
    if not callable(action.type):
        return None
    for text, kind in (("1", int), ("0.5", float)):
        try:
            value: Any = action.type(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            continue
        if type(value) is kind:
            return kind
    return None


def _parser() -> argparse.ArgumentParser:
    """The parser of the command, as it is when it parses."""
    from mesart.scripts.cli import main

    found: list[argparse.ArgumentParser] = []
    parse = argparse.ArgumentParser.parse_args

    def catch(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        found.append(self)
        raise KeyboardInterrupt  # which the command takes for its user's wish

    argparse.ArgumentParser.parse_args = catch  # type: ignore[method-assign]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            main(["inspect", "nowhere"])
    finally:
        argparse.ArgumentParser.parse_args = parse  # type: ignore[method-assign]
    return found[0]


def _verbs(parser: argparse.ArgumentParser, before: Verb = ()) -> Iterator[tuple[Verb, argparse.ArgumentParser]]:
    deeper = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not deeper:
        yield before, parser
    for action in deeper:
        for name, child in action.choices.items():
            yield from _verbs(child, (*before, name))


if __name__ == "__main__":
    from tests.fuzz.command import main

    sys.exit(main(["commands", *sys.argv[1:]]))

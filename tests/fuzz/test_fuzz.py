"""Short runs of the fuzzers with fixed seeds; `make fuzz` runs long ones with any.

Each run is a process of its own: cases are forked, and a process that other tests have used holds threads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.fuzz.soak import soak
from tests.fuzz.values import dump, mutate_json, raw
from tests.fuzz.workers import FAULT, SAME, Case, Fault, check_message, run_cases

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: Any) -> None:
    """A run that finds nothing."""
    command = [sys.executable, "-m", "tests.fuzz", *map(str, arguments), "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_bundles(bundle):
    run("bundles", "--bundle", bundle(), "--cases", 60, "--seed", 1)


def test_bundles_on_openvino(bundle):
    run("bundles", "--bundle", bundle(), "--cases", 8, "--seed", 2, "--backend", "openvino")


def test_checkpoints_commands_and_kills(bundle):
    """In one process: what they need is slow to import."""
    arguments = ("--bundle", bundle(), "--half", bundle(dtype="float16"), "--traced", 0.02, "--seed", 1)
    run("checkpoints", "commands", "kills", "--cases", 40, 24, 6, *arguments)


def test_soak(bundle):
    soak(bundle(), 5.0, seed=1, quiet=True)


class Scripted:
    """A target whose cases do what the test says."""

    name = "scripted"
    writes: Sequence[str] = ("work/out",)
    limit = 1.0

    def __init__(self, act: Any) -> None:
        self.act = act

    def prepare(self) -> None:
        pass

    def run(self, case: Case) -> str:
        case.said(["nothing"])
        self.act(case)
        return SAME


def forever(case: Case) -> None:
    while True:
        pass


def wait(case: Case) -> None:
    time.sleep(60)


def die(case: Case) -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # what abort() ends with is up to the handlers of SIGABRT


def wrong(case: Case) -> None:
    raise KeyError("x")


def write(case: Case) -> None:
    (case.victim / "x").write_text("x")


def leave(case: Case) -> None:
    (case.folder / "tmp" / "x").write_text("x")


def eat(case: Case) -> None:
    bytearray(5 << 30)


def accept(case: Case) -> None:
    case.must_refuse = "a name"


def print_twice(case: Case) -> None:
    check_message("a\nb", "here")


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (forever, "hang"),
        (wait, "hang"),
        (die, "died (-9)"),
        (wrong, "KeyError"),
        (write, "wrote outside"),
        (leave, "wrote outside"),
        (eat, "MemoryError"),
        (accept, "accepted"),
        (print_twice, "message of several lines or none"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_faults_are_found(act, kind):
    (outcome,) = run_cases(Scripted(act), 0, [3], 1)
    assert (outcome.index, outcome.verdict, outcome.kind) == (3, FAULT, kind)


def test_what_is_right_is_no_fault():
    def act(case: Case) -> None:
        (case.work / "out").write_text("x")

    (outcome,) = run_cases(Scripted(act), 0, [0], 1)
    assert outcome.verdict == SAME


def test_cases_depend_on_seed_and_index():
    tree = {"a": [1, 2, {"b": "x"}], "c": None, "d": {"e": 1.5}}
    data = json.dumps(tree).encode()
    once, again = ([mutate_json(Random(f"1:{i}"), data) for i in range(40)] for _ in range(2))
    assert once == again
    assert len(set(once)) > 20


def test_raw_values():
    assert dump({"a": raw("1e999"), "b": 'x"'}) == '{"a": 1e999, "b": "x\\""}'


@pytest.mark.parametrize("message", ["", "a\nb", "a\x1b[2J", "\ud800", "x" * 5000])
def test_messages(message):
    with pytest.raises(Fault):
        check_message(message, "here")

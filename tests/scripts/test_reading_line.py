"""The line that tells of reading: on a terminal only, rewritten in place, gone at the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from mesart.scripts.reading_line import ReadingLine

GENERATE = """
import sys
from mesart.scripts import cli, reading_line

reading_line._PATIENCE = 0
sys.exit(cli.main(sys.argv[1:]))
"""


def on_a_terminal(*command: str, columns: int = 0) -> tuple[str, str]:
    """What a command writes to standard output, a pipe, and to standard error, a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # as Linux says that nobody has it open any more
            while part := os.read(ours, 4096):
                shown += part
        os.close(ours)
        assert process.stdout is not None
        out = process.stdout.read()
    assert process.returncode == 0, shown
    return out, shown.decode()


def screen(shown: str) -> str:
    """What is left in the line."""
    line: list[str] = []
    for part in shown.split("\r"):
        line[: len(part)] = part
    return "".join(line).rstrip()


@pytest.fixture
def command(bundle: Callable[..., Path], tmp_path: Path) -> list[str]:
    (tmp_path / "a.txt").write_text("The grass is green. " * 8)
    arguments = [str(bundle()), "-p", "Here", "-n", "3", "--backend", "onnxruntime", "--reuse", "always"]
    return [sys.executable, "-c", GENERATE, "generate", *arguments, "--documents", str(tmp_path / "a.txt")]


def test_on_a_terminal(command: list[str]) -> None:
    out, shown = on_a_terminal(*command)
    assert out.endswith("\n")
    assert "\r" not in out
    first, *_ = shown.split("\r")[1:]
    assert first.startswith("reading ")
    assert first.endswith(" tokens")
    assert "\n" not in shown
    assert screen(shown) == ""


def test_in_pipes(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_rewritten_in_place() -> None:
    code = """
import time
from mesart.scripts import reading_line
from mesart.scripts.reading_line import ReadingLine

reading_line._PATIENCE, reading_line._BETWEEN = 0, 0
with ReadingLine("a.txt") as line:
    line(12288, 32768)
    line(32768, 32768)
    line.clear()
    line.clear()
    line(1, 2)
"""
    out, shown = on_a_terminal(sys.executable, "-c", code)
    assert out == ""
    parts = shown.split("\r")
    assert [part for part in parts if part.strip()] == [
        "a.txt: reading 12,288 of 32,768 tokens",
        "a.txt: reading 32,768 of 32,768 tokens",
        "a.txt: reading 1 of 2 tokens",
    ]
    assert screen(shown) == ""
    assert screen(shown.rpartition("\ra.txt")[0]) == "", "between, it was gone too"


def test_a_narrow_terminal_gets_its_end() -> None:
    code = """
from mesart.scripts import reading_line
reading_line._PATIENCE = 0
reading_line.ReadingLine("a-long-name" * 20)(1, 2)
"""
    _, shown = on_a_terminal(sys.executable, "-c", code, columns=30)
    assert shown == "\r" + "a-long-name: reading 1 of 2 tokens"[-29:]


def test_what_is_fast_is_not_worth_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    line = ReadingLine()
    for now[0] in (100.5, 100.9):
        line(1, 3)
    assert capsys.readouterr().err == ""
    for now[0] in (101.0, 101.05, 101.2):
        line(2, 3)
    assert capsys.readouterr().err == "\rreading 2 of 3 tokens" * 2


def test_it_is_gone_before_an_error_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("mesart.scripts.reading_line._PATIENCE", 0)
    with pytest.raises(KeyboardInterrupt), ReadingLine() as line:
        line(2, 3)
        raise KeyboardInterrupt
    shown = capsys.readouterr().err
    assert shown.startswith("\rreading 2 of 3 tokens")
    assert shown.endswith("\r")
    assert screen(shown) == ""

"""Standard streams that are closed, full, hung up on, or cannot show a text: one line, and never a traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CANNOT_WRITE = "mesart: error: cannot write to standard output"
MAIN = [sys.executable, "-m", "mesart.scripts.cli"]


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs ``line`` by bash; ``$MESART`` is the command, ``$1`` the first argument."""
    code = f'MESART="{" ".join(MAIN)}"; {line}'
    command = ["bash", "-c", code, "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=120)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        ("$MESART inspect $1 >/dev/full", 2, f"{CANNOT_WRITE}: No space left on device\n"),
        ("$MESART inspect $1 >&-", 2, f"{CANNOT_WRITE}: Bad file descriptor\n"),
        ("$MESART inspect $1 2>&-", 0, ""),
        ("$MESART inspect none 2>/dev/full", 2, ""),
        ("$MESART generate $1 -p - <&-", 2, "mesart: error: standard input cannot be read: it is closed\n"),
    ],
)
def test_streams_that_are_gone(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, unbuffered: str, line: str, status: int, error: str
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    done = shell(line, bundle())
    assert (done.returncode, done.stderr) == (status, error)


def test_a_reader_that_goes_away(bundle: Callable[..., Path]) -> None:
    """As of other tools: nothing is said, and the status is that of SIGPIPE."""
    done = shell('$MESART inspect $1 --json | sleep 0; echo "${PIPESTATUS[0]}"', bundle())
    assert done.stdout == "141\n"
    assert done.stderr == ""


def test_what_a_terminal_cannot_show_is_escaped() -> None:
    code = (
        "from mesart.scripts import streams\nwith streams.standard_streams(): streams.write('a\\xe9\\U0001f600\\udcff')"
    )
    done = shell(f'PYTHONIOENCODING=ascii {sys.executable} -c "$1"', code)
    assert (done.stdout, done.stderr) == ("a\\xe9\\U0001f600\\udcff", "")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (r"printf 'ab\377' | $MESART generate $1 -p -", "standard input is no UTF-8 text (invalid start byte at"),
        (r"$MESART generate $1 -p $'ab\377'", "the prompt is no UTF-8 text"),
        ("$MESART generate $1 -f /dev/zero", "/dev/zero holds more than 256 MiB"),
        ("$MESART generate $1 -f /", "/ cannot be read: Is a directory"),
    ],
)
def test_prompts_that_are_no_text(tmp_path: Path, line: str, error: str) -> None:
    done = shell(line, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"mesart: error: {error}")
    assert done.stderr.count("\n") == 1

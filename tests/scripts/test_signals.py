"""Signals end a command as Ctrl-C does: what is open is closed and cleared away; the status says which it was."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from mesart.scripts import cli, commands

CODE = """
import sys, time
from mesart.scripts import cli, commands

def run(arguments):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("clearing", flush=True)
        time.sleep(float(arguments[0]))
        print("cleared", flush=True)

commands.run = run
sys.exit(cli.main(sys.argv[1:]))
"""


def start(clearing: float = 0, before: str = "") -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", before + CODE, str(clearing)], stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command(number: signal.Signals, status: int) -> None:
    process = start()
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (status, "clearing\ncleared\n", "mesart: interrupted\n")


def test_the_second_ends_it_at_once() -> None:
    process = start(60)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "clearing\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == -signal.SIGTERM


def test_what_is_ignored_stays_ignored() -> None:
    """`nohup mesart ...` outlives its terminal."""
    process = start(before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_handlers_are_of_the_main_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def run(arguments: object) -> int:
        seen.append(signal.getsignal(signal.SIGTERM))
        return 0

    monkeypatch.setattr(commands, "run", run)
    thread = threading.Thread(target=cli.main, args=([],))
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
    assert cli.main([]) == 0
    assert seen[1] not in (signal.SIG_DFL, None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory: Python could not allocate more"),
        (RuntimeError("[enforce fail]: can't allocate memory: you\ntried"), "out of memory: [enforce"),
        (RuntimeError("can't start new thread"), "out of memory: can't start new thread"),
        (OSError(12, "Cannot allocate memory"), "out of memory: "),
        (OSError(28, "No space left on device", "/mnt/x"), "/mnt/x: No space left on device"),
        (ImportError("libcudart.so.13: cannot open shared object", name="tensorrt"), "tensorrt cannot be imported"),
    ],
)
def test_errors_of_the_machine_are_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: object) -> int:
        raise error

    monkeypatch.setattr(commands, "run", run)
    assert cli.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mesart: error: {message}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("x"), ImportError("cannot import name", name="mesart.graphs")])
def test_faults_of_ours_are_seen_whole(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: object) -> int:
        raise error

    monkeypatch.setattr(commands, "run", run)
    with pytest.raises(type(error)):
        cli.main([])

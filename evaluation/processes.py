"""Processes that measure: one at a time, with a time limit, and what they died of."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable
from typing import Literal

from mesart.graphs.errors import MesaError

_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|failed to allocate|unable to allocate|ALLOC_FAILED|bad_alloc"
    r"|GiB more: ",  # an engine that is known not to fit
    re.IGNORECASE,
)

Death = Literal["failed", "out of memory", "time limit"]


class ProcessError(MesaError):
    """A process that gave no result."""

    def __init__(self, death: Death, reason: str) -> None:
        super().__init__(reason)
        self.death: Death = death


def run_process(
    command: list[str],
    limit: float | None = None,
    started: Callable[[int], object] | None = None,
    /,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, and ends what it has started.

    Args:
        command: what to run.
        limit: seconds that it may take.
        started: is told the process's id.
        environment: variables that differ from this process's.

    Raises:
        ProcessError: it took longer.
    """
    pipe = subprocess.PIPE
    # In a session of its own: a compiler that it has started would outlive it.
    with subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        errors="replace",
        env=os.environ | environment,
        start_new_session=True,
    ) as process:
        try:
            if started is not None:
                started(process.pid)
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            raise ProcessError("time limit", f"took longer than {limit:.0f} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def process_error(done: subprocess.CompletedProcess[str]) -> ProcessError:
    """What a process died of: the last line that looks like an error, else its last."""
    if done.returncode < 0 and not _OUT_OF_MEMORY.search(done.stderr):
        name = signal.Signals(-done.returncode).name
        hint = " (the host's memory may have been full)" if name == "SIGKILL" else ""
        return ProcessError("failed", f"killed by {name}{hint}")
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"mesart: error: |[\w.]+(Error|Exception)\b", line)]
    reason = next(iter([*errors[-1:], *lines[-1:]]), "no message")
    return ProcessError("out of memory" if _OUT_OF_MEMORY.search(done.stderr) else "failed", reason)


__all__ = ["Death", "ProcessError", "process_error", "run_process"]

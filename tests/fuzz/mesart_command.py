"""The `mesart` command in this process, with what it wrote; and export with its slow part left out."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mesart.graphs.errors import MesaError
from mesart.scripts.cli import main
from tests.fuzz.workers import Fault, check_message

PREFIX = "mesart: error: "


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    status: int
    out: str
    err: str


def run_command(arguments: Sequence[str], *, statuses: Sequence[int] = (0, 2)) -> Ran:
    """Runs a command; standard streams must be files (as in a case).

    Raises:
        Fault: a status that is none of ``statuses``, a traceback, or an error in more than one line.
        MesaError: status 2.
    """
    starts = [_flushed(number) for number in (1, 2)]
    try:
        status: Any = main(list(arguments))
    except SystemExit as end:  # argparse
        status = end.code
    out, err = (_read(number, start) for number, start in zip((1, 2), starts, strict=True))
    verb = arguments[0] if arguments else "mesart"
    if "Traceback (most recent call last)" in err:
        raise Fault("traceback", verb, err.strip()[-300:])
    if status not in statuses or isinstance(status, bool):
        raise Fault(f"status {status!r}", verb, err.strip()[-300:])
    if status == 2:
        last = err.rstrip("\n").rpartition("\n")[2]
        if not last.startswith(PREFIX) and ": error: " not in last:  # argparse names the command
            raise Fault("status 2 without an error", verb, err.strip()[-300:])
        if err.count(PREFIX) > 1:
            raise Fault("message of several lines or none", verb, err.strip()[-300:])
        check_message(last, verb)
        raise MesaError(last)
    return Ran(int(status or 0), out, err)


def _flushed(number: int) -> int:
    (sys.stdout if number == 1 else sys.stderr).flush()
    return os.fstat(number).st_size


def _read(number: int, start: int) -> str:
    _flushed(number)
    with open(f"/dev/fd/{number}", "rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def import_ahead() -> None:
    """Imports what exports need, by names that no tool takes for unused: 6 s, in every forked case otherwise."""
    for name in (
        "mesart.evaluation",
        "mesart.export.bundle",
        "mesart.scripts.commands.export",
        "mesart.scripts.commands.generate",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llama.tokenization_llama",
        "transformers.tokenization_utils_tokenizers",
        "safetensors.torch",
    ):
        importlib.import_module(name)


def leave_out_tracing() -> None:
    """From now on exports of this process hold no graphs: checkpoints, folders and weights only, in 0.3 s."""
    from mesart.export import bundle
    from mesart.graphs.model.phase_module import PhaseModule

    assert callable(bundle._trace)
    bundle._trace = lambda network, config, *_: bundle._Graphs(PhaseModule(network, config, "traced"))

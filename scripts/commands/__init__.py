"""The verbs of the `mesart` command, a module each with ``add(commands)``; ``eval`` has several."""

from __future__ import annotations

from collections.abc import Sequence

from mesart import __version__
from mesart.graphs.errors import InputError
from mesart.scripts.commands import (
    bench,
    build,
    documents,
    evaluate,
    export,
    generate,
    inspection,
    tune,
    validation,
)
from mesart.scripts.options import Parser


def run(arguments: Sequence[str]) -> int:
    """Runs one command; its exit status.

    Raises:
        MesaError: an error of the user's input, the arguments among it.
    """
    for position, argument in enumerate(arguments, start=1):
        if "\0" in argument:  # no file can be called so, and each library has an error of its own for it
            raise InputError(f"argument {position} holds a NUL character")
    try:
        options = parser().parse_args(arguments)
    except SystemExit as done:  # --help and --version have been printed
        return int(done.code or 0)
    status: int = options.run(options)
    return status


def parser() -> Parser:
    """The parser of all verbs."""
    top = Parser(
        prog="mesart", description="Language models past their training window: Mesa-Extrapolation as ONNX graphs."
    )
    top.add_argument("--version", action="version", version=f"mesart {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for verb in (export, build, inspection, validation, generate, documents, bench, evaluate, tune):
        verb.add(commands)
    return top


__all__ = ["parser", "run"]

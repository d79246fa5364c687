"""Options and the values that they take: out of its range, each is an error before anything is loaded."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any, NoReturn

from mesart.graphs.errors import InputError
from mesart.graphs.memory_size import parse_memory

_MOST = 2**31 - 1
"""Of anything that is counted."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are those of all commands: one line."""

    default_command: str | None = None
    """The command that is meant where the first argument is an option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.default_command and args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = [self.default_command, *args]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """A verb and the function that does it."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def whole(least: int = 1, most: int | None = _MOST, of: str = "") -> Callable[[str], int]:
    """A whole number in a range; ``of`` what, for the message."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{_short(text)} is no whole number") from None
        if value < least or (most is not None and value > most):
            bounds = f"at least {least:,}" if most in (None, _MOST) and value < least else f"{least:,} to {most:,}"
            raise argparse.ArgumentTypeError(f"{_short(text)} is out of range; it must be {bounds}{of and f' {of}'}")
        return value

    return parse


def memory(text: str) -> int:
    """Bytes, written as 2GiB."""
    try:
        return parse_memory(text)
    except InputError:
        raise argparse.ArgumentTypeError(f"{_short(text)} is no size of memory; give one such as 2GiB") from None


def number(least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf) -> Callable[[str], float]:
    """A finite number in a range."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{_short(text)} is no number") from None
        if not math.isfinite(value) or not least <= value <= most or value <= above:
            low = f" above {above:g}" if above > -math.inf else f" at least {least:g}" if least > -math.inf else ""
            high = f"{' and' if low else ''} at most {most:g}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"{_short(text)} is out of range; it must be a finite number{low}{high}")
        return value

    return parse


def filled(text: str) -> str:
    """A text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


share = number(0, 1)
seed = whole(0, None)
threads = whole(1, 4 * (os.cpu_count() or 1))
"""Far more than there are cores would take longer to start than anything takes to run."""


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", type=filled, default="auto", help="auto, tensorrt, tensorrt-rtx, openvino, onnxruntime or torch"
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=seed, default=0)


def add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=filled, metavar="FILE", help="text to use instead of Python's standard library")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=filled, metavar="FILE", help="also write the result as JSON; - for standard output"
    )


def add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=filled, metavar="FILE", help="also draw a PNG")


def add_trust(parser: argparse.ArgumentParser, whose: str) -> None:
    parser.add_argument("--trust-remote-code", action="store_true", help=f"run Python code that {whose} brings")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:30]}...")


__all__ = [
    "Parser",
    "add_backend",
    "add_command",
    "add_json",
    "add_plot",
    "add_seed",
    "add_text",
    "add_trust",
    "filled",
    "number",
    "seed",
    "share",
    "threads",
    "whole",
]

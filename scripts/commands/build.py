"""`mesart build`: TensorRT engines from a bundle's graphs."""

from __future__ import annotations

import argparse
from typing import Any

from mesart.scripts import streams
from mesart.scripts.options import add_command, filled, whole


def add(commands: Any) -> None:
    parser = add_command(commands, "build", _run, "Build TensorRT engines from a bundle's graphs.")
    parser.add_argument("bundle", type=filled)
    parser.add_argument("--engine", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt-rtx")
    parser.add_argument(
        "--gpu",
        type=filled,
        metavar="NAMES",
        help="such as sm89,rtx5090 (default: this machine's); only tensorrt-rtx can choose",
    )
    parser.add_argument(
        "--layout", choices=("bucket", "profile"), default="bucket", help="an engine a phase and bucket, or a phase"
    )
    parser.add_argument(
        "--weights", choices=("shared", "embedded"), default="shared", help="one copy for all engines, or one in each"
    )
    parser.add_argument("--max-tokens", type=whole(), help="build only the buckets for prompts up to this length")


def _run(options: argparse.Namespace) -> int:
    from mesart.export import build_engines  # noqa: PLC0415  (torch is slow to import)

    build_engines(
        options.bundle,
        options.engine,
        options.gpu,
        layout=options.layout,
        weights=options.weights,
        max_tokens=options.max_tokens,
        report=streams.say,
    )
    return 0


__all__ = ["add"]

"""`mesart validate`: a bundle beside PyTorch."""

from __future__ import annotations

import argparse
from typing import Any

from mesart.scripts.commands.results import require_outputs, write_result
from mesart.scripts.options import add_backend, add_command, add_json, add_seed, add_trust, filled, whole


def add(commands: Any) -> None:
    parser = add_command(commands, "validate", _run, "Compare a bundle with PyTorch; exit status 1 if it is wrong.")
    parser.add_argument("bundle", type=filled)
    parser.add_argument(
        "--against", type=filled, metavar="MODEL", help="the checkpoint (default: the bundle's own weights)"
    )
    add_backend(parser)
    parser.add_argument("--graphs", choices=("all", "symbolic", "specialised"), default="all", help="not for TensorRT")
    parser.add_argument("--buckets", type=whole(0), nargs="+", metavar="CHUNKS", help="default: all")
    parser.add_argument("--steps", type=whole(0), default=8, help="decoding steps after each prompt")
    add_seed(parser)
    add_trust(parser, "the bundle or checkpoint")
    add_json(parser)


def _run(options: argparse.Namespace) -> int:
    require_outputs(options)
    from mesart.evaluation.validate import validate  # noqa: PLC0415  (torch is slow to import)

    result = validate(
        options.bundle,
        options.against,
        backend=options.backend,
        graphs=None if options.graphs == "all" else (options.graphs,),
        buckets=options.buckets,
        steps=options.steps,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )
    write_result(options, result)
    return 0 if result.passed else 1


__all__ = ["add"]

"""`mesart bench`: a bundle on each backend, beside plain transformers."""

from __future__ import annotations

import argparse
from typing import Any

from mesart.scripts.commands.results import require_outputs, write_result
from mesart.scripts.options import add_command, add_json, add_trust, filled, threads, whole


def add(commands: Any) -> None:
    parser = add_command(commands, "bench", _run, "Time a bundle on each backend, beside plain transformers.")
    parser.add_argument("bundle", type=filled)
    parser.add_argument("--lengths", type=whole(), nargs="+", metavar="TOKENS", help="prompt lengths")
    parser.add_argument("--new-tokens", type=whole(), default=32, help="tokens to decode")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all installed but torch")
    parser.add_argument("--repeat", type=whole(), default=1, help="timed runs of each; the median counts")
    parser.add_argument("--threads", type=threads)
    parser.add_argument("--no-transformers", action="store_true", help="leave plain transformers out")
    add_trust(parser, "the bundle, in PyTorch")
    add_json(parser)


def _run(options: argparse.Namespace) -> int:
    require_outputs(options)
    from mesart.evaluation.bench import run_bench  # noqa: PLC0415  (torch is slow to import)

    result = run_bench(
        options.bundle,
        lengths=options.lengths,
        new_tokens=options.new_tokens,
        backends=options.backends,
        repeat=options.repeat,
        threads=options.threads,
        transformers=not options.no_transformers,
        trust_remote_code=options.trust_remote_code,
    )
    write_result(options, result)
    return 0


__all__ = ["add"]

"""`mesart tune`: the configuration that suits a model."""

from __future__ import annotations

import argparse
from typing import Any

from mesart.scripts.commands.results import require_outputs, write_result
from mesart.scripts.options import (
    add_backend,
    add_command,
    add_json,
    add_seed,
    add_text,
    add_trust,
    filled,
    number,
    whole,
)


def add(commands: Any) -> None:
    parser = add_command(commands, "tune", _run, "Find the configuration (F, C, tail, N, log-n) that suits a model.")
    parser.add_argument("model", type=filled, help="a bundle (fast), or a checkpoint or hub id")
    parser.add_argument("--lengths", type=whole(), nargs="+", metavar="TOKENS", help="default: 4 and 16 x T_r")
    parser.add_argument(
        "--cost", action="store_true", help="judge by the time to the first token alone: C and the longest tail"
    )
    parser.add_argument("--prompts", type=whole(0), default=8, help="passkeys of each length and configuration")
    parser.add_argument("--places", type=whole(0), default=12, help="places of scored text of each")
    parser.add_argument("--final-prompts", type=whole(0), default=40, help="of each finalist")
    parser.add_argument("--final-places", type=whole(0), default=48, help="of each finalist")
    parser.add_argument("--finalists", type=whole(), default=3)
    parser.add_argument("--evaluations", type=whole(of="evaluations"), default=40, help="configurations to try at most")
    parser.add_argument("--seconds", type=number(0), help="after which nothing new is begun")
    parser.add_argument(
        "--sensitivity", action="store_true", help="no search: each parameter changed alone, all others left"
    )
    add_seed(parser)
    add_backend(parser)
    add_text(parser)
    add_trust(parser, "the checkpoint")
    parser.add_argument(
        "--journal", type=filled, metavar="FILE", help="keeps what was found, so that an interrupted run goes on"
    )
    add_json(parser)


def _run(options: argparse.Namespace) -> int:
    require_outputs(options)
    from mesart.evaluation.tuning import sensitivity, tune  # noqa: PLC0415  (torch is slow to import)

    names = ["lengths", "prompts", "places", "seed", "backend", "text", "journal", "trust_remote_code"]
    run: Any = sensitivity
    if not options.sensitivity:
        run = tune
        names += ["final_prompts", "final_places", "finalists", "evaluations", "seconds"]
    chosen = {name: getattr(options, name) for name in names}
    if options.cost:
        chosen |= {name: 0 for name in chosen if name.endswith(("prompts", "places"))}
    result = run(options.model, **chosen)
    write_result(options, result)
    return 0 if result.complete else 130


__all__ = ["add"]

"""`mesart eval cost`: time and memory of each method."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mesart.scripts.commands.results import require_outputs, write_result
from mesart.scripts.options import add_command, add_json, add_trust, filled, threads, whole


def add(tasks: Any) -> None:
    parser = add_command(tasks, "cost", _run, "Time and memory of each method against the prompt's length.")
    parser.add_argument("model", type=filled, help="a checkpoint or hub id")
    parser.add_argument("-o", "--output", type=filled, required=True, help="folder of the results")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="or NAME:PARAMETER=VALUE,... (default: all)")
    parser.add_argument("--lengths", type=whole(), nargs="+", metavar="TOKENS", required=True)
    parser.add_argument("--repeat", type=whole(), default=3, help="timed runs of each; the median counts")
    parser.add_argument("--new-tokens", type=whole(), default=8, help="tokens to decode")
    parser.add_argument("--threads", type=threads)
    add_trust(parser, "the checkpoint")
    add_json(parser)


def _run(options: argparse.Namespace) -> int:
    require_outputs(options)
    from mesart.evaluation.cost import run_cost  # noqa: PLC0415  (torch is slow to import)
    from mesart.evaluation.suite import JOURNAL_FILE  # noqa: PLC0415
    from mesart.evaluation.suite_plots import plot_cost  # noqa: PLC0415  (says what is missing before the work)

    folder = Path(options.output)
    result = run_cost(
        options.model,
        folder / JOURNAL_FILE,
        methods=options.methods,
        lengths=options.lengths,
        repeat=options.repeat,
        new_tokens=options.new_tokens,
        threads=options.threads,
        trust_remote_code=options.trust_remote_code,
    )
    write_result(options, result)
    if any(row.failed is None for row in result.rows):
        plot_cost(result, folder / "cost.png")
    return 0 if result.complete else 130


__all__ = ["add"]

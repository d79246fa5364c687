"""`mesart eval threshold`: where the plain model fails, told from its hidden states."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mesart.scripts.commands.results import require_outputs, write_result
from mesart.scripts.options import add_command, add_json, add_plot, add_seed, add_text, add_trust, filled, number, whole


def add(tasks: Any) -> None:
    parser = add_command(
        tasks, "threshold", _run, "Predict from hidden states where the plain model fails; measure it."
    )
    parser.add_argument("model", type=filled, help="a checkpoint or hub id")
    parser.add_argument("--max-tokens", type=whole(), help="the longest text (default: 4 x T_r)")
    parser.add_argument("--places", type=whole(2), default=32, help="texts, and as many to choose the dimension by")
    parser.add_argument("--tokens", type=whole(), default=16, help="tokens watched at each place")
    parser.add_argument(
        "--factor", type=number(above=1), default=1.2, help="of the perplexity, at which the model has failed"
    )
    parser.add_argument("--margin", type=number(above=0), help="times the stray at T_r / 2 that is too far")
    parser.add_argument("--passkey-prompts", type=whole(0), default=0, help="of each length, for the plain model")
    add_seed(parser)
    add_text(parser)
    add_trust(parser, "the checkpoint")
    add_json(parser)
    add_plot(parser)


def _run(options: argparse.Namespace) -> int:
    require_outputs(options)
    from mesart.evaluation.threshold import run_threshold  # noqa: PLC0415  (torch is slow to import)

    result = run_threshold(
        options.model,
        max_tokens=options.max_tokens,
        places=options.places,
        tokens=options.tokens,
        factor=options.factor,
        margin=options.margin,
        passkey_prompts=options.passkey_prompts,
        seed=options.seed,
        text=options.text,
        trust_remote_code=options.trust_remote_code,
    )
    write_result(options, result)
    if options.plot is not None:
        from mesart.evaluation.suite_plots import plot_threshold  # noqa: PLC0415

        plot_threshold({Path(options.model).name: result}, options.plot)
    return 0


__all__ = ["add"]

"""`mesart eval TASK`: how far a model goes. Passkeys and perplexity are here, the other tasks have modules."""

from __future__ import annotations

import argparse
from typing import Any

from mesart.scripts.commands import cost, suite, threshold
from mesart.scripts.commands.results import require_outputs, write_result
from mesart.scripts.options import (
    add_backend,
    add_command,
    add_json,
    add_plot,
    add_seed,
    add_text,
    add_trust,
    filled,
    share,
    whole,
)


def add(commands: Any) -> None:
    parser = commands.add_parser("eval", help="Measure how far a model goes: passkey retrieval, perplexity.")
    parser.default_command = "suite"  # `mesart eval --model MODEL ...`
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    passkey = add_command(tasks, "passkey", _passkey, "Passkey retrieval against prompt length.")
    passkey.add_argument("--fillers", nargs="+", default=["standard", "random"], metavar="NAME")
    passkey.add_argument("--prompts", type=whole(), default=20, help="prompts of each length and filler")
    passkey.add_argument("--depths", type=share, nargs="+", metavar="D", help="0 to 1 (default: evenly spread)")
    passkey.add_argument("--digits", type=whole(), default=5)
    perplexity = add_command(tasks, "perplexity", _perplexity, "Perplexity of the same tokens against context length.")
    perplexity.add_argument("--places", type=whole(), default=24, help="places in the text")
    perplexity.add_argument("--tokens", type=whole(), default=32, help="tokens judged at each place")
    for module in (suite, cost, threshold):
        module.add(tasks)
    for task in (passkey, perplexity):
        task.add_argument("source", type=filled, help="a bundle or a checkpoint")
        task.add_argument("--systems", nargs="+", default=["mesa", "origin"], metavar="NAME")
        task.add_argument(
            "--lengths", type=whole(), nargs="+", metavar="TOKENS", help="default: 1x to the largest, doubling"
        )
        add_seed(task)
        add_text(task)
        add_backend(task)
        add_trust(task, "the bundle or checkpoint")
        add_json(task)
        add_plot(task)


def _passkey(options: argparse.Namespace) -> int:
    require_outputs(options)
    from mesart.evaluation.passkey_eval import run_passkey  # noqa: PLC0415  (torch is slow to import)

    result = run_passkey(
        options.source,
        systems=options.systems,
        lengths=options.lengths,
        fillers=options.fillers,
        prompts=options.prompts,
        depths=options.depths,
        seed=options.seed,
        backend=options.backend,
        text=options.text,
        digits=options.digits,
        trust_remote_code=options.trust_remote_code,
    )
    return _report(options, result)


def _perplexity(options: argparse.Namespace) -> int:
    require_outputs(options)
    from mesart.evaluation.perplexity import run_perplexity  # noqa: PLC0415  (torch is slow to import)

    result = run_perplexity(
        options.source,
        systems=options.systems,
        lengths=options.lengths,
        places=options.places,
        tokens=options.tokens,
        seed=options.seed,
        backend=options.backend,
        text=options.text,
        trust_remote_code=options.trust_remote_code,
    )
    return _report(options, result)


def _report(options: argparse.Namespace, result: Any) -> int:
    write_result(options, result)
    if options.plot is not None and result.cells:
        result.plot(options.plot)
    return 0 if result.complete else 130


__all__ = ["add"]

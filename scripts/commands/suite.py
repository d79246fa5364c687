"""`mesart eval suite`: methods side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mesart.scripts import streams
from mesart.scripts.options import add_backend, add_command, add_seed, add_text, add_trust, filled, threads, whole


def add(tasks: Any) -> None:
    parser = add_command(tasks, "suite", _run, "Methods side by side; an interrupted run goes on.")
    parser.add_argument(
        "models", type=filled, nargs="*", metavar="MODEL", help="a bundle, a checkpoint or hub id, or NAME=MODEL"
    )
    parser.add_argument(
        "--model", type=filled, action="append", default=[], dest="more", metavar="MODEL", help="the same"
    )
    parser.add_argument("-o", "--output", type=filled, required=True, help="folder of the results")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="or NAME:PARAMETER=VALUE,... (default: all)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", default=["passkey", "perplexity"])
    parser.add_argument("--lengths", type=whole(), nargs="+", metavar="TOKENS", help="default: 1x to 32x, doubling")
    parser.add_argument("--prompts", type=whole(), default=20, help="of each method, task and length")
    parser.add_argument("--places", type=whole(), default=60, help="in the text, for perplexity")
    parser.add_argument("--scale", choices=("paper", "small"), default="paper", help="small: for tiny windows")
    add_seed(parser)
    add_text(parser)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of checkpoints")
    parser.add_argument("--device", type=filled, default="cpu", help="of PyTorch, such as cuda")
    add_backend(parser)
    parser.add_argument("--jobs", type=threads, default=1, help="processes at a time; they share the cores")
    add_trust(parser, "the models")


def _run(options: argparse.Namespace) -> int:
    import mesart.evaluation.suite_plots  # noqa: F401, PLC0415  (says what is missing before hours of work, not after)
    from mesart.evaluation.cells import Settings  # noqa: PLC0415
    from mesart.evaluation.suite import run_suite  # noqa: PLC0415
    from mesart.evaluation.suite_report import write_report  # noqa: PLC0415

    result = run_suite(
        dict(_named_model(model) for model in [*options.models, *options.more]),
        options.output,
        methods=options.methods,
        tasks=options.tasks,
        lengths=options.lengths,
        settings=Settings(
            prompts=options.prompts,
            places=options.places,
            seed=options.seed,
            scale=options.scale,
            text=options.text,
            dtype=options.dtype,
            device=options.device,
            backend=options.backend,
            trust_remote_code=options.trust_remote_code,
        ),
        jobs=options.jobs,
    )
    streams.write(result.table() + "\n", flush=True)
    if result.outcomes:
        write_report(result, options.output)
        streams.write(f"wrote {options.output}\n")
    return 0 if result.complete else 130


def _named_model(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    return (name, source) if equals else (Path(text).name or text, text)


__all__ = ["add"]

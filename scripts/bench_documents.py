"""Questions about documents that were read before: MesaRT with its store beside OpenVINO GenAI and llama.cpp.

    python scripts/real_models.py
    mesart export .cache/real/smollm2 -o .cache/real/f32 --max-tokens 65536
    python scripts/bench_documents.py .cache/real/f32:openvino --tokens 32768

Every system is asked the same in one process of its own: documents and a question, none of them known; the same
documents in the same order with other questions; the same documents in another order. MesaRT then answers from its
folder, with nothing in memory. The peers keep prefixes of prompts, which they do by themselves. Seconds are those to
the first token; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mesart.evaluation.machine import cpu_name
from mesart.evaluation.processes import ProcessError
from mesart.graphs.errors import InputError, MesaError
from mesart.scripts.bench_peers import PACKAGES, Bundle, Prompts, measure, prepare
from mesart.scripts.options import filled, number, threads, whole
from mesart.scripts.real_models import REAL, ROOT


@dataclass(frozen=True)
class Question:
    """One of the measurements: ``order`` of the documents, and what is forgotten before."""

    name: str
    order: str
    forgets: str = ""


COLD: Final = Question("first time", "given")
PEERS: Final = [COLD, *[Question("same order", "given")] * 2, Question("other order", "reversed")]
OURS: Final = [
    *PEERS,
    Question("other order, from the disk", "reversed", "memory"),
    Question("other order, after a restart", "reversed", "process"),
]


@dataclass
class Row:
    """A system's seconds to the first token by the question's name, or why there are none."""

    label: str
    seconds: dict[str, float]
    failure: str = ""


def rows_of(questions: Sequence[Question], found: Sequence[float]) -> dict[str, float]:
    """The median of each name."""
    named: dict[str, list[float]] = {}
    for question, seconds in zip(questions, found, strict=True):
        named.setdefault(question.name, []).append(seconds)
    return {name: statistics.median(values) for name, values in named.items()}


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table: seconds, and how many times sooner than the system's own first time."""
    names = list(dict.fromkeys(question.name for question in OURS))
    lines = [f"| system | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for row in rows:
        cold = row.seconds.get(COLD.name, 0.0)
        cells = [
            f"{row.seconds[name]:.3g} s" + (f" ({cold / row.seconds[name]:.3g}x)" if name != COLD.name else "")
            if name in row.seconds
            else row.failure[:120].replace("|", "/") or "-"
            for name in names
        ]
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return lines


def job_of(
    kind: str, model: Path, texts: Sequence[list[int]], asked: Sequence[Question], options: argparse.Namespace
) -> dict[str, Any]:
    """The worker's job: each question is another text, as long as the others."""
    documents, questions = list(texts[: options.documents]), texts[options.documents :]
    orders = {"given": documents, "reversed": documents[::-1]}
    return {
        "system": kind,
        "model": str(model.resolve()),
        "threads": options.threads,
        "new_tokens": 1,
        "prompt": [],
        "warm_up": questions[-1],
        "settings": {},
        "questions": [
            {"documents": orders[question.order], "question": ids, "forgets": question.forgets}
            for question, ids in zip(asked, questions, strict=False)
        ],
    }


def texts_of(options: argparse.Namespace) -> list[list[int]]:
    """Documents of equal length, and questions behind them, from a text that is on every machine."""
    length = (options.tokens - options.question) // options.documents
    count = len(OURS) + 1
    needed = length * options.documents + count * options.question
    ids = Prompts.read(options.checkpoint, needed, 0).longest
    cut = length * options.documents
    documents = [ids[at : at + length] for at in range(0, cut, length)]
    return documents + [ids[cut + at * options.question :][: options.question] for at in range(count)]


def run(options: argparse.Namespace) -> int:
    texts, rows = texts_of(options), []
    python = options.peers_env / "bin" / "python"
    systems: list[tuple[str, str, Path, Path, dict[str, Any], Sequence[Question]]] = []
    for bundle in options.bundle:
        settings = bundle.system().settings | {"memory": options.memory, "folder": options.folder}
        systems.append((bundle.system().label, "mesart-documents", bundle.folder, Path(sys.executable), settings, OURS))
    systems += [(name, name, options.gguf, python, {}, PEERS) for name in options.peers]
    if options.peers:
        prepare(options.peers_env)
    for label, kind, model, interpreter, settings, asked in systems:
        job = job_of(kind, model, texts, asked, options) | {"settings": settings}
        try:
            found = measure(interpreter, job, 60 * options.limit)["first_tokens"]
            rows.append(Row(label, rows_of(asked, found)))
        except ProcessError as error:
            rows.append(Row(label, {}, f"{error.death}: {error}"))
        print(json.dumps(rows[-1].__dict__), file=sys.stderr, flush=True)
    report = {
        "cpu": cpu_name(),
        "tokens": options.tokens,
        "documents": options.documents,
        "question": options.question,
        "rows": [row.__dict__ for row in rows],
    }
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"{cpu_name()}, {options.threads} threads; {options.tokens:,} tokens in {options.documents} documents", end=""
    )
    print(f" and a question of {options.question}; seconds to the first token (times sooner than the first time)\n")
    print("\n".join(table(rows)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done, whatever failed is a row; 2: an error of the user's input, in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bundle", type=Bundle.parse, nargs="*", metavar="PATH[:BACKEND[:int8]]", help="bundles to measure")
    add("--peers", nargs="*", choices=tuple(PACKAGES), default=list(PACKAGES), metavar="NAME")
    add("--gguf", type=Path, default=REAL / "smollm2.gguf", metavar="FILE", help="what the peers run")
    add("--checkpoint", type=Path, default=REAL / "smollm2", metavar="FOLDER", help="whose tokenizer counts")
    add("--tokens", type=whole(), default=32768, help="of documents and question together")
    add("--documents", type=whole(), default=8, help="how many")
    add("--question", type=whole(), default=64, metavar="TOKENS")
    add("--memory", default="8GiB", help="of the store")
    add("--folder", type=filled, help="where the store's folder is made (default: that of temporary files)")
    add("--threads", type=threads, default=len(os.sched_getaffinity(0)))
    add("--limit", type=number(above=0), default=30, metavar="MINUTES", help="of one system")
    add("--peers-env", type=Path, default=ROOT / ".cache" / "peers", metavar="FOLDER", help="the peers' environment")
    add("--json", type=filled, metavar="FILE", help="also write everything as JSON")
    try:
        return run(parser.parse_args(arguments))
    except (MesaError, OSError, InputError) as error:
        print(f"bench_documents: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

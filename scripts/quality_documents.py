"""How well a bundle answers about documents, by how a prompt is cut: docs/documents.md has the tables.

    python scripts/quality_documents.py BUNDLE --tasks passkey niah-multikey-1 vt --lengths 512 1024 --samples 20

Each prompt of a task (and of ``functions``, questions about the documentation of Python's own library) is given in
several ways: cut at fixed places as a plain prompt is; its text as documents of a chunk each with a tail of the
question alone, which is what a store reuses; the same with a tail of ``tail_min`` tokens, the last document's among
them; as small documents, of a quarter of a chunk each. Answers are greedy. Scores are the tasks' own, from 0 to 1,
means over the prompts.
"""

from __future__ import annotations

import argparse
import ast
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

from mesart.evaluation.corpus import library_documents, library_text
from mesart.evaluation.passkey import prompt_rng
from mesart.evaluation.tasks import SCALES, Sample, Writer, find_task
from mesart.graphs.errors import InputError, MesaError
from mesart.graphs.method.config import MesaConfig
from mesart.runtime import MesaModel
from mesart.scripts.options import whole

Parts = tuple[list[int], list[list[int]], list[int]]
"""What stands before the documents, the documents, and what stands behind them."""

FUNCTIONS: Final = "functions"
ASKED: Final = '\nQuestion: Which function is described as "{line}"?\nAnswer: The function'


def fixed(sample: Sample, config: MesaConfig) -> Parts:
    """A plain prompt, cut where its length says."""
    return list(sample.input_ids), [], []


def documents(sample: Sample, config: MesaConfig) -> Parts:
    return _parts(sample, sample.body[1], config.chunk_length)


def with_tail(sample: Sample, config: MesaConfig) -> Parts:
    """The last tokens of the documents belong to the question."""
    start, stop = sample.body
    question = len(sample.input_ids) - stop
    return _parts(sample, max(start + 1, stop - max(0, config.tail_min - question)), config.chunk_length)


def small(sample: Sample, config: MesaConfig) -> Parts:
    return _parts(sample, sample.body[1], config.chunk_length // 4)


WAYS: Final[dict[str, Callable[[Sample, MesaConfig], Parts]]] = {
    "fixed cuts": fixed,
    "documents": documents,
    "documents, tail of tail_min": with_tail,
    "documents of C / 4": small,
}


def _parts(sample: Sample, stop: int, size: int) -> Parts:
    ids, start = list(sample.input_ids), sample.body[0]
    return ids[:start], [ids[at : min(at + size, stop)] for at in range(start, stop, size)], ids[stop:]


def functions(writer: Writer, length: int, rng: random.Random) -> Sample:
    """Documentation of functions, of about ``length`` tokens, and the first line of one: the answer is its name."""
    entries = list(_documented())
    rng.shuffle(entries)
    begin = [*writer.prefix_ids, *writer.encode("Functions and their documentation.\n\n")]
    ids, told = list(begin), []
    for name, text in entries:
        piece = writer.encode(f"Function {name}\n{text}\n\n")
        if len(piece) < length // 4:
            if len(ids) + len(piece) > length - 64:
                break
            ids += piece
            told.append((name, text.strip().splitlines()[0]))
    name, line = rng.choice([entry for entry in told if 20 < len(entry[1]) < 120])
    question = writer.encode(ASKED.format(line=line))
    body = (len(begin), len(ids))
    return Sample((*ids, *question), "", (name,), len(writer.encode(f" is {name}")) + 4, body)


@lru_cache(1)
def _documented() -> tuple[tuple[str, str], ...]:
    """Names and documentation of the library's functions; each name once."""
    found: dict[str, str] = {}
    for source in library_documents("train"):
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                text = ast.get_docstring(node)
                if text and text.isascii():
                    found.setdefault(node.name, text[:1500])
    return tuple(found.items())


def samples(
    task: str, scale: str, writer: Writer, length: int, count: int
) -> Iterator[tuple[Sample, Callable[[str], float]]]:
    """Prompts, and how an answer is scored."""
    for index in range(count):
        rng = prompt_rng("eval", 13, index)
        if task == FUNCTIONS:
            sample = functions(writer, length, rng)
            yield sample, partial(_names, sample)
        else:
            kind = find_task(task, scale)
            sample = kind.sample(writer, length, rng)
            yield sample, partial(kind.score, sample)


def _names(sample: Sample, answer: str) -> float:
    return float(sample.references[0].lower() in answer.lower())


def score(model: MesaModel, sample: Sample, way: str) -> str:
    """The answer of the model, read in one of the ways."""
    config = model.manifest.config
    assert isinstance(config, MesaConfig)
    lead, parts, question = WAYS[way](sample, config)
    tokens: list[int] = []
    if not parts:
        answer = model.generate_ids([lead], sample.new_tokens)
    else:
        answer = model.generate_ids([question], sample.new_tokens, documents=parts, lead=lead, reuse="always")
    for (token,) in answer:
        if token is not None:
            tokens.append(token)
    return model.tokenizer.decode(tokens)


def run(options: argparse.Namespace) -> int:
    with MesaModel.load(options.bundle, options.backend) as model:
        if not isinstance(model.manifest.config, MesaConfig):
            raise InputError(f"{options.bundle} is a bundle of another method than Mesa: it has no chunks")
        tokenizer = model.tokenizer
        encode = lru_cache(100_000)(lambda text: tokenizer.encode(text, add_special_tokens=False))
        writer = Writer(encode, tuple(tokenizer.around[0]), library_text("held_out"))
        print(f"{options.bundle}: {model.manifest.config.described()}; {options.samples} prompts of each\n")
        print(f"| task | tokens | {' | '.join(WAYS)} |\n| --- | ---: |{' ---: |' * len(WAYS)}", flush=True)
        for task in options.tasks:
            for length in options.lengths:
                found: dict[str, list[float]] = {way: [] for way in WAYS}
                for sample, scored in samples(task, options.scale, writer, length, options.samples):
                    for way in WAYS:
                        found[way].append(scored(score(model, sample, way)))
                means = [f"{sum(values) / len(values):.2f}" for values in found.values()]
                print(f"| {task} | {length:,} | {' | '.join(means)} |", flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 2: an error of the user's input, in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tasks", nargs="+", default=["passkey", "niah-multikey-1", "vt"])
    parser.add_argument("--scale", choices=SCALES, default="small", help="sizes of the tasks' keys and values")
    parser.add_argument("--lengths", type=whole(), nargs="+", default=[512, 1024, 2048], metavar="TOKENS")
    parser.add_argument("--samples", type=whole(), default=20)
    try:
        return run(parser.parse_args(arguments))
    except MesaError as error:
        print(f"quality_documents: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

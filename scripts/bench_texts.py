"""Many texts on one engine, measured: decoding together, and while a long prompt is read.

    python scripts/bench_texts.py BUNDLE [--backend openvino] [--kv-dtype float16] [--texts 8] [--behind 1024]
        [--long 32768]

Three measurements in one run: tokens a second of one text and of all texts that decode together; the pauses between the
tokens of all texts while one more prompt is read; and how long that prompt takes, beside being read alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from mesart.runtime import MesaModel, SamplingConfig
from mesart.runtime.engine import Engine, Turn
from mesart.runtime.sampling import Sampler

MANY = 4096
"""Tokens that a text may get: more than any is given here."""


def turn_of(engine: Engine, prompt: np.ndarray[tuple[int], np.dtype[np.int64]], count: int) -> Turn:
    return Turn(engine.open_text(), prompt, sampler=Sampler(SamplingConfig(temperature=0)), max_new_tokens=count)


def decode(engine: Engine, turns: list[Turn], steps: int) -> float:
    """Tokens a second of all turns, whose prompts have been read."""
    before, start = sum(len(turn.tokens) for turn in turns), time.perf_counter()
    for _ in range(steps):
        engine.step()
    return (sum(len(turn.tokens) for turn in turns) - before) / (time.perf_counter() - start)


def read(engine: Engine, turns: list[Turn]) -> float:
    """Seconds until all turns have their first token."""
    start = time.perf_counter()
    while not all(turn.tokens for turn in turns):
        engine.step()
    return time.perf_counter() - start


def measure(model: MesaModel, texts: int, behind: int, long: int, steps: int) -> dict[str, float]:
    engine = model.engine
    random = np.random.default_rng(0)
    vocabulary = int(model.manifest.model["vocab_size"])

    def prompt(length: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return random.integers(3, vocabulary, length)

    found: dict[str, float] = {}
    one = [engine.add(turn_of(engine, prompt(behind), MANY))]
    read(engine, one)
    found["one_text_tokens_a_second"] = decode(engine, one, steps)
    turns = [*one, *(engine.add(turn_of(engine, prompt(behind), MANY)) for _ in range(texts - 1))]
    read(engine, turns)
    found["all_texts_tokens_a_second"] = decode(engine, turns, steps)
    found["ratio"] = found["all_texts_tokens_a_second"] / found["one_text_tokens_a_second"]
    if long:
        pauses = []
        late = engine.add(turn_of(engine, prompt(long), 1))
        begun = last = time.perf_counter()
        while not late.is_finished:
            count = len(one[0].tokens)
            engine.step()
            if len(one[0].tokens) > count:
                now = time.perf_counter()
                pauses.append(now - last)
                last = now
        found["long_prompt_beside_seconds"] = time.perf_counter() - begun
        found["pause_median_ms"] = statistics.median(pauses) * 1e3
        found["pause_most_ms"] = max(pauses) * 1e3
        for turn in [*turns, late]:
            engine.close_text(turn.text)
        alone = engine.add(turn_of(engine, prompt(long), 1))
        found["long_prompt_alone_seconds"] = read(engine, [alone])
        engine.close_text(alone.text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--kv-dtype", choices=("float16",), help="in what keys and values are kept; the bundle's dtype")
    parser.add_argument("--texts", type=int, default=8, help="that decode together")
    parser.add_argument("--behind", type=int, default=1024, help="tokens of each one's prompt")
    parser.add_argument("--long", type=int, default=0, help="tokens of the prompt that is read meanwhile; 0: none")
    parser.add_argument("--steps", type=int, default=24, help="that are timed")
    options = parser.parse_args()
    with MesaModel.load(options.bundle, options.backend, verify=False, kv_dtype=options.kv_dtype) as model:
        found = measure(model, options.texts, options.behind, options.long, options.steps)
        print(json.dumps({"backend": model.backend, "texts": options.texts, **found}, indent=1))


if __name__ == "__main__":
    main()

"""One measurement of the benchmark, in a process of its own: `python -m mesart.evaluation.bench_worker JOB`."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mesart.graphs.errors import MesaError
from mesart.graphs.manifest import Manifest

Answer = Callable[[list[int]], tuple[float, float]]
"""Runs a prompt and decodes behind it; seconds to the first logits, seconds a token."""


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Loads the system, warms it up, times it; peak memory is over all of that."""
    bundle = Path(job["bundle"])
    manifest = Manifest.read(bundle)
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    generator = np.random.default_rng(0)
    vocabulary = int(manifest.model["vocab_size"])
    prompt = generator.integers(0, vocabulary, job["tokens"]).tolist()
    with peak_memory() as peak:
        start = time.perf_counter()
        answer = _transformers(job) if job["system"] == "transformers" else _mesart(job)
        load = time.perf_counter() - start
        short = manifest.config.head_length + manifest.config.chunk_length + manifest.config.tail_min
        answer(prompt[: max(short, manifest.config.train_length + 1)])
        times = [answer(prompt) for _ in range(job["repeat"])]
    head = vocabulary * config["hidden_size"]
    embeddings = head if config.get("tie_word_embeddings") else 2 * head
    return {
        "first_token": [first for first, _ in times],
        "per_token": [each for _, each in times],
        "memory": peak[0],
        "load": load,
        "matrix_parameters": int(manifest.model["parameters"]) - embeddings,
        "head_parameters": head,
        "heads": config["num_attention_heads"],
    }


def _mesart(job: dict[str, Any]) -> Answer:
    from mesart.runtime import MesaModel  # noqa: PLC0415  (only one of the two systems is loaded)

    # Hashing the weights would read the whole file; a benchmark's bundle was made just before.
    model = MesaModel.load(job["bundle"], job["system"], threads=job["threads"], verify=False)

    def answer(prompt: list[int]) -> tuple[float, float]:
        start = time.perf_counter()
        token = int(model.prefill(prompt)[0, -1].argmax())
        first = time.perf_counter()
        for _ in range(job["new_tokens"]):
            token = int(model.step(token)[0, -1].argmax())
        return first - start, (time.perf_counter() - first) / job["new_tokens"]

    return answer


def _transformers(job: dict[str, Any]) -> Answer:
    import torch  # noqa: PLC0415  (only one of the two systems is loaded)

    from mesart.graphs.torch_graph import load_plain_model  # noqa: PLC0415

    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    model = load_plain_model(Path(job["bundle"]), dtype, attn_implementation="sdpa")

    def answer(prompt: list[int]) -> tuple[float, float]:
        with torch.inference_mode():
            start = time.perf_counter()
            output = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter()
            for _ in range(job["new_tokens"]):
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1].argmax(-1, keepdim=True)
            return first - start, (time.perf_counter() - first) / job["new_tokens"]

    return answer


@contextmanager
def peak_memory(interval: float = 0.02) -> Iterator[list[int]]:
    """Samples the process's anonymous resident memory, ``RssAnon`` of Linux; the list's one item is the peak, bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        raise MesaError("peak memory is read from /proc, which this system lacks; run the benchmark on Linux")
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.is_set():
            line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
            peak[0] = max(peak[0], int(line.split()[1]) * 1024)
            done.wait(interval)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

"""What one run of OpenVINO's paged graph takes, by new tokens and by the tokens before them.

    python scripts/bench_runs.py BUNDLE [--behind 1024 16384 32768] [--tokens 1 4 16] [--kv-dtype float32 float16]

Keys and values before are random. Bundles are loaded once for each dtype, and take turns; the least of all runs counts.
Elapsed time means something on an idle machine only; processor time is that of all threads together.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from mesart.graphs.bundle.names import BLOCK, Phase
from mesart.runtime import MesaModel
from mesart.runtime.kv.paged import PagedKv, PagedStore
from mesart.runtime.runners.runner import Segment


def behind(store: PagedStore, length: int, tokens: int, largest: int) -> PagedKv:
    """A text of random keys and values, with room for more."""
    random, kv = np.random.default_rng(0), store.allocate(length + tokens)
    for pool in (*store.keys, *store.values):
        numbers = random.standard_normal((len(kv.blocks), *pool.array.shape[1:]), np.float32)
        pool.array[kv.blocks] = numbers.astype(pool.array.dtype)
    kv.append(np.minimum(np.arange(length), largest))
    return kv


def seconds(model: MesaModel, kv: PagedKv, tokens: int) -> tuple[float, float]:
    """Elapsed and processor time of a run, after which the text is as it was."""
    length = kv.length
    phase: Phase = "decode" if tokens == 1 else "tail"
    ids, positions = np.arange(3, 3 + tokens), kv.positions[-1] + np.zeros(tokens, np.int64)
    segment = Segment(phase, kv, ids, positions, np.ones(tokens, np.float32), 1)
    begun, used = time.perf_counter(), time.process_time()
    model.engine.runner.run([segment])
    took = time.perf_counter() - begun, time.process_time() - used
    kv.length = length
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="in float32")
    parser.add_argument("--behind", type=int, nargs="+", default=[1024, 16384, 32768], help="tokens before")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16], help="new ones of a run")
    parser.add_argument("--kv-dtype", nargs="+", choices=("float32", "float16"), default=["float32", "float16"])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    models = {
        name: MesaModel.load(options.bundle, "openvino", verify=False, kv_dtype=None if name == "float32" else name)
        for name in options.kv_dtype
    }
    print(f"{'behind':>7} {'tokens':>7}  " + "  ".join(f"{name + ': elapsed, cpu':>26}" for name in models))
    for length in options.behind:
        texts = {}
        for name, model in models.items():
            store = model.engine.store
            if not isinstance(store, PagedStore):
                raise SystemExit(f"no paged attention: {model.choice}")
            texts[name] = behind(store, length, max(options.tokens) + BLOCK, model.manifest.config.positions - 1)
        for tokens in options.tokens:
            took: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
            for _ in range(1 + options.runs):  # the first prepares what this number of tokens needs
                for name, model in models.items():
                    took[name].append(seconds(model, texts[name], tokens))
            least = [[min(numbers) * 1e3 for numbers in zip(*runs[1:], strict=True)] for runs in took.values()]
            print(f"{length:>7} {tokens:>7}  " + "  ".join(f"{a:>15.0f} ms {b:>5.0f} ms" for a, b in least), flush=True)
        for name, model in models.items():
            model.engine.store.free(texts[name])


if __name__ == "__main__":
    main()

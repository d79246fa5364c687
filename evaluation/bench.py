"""How fast, and in how much memory: a bundle on each backend, beside plain transformers, in one run.

Every measurement has a process of its own (:mod:`mesart.evaluation.bench_worker`), so that memory is its own; the
systems take turns at each length, so that a change in the machine's speed meets all of them. Times are to be read as
ratios within one table. A short prompt is run first and not counted: engines compile on their first run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mesart.graphs import MesaConfig, MesaError, Plan
from mesart.graphs.manifest import Manifest
from mesart.runtime import backend_names, present_backends

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Machine:
    """What the machine can do, measured with PyTorch just before."""

    cpu: str
    threads: int
    flops: dict[str, float]
    """Peak of a product of 2048 x 2048 matrices, FLOP/s, by dtype."""
    bandwidth: float
    """Reading 1 GiB, bytes/s."""


@dataclass(frozen=True)
class Row:
    """One system at one prompt length."""

    system: str
    dtype: str
    tokens: int
    first_token: float
    """Seconds from the prompt's ids to the first logits; the median of the runs."""
    per_token: float
    """Seconds a decoded token behind that prompt."""
    memory: int
    """Peak anonymous resident memory, bytes: weights as the engine keeps them, cache, buffers, the interpreter; pages
    of a weight file that are merely mapped are not in it."""
    flops: float
    """Operations that the prompt needs, by the shapes of the model and what the system has to attend to."""
    bytes_per_token: float
    """Weights and cache that one decoded token has to read."""
    load: float
    """Seconds to load."""


@dataclass(frozen=True)
class BenchResult:
    bundle: str
    machine: Machine
    rows: list[Row]
    versions: dict[str, str]

    def table(self) -> str:
        """A table for people: the first system of each length is what the others are compared with."""
        peak = ", ".join(f"{value / 1e9:.0f} GFLOP/s {name}" for name, value in self.machine.flops.items())
        lines = [
            f"{self.machine.cpu}, {self.machine.threads} threads: {peak}, {self.machine.bandwidth / 1e9:.1f} GB/s",
            f"{'tokens':>7}  {'system':<26} {'first token':>11} {'speed-up':>8} {'GFLOP/s':>8} {'of peak':>7}  "
            f"{'tokens/s':>8} {'speed-up':>8} {'GB/s':>6} {'of peak':>7}  {'memory':>8} {'load':>6}",
        ]
        for tokens in dict.fromkeys(row.tokens for row in self.rows):
            rows = [row for row in self.rows if row.tokens == tokens]
            base = rows[0]
            for row in rows:
                flops, reads = row.flops / row.first_token, row.bytes_per_token / row.per_token
                sooner, faster = base.first_token / row.first_token, base.per_token / row.per_token
                lines.append(
                    f"{tokens:>7}  {row.system:<26} {row.first_token:>9.2f} s {sooner:>7.2f}x "
                    f"{flops / 1e9:>8.1f} {flops / self.machine.flops[row.dtype]:>7.0%}  {1 / row.per_token:>8.1f} "
                    f"{faster:>7.2f}x {reads / 1e9:>6.1f} {reads / self.machine.bandwidth:>7.0%}  "
                    f"{row.memory / 1e9:>5.2f} GB {row.load:>4.1f} s"
                )
        lines.append("speed-up: over the first system of the same length; memory: peak anonymous resident memory")
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self)) + "\n"


def run_bench(
    bundle: str | Path,
    *,
    lengths: Sequence[int] | None = None,
    new_tokens: int = 32,
    backends: Sequence[str] | None = None,
    repeat: int = 1,
    threads: int | None = None,
    transformers: bool = True,
    progress: bool = True,
) -> BenchResult:
    """Times prompts of several lengths on each backend and on plain transformers.

    Args:
        bundle: the bundle's folder; transformers runs the same weights.
        lengths: prompt lengths in tokens; T_r, and doubling from there to the bundle's largest, if left out.
        new_tokens: tokens to decode behind each prompt.
        backends: all installed engines that compute the bundle's dtype if left out.
        repeat: runs of each; the median counts.
        threads: CPU threads of every system; all available if left out.
        transformers: also run transformers, with the faster of float32 and bfloat16 (sdpa attention).

    Raises:
        MesaError: an unknown backend, or a length that the bundle does not serve.
    """
    folder = Path(bundle)
    manifest = Manifest.read(folder)
    wanted = list(lengths) if lengths else _default_lengths(manifest)
    largest = manifest.buckets[-1].max_tokens
    for tokens in wanted:
        if not 1 <= tokens <= largest:
            raise MesaError(f"cannot time a prompt of {tokens} tokens: the bundle serves 1 to {largest}")
    systems = _systems(manifest, backends)
    count = threads or len(os.sched_getaffinity(0))
    machine = measure_machine(count)
    common = {"bundle": str(folder), "threads": count, "new_tokens": new_tokens, "repeat": repeat}
    rows: list[Row] = []
    with tqdm(total=len(wanted) * (len(systems) + transformers), desc="bench", unit="run", disable=not progress) as bar:
        if transformers:
            bar.set_postfix_str("which dtype is faster in transformers")
            plain = _best_transformers(common, manifest)
        for tokens in wanted:
            if transformers:
                bar.set_postfix_str(f"transformers, {tokens} tokens")
                found = _work({**common, "system": "transformers", "dtype": plain, "tokens": tokens})
                rows.append(_row(f"transformers sdpa {plain}", plain, tokens, found, manifest, dense=True))
                bar.update()
            for name in systems:
                bar.set_postfix_str(f"{name}, {tokens} tokens")
                found = _work({**common, "system": name, "tokens": tokens})
                rows.append(_row(f"mesart {name} {manifest.dtype}", manifest.dtype, tokens, found, manifest))
                bar.update()
    packages = ["mesart", "torch", "transformers", *(name for name in systems if name != "torch")]
    return BenchResult(str(bundle), machine, rows, {name: version(name) for name in packages})


def _default_lengths(manifest: Manifest) -> list[int]:
    lengths = [manifest.config.train_length]
    while lengths[-1] * 2 <= manifest.max_tokens:
        lengths.append(lengths[-1] * 2)
    return lengths


def _systems(manifest: Manifest, backends: Sequence[str] | None) -> list[str]:
    if backends is None:
        skipped = {"torch"} | ({"onnxruntime"} if manifest.dtype == "bfloat16" else set())
        return [name for name in present_backends() if name not in skipped]
    for name in backends:
        if name not in backend_names():
            raise MesaError(f"unknown backend {name!r}; there are {', '.join(backend_names())}")
    return list(backends)


def _best_transformers(common: dict[str, Any], manifest: Manifest) -> str:
    """The dtype in which transformers answers a prompt of one trained window, and 8 tokens more, sooner."""
    tokens = min(manifest.config.train_length, 2048)
    times = {}
    for dtype in ("bfloat16", "float32"):
        found = _work({**common, "system": "transformers", "dtype": dtype, "tokens": tokens, "repeat": 3})
        times[dtype] = statistics.median(found["first_token"]) + 8 * statistics.median(found["per_token"])
    return min(times, key=lambda dtype: times[dtype])


def _work(job: dict[str, Any]) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
    done = subprocess.run(
        [sys.executable, "-m", "mesart.evaluation.bench_worker", json.dumps(job)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise MesaError(f"{job['system']} failed at {job['tokens']} tokens: {reason[-1] if reason else 'no message'}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _row(name: str, dtype: str, tokens: int, found: dict[str, Any], manifest: Manifest, *, dense: bool = False) -> Row:
    return Row(
        name,
        dtype,
        tokens,
        statistics.median(found["first_token"]),
        statistics.median(found["per_token"]),
        found["memory"],
        prompt_flops(manifest, tokens, found["matrix_parameters"], found["heads"], dense=dense),
        token_bytes(manifest, tokens, found["matrix_parameters"] + found["head_parameters"], dtype),
        found["load"],
    )


def prompt_flops(manifest: Manifest, tokens: int, parameters: int, heads: int, *, dense: bool) -> float:
    """Operations of a prompt: two for each weight and token, four for each dimension of each score that is needed."""
    pairs = tokens * (tokens + 1) / 2 if dense else needed_pairs(manifest.config, tokens)
    scores = sum(2 * heads * pairs * (layer.key_size + layer.value_size) for layer in manifest.layers)
    return 2.0 * parameters * tokens + scores


def needed_pairs(config: MesaConfig, tokens: int) -> int:
    """Pairs of a query and a key that it sees, over the whole prompt."""
    plan = Plan.of(config, tokens)
    spans = ([] if plan.head is None else [(len(plan.head), 0)]) + [(len(c), config.head_length) for c in plan.chunks]
    spans.append((len(plan.tail), plan.tail.start))
    return sum(new * past + new * (new + 1) // 2 for new, past in spans)


def token_bytes(manifest: Manifest, tokens: int, parameters: int, dtype: str) -> float:
    """Bytes that a decoded token reads: every weight of a matrix, and the cache."""
    cache = sum(layer.kv_heads * (layer.key_size + layer.value_size) for layer in manifest.layers) * tokens
    return float((parameters + cache) * _BYTES[dtype])


def measure_machine(threads: int) -> Machine:
    """The peaks that results are compared with."""
    import torch  # noqa: PLC0415  (slow to import)

    torch.set_num_threads(threads)
    flops = {}
    for dtype in ("float32", "bfloat16"):
        left = torch.randn(2048, 2048).to(getattr(torch, dtype))
        # As a product, and as a convolution over one point: torch gives the two to different libraries, of which
        # either may be slow on a given CPU.
        signal, kernel = left[None], left[:, :, None]
        product = _best_time(lambda left=left: left @ left)
        convolution = _best_time(lambda signal=signal, kernel=kernel: torch.conv1d(signal, kernel))
        flops[dtype] = 2 * 2048**3 / min(product, convolution)
    flops["float16"] = flops["float32"]  # CPU engines compute float16 in float32
    block = torch.ones(1 << 28)
    bandwidth = block.numel() * 4 / _best_time(block.sum)
    return Machine(_cpu_name(), threads, flops, bandwidth)


def _best_time(function: Any, runs: int = 5) -> float:
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())

"""How fast, and in how much memory: a bundle on each backend, beside plain transformers, in one run.

Every measurement has a process of its own (:mod:`mesart.evaluation.bench_worker`), so that memory is its own; the
systems take turns at each length, so that a change in the machine's speed meets all of them. Times are to be read as
ratios within one table. A short prompt is run first and not counted: engines compile on their first run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesart.evaluation.arguments import require_lengths, require_whole
from mesart.evaluation.machine import Machine, measure_machine
from mesart.evaluation.pairs import needed_pairs
from mesart.evaluation.processes import ProcessError, process_error, run_process
from mesart.evaluation.progress import progress_bar
from mesart.evaluation.provenance import versions
from mesart.evaluation.result import Result
from mesart.graphs import InputError
from mesart.graphs.bundle.manifest import Manifest
from mesart.runtime import backend_names, present_backends

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_WORKER = [sys.executable, "-m", "mesart.evaluation.bench_worker"]


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
class BenchResult(Result):
    """What :func:`run_bench` found."""

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

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


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
    trust_remote_code: bool = False,
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
        progress: show a bar.
        trust_remote_code: run the Python code that the bundle brings, if it does.

    Raises:
        MesaError: an unknown backend, or a length that the bundle does not serve.
    """
    require_lengths(lengths)
    require_whole("new tokens", new_tokens)
    require_whole("repeated runs", repeat)
    if threads is not None:
        require_whole("threads", threads, most=4 * (os.cpu_count() or 1))
    folder = Path(bundle)
    manifest = Manifest.read(folder)
    wanted = list(lengths) if lengths else _default_lengths(manifest)
    largest = manifest.buckets[-1].max_tokens
    for tokens in wanted:
        if not 1 <= tokens <= largest:
            raise InputError(f"cannot time a prompt of {tokens} tokens: the bundle serves 1 to {largest}")
    systems = _systems(manifest, backends)
    count = threads or len(os.sched_getaffinity(0))
    machine = measure_machine(count)
    common = {"bundle": str(folder), "threads": count, "new_tokens": new_tokens, "repeat": repeat}
    common["trust_remote_code"] = trust_remote_code
    rows: list[Row] = []
    with progress_bar(
        total=len(wanted) * (len(systems) + transformers), desc="bench", unit="run", disable=not progress
    ) as bar:
        if transformers:
            bar.set_postfix_str("which dtype is faster in transformers")
            plain = _best_transformers(common, manifest)
        for tokens in wanted:
            if transformers:
                bar.set_postfix_str(f"transformers, {tokens} tokens")
                found = _work({**common, "system": "transformers", "dtype": plain, "tokens": tokens})
                rows.append(make_row(f"transformers sdpa {plain}", plain, tokens, found, manifest, dense=True))
                bar.update()
            for name in systems:
                bar.set_postfix_str(f"{name}, {tokens} tokens")
                found = _work({**common, "system": name, "tokens": tokens})
                rows.append(make_row(f"mesart {name} {manifest.dtype}", manifest.dtype, tokens, found, manifest))
                bar.update()
    packages = ["mesart", "torch", "transformers", *(name for name in systems if name != "torch"), "onnxruntime-gpu"]
    return BenchResult(str(bundle), machine, rows, versions(packages))


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
            raise InputError(f"unknown backend {name!r}; there are {', '.join(backend_names())}")
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
    try:
        return run_worker(job)
    except ProcessError as error:
        raise InputError(f"{job['system']} failed at {job['tokens']} tokens: {error}") from error


def run_worker(job: dict[str, Any], limit: float | None = None, **environment: str) -> dict[str, Any]:
    """One job of :mod:`mesart.evaluation.bench_worker` in a process of its own; arguments as of ``run_process``."""
    if "threads" in job:
        environment["OMP_NUM_THREADS"] = str(job["threads"])
    done = run_process([*_WORKER, json.dumps(job)], limit, **environment)
    if done.returncode:
        raise process_error(done)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # engines may print too
    if not lines:
        raise ProcessError("failed", "ended without a result")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def make_row(
    name: str, dtype: str, tokens: int, found: dict[str, Any], manifest: Manifest, *, dense: bool = False
) -> Row:
    """What a worker has found, beside what the prompt and a token need."""
    return Row(
        name,
        dtype,
        tokens,
        statistics.median(found["first_token"]),
        statistics.median(found["per_token"]),
        found["memory"],
        prompt_flops(manifest, tokens, found["matrix_parameters"], found["heads"], dense=dense),
        token_bytes(manifest, tokens, found["matrix_parameters"] + found["head_parameters"], dtype, plain=dense),
        found["load"],
    )


def prompt_flops(manifest: Manifest, tokens: int, parameters: int, heads: int, *, dense: bool) -> float:
    """Operations of a prompt: two for each weight and token, four for each dimension of each score that is needed."""
    pairs = tokens * (tokens + 1) / 2 if dense else needed_pairs(manifest.config, tokens)
    scores = sum(2 * heads * pairs * (layer.key_size + layer.value_size) for layer in manifest.layers)
    return 2.0 * parameters * tokens + scores


def token_bytes(manifest: Manifest, tokens: int, parameters: int, dtype: str, *, plain: bool = False) -> float:
    """Bytes that a decoded token reads: every weight of a matrix, and the cache; ``plain``: none of it quantised."""
    cache = sum(layer.kv_heads * (layer.key_size + layer.value_size) for layer in manifest.layers) * tokens
    how, weight = manifest.quantisation, float(_BYTES[dtype])
    if how is not None and not plain:
        weight = how.bits / 8 + (weight / how.group_size if how.group_size else 0.0)
    return parameters * weight + cache * _BYTES[dtype]

"""Memory and latency of each method against the prompt's length (the paper's Figure 5), each in a process of its own.

All methods run the same model in PyTorch on the same fused attention, so that what differs is what the rule asks for:
how many scores are computed (``pairs``) and how many keys are kept (``kept``).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mesart.evaluation.arguments import require_lengths, require_number, require_whole
from mesart.evaluation.bench_worker import peak_memory
from mesart.evaluation.journal import Journal
from mesart.evaluation.methods import METHODS, parse_method
from mesart.evaluation.processes import ProcessError, process_error, run_process
from mesart.evaluation.progress import progress_bar
from mesart.evaluation.provenance import fingerprint, versions
from mesart.evaluation.report import table, times
from mesart.evaluation.result import Result
from mesart.graphs.method.config import MesaConfig


@dataclass(frozen=True)
class CostRow:
    """One method at one length."""

    method: str
    length: int
    first_token: tuple[float, ...] = ()
    """Seconds to the first logits, of each timed run."""
    per_token: float = 0.0
    """Seconds of a decoding step, the median."""
    memory: int = 0
    """Bytes above what the process had with the model loaded, at its peak."""
    pairs: int = 0
    """Scores that the rule asks for in the prompt, of one head of one layer."""
    kept: int = 0
    """Keys that the next token may see."""
    failed: str | None = None
    """Why there is no measurement."""


@dataclass(frozen=True)
class CostResult(Result):
    """What :func:`run_cost` found."""

    source: str
    train_length: int
    threads: int
    rows: tuple[CostRow, ...]
    complete: bool

    def table(self) -> str:
        """A row for each length and method, as Markdown that reads well as it is."""
        rows = [
            [
                f"{row.length:,}",
                times(row.length, self.train_length),
                row.method,
                *(
                    ["-", "-", "-", row.failed, "-"]
                    if row.failed
                    else [
                        f"{median(row.first_token):.2f} s",
                        f"{row.per_token * 1e3:.1f} ms",
                        f"{row.memory / 1e6:,.0f} MB",
                        f"{row.pairs / 1e6:,.1f} M",
                        f"{row.kept:,}",
                    ]
                ),
            ]
            for row in self.rows
        ]
        header = ["tokens", "of T_r", "method", "first token", "per token", "memory", "scores", "keys kept"]
        return table(header, rows)

    def record(self) -> dict[str, Any]:
        fields = {"source": Path(self.source).name, "train_length": self.train_length, "threads": self.threads}
        rows = [asdict(row) for row in self.rows]
        return {"task": "cost", "complete": self.complete, **fields, "rows": rows, "versions": versions()}


def run_cost(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    methods: Sequence[str] | None = None,
    lengths: Sequence[int],
    repeat: int = 3,
    new_tokens: int = 8,
    threads: int | None = None,
    limit: float = 600.0,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> CostResult:
    """Times every method at every length; prompts are random tokens. An interrupt ends it; call again to go on.

    Args:
        source: a checkpoint's folder or a hub id; needs no tokenizer.
        output: the journal.
        methods: as of :func:`~mesart.evaluation.suite.run_suite`.
        lengths: of the prompts in tokens.
        repeat: timed runs of each prompt, after one at the trained length to warm up.
        new_tokens: decoded behind each prompt.
        threads: of PyTorch; all cores if left out.
        limit: seconds that one method may take for one length.
        trust_remote_code: run the Python code that the checkpoint brings, if it does.
        progress: show a progress bar on stderr.

    Raises:
        MesaError: an unknown method, a model that cannot be loaded, or a journal of another run.
    """
    require_lengths(lengths)
    require_whole("repeated runs", repeat)
    require_whole("new tokens", new_tokens)
    if threads is not None:
        require_whole("threads", threads, most=4 * (os.cpu_count() or 1))
    require_number("limit", limit, above=0)
    names = list(METHODS if methods is None else dict.fromkeys(methods))
    threads = threads or os.cpu_count() or 1
    train_length, sizes = MesaConfig.from_model(source).train_length, sorted(set(lengths))
    for name in names:
        parse_method(name, train_length, sizes[-1])  # says what is wrong before anything runs
    journal = Journal(output)
    conditions = {
        "model": fingerprint(os.fspath(source)),
        "versions": versions(),
        "runs": {"repeat": repeat, "new_tokens": new_tokens, "threads": threads, "longest": sizes[-1]},
    }
    rows: list[CostRow] = []
    complete = True
    try:
        with progress_bar(total=len(sizes) * len(names), unit="cell", desc="cost", disable=not progress) as bar:
            for length in sizes:
                for name in names:
                    bar.set_postfix_str(f"{name}, {length} tokens")
                    key = ("cost", Path(source).name, name, length)
                    row = journal.find(key, conditions, lambda found: _row(name, length, found))  # noqa: B023
                    if row is None:
                        job = {
                            "source": os.fspath(source),
                            "method": name,
                            "length": length,
                            "longest": sizes[-1],
                            "repeat": repeat,
                            "new_tokens": new_tokens,
                            "trust_remote_code": trust_remote_code,
                        }
                        found = _measure(job, threads, limit)
                        journal.add(key, conditions, found)
                        row = _row(name, length, found)
                    rows.append(row)
                    bar.update()
    except KeyboardInterrupt:
        complete = False
    return CostResult(os.fspath(source), train_length, threads, tuple(rows), complete)


def _row(method: str, length: int, found: Mapping[str, Any]) -> CostRow:
    """A row of what the journal keeps of it."""
    first = tuple(map(float, found["first_token"]))
    numbers = {name: found[name] + 0 for name in ("per_token", "memory", "pairs", "kept")}
    if not isinstance(found["failed"], str | None) or not (first or found["failed"]):
        raise ValueError("neither times nor a reason why there are none")
    return CostRow(method, length, first, **numbers, failed=found["failed"])


def _measure(job: Mapping[str, Any], threads: int, limit: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "mesart.evaluation.cost", json.dumps(job)]
    try:
        done = run_process(command, limit, OMP_NUM_THREADS=str(threads))
        if done.returncode:
            raise process_error(done)
    except ProcessError as error:
        row = CostRow(job["method"], job["length"], failed=f"{error.death}: {error}")
    else:
        row = CostRow(job["method"], job["length"], **json.loads(done.stdout.splitlines()[-1]))
    return {name: value for name, value in asdict(row).items() if name not in ("method", "length")}


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """One measurement, in this process: see :class:`CostRow`."""
    import torch  # noqa: PLC0415

    from mesart.evaluation.methods.system import MethodSystem  # noqa: PLC0415
    from mesart.export.checkpoint import load_model  # noqa: PLC0415

    model = load_model(job["source"], "float32", trust_remote_code=job["trust_remote_code"])
    config: Any = model.config
    vocabulary = int(config.get_text_config().vocab_size)
    train_length = MesaConfig.from_model(job["source"]).train_length
    method = parse_method(job["method"], train_length, job["longest"])
    prompt = torch.randint(vocabulary, (job["length"],), generator=torch.Generator().manual_seed(0)).tolist()
    with peak_memory() as loaded:
        pass
    system = MethodSystem(model, method)
    system.prefill(prompt[:train_length], 1)
    first, each = [], []
    with peak_memory(0.005) as peak:
        for _ in range(job["repeat"]):
            start = time.perf_counter()
            token = int(system.prefill(prompt, 1)[-1].argmax())
            first.append(time.perf_counter() - start)
            for _ in range(job["new_tokens"]):
                start = time.perf_counter()
                token = int(system.step(token).argmax())
                each.append(time.perf_counter() - start)
    return {
        "first_token": first,
        "per_token": median(each),
        "memory": max(0, peak[0] - loaded[0]),
        "pairs": method.pairs(job["length"]),
        "kept": method.kept(job["length"]),
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))

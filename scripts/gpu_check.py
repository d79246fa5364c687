"""One command for a GPU machine: validates and times every backend that runs there, and prints one table, last.

Each export, build, validation and measurement has a process of its own and a time limit, so a crash is a row and not
the end. What became of each is a line of rows.jsonl in the work folder: a rerun goes on where the last one ended, and
refuses what other versions have measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from mesart.evaluation.bench import make_row, run_worker
from mesart.evaluation.journal import Journal, Key
from mesart.evaluation.machine import cpu_name
from mesart.evaluation.processes import ProcessError, process_error, run_process
from mesart.evaluation.provenance import versions
from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.errors import InputError, MesaError

DEMO_MODEL = Path(__file__).resolve().parent.parent / "evaluation" / "demo_model"
K = 1024


@dataclass(frozen=True)
class Model:
    """What is timed; validated too if it is a trained one, that is a folder."""

    lengths: tuple[int, ...]
    folder: Path | None = None
    shape: str = ""
    """Of make_random_model.py, if there is no folder."""
    window: int = 0


MODELS = {
    "demo": Model(tuple(256 << i for i in range(6)), DEMO_MODEL),
    "1b": Model(tuple(4 * K << i for i in range(6)), shape="llama-1b", window=2 * K),
    "8b": Model(tuple(4 * K << i for i in range(6)), shape="llama-8b", window=8 * K),
    # The paper ran out of memory past 192k.
    "phi3-mini": Model((128 * K, 192 * K, 256 * K, 512 * K), shape="phi3-mini", window=4 * K),
}

ENGINE_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
PEERS = ("transformers", "transformers-compiled")

# System -> the dtype that it runs. onnxruntime takes no bfloat16 from numpy, and computes none on CPUs.
GPU_SYSTEMS = {"tensorrt-rtx": "bfloat16", "tensorrt": "bfloat16", "onnxruntime": "float16"}
CPU_SYSTEMS = {"openvino": "bfloat16", "onnxruntime": "float32"}
GPU_SYSTEMS |= dict.fromkeys(PEERS, "bfloat16")
CPU_SYSTEMS |= dict.fromkeys(PEERS, "bfloat16")

VERSIONS = (
    *("mesart", "torch", "transformers", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("tensorrt", "tensorrt_rtx", "cuda-python"),
)


@dataclass(frozen=True)
class Machine:
    """Where this runs."""

    name: str
    driver: str = ""
    capability: str = ""
    memory: str = ""
    """MiB in use before the run, of all."""

    @property
    def device(self) -> str:
        return "cuda" if self.driver else "cpu"


@dataclass(frozen=True)
class Task:
    """A row of the table."""

    model: str
    system: str
    tokens: int | None
    """Of the prompt; ``None`` for a validation."""

    def __str__(self) -> str:
        return f"{self.model} {'validation' if self.tokens is None else f'{self.tokens:,} tokens'}, {self.system}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done, 1: a validation found a backend wrong, 2: an error of the user's input, in one line."""
    options = _parser().parse_args(arguments)
    try:
        return GpuCheck(options).run()
    except MesaError as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_check: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    names = list(dict.fromkeys([*GPU_SYSTEMS, *CPU_SYSTEMS]))
    everything = f"default: all of {', '.join(MODELS)}"
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=everything)
    everything = f"default: all that run here of {', '.join(names)}"
    parser.add_argument("--backends", nargs="+", choices=names, metavar="NAME", help=everything)
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="prompt lengths, of every model")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--work", type=Path, default=Path("gpu_check"), help="folder of checkpoints, bundles and rows")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start no new row after so long")
    parser.add_argument("--limit", type=float, default=10, metavar="MINUTES", help="of one process (default: 10)")
    parser.add_argument("--again", action="store_true", help="repeat rows that an earlier run has measured")
    parser.add_argument("--cpu", action="store_true", help="the same on the CPU, to try it without a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all as JSON")
    return parser


class GpuCheck:
    """One run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.start = time.monotonic()
        self.machine = Machine(cpu_name()) if options.cpu else find_gpu()
        systems = CPU_SYSTEMS if options.cpu else GPU_SYSTEMS
        unknown = [name for name in options.backends or () if name not in systems]
        if unknown:
            raise InputError(f"{unknown[0]} does not run on {self.machine.device}; there are {', '.join(systems)}")
        if options.new_tokens < 1 or min(options.lengths or [1]) < 1:
            raise InputError("--lengths and --new-tokens must be at least 1")
        self.systems = {name: dtype for name, dtype in systems.items() if name in (options.backends or systems)}
        self.journal = Journal(options.work / "rows.jsonl")
        self.bundles: dict[tuple[str, str], Path | ProcessError] = {}
        self.peaks: dict[str, Any] | None = None
        self.skipped: list[str] = []

    def run(self) -> int:
        self._probe()
        self.peaks = self._measure_peaks() if self.systems else None
        rows: dict[Task, dict[str, Any]] = {}
        left_out: list[Task] = []
        stopped: dict[tuple[str, str], dict[str, Any]] = {}
        for task in self._tasks():
            record = None if self.options.again else self._find(self._key(task))
            if record is None and (task.model, task.system) in stopped:
                before = stopped[task.model, task.system]
                reason = f"not tried: so at {before['tokens']:,} tokens"
                record = self._keep(task, {"status": before["status"], "reason": reason})
            if record is None and self._budget_is_spent():
                left_out.append(task)
                continue
            if record is None:
                self._say(str(task))
                record = self._keep(task, self._outcome(task))
                self._say(f"  {', '.join(filter(None, self._cells(task, record)))}")
            rows[task] = record
            if task.tokens and (record["status"] in ("out of memory", "time limit") or record.get("engines_failed")):
                stopped.setdefault((task.model, task.system), record)
        self._report(rows, left_out)
        return int(any(record.get("passed") is False for record in rows.values()))

    def _tasks(self) -> Iterator[Task]:
        """The most important first, and short before long; all systems take turns at each length."""
        for name in self._models():
            if MODELS[name].folder is not None:
                yield from (Task(name, system, None) for system in self.systems if system not in PEERS)
            for tokens in self.options.lengths or MODELS[name].lengths:
                yield from (Task(name, system, tokens) for system in self.systems)

    def _models(self) -> list[str]:
        return [name for name in MODELS if name in self.options.models]

    def _key(self, task: Task) -> Key:
        what = ("validation",) if task.tokens is None else (task.tokens, self.options.new_tokens)
        return (self.machine.name, task.model, task.system, self.systems[task.system], *what)

    def _find(self, key: Key) -> dict[str, Any] | None:
        return self.journal.find(key, self._conditions, dict)

    def _keep(self, task: Task, outcome: dict[str, Any]) -> dict[str, Any]:
        """Writes down what became of a row."""
        new = self.options.new_tokens if task.tokens else None
        what = {"machine": self.machine.name, "dtype": self.systems[task.system], **asdict(task), "new_tokens": new}
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **what, **outcome}
        self.journal.add(self._key(task), self._conditions, record)
        return record

    @cached_property
    def _conditions(self) -> dict[str, Any]:
        return {"versions": self.versions}

    def _budget_is_spent(self) -> bool:
        budget = self.options.budget
        return budget is not None and time.monotonic() - self.start >= 60 * budget

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", file=sys.stderr, flush=True)

    # Before the rows

    def _probe(self) -> None:
        """Leaves out the systems that do not run here, with the reason."""
        for name in list(self.systems):
            reason = self._why_not(name)
            if reason:
                del self.systems[name]
                self.skipped.append(f"{name}: {reason}")
                self._say(f"skipped {self.skipped[-1]}")

    def _why_not(self, system: str) -> str:
        needed = ENGINE_PACKAGES.get(system, "transformers" if system in PEERS else system)
        for package in [needed, "torch"] if system in PEERS else [needed]:
            if importlib.util.find_spec(package) is None:
                return f"the package {package} is not installed"
        if self.machine.device == "cpu":
            return ""
        try:
            run_worker(
                {"task": "probe", "system": PEERS[0] if system in PEERS else system},
                self._limit,
                **self._environment(system),
            )
        except ProcessError as error:
            # What is of use elsewhere ("TensorRT for RTX 1.7 builds for sm75, ..., not for sm90; use ...") ends there.
            return _phrase(error).split(";")[0]
        return ""

    def _measure_peaks(self) -> dict[str, Any] | None:
        """FLOP/s by dtype and bytes/s of the machine; nothing without a torch that can measure them."""
        key = (self.machine.name, "peaks")
        record = self._find(key)
        if record is None and importlib.util.find_spec("torch"):
            self._say("measuring the machine's peaks")
            try:
                record = run_worker({"task": "machine", **self._common()}, self._limit)
                self.journal.add(key, self._conditions, record)
            except ProcessError as error:
                self._say(f"no peaks: {_phrase(error)}")
        return record

    def _common(self) -> dict[str, Any]:
        return {"device": self.machine.device, "threads": len(os.sched_getaffinity(0))}

    @property
    def _limit(self) -> float:
        return float(60 * self.options.limit)

    def _environment(self, system: str) -> dict[str, str]:
        """onnxruntime finds the CUDA libraries of NVIDIA's packages only where the loader looks for them."""
        if system != "onnxruntime" or self.machine.device == "cpu":
            return {}
        found = sorted(map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/*/lib")))
        return {"LD_LIBRARY_PATH": ":".join([*found, os.environ.get("LD_LIBRARY_PATH", "")])}

    # A row

    def _outcome(self, task: Task) -> dict[str, Any]:
        """What becomes of a row: its status, and a result or a reason."""
        begin = time.monotonic()
        try:
            bundle = self._bundle(task)
        except MesaError as error:
            return _failure(error)
        built = time.monotonic()
        try:
            self._build(task, bundle)
        except MesaError as error:
            return _failure(error, "build: ") | {"engines_failed": True}
        ready = time.monotonic()
        try:
            outcome = self._validate(task, bundle) if task.tokens is None else self._time(task, bundle)
        except MesaError as error:
            return _failure(error)
        seconds = {"export": built - begin, "build": ready - built, "run": time.monotonic() - ready}
        return {"status": "ok", **outcome, "seconds": {name: round(value, 1) for name, value in seconds.items()}}

    def _bundle(self, task: Task) -> Path:
        """The bundle that a system runs, exported if it is not there; the peers take the weights of another's."""
        others = [dtype for system, dtype in self.systems.items() if system not in PEERS]
        dtype = self.systems[task.system] if task.system not in PEERS or not others else others[0]
        if (task.model, dtype) not in self.bundles:
            try:
                self.bundles[task.model, dtype] = self._export(task.model, dtype)
            except ProcessError as error:
                self.bundles[task.model, dtype] = ProcessError(error.death, f"export: {_phrase(error)}")
        found = self.bundles[task.model, dtype]
        if isinstance(found, ProcessError):
            raise found
        return found

    def _export(self, name: str, dtype: str) -> Path:
        model, bundle = MODELS[name], Path(self.options.work) / f"{name}-{dtype}"
        tokens = max([*model.lengths, *(self.options.lengths or ())]) + self.options.new_tokens
        with contextlib.suppress(MesaError):  # none, or of an older version: made anew
            if Manifest.read(bundle).buckets[-1].max_tokens >= tokens:
                return bundle
        checkpoint = model.folder or Path(self.options.work) / f"{name}-checkpoint"
        if not checkpoint.is_dir():
            self._say(f"  making random weights: {checkpoint}")
            script = ["mesart.scripts.make_random_model", model.shape, "--window", str(model.window)]
            self._run([*script, "-o", str(checkpoint)])
        self._say(f"  exporting {bundle}")
        options = ["--dtype", dtype, "--max-tokens", str(tokens)]
        self._run(["mesart.scripts.cli", "export", str(checkpoint), "-o", str(bundle), *options])
        return bundle

    def _build(self, task: Task, bundle: Path) -> None:
        """Engines as far as the row needs them: what fails, or does not fit, for a longer prompt is not tried yet."""
        if task.system not in ENGINE_PACKAGES:
            return
        if importlib.util.find_spec("torch") is None and Manifest.read(bundle).engines:
            return  # built elsewhere; without torch nothing can be built here
        self._say("  building engines")
        options = ["--engine", task.system]
        if task.tokens is not None:
            options += ["--max-tokens", str(task.tokens + self.options.new_tokens)]
        self._run(["mesart.scripts.cli", "build", str(bundle), *options])

    def _run(self, module: list[str], **environment: str) -> None:
        done = run_process([sys.executable, "-m", *module], self._limit, **environment)
        if done.returncode:
            raise process_error(done)

    def _validate(self, task: Task, bundle: Path) -> dict[str, Any]:
        command = [sys.executable, "-m", "mesart.scripts.cli", "validate", str(bundle), "--backend", task.system]
        command += ["--against", str(MODELS[task.model].folder), "--json", "-"]
        done = run_process(command, self._limit, **self._environment(task.system))
        if not done.stdout.startswith("{"):  # status 1 is a verdict too
            raise process_error(done)
        found = json.loads(done.stdout)
        return {"passed": found["passed"], "reason": found["verdict"], "result": found}

    def _time(self, task: Task, bundle: Path) -> dict[str, Any]:
        peer, dtype = task.system in PEERS, self.systems[task.system]
        job = {
            "system": PEERS[0] if peer else task.system,
            "compiled": task.system == "transformers-compiled",
            "bundle": str(bundle),
            "dtype": dtype,
            "tokens": task.tokens,
            "new_tokens": self.options.new_tokens,
            "repeat": 1,
            "warm_whole": True,
        }
        found = run_worker(job | self._common(), self._limit, **self._environment(task.system))
        row = make_row(task.system, dtype, task.tokens or 0, found, Manifest.read(bundle), dense=peer)
        return {"result": asdict(row) | {"warm_up": found["warm_up"]}}

    # The end

    def _report(self, rows: dict[Task, dict[str, Any]], left_out: list[Task]) -> None:
        not_run = self._not_run(left_out)
        if self.options.json:
            report = {
                "date": date.today().isoformat(),
                **asdict(self.machine),
                "versions": self.versions,
                "peaks": self.peaks,
                "rows": list(rows.values()),
                "not_run": not_run,
            }
            self.options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print("\n".join([*self._heading(), "", *self._table(rows), "", not_run]))

    @cached_property
    def versions(self) -> dict[str, str]:
        return versions(VERSIONS)

    def _heading(self) -> list[str]:
        machine = self.machine
        gpu = f"driver {machine.driver}, {machine.capability}, {machine.memory}; " if machine.driver else ""
        peaks = "peaks not measured: no torch that can"
        if self.peaks:
            flops = ", ".join(f"{value / 1e12:.3g} TFLOP/s {name}" for name, value in self.peaks["flops"].items())
            peaks = f"measured peaks: {flops}; {self.peaks['bandwidth'] / 1e9:.4g} GB/s"
        memory = (
            "peak in use on the card, sampled every 20 ms (CUDA's context with it; of transformers without what torch "
            "keeps unused)"
            if machine.driver
            else "peak anonymous resident memory of the process"
        )
        return [
            f"## {date.today().isoformat()}: {machine.name}, every backend",
            "",
            gpu + ", ".join(f"{name} {number}" for name, number in self.versions.items()) + ".",
            f"{peaks}. {self.options.new_tokens} tokens decoded behind each prompt. Memory: {memory}.",
        ]

    def _table(self, rows: dict[Task, dict[str, Any]]) -> list[str]:
        lines = [
            "| model | tokens | system | first token | of peak | tokens/s | of bandwidth | memory |",
            "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for task, record in rows.items():
            label = ("" if task.system in PEERS else "mesart ") + f"{task.system} {self.systems[task.system]}"
            tokens = "validation" if task.tokens is None else f"{task.tokens:,}"
            lines.append(f"| {' | '.join([task.model, tokens, label, *self._cells(task, record)])} |")
        return lines

    def _cells(self, task: Task, record: dict[str, Any]) -> list[str]:
        if record["status"] != "ok" or task.tokens is None:
            status = [] if record["status"] == "ok" else [record["status"]]
            text = ": ".join([*status, *filter(None, [record.get("reason")])])
            return [text[:200].replace("|", "/"), "", "", "", ""]
        row, flops, reads = record["result"], "n/a", "n/a"
        if self.peaks:
            flops = f"{row['flops'] / row['first_token'] / self.peaks['flops'][row['dtype']]:.0%}"
            reads = f"{row['bytes_per_token'] / row['per_token'] / self.peaks['bandwidth']:.0%}"
        rate, memory = f"{1 / row['per_token']:.1f}", f"{row['memory'] / 1e9:.2f} GB"
        return [f"{row['first_token']:.3g} s", flops, rate, reads, memory]

    def _not_run(self, left_out: list[Task]) -> str:
        """One line: systems that do not run here, and rows that the budget has left out, those of a model together."""
        parts = list(self.skipped)
        for name in self._models():
            lengths: dict[str, list[str]] = {}
            for task in left_out:
                if task.model == name:
                    what = "validation" if task.tokens is None else f"{task.tokens:,}"
                    lengths.setdefault(what, []).append(task.system)
            full = len(self.systems)
            texts = [
                what if len(systems) == full else f"{what} ({', '.join(systems)})" for what, systems in lengths.items()
            ]
            if texts:
                parts.append(f"{name} at {', '.join(texts)}: the budget of {self.options.budget:g} minutes was spent")
        return f"Not run: {'; '.join(parts) or 'nothing was left out'}."


def find_gpu() -> Machine:
    """The first GPU that the process sees, by nvidia-smi, which comes with every driver.

    Raises:
        MesaError: there is none.
    """
    missing = InputError("there is no GPU here (nvidia-smi shows none); --cpu tries the same on the CPU")
    if shutil.which("nvidia-smi") is None:
        raise missing
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    fields = "name,driver_version,compute_cap,memory.used,memory.total"
    command = ["nvidia-smi", "-i", visible, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode or not done.stdout.strip():
        raise missing
    name, driver, capability, used, total = [text.strip() for text in done.stdout.splitlines()[0].split(",")]
    return Machine(name, driver, "sm" + capability.replace(".", ""), f"{used} of {total} MiB in use before")


def _failure(error: MesaError, what: str = "") -> dict[str, Any]:
    return {"status": getattr(error, "death", "failed"), "reason": what + _phrase(error)}


def _phrase(error: MesaError) -> str:
    """The reason without the name of its class, if that is ours."""
    return re.sub(r"^(mesart: error|[\w.]*MesaError): ", "", str(error))


if __name__ == "__main__":
    sys.exit(main())

"""MesaRT beside what one would use instead: OpenVINO GenAI, llama.cpp and transformers, on one real model, in one run.

    python scripts/real_models.py
    mesart export .cache/real/smollm2 -o .cache/real/int4 --quantise int4
    python scripts/bench_peers.py --bundle .cache/real/int4:openvino --bundle .cache/real/int4:onnxruntime:int8

The peers are installed once, in an environment of their own (.cache/peers). Each measurement is a process of its own;
the systems take turns, round by round, so that a change in the machine's speed meets all of them. All get the ids of
the same text, a part of Python's standard library, behind a short one of another text that is not counted, and decode
greedily past any end of text. Nothing else should run meanwhile: threads that wait for each other lose most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from mesart.evaluation.corpus import library_text
from mesart.evaluation.machine import cpu_name
from mesart.evaluation.processes import ProcessError, process_error, run_process
from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.errors import InputError, MesaError
from mesart.runtime import backend_names
from mesart.runtime.text import Tokenizer
from mesart.scripts.options import filled, number, threads, whole
from mesart.scripts.real_models import REAL, ROOT

WORKER: Final = Path(__file__).with_name("peer_worker.py")

PACKAGES: Final = {
    "openvino-genai": ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"),
    "llama.cpp": ("xllamacpp==2026.10.11549",),
}
"""What runs each of the peers that have an environment of their own."""

PEERS: Final = (*PACKAGES, "transformers")

PRECISIONS: Final = {"float32": "f32", "bfloat16": "bf16"}
"""OpenVINO's names."""

FLAGS: Final = re.compile(r"avx|fma$|f16c$|amx_")
"""Of /proc/cpuinfo: what the engines choose their kernels by."""

BFLOAT16_FLAGS: Final = {"avx512_bf16", "amx_bf16"}

INTERVAL: Final = 0.02


@dataclass(frozen=True)
class System:
    """What is measured: a row at each length."""

    label: str
    kind: str
    """The worker's name of it."""
    model: Path
    python: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_peer(self) -> bool:
        return self.kind != "mesart"


@dataclass(frozen=True)
class Bundle:
    """`PATH[:BACKEND[:int8]]`"""

    folder: Path
    backend: str = "auto"
    activations: str | None = None

    @classmethod
    def parse(cls, text: str) -> Bundle:
        path, activations = (text.removesuffix(":int8"), "int8") if text.endswith(":int8") else (text, None)
        folder, _, backend = path.rpartition(":")
        if backend not in ("auto", *backend_names()):
            folder, backend = path, "auto"  # a path may hold a colon
        if not folder:
            raise argparse.ArgumentTypeError("it names no folder")
        return cls(Path(folder), backend, activations)

    def system(self) -> System:
        manifest = Manifest.read(self.folder)
        settings = {"backend": self.backend} | ({"activations": self.activations} if self.activations else {})
        parts = [self.backend, manifest.dtype]
        if manifest.quantisation is not None:
            parts.append(f"weights in {manifest.quantisation.bits} bits")
        if self.activations:
            parts.append("activations in 8 bits")
        label = f"mesart {self.folder.name} ({', '.join(parts)})"
        return System(label, "mesart", self.folder, Path(sys.executable), settings)


class Memory:
    """Samples what a process takes, from outside: an engine may keep Python from running.

    Attributes:
        anonymous: the most of ``RssAnon``, bytes: pages of mapped files are not in it.
        resident: ``VmHWM``, bytes: they are.
    """

    def __init__(self, interval: float = INTERVAL) -> None:
        self.anonymous = self.resident = 0
        self._interval, self._done = interval, threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, pid: int) -> None:
        if not Path("/proc/self/status").is_file():
            raise InputError("peak memory is read from /proc, which this system lacks; run the benchmark on Linux")
        self._thread = threading.Thread(target=self._sample, args=(Path(f"/proc/{pid}/status"),), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def read(self, status: str) -> None:
        """Takes note of the text of a ``/proc/PID/status``; that of a process that has ended has no such lines."""
        for name, kib in re.findall(r"^(RssAnon|VmHWM):\s+(\d+) kB", status, re.MULTILINE):
            attribute = "anonymous" if name == "RssAnon" else "resident"
            setattr(self, attribute, max(getattr(self, attribute), int(kib) * 1024))

    def _sample(self, path: Path) -> None:
        while not self._done.is_set():
            try:
                self.read(path.read_text(encoding="utf-8"))
            except OSError:
                return  # it has ended
            self._done.wait(self._interval)


@dataclass
class Row:
    """A system at one prompt length: a measurement a round, or why there is none."""

    system: System
    tokens: int
    measured: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""

    def median(self, key: str) -> float:
        return float(statistics.median(found[key] for found in self.measured))

    def as_json(self) -> dict[str, Any]:
        medians = {key: self.median(key) for key in MEDIANS} if self.measured else None
        system = {"label": self.system.label, "kind": self.system.kind, "settings": self.system.settings}
        row = {"tokens": self.tokens, "failure": self.failure or None, "medians": medians}
        return {**system, **row, "rounds": self.measured}


MEDIANS: Final = ("first_token", "per_token", "memory", "resident", "load")

COMPARED: Final[dict[str, Callable[[float], str]]] = {
    "first_token": lambda seconds: f"{seconds:.3g} s",
    "per_token": lambda seconds: f"{seconds * 1e3:.3g} ms",
    "memory": lambda size: f"{size / 1e6:,.0f} MB",
}
"""The columns that have a ratio."""


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table. Ratios: medians over the least median of a peer at that length; below 1 is better than all."""
    lines = [
        "| prompt | system | first token | / best | a token | / best | memory | / best | with files | load |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [f"{row.tokens:,}", row.system.label]
        if row.failure:
            cells += [row.failure[:200].replace("|", "/"), *[""] * 7]
        else:
            for key, show in COMPARED.items():
                best = best_peer(rows, row.tokens, key)
                cells += [show(row.median(key)), "" if best is None else f"{row.median(key) / best:.2f}"]
            cells += [COMPARED["memory"](row.median("resident")), f"{row.median('load'):.1f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def best_peer(rows: Sequence[Row], tokens: int, key: str) -> float | None:
    peers = [row for row in rows if row.tokens == tokens and row.system.is_peer and row.measured and not row.failure]
    return min((row.median(key) for row in peers), default=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done, whatever failed is a row; 2: an error of the user's input, in one line."""
    try:
        return run(_parser().parse_args(arguments))
    except (MesaError, OSError) as error:
        print(f"bench_peers: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = "a bundle, and what runs it (default: auto); with :int8 behind it, activations are rounded to 8 bits"
    add("--bundle", type=Bundle.parse, action="append", default=[], metavar="PATH[:BACKEND[:int8]]", help=what)
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), metavar="NAME", help=f"default: {' '.join(PEERS)}")
    add(
        "--gguf", type=Path, default=REAL / "smollm2.gguf", metavar="FILE", help="what OpenVINO GenAI and llama.cpp run"
    )
    what = "what transformers runs, and whose tokenizer counts"
    add("--checkpoint", type=Path, default=REAL / "smollm2", metavar="FOLDER", help=what)
    add("--lengths", type=whole(), nargs="+", default=[1024, 4096], metavar="TOKENS", help="of prompts")
    add("--new-tokens", type=whole(), default=32, help="tokens decoded behind the first")
    add("--warm-up", type=whole(0), default=256, metavar="TOKENS", help="of the prompt that is not counted; 0: none")
    add("--rounds", type=whole(), default=3, help="measurements of each; the median counts")
    add("--threads", type=threads, default=len(os.sched_getaffinity(0)), help="of every system (default: all cores)")
    what = "what peers compute in that let one choose; auto: as they do by themselves; a bundle has its own"
    add("--precision", choices=("auto", *PRECISIONS), default="auto", help=what)
    what = "of transformers; default: --precision, and for auto what the processor has instructions for"
    add("--dtype", choices=tuple(PRECISIONS), help=what)
    add("--limit", type=number(above=0), default=10, metavar="MINUTES", help="of one process (default: 10)")
    add("--peers-env", type=Path, default=ROOT / ".cache" / "peers", metavar="FOLDER", help="the peers' environment")
    add("--json", type=filled, metavar="FILE", help="also write everything as JSON")
    return parser


def run(options: argparse.Namespace) -> int:
    systems, broken = _systems(options)
    prompts = Prompts.read(options.checkpoint, max(options.lengths), options.warm_up)
    rows = [
        Row(system, tokens, failure=broken.get(system.kind, "")) for tokens in options.lengths for system in systems
    ]
    for tokens in options.lengths:
        for turn in range(options.rounds):
            for row in rows:
                if row.tokens == tokens and not row.failure:
                    _say(f"{tokens:,} tokens, round {turn + 1} of {options.rounds}: {row.system.label}")
                    _add_measurement(row, prompts, options)
    report = _report(rows, options)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join([*_heading(report), "", *table(rows), "", *_notes(rows, options)]))
    return 0


def _systems(options: argparse.Namespace) -> tuple[list[System], dict[str, str]]:
    """What is measured, and what cannot be, with the reason, by the worker's name."""
    systems = [bundle.system() for bundle in options.bundle]
    peers = [name for name in PEERS if name in options.peers]
    for name in peers:
        model = options.gguf if name in PACKAGES else options.checkpoint
        if not model.exists():
            raise InputError(f"{model} is not there; scripts/real_models.py makes it, or name another one")
        python, label, settings = options.peers_env / "bin" / "python", name, {}
        if name == "openvino-genai" and options.precision != "auto":
            settings = {"INFERENCE_PRECISION_HINT": PRECISIONS[options.precision]}
        elif name == "transformers":
            dtype = options.dtype or _natural_dtype(options.precision)
            python, label, settings = Path(sys.executable), f"{name} ({dtype})", {"dtype": dtype}
        systems.append(System(label, name, model, python, settings))
    if not systems:
        raise InputError("nothing to measure: give --bundle or --peers")
    broken = {}
    installed = [name for name in peers if name in PACKAGES]
    if installed:
        try:
            prepare(options.peers_env)
        except MesaError as error:
            broken = dict.fromkeys(installed, f"failed: {error}")
    return systems, broken


def _natural_dtype(precision: str) -> str:
    if precision != "auto":
        return precision
    return "bfloat16" if BFLOAT16_FLAGS.intersection(cpu_flags()) else "float32"


def prepare(folder: Path, install: Callable[[list[str]], object] | None = None) -> None:
    """Makes the peers' environment, anew if it is not whole or holds other versions.

    Raises:
        MesaError: it cannot be made.
    """
    packages = [package for group in PACKAGES.values() for package in group]
    done, text = folder / "installed.txt", "\n".join(packages) + "\n"
    if done.is_file() and done.read_text(encoding="utf-8") == text:
        return
    _say(f"installing {', '.join(packages)} into {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *packages],
    ):
        (install or _run)(command)
    done.write_text(text, encoding="utf-8")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "Error"))]
        reason = next(iter([*errors, *done.stderr.strip().splitlines()[-1:]]), f"exit status {done.returncode}")
        raise InputError(f"the peers' environment cannot be made: {reason}")


@dataclass(frozen=True)
class Prompts:
    """Ids of a text that is on every machine, and of another part of it."""

    longest: list[int]
    warm_up: list[int]

    @classmethod
    def read(cls, checkpoint: Path, tokens: int, warm_up: int) -> Prompts:
        text, tokenizer = library_text("held_out"), Tokenizer(checkpoint)
        needed = tokens + warm_up
        letters = min(4 * needed, len(text))
        ids: list[int] = []
        while len(ids) < needed and letters < 2 * len(text):
            letters *= 2
            ids = tokenizer.encode(text[:letters], add_special_tokens=False)
        if len(ids) < needed:
            raise InputError(f"the text has {len(ids):,} tokens, fewer than {needed:,}; give shorter --lengths")
        return cls(ids[:tokens], ids[tokens:needed])


def _add_measurement(row: Row, prompts: Prompts, options: argparse.Namespace) -> None:
    """One more of a row; what fails is not tried again."""
    job = {
        "system": row.system.kind,
        "model": str(row.system.model.resolve()),
        "threads": options.threads,
        "new_tokens": options.new_tokens,
        "prompt": prompts.longest[: row.tokens],
        "warm_up": prompts.warm_up,
        "settings": row.system.settings,
    }
    try:
        found = measure(row.system.python, job, 60 * options.limit)
    except ProcessError as error:
        row.failure = f"{error.death}: {error}"
        _say(f"  {row.failure}")
        return
    row.measured.append(found)
    _say("  " + ", ".join(show(found[key]) for key, show in COMPARED.items()))


def measure(python: Path, job: dict[str, Any], limit: float) -> dict[str, Any]:
    """One measurement, with the memory that its process took.

    Raises:
        ProcessError: it gave none.
    """
    memory = Memory()
    with TemporaryDirectory() as folder:
        path = Path(folder, "job.json")
        path.write_text(json.dumps(job), encoding="utf-8")
        command, environment = [str(python), str(WORKER), str(path)], {"HF_HUB_OFFLINE": "1"}
        environment["OMP_NUM_THREADS"] = str(job["threads"])
        try:
            done = run_process(command, limit, memory.watch, **environment)
        finally:
            memory.stop()
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # engines may print too
    if done.returncode:
        raise process_error(done)
    if not lines:
        raise ProcessError("failed", "ended without a result")
    found: dict[str, Any] = json.loads(lines[-1])
    return found | {"memory": memory.anonymous, "resident": memory.resident}


def cpu_flags() -> list[str]:
    """Of the first processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    words = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return [word for word in words if FLAGS.match(word)]


def _report(rows: Sequence[Row], options: argparse.Namespace) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for row in rows:
        for found in row.measured:
            # MesaRT and OpenVINO GenAI may run different versions of OpenVINO.
            peer = "peers' " if row.system.kind in PACKAGES else ""
            versions |= {peer + name: value for name, value in found["versions"].items()}
    machine = {"cpu": cpu_name(), "flags": cpu_flags(), "cores": len(os.sched_getaffinity(0))}
    machine["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    keys = ("lengths", "new_tokens", "warm_up", "rounds", "threads", "precision")
    settings = {key: getattr(options, key) for key in keys}
    made = {"date": date.today().isoformat(), "machine": machine, "versions": versions, "settings": settings}
    return {**made, "rows": [row.as_json() for row in rows]}


def _heading(report: dict[str, Any]) -> list[str]:
    machine, settings = report["machine"], report["settings"]
    return [
        f"## {report['date']}: {machine['cpu']}, {settings['threads']} threads",
        "",
        f"{machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB; {' '.join(machine['flags'])}. "
        + ", ".join(f"{name} {value}" for name, value in report["versions"].items())
        + ".",
    ]


def _notes(rows: Sequence[Row], options: argparse.Namespace) -> list[str]:
    lines = [
        f"Medians of {options.rounds}; / best: over the best peer, below 1 is better. A token: mean of "
        f"{options.new_tokens} behind the first. Memory: peak anonymous resident memory of the process (RssAnon, "
        f"sampled every {1e3 * INTERVAL:.0f} ms), loading among it; with files: the peak of all that is resident "
        "(VmHWM), pages of mapped files too.",
        "",
    ]
    told: dict[str, str] = {}
    for row in rows:
        for found in row.measured:
            notes = [found["numbers"], *(f"{name} {value}".strip(" |") for name, value in found["notes"].items())]
            told[row.system.label] = "; ".join(notes)
    return lines + [f"- {label}: {text}" for label, text in told.items()]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

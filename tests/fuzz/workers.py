"""Cases in processes of their own: forked from one that has imported everything, watched, and their folders compared.

A case runs in a private folder::

    work/     its current folder; what the target makes is here
    victim/   files that hostile names would hit, by relative and by absolute paths
    home/     HOME
    tmp/      TMPDIR

Whatever changes there, apart from what the target says may change, is a fault; so is a Python exception other than
``MesaError``, a message that is no line for people, more than ``LIMIT`` seconds, and the death of the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import re
import resource
import selectors
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

import mesart.graphs.errors
from mesart.graphs.errors import MesaError

LIMIT = 10.0
"""Seconds of computing that a case may take; a waiting process gets as long by the clock."""
PATIENCE = 30
"""By the clock, a computing process gets this many times the limit: the machine may be busy."""
MEMORY = 4 << 30
"""Address space of a case, bytes, beyond what all cases share."""
FILE_SIZE = 1 << 30
"""The largest file that a case may write, bytes."""
PRODUCT = Path(mesart.graphs.errors.__file__).resolve().parents[1]

REFUSED, SAME, OTHER, FAULT, BROKEN = "refused", "same", "other", "FAULT", "BROKEN HARNESS"
VERDICTS = (REFUSED, SAME, OTHER, FAULT, BROKEN)

Files = dict[str, tuple[int, int, int, str]]


class Fault(Exception):
    """What a case found that may not be. ``place`` groups faults of one cause."""

    def __init__(self, kind: str, place: str, detail: str = "") -> None:
        super().__init__(kind, place, detail)
        self.kind, self.place, self.detail = kind, place, detail


@dataclass(frozen=True)
class Outcome:
    """Of one case."""

    index: int
    verdict: str
    kind: str = ""
    place: str = ""
    detail: str = ""
    said: str = ""
    """What was changed."""
    seconds: float = 0.0
    """Of computing."""

    def __str__(self) -> str:
        what = f"{self.kind} at {self.place}" if self.place else self.kind
        return f"{self.index}: {self.verdict} {what}: {self.detail[:200]!a} after {self.said[:200]}"


class Case:
    """What a target gets: its folders, its random numbers, and ways to say how far it is."""

    def __init__(
        self, folder: Path, rng: Random, send: Callable[[Mapping[str, Any]], None], writes: Sequence[str], limit: float
    ) -> None:
        self.folder, self.rng, self._send = folder, rng, send
        self.work, self.victim = folder / "work", folder / "victim"
        self.refusals: list[str] = []
        self.must_refuse = ""
        """Why this case has to be refused; empty if it need not be."""
        self.may_write, self.limit = tuple(writes), limit

    def said(self, changes: Iterable[str]) -> None:
        """What was changed; everything before this belongs to the harness, everything behind it is the product's."""
        self._send({"said": "; ".join(changes), "files": snapshot(self.folder)})
        self._send({"may_write": self.may_write, "limit": self.limit})

    def stage(self, name: str) -> None:
        """What is done next: where a process died that cannot say it itself."""
        self._send({"stage": name})

    def refused(self, error: MesaError) -> None:
        """Notes a refusal, and looks at its words."""
        check_message(str(error), place_of(error))
        self.refusals.append(str(error))

    def attempt(self, stage: str, do: Callable[[], Any]) -> Any:
        """The result, or ``None`` if the product refuses; whatever else is raised is a fault."""
        self.stage(stage)
        try:
            return do()
        except MesaError as error:
            self.refused(error)
            return None


class Target(Protocol):
    """A kind of cases."""

    name: str
    writes: Sequence[str]
    """What a case may write, relative to its folder."""
    limit: float
    """Seconds of computing."""

    def prepare(self) -> None:
        """Once, before all cases, in the process that they are forked from: no threads may be left."""
        ...

    def run(self, case: Case) -> str:
        """Changes something, says what (:meth:`Case.said`), uses it, and returns the verdict."""
        ...


def run_cases(target: Target, seed: int, indices: Iterable[int], jobs: int) -> Iterator[Outcome]:
    """Outcomes of cases as they finish; each depends on ``(seed, index)`` alone."""
    waiting, running = iter(indices), dict[int, _Child]()
    with selectors.DefaultSelector() as selector, tempfile.TemporaryDirectory(prefix="fuzz-") as base:
        exhausted = False
        while running or not exhausted:
            while not exhausted and len(running) < jobs:
                index = next(waiting, None)
                if index is None:
                    exhausted = True
                    break
                child = _Child(target, seed, index, Path(base))
                running[child.pid] = child
                selector.register(child.pipe, selectors.EVENT_READ, child)
            for key, _ in selector.select(0.1):
                key.data.read()
            for pid, child in list(running.items()):
                child.watch()
                if child.finished:
                    selector.unregister(child.pipe)
                    del running[pid]
                    yield child.outcome()


class _Child:
    """A forked process and what it has said so far."""

    def __init__(self, target: Target, seed: int, index: int, base: Path) -> None:
        self.target, self.index = target, index
        self.folder = Path(tempfile.mkdtemp(prefix=f"{index}-", dir=base))
        self.output = Path(tempfile.mkdtemp(prefix=f"{index}-output-", dir=base))
        self.pipe, to_parent = os.pipe()
        self.heard: dict[str, Any] = {"limit": target.limit, "may_write": target.writes}
        self.finished, self.hung, self.status, self.seconds = False, False, 0, 0.0
        self._text = b""
        self._start = self._looked = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _child(target, f"{target.name}:{seed}:{index}", self.folder, self.output, to_parent)
        os.close(to_parent)
        os.set_blocking(self.pipe, False)

    def read(self) -> None:
        while True:
            try:
                block = os.read(self.pipe, 1 << 16)
            except BlockingIOError:
                break
            if not block:
                break
            self._text += block
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            self.heard.update(json.loads(line))

    @property
    def limit(self) -> float:
        return float(self.heard["limit"])

    def watch(self) -> None:
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid:
            self.read()
            self.finished, self.status = True, status
            self.seconds = usage.ru_utime + usage.ru_stime
            self._kill()  # what the case has left running
            os.close(self.pipe)
            return
        now = time.monotonic()
        if self.hung or now - self._start < self.limit or now - self._looked < 1:
            return
        self._looked = now
        family = _family(self.pid).values()
        computed, is_running = sum(seconds for seconds, _ in family), any(runs for _, runs in family)
        patience = PATIENCE if is_running or computed > (now - self._start) / 10 else 1
        if computed > self.limit or now - self._start > patience * self.limit:
            self.hung = True
            os.kill(self.pid, signal.SIGUSR2)  # faulthandler writes where it is, even in compiled code
            time.sleep(0.3)
            for pid in _family(self.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def outcome(self) -> Outcome:
        """The verdict, with what only this side can see."""
        said = self.heard.get("said", "")
        fault: dict[str, str] = self.heard.get("fault") or {}
        verdict = FAULT if fault else self.heard.get("verdict", FAULT)
        if self.hung or self.seconds > self.limit:
            verdict, fault = FAULT, {"kind": "hang", "place": self._where(), "detail": f"{self.seconds:.0f} s"}
        elif "verdict" not in self.heard and not fault:
            end = os.waitstatus_to_exitcode(self.status)
            fault = {"kind": f"died ({end})", "place": self._where(), "detail": self._tail()}
        if "files" in self.heard:  # a file that may not have changed is worse than all else
            before = {name: tuple(entry) for name, entry in self.heard["files"].items()}
            changed = [
                name for name in differences(before, snapshot(self.folder)) if not self._may_write(name, bool(fault))
            ]
            if changed:
                verdict = FAULT
                fault = {"kind": "wrote outside", "place": self._names(changed), "detail": ", ".join(changed[:5])}
        elif verdict != SAME:
            verdict = BROKEN
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.output, ignore_errors=True)
        kind, place, detail = (fault.get(name, "") for name in ("kind", "place", "detail"))
        return Outcome(self.index, verdict, kind, place, detail, said, self.seconds)

    def _may_write(self, name: str, failed: bool) -> bool:
        allowed = (*self.heard["may_write"], *(("tmp", "work/.") if failed else ()))  # what a dead process has left
        return any(name == free or name.startswith(free if free.endswith(".") else free + "/") for free in allowed)

    @staticmethod
    def _names(changed: Sequence[str]) -> str:
        return "/".join(changed[0].split("/")[:2])

    def _where(self) -> str:
        """The product's innermost line in what faulthandler wrote; else the stage."""
        try:
            text = (self.output / "stderr").read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        dump = text[text.rfind("most recent call first") :]
        for file, line in re.findall(r'File "([^"]+)", line (\d+)', dump):
            if (place := product_place(file, int(line))) is not None:
                return place
        return f"stage {self.heard.get('stage', 'start')}"

    def _tail(self) -> str:
        text = (self.output / "stderr").read_text(encoding="utf-8", errors="replace").strip()
        return text[-300:]


def _child(target: Target, key: str, folder: Path, output: Path, pipe: int) -> None:
    """The forked process; never returns."""

    def send(message: Mapping[str, Any]) -> None:
        os.write(pipe, (json.dumps(message) + "\n").encode())

    code = 3
    try:
        os.setpgid(0, 0)
        for name in ("work", "victim", "home", "tmp"):
            (folder / name).mkdir()
        os.chdir(folder / "work")
        os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
        os.environ |= {"XDG_CACHE_HOME": str(folder / "home" / "cache"), "HF_HUB_OFFLINE": "1"}
        # Folders of their own, of libraries that evaluations and traces use: no case of ours.
        os.environ |= {"MPLCONFIGDIR": str(output / "plots"), "TORCHINDUCTOR_CACHE_DIR": str(output / "inductor")}
        tempfile.tempdir = None
        _redirect(output)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for what, most in (
            (resource.RLIMIT_AS, mapped + MEMORY),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, FILE_SIZE),
        ):
            resource.setrlimit(what, (most, most))
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR2)
        case = Case(folder, Random(key), send, target.writes, target.limit)
        try:
            verdict = target.run(case)
            if case.must_refuse and not case.refusals:
                raise Fault("accepted", case.must_refuse)
            send({"verdict": verdict})
        except Fault as fault:
            send({"fault": {"kind": fault.kind, "place": fault.place, "detail": fault.detail}})
        except BaseException as error:  # noqa: BLE001  (that anything may come is what is looked for)
            detail = "".join(traceback.format_exception_only(error)).strip()
            send({"fault": {"kind": type(error).__name__, "place": place_of(error), "detail": detail[:300]}})
            traceback.print_exc()
        code = 0
    finally:
        os._exit(code)


def _redirect(output: Path) -> None:
    """Standard streams into files; nothing to read."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (open as long as the process is)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def make_in_fork(make: Callable[[], object]) -> None:
    """Calls ``make`` in a process of its own, whose threads end with it."""
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            make()
            code = 0
        except BaseException:  # noqa: BLE001  (shown; the process ends in any case)
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError("what the cases begin from cannot be made")


def _family(leader: int) -> dict[int, tuple[float, bool]]:
    """A process and all that come from it, in whatever session: seconds computed, and whether it computes now."""
    parents: dict[int, int] = {}
    states: dict[int, tuple[float, bool]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        parents[int(entry.name)] = int(fields[1])
        ticks = int(fields[11]) + int(fields[12])
        states[int(entry.name)] = ticks / os.sysconf("SC_CLK_TCK"), fields[0] in "RD"
    family = {leader}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return {pid: states[pid] for pid in family if pid in states}


def snapshot(folder: Path) -> Files:
    """Kind, size, time and link target of everything in a folder. Nothing is opened: a pipe would wait."""
    found: Files = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            info = os.lstat(path)
            is_folder = stat.S_ISDIR(info.st_mode)  # its time changes with each file that comes and goes
            target = os.readlink(path) if stat.S_ISLNK(info.st_mode) else ""
            size, time_ns = (0, 0) if is_folder else (info.st_size, info.st_mtime_ns)
            found[os.path.relpath(path, folder)] = (info.st_mode, size, time_ns, target)
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def product_place(file: str, line: int) -> str | None:
    """``runtime/text.py:127`` for a line of the product; ``None`` for another."""
    if not os.path.isabs(file):
        return None  # such as <template>
    path = Path(os.path.realpath(file))
    return f"{path.relative_to(PRODUCT)}:{line}" if path.is_relative_to(PRODUCT) and "tests" not in path.parts else None


def place_of(error: BaseException) -> str:
    """The product's innermost line in a traceback."""
    frames = [product_place(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
    places = [place for place in frames if place is not None]
    if places:
        return places[-1]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def check_message(message: str, place: str) -> None:
    """A refusal is one line that a terminal can show.

    Raises:
        Fault: it is not.
    """
    if "\n" in message or not message.strip():
        raise Fault("message of several lines or none", place, message[:200])
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in message):
        raise Fault("message with control characters", place, message[:200])
    if len(message) > 3000:
        raise Fault("message without end", place, message[:200])


@dataclass
class Summary:
    """Of many cases."""

    target: str
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    """By the clock."""

    @property
    def faults(self) -> list[Outcome]:
        return sorted((o for o in self.outcomes if o.verdict in (FAULT, BROKEN)), key=lambda outcome: outcome.index)

    def table(self) -> str:
        """Cases by verdict; faults by kind and place, with the indices to repeat them."""
        counts = {verdict: sum(o.verdict == verdict for o in self.outcomes) for verdict in VERDICTS}
        rate = len(self.outcomes) / max(self.seconds, 1e-9)
        lines = [
            f"{self.target}: {len(self.outcomes)} cases in {self.seconds:.0f} s ({rate:.1f} a second): "
            + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
        ]
        groups: dict[tuple[str, str, str], list[Outcome]] = {}
        for outcome in self.faults:
            groups.setdefault((outcome.verdict, outcome.kind, outcome.place), []).append(outcome)
        for (verdict, kind, place), found in sorted(groups.items(), key=lambda item: -len(item[1])):
            indices = " ".join(str(outcome.index) for outcome in found[:8])
            lines.append(
                f"  {len(found):5d}  {verdict} {kind} at {place}  [{indices}{' ...' if len(found) > 8 else ''}]"
            )
            lines.append(f"         {found[0].detail[:150]!a} after {found[0].said[:150]!a}")
        return "\n".join(lines)

    def to_json(self) -> str:
        cases = [vars(outcome) for outcome in self.outcomes]
        return json.dumps({"target": self.target, "seconds": self.seconds, "cases": cases})


def campaign(
    target: Target, seed: int, indices: Iterable[int], jobs: int, *, every: float = 60.0, verbose: bool = False
) -> Summary:
    """Runs cases and tells how far it is."""
    summary = Summary(target.name)
    start = told = time.monotonic()
    gc.freeze()  # a collection in a child would copy the pages of all that is shared
    for outcome in run_cases(target, seed, indices, jobs):
        summary.outcomes.append(outcome)
        if verbose:
            print(outcome, flush=True)
        if time.monotonic() - told > every:
            told = time.monotonic()
            print(
                f"{target.name}: {len(summary.outcomes)} cases, {len(summary.faults)} faults",
                file=sys.stderr,
                flush=True,
            )
    summary.seconds = time.monotonic() - start
    return summary

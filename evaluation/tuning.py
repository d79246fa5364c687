"""Which configuration suits a model: a search on a budget, and a sweep that shows what each parameter does.

A configuration is judged on two things: how many passkeys it finds, and the loss of the same held-out tokens behind
long texts. All configurations get the same prompts and the same places, so they are compared place by place.

A bundle's symbolic graph takes cuts, positions and scales as data, so one bundle runs every configuration of its
trained length without another export, several times faster than PyTorch runs the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from mesart.evaluation.arguments import require_lengths, require_number, require_seed, require_whole
from mesart.evaluation.held_out import Text, held_out_text
from mesart.evaluation.journal import Journal, Key
from mesart.evaluation.passkey_eval import PromptMaker, ask
from mesart.evaluation.perplexity import places_in
from mesart.evaluation.progress import progress_bar
from mesart.evaluation.provenance import fingerprint, versions
from mesart.evaluation.report import Z95, table, times, wilson_interval
from mesart.evaluation.result import Result, subject_record
from mesart.evaluation.systems import CheckpointModel, MesaBundle, MesaReference, OpenSystems, Source, Subject, System
from mesart.graphs.config import MesaConfig
from mesart.graphs.errors import InputError, MesaError
from mesart.graphs.manifest import MANIFEST_FILE, Manifest, sha256
from mesart.graphs.plan import Plan, buckets_up_to
from mesart.runtime.load import load_runner, read_texts
from mesart.runtime.model import MesaModel
from mesart.runtime.text import Tokenizer
from mesart.runtime.text_files import TEXT_FILES

PARAMETERS: Final = ("log_n", "linear_window", "head_length", "chunk_length", "rho", "stair_width")
"""What may be varied, in the order of the search: what decides most comes first."""

_MULTIPLES: Final = (1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2)
_RHOS: Final = (0.25, 0.375, 0.5, 0.625, 0.75)
_SEARCH_SHARE: Final = 0.6
"""Of the seconds: what is left is for the finalists."""


@dataclass(frozen=True)
class Task:
    """What every configuration is asked; part of what a journal's results are kept under."""

    lengths: tuple[int, ...]
    prompts: int
    """Of each length."""
    places: int
    """In the held-out text, of each length."""
    scored: int
    """Tokens of each place."""
    digits: int = 5


@dataclass(frozen=True)
class Measured:
    """One configuration at one length."""

    length: int
    correct: int
    prompts: int
    losses: tuple[float, ...]
    """Mean negative log-probability at each place, in nats a token."""
    seconds: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the rate."""
        return wilson_interval(self.correct, self.prompts)

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.losses))


@dataclass(frozen=True)
class Tried:
    """One configuration at all lengths."""

    config: MesaConfig
    stage: str
    """``search`` or ``final``; only results of one stage are comparable."""
    measured: tuple[Measured, ...]

    @property
    def correct(self) -> int:
        return sum(m.correct for m in self.measured)

    @property
    def prompts(self) -> int:
        return sum(m.prompts for m in self.measured)

    @property
    def rate(self) -> float:
        return self.correct / self.prompts

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the rate."""
        return wilson_interval(self.correct, self.prompts)

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(loss for m in self.measured for loss in m.losses)

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.losses))

    @property
    def scores(self) -> int:
        """Attention scores that a prompt of the longest length takes, a head and layer: what it costs."""
        return attention_scores(self.config, self.measured[-1].length)


def attention_scores(config: MesaConfig, tokens: int) -> int:
    """Scores that the prefill of ``tokens`` tokens computes for each head and layer."""
    plan = Plan.of(config, tokens)
    seen = [(plan.head, 0), *((chunk, config.head_length) for chunk in plan.chunks), (plan.tail, plan.tail.start)]
    return sum(len(span) * before + len(span) * (len(span) + 1) // 2 for span, before in seen if span is not None)


def perplexity_ratio(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """A perplexity over another of the same tokens, and its 95% interval from the spread over the places."""
    changes = [loss - before for loss, before in zip(losses, base, strict=True)]
    mean = statistics.fmean(changes)
    half = Z95 * statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


@dataclass(frozen=True)
class TuneResult(Result):
    """What :func:`tune` found."""

    subject: Subject
    """Its ``config`` is where the search started."""
    seed: int
    task: Task
    text: Text
    recommended: MesaConfig
    tried: tuple[Tried, ...]
    skipped: tuple[tuple[MesaConfig | None, str], ...]
    """Combinations that cannot be, and why; ``None`` where not even the configuration can be made."""
    complete: bool
    """False if the budget or an interrupt ended the run before the finalists were all judged."""
    seconds: float

    def table(self) -> str:
        """All that was tried, the finalists first."""
        start = {tried.stage: tried for tried in reversed(self.tried) if tried.config == self.subject.config}
        rows = []
        for stage in ("final", "search"):
            for tried in _by_quality([tried for tried in self.tried if tried.stage == stage]):
                base = start.get(stage)
                ratio = perplexity_ratio(tried.losses, base.losses) if base else None
                rows.append(
                    [
                        stage,
                        *_numbers(tried.config),
                        f"{tried.correct}/{tried.prompts}",
                        _span(*tried.interval),
                        f"{tried.perplexity:.2f}",
                        f"x{ratio[0]:.3f} ({_span(*ratio[1:], digits=3)})" if ratio else "",
                        f"x{tried.scores / base.scores:.2f}" if base else "",
                        "recommended" if tried.config == self.recommended else "start" if tried is base else "",
                    ]
                )
        header = ["stage", *_COLUMNS, "found", "95%", "perplexity", "to the start (95%)", "scores", ""]
        lengths = ", ".join(f"{n:,} ({times(n, self.subject.config.train_length)})" for n in self.task.lengths)
        title = f"Passkeys and perplexity at {lengths} tokens; seed {self.seed}, {self.subject.source}"
        note = "" if self.complete else "\n\nNot complete: the budget or an interrupt ended it."
        changed = _changes(self.subject.config, self.recommended)
        advice = f"Recommended: {changed}" if changed else "Recommended: what it started from"
        return f"{title}\n\n{table(header, rows)}\n\n{advice}{note}"

    def record(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "task_settings": dataclasses.asdict(self.task),
            "text": self.text.record(),
            "recommended": self.recommended.to_dict(),
            "seconds": round(self.seconds, 1),
            "tried": [{**dataclasses.asdict(t), "interval95": t.interval, "scores": t.scores} for t in self.tried],
            "skipped": [{"config": config and config.to_dict(), "reason": reason} for config, reason in self.skipped],
        }
        return subject_record("tune", self.subject, self.seed, self.complete, fields)


@dataclass(frozen=True)
class SensitivityRow:
    """One parameter changed, all others left: one length."""

    parameter: str
    """``default``: nothing is changed."""
    value: Any
    length: int
    measured: Measured | None
    ratio: tuple[float, float, float] | None
    """Perplexity over that of the default for the same tokens, and its 95% interval."""
    refused: str | None = None
    """Why it cannot be."""


@dataclass(frozen=True)
class SensitivityResult(Result):
    """What :func:`sensitivity` found."""

    subject: Subject
    seed: int
    task: Task
    text: Text
    rows: tuple[SensitivityRow, ...]
    complete: bool
    seconds: float

    def table(self) -> str:
        """A row for each parameter, value and length that could be."""
        rows = [
            [
                row.parameter,
                _value(row.value),
                f"{row.length:,}",
                f"{row.measured.correct}/{row.measured.prompts}",
                _span(*row.measured.interval),
                f"{row.measured.perplexity:.2f}",
                f"x{row.ratio[0]:.3f} ({_span(*row.ratio[1:], digits=3)})" if row.ratio else "",
            ]
            for row in self.rows
            if row.measured is not None
        ]
        header = ["parameter", "value", "tokens", "found", "95%", "perplexity", "to the default (95%)"]
        title = f"One parameter changed at a time; seed {self.seed}, {self.subject.source}"
        refused = sorted({f"{row.parameter}={_value(row.value)}" for row in self.rows if row.refused is not None})
        note = f"\n\nCannot be, at some length: {', '.join(refused)}" if refused else ""
        note += "" if self.complete else "\n\nInterrupted: what was finished by then."
        return f"{title}\n\n{table(header, rows)}{note}"

    def record(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "task_settings": dataclasses.asdict(self.task),
            "text": self.text.record(),
            "seconds": round(self.seconds, 1),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        return subject_record("sensitivity", self.subject, self.seed, self.complete, fields)


def tune(
    source: Source,
    *,
    start: MesaConfig | None = None,
    lengths: Sequence[int] | None = None,
    prompts: int = 8,
    places: int = 12,
    final_prompts: int = 40,
    final_places: int = 48,
    finalists: int = 3,
    evaluations: int = 40,
    seconds: float | None = None,
    parameters: Sequence[str] = PARAMETERS[:-1],
    seed: int = 0,
    backend: str = "auto",
    text: str | os.PathLike[str] | None = None,
    journal: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> TuneResult:
    """Searches a configuration for a model: coordinate descent, then the best few again on more prompts.

    From the start, each parameter in turn is set to each value of a small grid while the others stay, and keeps the
    best; again from the first parameter until nothing changes. The *finalists*, the best of all and the start, are then
    judged on more prompts and places. What is recommended is, among the finalists whose rate of passkeys may be the
    best (the 95% interval reaches it), the one with the lowest perplexity, or a cheaper one whose perplexity may be as
    low (95% interval, place by place); the start, if it is one of these and none of them is cheaper. A search picks up
    chance too: trust the ``final`` rows, not the ``search`` rows.

    Args:
        source: a bundle, which runs every configuration of its trained length; or a checkpoint's folder or hub id,
            which PyTorch runs, several times slower: export it first to save time.
        start: where the search starts; a bundle's own configuration, or that of the model's trained length.
        lengths: of prompts and texts in tokens; 4 and 16 times the trained length if left out.
        prompts, places: passkey prompts and places of scored text of each length in the search.
        final_prompts, final_places: of each finalist.
        finalists: beside the start.
        evaluations: configurations that the search may try, the start included.
        seconds: after which nothing new is begun; 60% of them are for the search. A run that is bound by time gives
            other results on another machine, one that is bound by ``evaluations`` does not.
        parameters: of :data:`PARAMETERS`, those that are varied.
        seed: of prompts and places.
        backend: what runs a bundle's graph.
        text: a file of held-out text; library text that the demo model never saw if left out.
        journal: a file of results; what is in it is not run again.
        trust_remote_code: run the Python code that a checkpoint brings, if it does.
        progress: show a progress bar on stderr.

    Raises:
        MesaError: an option out of its range, a start that cannot run at one of the lengths, results of another model,
            version or seed in the journal.
    """
    if evaluations < 1 or finalists < 1:
        raise InputError("tuning needs at least 1 evaluation and 1 finalist")
    require_whole("evaluations", evaluations)
    require_whole("finalists", finalists)
    _require_counts((prompts, places), (final_prompts, final_places))
    if seconds is not None:
        require_number("seconds", seconds, least=0)
    _check_parameters(parameters)
    bench = _Bench(
        source, start, lengths, (final_prompts, final_places), seed, backend, text, journal, trust_remote_code
    )
    clock = time.monotonic()
    tried: dict[MesaConfig, Tried] = {}
    finals: dict[MesaConfig, Tried] = {}
    skipped: dict[str, tuple[MesaConfig | None, str]] = {}
    complete = True

    def in_time(share: float) -> bool:
        return seconds is None or time.monotonic() - clock < share * seconds

    with progress_bar(total=evaluations, unit="config", desc="tune", disable=not progress) as bar:

        def attempt(config: MesaConfig) -> Tried | None:
            if config not in tried:
                if len(tried) >= evaluations or not in_time(_SEARCH_SHARE):
                    return None
                bar.set_postfix_str(_changes(bench.start, config) or "start")
                try:
                    tried[config] = bench.judge(config, "search", prompts, places)
                except MesaError as error:
                    skipped[str(config)] = (config, str(error))
                    return None
                bar.update()
            return tried[config]

        try:
            bench.require(bench.start)
            best = bench.judge(bench.start, "search", prompts, places)
            tried[bench.start] = best
            bar.update()
            changed = True
            while changed:
                changed = False
                for parameter in parameters:
                    around = [best]
                    for value in grid(bench.start, parameter, bench.lengths[-1]):
                        try:
                            config = replace(best.config, **{parameter: value})
                        except MesaError as error:  # a combination that cannot be
                            skipped[f"{best.config} {parameter}={value}"] = (None, f"{parameter} = {value}: {error}")
                            continue
                        found = attempt(config)
                        around += [found] if found is not None else []
                    winner = _by_quality(around)[0]
                    if winner.config != best.config:
                        best, changed = winner, True
            leaders = _by_quality(list(tried.values()))[:finalists]
            for config in dict.fromkeys([bench.start, *(leader.config for leader in leaders)]):
                if not in_time(1.0):
                    complete = False
                    break
                bar.set_postfix_str(f"final: {_changes(bench.start, config) or 'start'}")
                finals[config] = bench.judge(config, "final", final_prompts, final_places)
        except KeyboardInterrupt:
            complete = False
    if not tried:
        raise InputError("tuning was interrupted before anything was judged")
    judged = list(finals.values()) if len(finals) > 1 or complete else list(tried.values())
    task = Task(bench.lengths, final_prompts, final_places, bench.scored)
    return TuneResult(
        bench.subject,
        seed,
        task,
        bench.text,
        _recommend(judged, bench.start).config,
        (*finals.values(), *tried.values()),
        tuple(skipped.values()),
        complete,
        time.monotonic() - clock,
    )


def sensitivity(
    source: Source,
    *,
    start: MesaConfig | None = None,
    lengths: Sequence[int] | None = None,
    prompts: int = 20,
    places: int = 32,
    parameters: Sequence[str] = PARAMETERS,
    values: Mapping[str, Sequence[Any]] | None = None,
    seed: int = 0,
    backend: str = "auto",
    text: str | os.PathLike[str] | None = None,
    journal: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> SensitivityResult:
    """Changes one parameter at a time and leaves all others. An interrupt (Ctrl-C) ends it with what was finished.

    Args:
        values: of a parameter, in place of :func:`grid`.
        source, start, lengths, prompts, places, parameters, seed, backend, text, journal, progress: as of :func:`tune`.

    Raises:
        MesaError: as of :func:`tune`.
    """
    _require_counts((prompts, places), (prompts, places))
    _check_parameters([*parameters, *(values or {})])
    bench = _Bench(source, start, lengths, (prompts, places), seed, backend, text, journal, trust_remote_code)
    bench.require(bench.start)
    clock = time.monotonic()
    asked: list[tuple[str, Any]] = [("default", None)]
    for name in parameters:
        given = (values or {}).get(name) or grid(bench.start, name, bench.lengths[-1])
        asked += [(name, value) for value in given if value != getattr(bench.start, name)]
    rows: list[SensitivityRow] = []
    base: dict[int, Measured] = {}
    complete = True
    with progress_bar(total=len(asked), unit="value", desc="sensitivity", disable=not progress) as bar:
        try:
            for name, value in asked:
                bar.set_postfix_str(f"{name} {'' if value is None else _value(value)}".strip())
                for length in bench.lengths:
                    try:
                        config = bench.start if name == "default" else replace(bench.start, **{name: value})
                        measured = bench.measure(config, length, prompts, places)
                    except MesaError as error:
                        rows.append(SensitivityRow(name, value, length, None, None, str(error)))
                        continue
                    base.setdefault(length, measured)
                    ratio = perplexity_ratio(measured.losses, base[length].losses)
                    rows.append(SensitivityRow(name, value, length, measured, ratio))
                bar.update()
        except KeyboardInterrupt:
            complete = False
    task = Task(bench.lengths, prompts, places, bench.scored)
    return SensitivityResult(bench.subject, seed, task, bench.text, tuple(rows), complete, time.monotonic() - clock)


def grid(config: MesaConfig, parameter: str, longest: int) -> list[Any]:
    """Values of a parameter around a configuration. Some may not go together with the rest: that is asked of it.

    Args:
        longest: tokens of the longest prompt, which stair widths must fit.
    """
    if parameter == "log_n":
        return [True, False]
    if parameter == "rho":
        return sorted({*_RHOS, config.rho})
    if parameter == "stair_width":
        # The smallest that fits leaves no room to spare; the paper's is 50 whatever the length.
        least = replace(config, stair_width=None).fitting_width(longest)
        return [None, *sorted({50, *(math.ceil(least * share) for share in (0.5, 1, 1.5, 2, 4))})]
    value = getattr(config, parameter)
    found = {max(1, round(value * share)) for share in _MULTIPLES}
    if parameter == "chunk_length":
        found.add(config.train_length - config.head_length)  # the paper's
    return sorted(found)


def _check_parameters(parameters: Sequence[str]) -> None:
    for name in parameters:
        if name not in PARAMETERS:
            raise InputError(f"unknown parameter {name!r}; there are {', '.join(PARAMETERS)}")


def _require_counts(searched: tuple[int, int], most: tuple[int, int]) -> None:
    """Raises a :class:`MesaError` unless so many prompts and places can be judged, and are some of the most."""
    if min(most) < 1:
        raise InputError(f"{min(most)} prompts or places judge nothing; at least 1 of each is needed")
    for name, count, limit in zip(("prompts", "places"), searched, most, strict=True):
        require_whole(name, count)
        require_whole(name, limit)
        _spread(count, limit)


def _by_quality(tried: Sequence[Tried]) -> list[Tried]:
    """Best first: more passkeys; then lower perplexity; then fewer scores."""
    return sorted(tried, key=lambda it: (-it.rate, statistics.fmean(it.losses), it.scores))


def _recommend(tried: Sequence[Tried], start: MesaConfig) -> Tried:
    """The rule of :func:`tune`."""
    highest = max(it.rate for it in tried)
    equal = [it for it in tried if it.interval[1] >= highest]
    lowest = min(equal, key=lambda it: statistics.fmean(it.losses))
    as_low = [it for it in equal if perplexity_ratio(it.losses, lowest.losses)[1] <= 1]
    return min(as_low, key=lambda it: (it.scores, it.config != start, statistics.fmean(it.losses)))


class _Bench:
    """A model whose configuration is free, the prompts and places that judge it, and the journal of what is known."""

    def __init__(
        self,
        source: Source,
        start: MesaConfig | None,
        lengths: Sequence[int] | None,
        most: tuple[int, int],
        seed: int,
        backend: str,
        text: str | os.PathLike[str] | None,
        journal: str | os.PathLike[str] | None,
        trust_remote_code: bool,
    ) -> None:
        require_lengths(lengths)
        require_seed(seed)
        self._journal = None if journal is None else Journal(journal)
        self.text, self._seed, self._most = held_out_text(text), seed, most
        opener, self.start, tokenizer, engine, kind, self._model = _open(source, start, backend, trust_remote_code)
        self._opener = opener
        train_length = self.start.train_length
        self.lengths = tuple(sorted(set([4 * train_length, 16 * train_length] if lengths is None else lengths)))
        if not self.lengths:
            raise InputError("name a length")
        self.scored = min(32, self.start.tail_min)
        self.subject = Subject(os.fspath(source), kind, self.start, {"mesa": engine})
        self._opened = OpenSystems(self.subject, tokenizer, self.lengths[-1])
        self._maker = PromptMaker(self._opened, self.text, Task.digits, seed)
        if self.lengths[0] < self._maker.shortest:
            raise InputError(
                f"a length of {self.lengths[0]} tokens is too short: a passkey prompt takes at least "
                f"{self._maker.shortest} tokens of this model's tokenizer"
            )
        self._stream = self._opened.encode(self.text.content)
        places_in(len(self._stream), self.lengths[-1], most[1], seed)  # long enough, or an error now

    def require(self, config: MesaConfig) -> None:
        """Raises a :class:`MesaError` if the configuration cannot run all lengths."""
        for length in self.lengths:
            self._check(config, length)

    def judge(self, config: MesaConfig, stage: str, prompts: int, places: int) -> Tried:
        """One configuration at all lengths."""
        self.require(config)
        return Tried(config, stage, tuple(self.measure(config, n, prompts, places) for n in self.lengths))

    def measure(self, config: MesaConfig, length: int, prompts: int, places: int) -> Measured:
        """One configuration at one length, from the journal if it is known.

        Raises:
            MesaError: the configuration cannot run this length.
        """
        self._check(config, length)
        key: Key = (json.dumps(config.to_dict(), sort_keys=True), length, prompts, places)
        conditions = {
            "model": self._model,
            "engine": self.subject.engines["mesa"],
            "seed": self._seed,
            "most": list(self._most),  # the few of the search are some of these
            "longest": self.lengths[-1],
            "scored": self.scored,
            "text": self.text.record(),
            "versions": versions(),
        }
        known = self._journal.find(key, conditions, _measured) if self._journal is not None else None
        if known is not None:
            return known
        measured = self._measure(config, length, prompts, places)
        if self._journal is not None:
            self._journal.add(key, conditions, dataclasses.asdict(measured))
        return measured

    def _measure(self, config: MesaConfig, length: int, prompts: int, places: int) -> Measured:
        clock = time.monotonic()
        system = self._opener(config, length)
        wrong = 0
        for index in _spread(prompts, self._most[0]):
            prompt = self._maker.prompt(length, "random", None, index, self._most[0])
            wrong += len(ask(self._opened, system, prompt))
        prefix = self._opened.prefix_ids
        ends = places_in(len(self._stream), self.lengths[-1] - len(prefix), self._most[1], self._seed)
        losses = []
        for index in _spread(places, self._most[1]):
            body = self._stream[ends[index] - length + len(prefix) : ends[index]]
            losses.append(-float(system.log_probs(prefix + body, self.scored).mean()))
        return Measured(length, prompts - wrong, prompts, tuple(losses), round(time.monotonic() - clock, 3))

    def _check(self, config: MesaConfig, length: int) -> None:
        plan = Plan.of(config, length - 1)
        Plan.of(config, length)
        if len(plan.tail) < self.scored:
            raise InputError(
                f"the tail of a text of {length} tokens is {len(plan.tail)} tokens, and {self.scored} are scored"
            )


def _measured(found: Mapping[str, Any]) -> Measured:
    """What the journal keeps of it."""
    length, correct, prompts = (int(found[name]) for name in ("length", "correct", "prompts"))
    losses = tuple(map(float, found["losses"]))
    if not 0 <= correct <= prompts or not losses:
        raise ValueError("it counts no passkeys, or has no losses")
    return Measured(length, correct, prompts, losses, float(found["seconds"]))


def _spread(count: int, most: int) -> Iterator[int]:
    """``count`` of ``most`` indices, evenly: few prompts are some of the many, at all depths."""
    if count > most:
        raise InputError(f"the search has {count} prompts or places, more than the final's {most}; ask for fewer there")
    return ((2 * index + 1) * most // (2 * count) for index in range(count))


Opener = Callable[[MesaConfig, int], System]


def _open(
    source: Source, start: MesaConfig | None, backend: str, trust_remote_code: bool = False
) -> tuple[Opener, MesaConfig, Tokenizer, str, str, str]:
    """What runs a configuration up to a length; where to start; tokenizer, engine, kind and fingerprint."""
    folder = Path(source)
    if (folder / MANIFEST_FILE).is_file():
        manifest = Manifest.read(folder)
        files = manifest.open_files(folder)
        files.verify(keep=TEXT_FILES)
        loaded = load_runner(files, manifest, backend)
        models: list[MesaModel] = []

        def run_bundle(config: MesaConfig, length: int) -> System:
            # The manifest says how to cut; the symbolic graph takes the cuts as they come.
            changed = replace(manifest, config=config, buckets=list(buckets_up_to(config, length)))
            for model in models:
                model.clear()  # all have one store
            models[:] = [MesaModel(files, replace(loaded, manifest=changed))]
            return MesaBundle(models[0])

        if not isinstance(manifest.config, MesaConfig):
            raise InputError(f"{folder} holds {manifest.config.name}; only Mesa has parameters that are tuned here")
        config = manifest.config if start is None else start
        if config.train_length != manifest.config.train_length:
            raise InputError(
                f"the bundle's tables are for train_length = {manifest.config.train_length}; start from that, or "
                "export again"
            )
        config = replace(config, short_length=manifest.config.short_length)
        described = f"{loaded.backend} on {loaded.device}, {manifest.dtype}"
        tokenizer = Tokenizer.of(read_texts(files).contents, folder)
        return run_bundle, config, tokenizer, described, "bundle", sha256(folder / MANIFEST_FILE)
    if backend not in ("auto", "torch"):
        raise InputError(f"{source} is a checkpoint, which PyTorch runs; to use backend {backend!r}, export it first")
    checkpoint = CheckpointModel.load(source, trust_remote_code=trust_remote_code)
    config = (start or MesaConfig()).for_model(os.fspath(source))

    def run_checkpoint(config: MesaConfig, _length: int) -> System:
        return MesaReference(checkpoint.model, config)

    described = MesaReference(checkpoint.model, config).engine
    return run_checkpoint, config, checkpoint.tokenizer, described, "checkpoint", fingerprint(os.fspath(source))


_COLUMNS: Final = ("F", "C", "N", "E", "rho", "log-n")


def _numbers(config: MesaConfig) -> list[str]:
    width = "by rho" if config.stair_width is None else str(config.stair_width)
    return [
        str(config.head_length),
        str(config.chunk_length),
        str(config.linear_window),
        width,
        f"{config.rho:g}",
        "on" if config.log_n else "off",
    ]


def _changes(start: MesaConfig, config: MesaConfig) -> str:
    before, after = start.to_dict(), config.to_dict()
    return ", ".join(f"{name}={_value(after[name])}" for name in after if after[name] != before[name])


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _span(low: float, high: float, digits: int = 2) -> str:
    return f"{low:.{digits}f} to {high:.{digits}f}"


__all__ = [
    "PARAMETERS",
    "Measured",
    "SensitivityResult",
    "SensitivityRow",
    "Task",
    "Tried",
    "TuneResult",
    "attention_scores",
    "grid",
    "perplexity_ratio",
    "sensitivity",
    "tune",
]

"""What tuning found: configurations, what was measured of them, and the tables of both."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from mesart.evaluation.held_out import Text
from mesart.evaluation.pairs import needed_pairs
from mesart.evaluation.report import Z95, table, times, wilson_interval
from mesart.evaluation.result import Result, subject_record
from mesart.evaluation.systems import Subject
from mesart.graphs.method.config import MesaConfig


@dataclass(frozen=True)
class TuneTask:
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
    first_token: tuple[float, ...]
    """Seconds from a prompt of this length to its first logits, of each timed run on this machine."""
    seconds: float
    """That all of it took."""

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the rate."""
        return wilson_interval(self.correct, self.prompts) if self.prompts else (0.0, 1.0)

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
        """Of passkeys; 1 where none was asked for."""
        return self.correct / self.prompts if self.prompts else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the rate."""
        return wilson_interval(self.correct, self.prompts) if self.prompts else (0.0, 1.0)

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(loss for m in self.measured for loss in m.losses)

    @property
    def loss(self) -> float:
        """Nats a token; 0 where nothing was scored."""
        return statistics.fmean(self.losses) if self.losses else 0.0

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.losses))

    @property
    def first_token(self) -> tuple[float, ...]:
        """Seconds to the first logits of a prompt of the longest length, of each timed run: what it costs."""
        return self.measured[-1].first_token

    @property
    def scores(self) -> int:
        """Attention scores that a prompt of the longest length takes, a head and layer."""
        return needed_pairs(self.config, self.measured[-1].length)


def perplexity_ratio(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """A perplexity over another of the same tokens, and its 95% interval from the spread over the places.

    1 where nothing was scored.
    """
    if not losses:
        return 1.0, 1.0, 1.0
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
    task: TuneTask
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
            for tried in by_quality([tried for tried in self.tried if tried.stage == stage]):
                base = start.get(stage)
                ratio = perplexity_ratio(tried.losses, base.losses) if base else None
                rows.append(
                    [
                        stage,
                        *_numbers(tried.config),
                        *_quality(tried, ratio),
                        f"{statistics.median(tried.first_token):.3g} s",
                        f"x{tried.scores / base.scores:.2f}" if base else "",
                        "recommended" if tried.config == self.recommended else "start" if tried is base else "",
                    ]
                )
        header = ["stage", *_COLUMNS, "found", "95%", "perplexity", "to the start (95%)", "first token", "scores", ""]
        lengths = ", ".join(f"{n:,} ({times(n, self.subject.config.train_length)})" for n in self.task.lengths)
        what = "Passkeys, perplexity and time to the first token"
        title = f"{what} at {lengths} tokens; seed {self.seed}, {self.subject.source}"
        note = "" if self.complete else "\n\nNot complete: the budget or an interrupt ended it."
        changed = changes(self.subject.config, self.recommended)
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
    task: TuneTask
    text: Text
    rows: tuple[SensitivityRow, ...]
    complete: bool
    seconds: float

    def table(self) -> str:
        """A row for each parameter, value and length that could be."""
        rows = [
            [
                row.parameter,
                shown(row.value),
                f"{row.length:,}",
                *_quality(row.measured, row.ratio),
                f"{statistics.median(row.measured.first_token):.3g} s",
            ]
            for row in self.rows
            if row.measured is not None
        ]
        header = ["parameter", "value", "tokens", "found", "95%", "perplexity", "to the default (95%)", "first token"]
        title = f"One parameter changed at a time; seed {self.seed}, {self.subject.source}"
        refused = sorted({f"{row.parameter}={shown(row.value)}" for row in self.rows if row.refused is not None})
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


def by_quality(tried: Sequence[Tried]) -> list[Tried]:
    """Best first: more passkeys; then lower perplexity; then the sooner first token."""
    return sorted(tried, key=lambda it: (-it.rate, it.loss, statistics.median(it.first_token)))


_COLUMNS: Final = ("F", "C", "tail", "N", "E", "rho", "log-n")


def _numbers(config: MesaConfig) -> list[str]:
    width = "by rho" if config.stair_width is None else str(config.stair_width)
    return [
        str(config.head_length),
        str(config.chunk_length),
        f"{config.tail_min} to {'any' if config.tail_max is None else config.tail_max}",
        str(config.linear_window),
        width,
        f"{config.rho:g}",
        "on" if config.log_n else "off",
    ]


def changes(start: MesaConfig, config: MesaConfig) -> str:
    before, after = start.to_dict(), config.to_dict()
    return ", ".join(f"{name}={shown(after[name])}" for name in after if after[name] != before[name])


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _span(low: float, high: float, digits: int = 2) -> str:
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _quality(found: Measured | Tried, ratio: tuple[float, float, float] | None) -> list[str]:
    """Cells of a table; empty where nothing was asked."""
    passkeys = [f"{found.correct}/{found.prompts}", _span(*found.interval)] if found.prompts else ["", ""]
    if not found.losses:
        return [*passkeys, "", ""]
    change = f"x{ratio[0]:.3f} ({_span(*ratio[1:], digits=3)})" if ratio else ""
    return [*passkeys, f"{found.perplexity:.2f}", change]


__all__ = [
    "Measured",
    "SensitivityResult",
    "SensitivityRow",
    "Tried",
    "TuneResult",
    "TuneTask",
    "by_quality",
    "changes",
    "perplexity_ratio",
    "shown",
]

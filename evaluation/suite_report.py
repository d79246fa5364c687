"""What the suite found: tables for people, JSON for machines, and the folder that has both."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mesart.evaluation.cells import PERPLEXITY, Cell, Outcome, Settings
from mesart.evaluation.held_out import Text
from mesart.evaluation.output import WriteError, write_file
from mesart.evaluation.provenance import versions
from mesart.evaluation.report import Z95, table, times, wilson_interval
from mesart.evaluation.result import Result
from mesart.evaluation.tasks import find_task
from mesart.graphs.errors import InputError


@dataclass(frozen=True)
class GridModel:
    """A model of the grid."""

    name: str
    source: str
    train_length: int
    fingerprint: str


@dataclass(frozen=True)
class SuiteResult(Result):
    """All cells that are known."""

    models: tuple[GridModel, ...]
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    settings: Settings
    text: Text
    outcomes: dict[Cell, Outcome] = field(repr=False)
    parameters: dict[tuple[str, str], dict[str, Any]]
    """Of each model's methods."""
    complete: bool
    revision: str | None

    def outcome(self, model: str, method: str, task: str, length: int) -> Outcome | None:
        return self.outcomes.get(Cell(model, method, task, length))

    def table(self) -> str:
        """A table for each model and task: lengths down, methods across; Markdown that reads well as it is."""
        parts = []
        for model in self.models:
            parts.append(
                f"## {model.name}\n\nTrained on windows of {model.train_length:,} tokens. "
                f"Seed {self.settings.seed}; text: {self.text.name}."
            )
            parts += [_table(self, model, task) for task in self.tasks]
            refused = {
                (cell.method, outcome.refused): None
                for cell, outcome in sorted(self.outcomes.items(), key=lambda item: item[0])
                if cell.model == model.name and outcome.refused
            }
            if refused:
                parts.append("\n".join(f"- {method} left out: {reason}" for method, reason in refused))
        if not self.complete:
            parts.append("Interrupted: what was finished by then. The same command goes on.")
        return "\n\n".join(parts) + "\n"

    def record(self) -> dict[str, Any]:
        cells = []
        for cell, outcome in sorted(self.outcomes.items(), key=lambda item: item[0]):
            entry: dict[str, Any] = {**asdict(cell), **asdict(outcome)}
            if outcome.scores:
                entry["value"], entry["interval95"] = value(cell, outcome), interval(cell, outcome)
            cells.append(entry)
        return {
            "task": "suite",
            "complete": self.complete,
            "revision": self.revision,
            "versions": versions(),
            "settings": asdict(self.settings),
            "text": self.text.record(),
            # A folder's place says nothing elsewhere; the fingerprint tells models apart.
            "models": [{**asdict(model), "source": Path(model.source).name} for model in self.models],
            "parameters": [
                {"model": model, "method": method, **parameters}
                for (model, method), parameters in self.parameters.items()
            ],
            "cells": cells,
        }


def value(cell: Cell, outcome: Outcome) -> float:
    """The mean score; of perplexity e to the power of the mean loss."""
    mean = statistics.fmean(outcome.scores)
    return math.exp(mean) if cell.task == PERPLEXITY else mean


def interval(cell: Cell, outcome: Outcome) -> tuple[float, float]:
    """The 95% interval of :func:`value`.

    Of scores it is Wilson's; where an answer may be right in part the interval is too wide rather than too narrow, as
    no score between 0 and 1 spreads more than one that is 0 or 1. Of perplexity it is that of the mean loss.
    """
    count = len(outcome.scores)
    if cell.task != PERPLEXITY:
        return wilson_interval(math.fsum(outcome.scores), count)
    half = Z95 * statistics.stdev(outcome.scores) / math.sqrt(count) if count > 1 else 0.0
    mean = statistics.fmean(outcome.scores)
    return math.exp(mean - half), math.exp(mean + half)


def _table(result: SuiteResult, model: GridModel, task: str) -> str:
    known = {
        cell: outcome
        for cell, outcome in result.outcomes.items()
        if (cell.model, cell.task) == (model.name, task) and outcome.scores
    }
    names = [method for method in result.methods if any(cell.method == method for cell in known)]
    rows = []
    for length in result.lengths:
        row = [f"{length:,}", times(length, model.train_length)]
        for method in names:
            cell = Cell(model.name, method, task, length)
            row.append(_number(cell, known[cell]) if cell in known else "")
        rows.append(row)
    settings = result.settings
    if task == PERPLEXITY:
        title = (
            f"### perplexity\n\nOf the same {settings.scored} tokens at each of {settings.places} places of the text, "
            "with longer and longer contexts; 95% interval."
        )
    else:
        found = find_task(task, settings.scale)
        title = (
            f"### {task}\n\n{found.title} ({found.source}). Mean score of {settings.prompts} prompts a cell, "
            "0 to 1; 95% interval."
        )
    return f"{title}\n\n{table(['tokens', 'of T_r', *names], rows)}"


def _number(cell: Cell, outcome: Outcome) -> str:
    low, high = interval(cell, outcome)
    if cell.task == PERPLEXITY:
        return f"{value(cell, outcome):.3g} [{low:.3g}, {high:.3g}]"
    return f"{value(cell, outcome):.2f} [{low:.2f}, {high:.2f}]"


def write_report(result: SuiteResult, folder: str | os.PathLike[str]) -> None:
    """Writes ``README.md`` with tables and pictures, ``results.json``, and the pictures into a folder.

    Raises:
        MesaError: matplotlib is missing, or the folder cannot be written.
    """
    from mesart.evaluation.suite_plots import draw_suite  # noqa: PLC0415  (matplotlib only where it is needed)

    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        pictures = draw_suite(result, place)
        links = "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)
        write_file(place / "README.md", f"# Methods side by side\n\n{links}\n\n{result.table()}")
        write_file(place / "results.json", result.to_json())
    except WriteError:  # it names the file
        raise
    except OSError as error:
        raise InputError(f"{place} cannot be written: {error.strerror or error}") from error


def depth_grid(result: SuiteResult, model: str, method: str, task: str, depths: int = 5) -> list[list[float]] | None:
    """Mean scores by depth (rows, shallow first) and length (columns), or ``None`` if a cell is missing.

    Raises:
        ValueError: the task has no depths.
    """
    columns = []
    for length in result.lengths:
        outcome = result.outcome(model, method, task, length)
        if outcome is None or not outcome.scores:
            return None
        columns.append(_by_depth(outcome.scores, outcome.depths, depths))
    return [list(row) for row in zip(*columns, strict=True)]


def _by_depth(scores: Sequence[float], depths: Sequence[float | None], count: int) -> list[float]:
    groups: list[list[float]] = [[] for _ in range(count)]
    for score, depth in zip(scores, depths, strict=True):
        if depth is None:
            raise ValueError("the task's answers stand at no single depth")
        groups[min(count - 1, int(depth * count))].append(score)
    return [statistics.fmean(group) if group else math.nan for group in groups]


__all__ = ["GridModel", "SuiteResult", "depth_grid", "interval", "value", "write_report"]

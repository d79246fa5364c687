"""The suite's pictures, in the layout of the paper's figures."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from mesart.evaluation.cells import PERPLEXITY, Cell
from mesart.evaluation.cost import CostResult
from mesart.evaluation.plots import draw_line, few_digits, legend, length_axis, require, save, style
from mesart.evaluation.report import times
from mesart.evaluation.suite_report import SuiteResult, depth_grid, interval, value
from mesart.evaluation.threshold import ThresholdResult
from mesart.evaluation.tuning import SensitivityResult

_WIDTH: Final = 4.4
"""Inches of a panel."""

Place = str | os.PathLike[str]


def draw_suite(result: SuiteResult, folder: Path) -> list[str]:
    """All pictures of a result, as far as it goes; their names."""
    names = []
    done = {cell.task for cell, outcome in result.outcomes.items() if outcome.scores}
    for task in (task for task in result.tasks if task in done):
        names.append(f"{task}.png")
        if task == PERPLEXITY:
            plot_loss(result, folder / names[-1])
            continue
        plot_accuracy(result, task, folder / names[-1])
        for model in result.models:
            if _has_depths(result, model.name, task):
                names.append(f"{task}-depths-{model.name}.png")
                plot_depths(result, model.name, task, folder / names[-1])
    return names


def _has_depths(result: SuiteResult, model: str, task: str) -> bool:
    """Whether all cells of at least one method are there, each prompt with a depth."""
    for method in result.methods:
        outcomes = [result.outcome(model, method, task, length) for length in result.lengths]
        if all(outcome is not None and outcome.scores and None not in outcome.depths for outcome in outcomes):
            return True
    return False


def plot_accuracy(result: SuiteResult, task: str, path: Place) -> None:
    """Scores against length, a panel for each model, a line for each method (the paper's Figure 3)."""
    _panels(result, task, path, title=f"{task}: mean score", percent=True)


def plot_loss(result: SuiteResult, path: Place) -> None:
    """Perplexity against length, a panel for each model (the paper's Figure 4)."""
    _panels(result, PERPLEXITY, path, title="Perplexity of the same tokens, with more and more context", percent=False)


def _panels(result: SuiteResult, task: str, path: Place, *, title: str, percent: bool) -> None:
    known = {c: o for c, o in result.outcomes.items() if c.task == task and o.scores}
    require(list(known))
    models = [model for model in result.models if any(cell.model == model.name for cell in known)]
    with style():
        figure = Figure(figsize=(1.0 + _WIDTH * len(models), 4.6), layout="constrained")
        figure.suptitle(title)
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, model in zip(panels, models, strict=True):
            axes.set_title(model.name, loc="right")
            for method in result.methods:
                cells = [c for n in result.lengths if (c := Cell(model.name, method, task, n)) in known]
                if cells:
                    values = [value(c, known[c]) for c in cells]
                    draw_line(axes, method, [c.length for c in cells], values, [interval(c, known[c]) for c in cells])
            length_axis(axes, list(result.lengths), model.train_length, "prompt, tokens")
            if percent:
                axes.set_ylim(-0.04, 1.04)
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            else:
                _logarithmic(axes)
        legend(figure, panels, columns=6)
        save(figure, path)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(FuncFormatter(few_digits))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def plot_depths(result: SuiteResult, model: str, task: str, path: Place, depths: int = 5) -> None:
    """Scores by depth of the needle and length of the haystack, a heat map for each method."""
    grids = {m: grid for m in result.methods if (grid := depth_grid(result, model, m, task, depths)) is not None}
    require(list(grids))
    train_length = next(info.train_length for info in result.models if info.name == model)
    columns = min(4, len(grids))
    rows = math.ceil(len(grids) / columns)
    with style():
        figure = Figure(figsize=(1.0 + 3.2 * columns, 0.8 + 2.4 * rows), layout="constrained")
        figure.suptitle(f"{task} on {model}: score by depth and length")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in panels[len(grids) :]:
            axes.set_axis_off()
        image: Any = None
        for axes, (method, grid) in zip(panels, grids.items(), strict=False):
            axes.set_title(method, loc="left")
            image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axes.set_xticks(range(len(result.lengths)), [times(n, train_length) for n in result.lengths])
            axes.set_yticks([-0.5, depths - 0.5], ["start", "end"])
            axes.grid(False)
        figure.colorbar(image, ax=panels.tolist(), shrink=0.8, label="score")
        save(figure, path)


def plot_cost(result: CostResult, path: Place, memory: str = "memory beyond the weights") -> None:
    """Time to the first token, time of a step, and ``memory``, which says of what, against length (Figure 5)."""
    rows = [row for row in result.rows if row.failed is None]
    require(rows)
    what: Sequence[tuple[str, Any]] = (
        ("first token, seconds", lambda row: statistics.median(row.first_token)),
        ("a further token, milliseconds", lambda row: row.per_token * 1e3),
        (f"{memory}, MB", lambda row: row.memory / 1e6),
    )
    with style():
        figure = Figure(figsize=(1.0 + _WIDTH * len(what), 4.6), layout="constrained")
        figure.suptitle("Time and memory against the prompt's length")
        panels = figure.subplots(1, len(what), squeeze=False)[0]
        lengths = sorted({row.length for row in rows})
        for axes, (label, of) in zip(panels, what, strict=True):
            for method in dict.fromkeys(row.method for row in rows):
                found = [row for row in rows if row.method == method]
                values = [of(row) for row in found]
                draw_line(axes, method, [row.length for row in found], values, None)
            length_axis(axes, lengths, result.train_length, "prompt, tokens")
            _logarithmic(axes)
            axes.set_ylabel(label)
        legend(figure, panels, columns=6)
        save(figure, path)


def plot_threshold(results: Mapping[str, ThresholdResult], path: Place) -> None:
    """The chosen dimension's value against position, a panel for each model (the paper's Figure 2).

    The dotted line is the value at T_r; the vertical ones are where failure was predicted and where it came.
    """
    with style():
        figure = Figure(figsize=(1.0 + _WIDTH * len(results), 4.6), layout="constrained")
        figure.suptitle("A hidden state past the trained window")
        panels = figure.subplots(1, len(results), squeeze=False)[0]
        for axes, (name, result) in zip(panels, results.items(), strict=True):
            axes.set_title(f"{name}: layer {result.layer}, dimension {result.dimension}", loc="right")
            lengths: list[int] = []
            for method, probe in result.methods.items():
                curve = probe.values
                lengths = [int(position) for position in curve.positions]
                intervals = list(zip(curve.lower, curve.upper, strict=True))
                draw_line(axes, method, lengths, list(curve.mean), intervals)
            length_axis(axes, lengths, result.train_length, "position, tokens")
            axes.axhline(result.threshold, color="black", linestyle=":", linewidth=1)
            for crossing, look in ((result.predicted, "--"), (result.actual, "-")):
                if crossing.position is not None:
                    axes.axvline(crossing.position, color="#d55e00", linestyle=look, linewidth=1)
            axes.set_ylabel("value")
        legend(figure, panels)
        save(figure, path)


def plot_sensitivity(result: SensitivityResult, path: Place) -> None:
    """Perplexity relative to the default's, a panel for each parameter, a line for each length."""
    parameters = [p for p in dict.fromkeys(row.parameter for row in result.rows) if p != "default"]
    require(parameters)
    lengths = list(dict.fromkeys(row.length for row in result.rows))
    with style():
        figure = Figure(figsize=(1.0 + 3.4 * len(parameters), 3.8), layout="constrained")
        figure.suptitle("One parameter changed, all others left: perplexity relative to the default's")
        panels = figure.subplots(1, len(parameters), squeeze=False, sharey=True)[0]
        for axes, parameter in zip(panels, parameters, strict=True):
            axes.set_title(parameter, loc="right")
            for length in lengths:
                rows = [r for r in result.rows if (r.parameter, r.length) == (parameter, length) and r.ratio]
                ratios = [row.ratio for row in rows if row.ratio]
                errors = [[r[0] - r[1] for r in ratios], [r[2] - r[0] for r in ratios]]
                ticks = [str(row.value) for row in rows]
                axes.errorbar(ticks, [r[0] for r in ratios], errors, marker="o", capsize=3, label=f"{length:,} tokens")
            axes.axhline(1.0, color="black", linestyle=":", linewidth=1)
        legend(figure, panels)
        save(figure, path)


__all__ = ["draw_suite", "plot_accuracy", "plot_cost", "plot_depths", "plot_loss", "plot_sensitivity", "plot_threshold"]

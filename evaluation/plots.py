"""The pictures of the reports. The one module that needs matplotlib."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from mesart.evaluation.output import write_file
from mesart.evaluation.report import times
from mesart.graphs.errors import InputError

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
except ImportError as error:
    raise InputError("plots need matplotlib: pip install 'mesart[eval]'") from error

if TYPE_CHECKING:
    from mesart.evaluation.passkey_eval import PasskeyResult
    from mesart.evaluation.perplexity import PerplexityResult

# Told apart by colour-blind readers and in grey print, and where one lies on the other.
_LOOKS: Final[dict[str, dict[str, Any]]] = {
    "mesa": {"color": "#0072b2", "marker": "o", "markersize": 6, "zorder": 4, "label": "Mesa"},
    "origin": {"color": "#d55e00", "marker": "s", "markersize": 8, "zorder": 3, "label": "Origin (the plain model)"},
    "dynamic-ntk": {"color": "#e69f00", "marker": "^", "label": "Dynamic-NTK"},
    "yarn": {"color": "#b8860b", "marker": "v", "label": "YaRN"},
    "rerope": {"color": "#009e73", "marker": "D", "label": "ReRoPE"},
    "rerope:log_n=true": {
        "color": "#000000",
        "marker": "D",
        "linestyle": ":",
        "zorder": 5,
        "label": "ReRoPE with log-n",
    },
    "leaky-rerope": {"color": "#009e73", "marker": "d", "linestyle": "--", "label": "Leaky-ReRoPE"},
    "self-extend": {"color": "#56b4e9", "marker": "P", "label": "SelfExtend"},
    "dual-chunk": {"color": "#56b4e9", "marker": "p", "linestyle": "--", "label": "Dual Chunk Attention"},
    "lm-infinite": {"color": "#cc79a7", "marker": "<", "label": "LM-Infinite"},
    "streaming-llm": {"color": "#cc79a7", "marker": ">", "linestyle": "--", "label": "Streaming-LLM"},
    "star-attention": {"color": "#7f7f7f", "marker": "*", "label": "Star Attention"},
    "infllm": {"color": "#7f7f7f", "marker": "X", "linestyle": "--", "label": "InfLLM"},
}
_GREY: Final = "#666666"


def plot_passkey(result: PasskeyResult, path: str | os.PathLike[str]) -> None:
    """Draws the share of keys found against the prompt's length: a panel for each filler, a line for each system.

    Raises:
        MesaError: nothing was finished, or the picture cannot be written.
    """
    cells = result.pooled()
    require(cells)
    fillers = list(dict.fromkeys(cell.filler for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    with style():
        figure = Figure(figsize=(1.0 + 4.4 * len(fillers), 4.0), layout="constrained")
        figure.suptitle("Passkey: how often the key is found")
        panels: Sequence[Axes] = figure.subplots(1, len(fillers), sharey=True, squeeze=False)[0]
        for axes, filler in zip(panels, fillers, strict=True):
            axes.set_title(f"{filler} filler", loc="right")
            for system in result.subject.engines:
                line = [cell for cell in cells if (cell.system, cell.filler) == (system, filler)]
                draw_line(axes, system, [c.length for c in line], [c.rate for c in line], [c.interval for c in line])
            length_axis(axes, lengths, result.subject.config.train_length, "prompt, tokens")
            axes.set_ylim(-0.04, 1.04)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        panels[0].set_ylabel(f"keys found, of {cells[0].prompts} prompts")
        legend(figure, panels)
        save(figure, path)


def plot_perplexity(result: PerplexityResult, path: str | os.PathLike[str]) -> None:
    """Draws the perplexity of the same tokens against the length of their context, a line for each system.

    Raises:
        MesaError: nothing was finished, or the picture cannot be written.
    """
    cells = result.cells
    require(cells)
    with style():
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        figure.suptitle("Perplexity of the same tokens, with more and more context")
        axes = figure.subplots()
        for system in result.subject.engines:
            line = [cell for cell in cells if cell.system == system]
            if not line:
                continue
            # The band is of the change from the shortest context: how hard the places are is the same for all.
            start = result.shortest(system).perplexity
            ratios = [result.ratio_interval(c) for c in line]
            intervals = [(start * low, start * high) for low, high in ratios]
            draw_line(axes, system, [c.length for c in line], [c.perplexity for c in line], intervals)
        length_axis(axes, sorted({c.length for c in cells}), result.subject.config.train_length, "context, tokens")
        axes.set_yscale("log")
        # Decades are too coarse for the few that lie between good and useless.
        axes.yaxis.set_minor_formatter(FuncFormatter(few_digits))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel(f"perplexity of {result.tokens} tokens at {result.places} places")
        legend(figure, [axes])
        save(figure, path)


def require(cells: Sequence[object]) -> None:
    if not cells:
        raise InputError("there is nothing to draw: no part of the evaluation was finished")


def style() -> AbstractContextManager[None]:
    context: AbstractContextManager[None] = matplotlib.rc_context(
        {
            "font.size": 10,
            "axes.titlesize": 10,
            "figure.titlesize": 12,
            "figure.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": _GREY,
            "xtick.color": _GREY,
            "ytick.color": _GREY,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e6e6e6",
            "legend.frameon": False,
        }
    )
    return context


def draw_line(
    axes: Axes,
    system: str,
    lengths: list[int],
    values: list[float],
    intervals: list[tuple[float, float]] | None,
) -> None:
    """A line of a system or method, its 95% intervals as a band."""
    look = {"linewidth": 2, "markersize": 5, **_LOOKS.get(system, {"label": system})}
    axes.plot(lengths, values, clip_on=False, **look)
    if intervals is not None:
        low, high = [low for low, _ in intervals], [high for _, high in intervals]
        axes.fill_between(lengths, low, high, color=look.get("color"), alpha=0.12, linewidth=0)


def length_axis(axes: Axes, lengths: Sequence[int], train_length: int, label: str) -> None:
    """Lengths by powers of two, in tokens and in trained windows; the window itself is marked."""
    axes.set_xscale("log", base=2)
    shown = lengths[:: -(-len(lengths) // 8)]  # more would overlap
    axes.set_xticks(shown, [f"{n:,}\n{times(n, train_length)}" for n in shown])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.grid(False, axis="x")
    left, right = min(lengths[0], train_length) / 1.25, max(lengths[-1], train_length) * 1.25
    axes.set_xlim(left, right)
    axes.axvspan(left, train_length, color="#f2f2f2", zorder=0, linewidth=0)
    axes.axvline(train_length, color=_GREY, linestyle="--", linewidth=1, zorder=1)
    axes.annotate(
        f"trained on {train_length:,} tokens",
        (train_length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 3),
        textcoords="offset points",
        fontsize=8,
        color=_GREY,
    )
    axes.set_xlabel(label)


def few_digits(value: float, _: int | None) -> str:
    """Labels 2 and 5 between the decades."""
    return f"{value:g}" if f"{value:.0e}"[0] in "25" else ""


def legend(figure: Figure, panels: Sequence[Axes], columns: int | None = None) -> None:
    """One legend below all panels, each name once."""
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns or len(named))


def picture_format(path: str | os.PathLike[str]) -> str:
    """The format of a picture's file, by its ending.

    Raises:
        MesaError: there is none, or matplotlib does not draw such pictures.
    """
    found = os.path.splitext(path)[1].removeprefix(".").lower()
    known = Figure().canvas.get_supported_filetypes()
    if found not in known:
        raise InputError(
            f"cannot write the picture {os.fspath(path)}: its name must end in one of .{', .'.join(sorted(known))}"
        )
    return found


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a picture, all or nothing.

    Raises:
        MesaError: it cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=picture_format(path))
    write_file(path, picture.getvalue(), "picture")


__all__ = ["picture_format", "plot_passkey", "plot_perplexity"]

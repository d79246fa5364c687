"""What all reports share: tables, JSON, intervals, versions."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from mesart.evaluation.systems import Subject

Z95: Final = 1.959964
"""Half the width of a 95% interval, in standard deviations of the normal distribution."""

_PACKAGES: Final = ("mesart", "numpy", "tokenizers", "onnxruntime", "openvino", "torch", "transformers")


def wilson_interval(correct: float, count: int) -> tuple[float, float]:
    """The 95% interval of a rate of which ``correct`` out of ``count`` were seen (Wilson's: right at 0 and 1 too)."""
    rate, spread = correct / count, Z95**2 / count
    centre = (rate + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(rate * (1 - rate) / count + spread / (4 * count))
    # At the ends the exact bounds are 0 and 1; rounding may leave a trace beside them.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == count else centre + half)


def times(length: int, train_length: int) -> str:
    """A length in trained windows, such as ``16x``."""
    return f"{length / train_length:.3g}x"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown that is aligned as it stands, columns to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    ruler = [f"{'-' * (width - 1)}:" for width in widths]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ruler, *lines[1:]))


def to_json(task: str, subject: Subject, seed: int, complete: bool, fields: Mapping[str, Any]) -> str:
    """A report for machines, which says all that is needed to run it again."""
    report = {
        "task": task,
        "complete": complete,
        "seed": seed,
        "source": {"path": subject.source, "kind": subject.kind},
        "config": subject.config.to_dict(),
        "systems": subject.engines,
        **fields,
        "versions": versions(),
    }
    return json.dumps(report, indent=1, default=dataclasses.asdict) + "\n"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

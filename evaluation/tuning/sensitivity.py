"""What each parameter does: one changed at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mesart.evaluation.progress import progress_bar
from mesart.evaluation.systems import Source
from mesart.evaluation.tuning.grid import PARAMETERS, check_parameters, grid, require_counts
from mesart.evaluation.tuning.measure import Bench
from mesart.evaluation.tuning.report import (
    Measured,
    SensitivityResult,
    SensitivityRow,
    TuneTask,
    perplexity_ratio,
    shown,
)
from mesart.evaluation.tuning.search import SEARCH_RUNS
from mesart.graphs.errors import MesaError
from mesart.graphs.method.config import MesaConfig


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
    require_counts((prompts, places), (prompts, places))
    check_parameters([*parameters, *(values or {})])
    bench = Bench(source, start, lengths, (prompts, places), seed, backend, text, journal, trust_remote_code)
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
                bar.set_postfix_str(f"{name} {'' if value is None else shown(value)}".strip())
                for length in bench.lengths:
                    try:
                        config = bench.start if name == "default" else replace(bench.start, **{name: value})
                        measured = bench.measure(config, length, prompts, places, SEARCH_RUNS)
                    except MesaError as error:
                        rows.append(SensitivityRow(name, value, length, None, None, str(error)))
                        continue
                    base.setdefault(length, measured)
                    ratio = perplexity_ratio(measured.losses, base[length].losses)
                    rows.append(SensitivityRow(name, value, length, measured, ratio))
                bar.update()
        except KeyboardInterrupt:
            complete = False
    task = TuneTask(bench.lengths, prompts, places, bench.scored)
    return SensitivityResult(bench.subject, seed, task, bench.text, tuple(rows), complete, time.monotonic() - clock)


__all__ = ["sensitivity"]

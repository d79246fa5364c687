"""Which configuration suits a model: a search on a budget.

A configuration is judged on how many passkeys it finds, on the loss of the same held-out tokens behind long texts, and
on the time to the first token on this machine.

A bundle's symbolic graph takes cuts, positions and scales as data, so one bundle runs every configuration of its
trained length without another export, several times faster than PyTorch runs the checkpoint.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from mesart.evaluation.arguments import require_number, require_whole
from mesart.evaluation.progress import progress_bar
from mesart.evaluation.systems import Source
from mesart.evaluation.tuning.grid import COST_PARAMETERS, PARAMETERS, check_parameters, grid, require_counts
from mesart.evaluation.tuning.measure import Bench
from mesart.evaluation.tuning.report import Tried, TuneResult, TuneTask, by_quality, changes, perplexity_ratio
from mesart.graphs.errors import InputError, MesaError
from mesart.graphs.method.config import MesaConfig
from mesart.graphs.method.plan import Plan

_SEARCH_SHARE: Final = 0.6
"""Of the seconds: what is left is for the finalists."""

SEARCH_RUNS: Final = 3
"""Timed runs of each length."""
_FINAL_RUNS: Final = 7


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
    parameters: Sequence[str] | None = None,
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
    judged on more prompts, places and timed runs. Recommended is, among the finalists whose rate of passkeys may be the
    best (the 95% interval reaches it) and whose perplexity may be as low as the lowest of these (95% interval, place by
    place), the one with the soonest first token; the start, if it is one of these and none of them is clearly sooner. A
    search picks up chance too: trust the ``final`` rows, not the ``search`` rows.

    With no prompts and no places at all, time alone decides: nothing is asked of the model's quality.

    Args:
        source: a bundle, which runs every configuration of its trained length; or a checkpoint's folder or hub id,
            which PyTorch runs, several times slower: export it first to save time.
        start: where the search starts; a bundle's own configuration, or that of the model's trained length.
        lengths: of prompts and texts in tokens; 4 and 16 times the trained length if left out.
        prompts, places: passkey prompts and places of scored text of each length in the search; 0: none.
        final_prompts, final_places: of each finalist; no fewer.
        finalists: beside the start.
        evaluations: configurations that the search may try, the start included.
        seconds: after which nothing new is begun; 60% of them are for the search.
        parameters: of :data:`PARAMETERS`, those that are varied; all but the stair width if left out, or, where no
            quality is asked for, :data:`COST_PARAMETERS`.
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
    require_counts((prompts, places), (final_prompts, final_places))
    if seconds is not None:
        require_number("seconds", seconds, least=0)
    if parameters is None:
        parameters = PARAMETERS[:-1] if final_prompts or final_places else COST_PARAMETERS
    check_parameters(parameters)
    bench = Bench(
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
                bar.set_postfix_str(changes(bench.start, config) or "start")
                try:
                    tried[config] = bench.judge(config, "search", prompts, places, SEARCH_RUNS)
                except MesaError as error:
                    skipped[str(config)] = (config, str(error))
                    return None
                bar.update()
            return tried[config]

        try:
            bench.require(bench.start)
            best = bench.judge(bench.start, "search", prompts, places, SEARCH_RUNS)
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
                            if config != best.config and _cuts_alike(config, best.config, bench.lengths):
                                continue
                        except MesaError as error:  # a combination that cannot be
                            skipped[f"{best.config} {parameter}={value}"] = (None, f"{parameter} = {value}: {error}")
                            continue
                        found = attempt(config)
                        around += [found] if found is not None else []
                    winner = by_quality(around)[0]
                    if winner.config != best.config:
                        best, changed = winner, True
            leaders = by_quality(list(tried.values()))[:finalists]
            for config in dict.fromkeys([bench.start, *(leader.config for leader in leaders)]):
                if not in_time(1.0):
                    complete = False
                    break
                bar.set_postfix_str(f"final: {changes(bench.start, config) or 'start'}")
                finals[config] = bench.judge(config, "final", final_prompts, final_places, _FINAL_RUNS)
        except KeyboardInterrupt:
            complete = False
    if not tried:
        raise InputError("tuning was interrupted before anything was judged")
    judged = list(finals.values()) if len(finals) > 1 or complete else list(tried.values())
    task = TuneTask(bench.lengths, final_prompts, final_places, bench.scored)
    return TuneResult(
        bench.subject,
        seed,
        task,
        bench.text,
        recommend(judged, bench.start).config,
        (*finals.values(), *tried.values()),
        tuple(skipped.values()),
        complete,
        time.monotonic() - clock,
    )


def recommend(tried: Sequence[Tried], start: MesaConfig) -> Tried:
    """The rule of :func:`tune`."""
    highest = max(it.rate for it in tried)
    equal = [it for it in tried if it.interval[1] >= highest]
    lowest = min(equal, key=lambda it: it.loss)
    as_low = [it for it in equal if perplexity_ratio(it.losses, lowest.losses)[1] <= 1]
    soonest = min(as_low, key=lambda it: (statistics.median(it.first_token), it.config != start, it.loss))
    # Runs of one configuration differ too: another counts as sooner if its slowest run is sooner than the fastest.
    unmoved = [it for it in as_low if it.config == start and min(it.first_token) <= max(soonest.first_token)]
    return next(iter(unmoved), soonest)


def _cuts_alike(one: MesaConfig, other: MesaConfig, lengths: Sequence[int]) -> bool:
    """Whether two configurations differ in a limit of the tail alone, which no prompt of these lengths meets."""
    if replace(one, tail_max=other.tail_max) != other:
        return False
    return all(Plan.of(one, n) == Plan.of(other, n) for length in lengths for n in (length - 1, length))


__all__ = ["SEARCH_RUNS", "recommend", "tune"]

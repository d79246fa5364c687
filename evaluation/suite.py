"""The grid of models x methods x tasks x lengths: every method asked the same seeded questions, on every model.

Models are checkpoints and bundles. A cell of the grid is one method on one model, task and length
(:mod:`~mesart.evaluation.cells`). Cells run in several processes, are written down as they end
(:mod:`~mesart.evaluation.journal`), and are not run again when an interrupted run is started anew.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mesart.evaluation.arguments import require_lengths, require_whole
from mesart.evaluation.cells import (
    PERPLEXITY,
    Cell,
    Job,
    Outcome,
    Settings,
    examiner_of,
    opened,
    run_cell,
    text_of,
)
from mesart.evaluation.journal import Journal
from mesart.evaluation.methods import METHODS, parse_method
from mesart.evaluation.output import require_folder
from mesart.evaluation.progress import progress_bar
from mesart.evaluation.provenance import fingerprint, revision, versions
from mesart.evaluation.suite_report import GridModel, SuiteResult
from mesart.evaluation.systems.model import own_method
from mesart.evaluation.tasks import Writer, find_task
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig
from mesart.graphs.method.protocol import StaticMethod

JOURNAL_FILE: Final = "journal.jsonl"


_APART: Final = ("text", "trust_remote_code", "backend")
"""Settings that a journal does not compare for all: the text has a record of its own, trust changes no number, and the
backend is that of bundles."""


@dataclass(frozen=True)
class _Described:
    """A model before it is opened."""

    info: GridModel
    held: StaticMethod | None
    """The configuration of a bundle."""

    def parameters(self, method: str, longest: int) -> dict[str, Any]:
        """Those that a method has on this model.

        Raises:
            MesaError: no such method or parameter.
        """
        if self.held is not None and method == self.held.name:
            return {name: value for name, value in self.held.to_dict().items() if name != "train_length"}
        return parse_method(method, self.info.train_length, longest).parameters


def run_suite(
    models: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    methods: Sequence[str] | None = None,
    tasks: Sequence[str],
    lengths: Sequence[int] | None = None,
    settings: Settings | None = None,
    jobs: int = 1,
    progress: bool = True,
) -> SuiteResult:
    """Runs all cells of a grid that are not in the journal yet. An interrupt (Ctrl-C) ends it; call again to go on.

    Args:
        models: bundles, checkpoints' folders or hub ids by the names that reports give them. The method that a bundle
            holds runs as it was exported, on its engine; every other in PyTorch, on the bundle's weights.
        output: folder of the journal.
        methods: names of :data:`~mesart.evaluation.methods.METHODS`, some with parameters of their own, see
            :func:`~mesart.evaluation.methods.parse_method`; all, with their defaults, if left out.
        tasks: names of tasks; :data:`PERPLEXITY` is one.
        lengths: of the prompts in tokens; 1, 2, 4, ... 32 times the trained length of the first model if left out.
        settings: number of prompts, seed and so on.
        jobs: processes at a time; they share the cores.
        progress: show a progress bar on stderr.

    Raises:
        MesaError: an unknown name, a length below what a task needs, results of another run in the journal, or a model
            that no method can take; before anything runs, where it can be known.
    """
    settings = settings or Settings()
    settings.require()
    require_whole("jobs", jobs)
    require_lengths(lengths)
    names = tuple(METHODS if methods is None else dict.fromkeys(methods))
    chosen_tasks = tuple(dict.fromkeys(tasks))
    if not (models and names and chosen_tasks):
        raise InputError("name at least one model, one method and one task")
    for task in chosen_tasks:
        if task != PERPLEXITY:
            find_task(task, settings.scale)
    require_folder(output)
    text = text_of(settings)
    described = tuple(_describe(name, os.fspath(source)) for name, source in models.items())
    if settings.backend != "auto" and all(model.held is None for model in described):
        raise InputError(
            f"backend {settings.backend!r} runs the graphs of bundles, and no model here is one: export it"
        )
    if lengths is None:
        lengths = [described[0].info.train_length << power for power in range(6)]
    sizes = tuple(sorted(set(lengths)))
    if not sizes:
        raise InputError("name a length")
    parameters: dict[tuple[str, str], dict[str, Any]] = {}
    for model in described:
        for method in names:
            parameters[model.info.name, method] = model.parameters(method, sizes[-1])
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for model in described:
        writer = examiner_of(opened(model.info.source, settings, threads), text).writer
        _check_lengths(writer, model.info.source, chosen_tasks, sizes, settings)
    journal = Journal(Path(output) / JOURNAL_FILE)
    shared = {
        "versions": versions(),
        "settings": {name: value for name, value in vars(settings).items() if name not in _APART},
        "text": text.record(),
    }
    conditions: dict[Cell, dict[str, Any]] = {}
    outcomes: dict[Cell, Outcome] = {}
    waiting: list[Job] = []
    for length in sizes:
        for info, held in ((model.info, model.held) for model in described):
            for task in chosen_tasks:
                for method in names:
                    cell = Cell(info.name, method, task, length)
                    conditions[cell] = {
                        "model": info.fingerprint,
                        "parameters": parameters[info.name, method],
                        **shared,
                        **({"longest": sizes[-1]} if task == PERPLEXITY else {}),  # the places follow from it
                        **({} if held is None else {"backend": settings.backend}),
                    }
                    known = journal.find(cell.key, conditions[cell], _outcome)
                    if known is not None:
                        outcomes[cell] = known
                    else:
                        waiting.append(Job(cell, info.source, settings, sizes[-1], threads))
    complete = True
    try:
        for cell, outcome in _run(waiting, jobs, progress):
            journal.add(cell.key, conditions[cell], vars(outcome))
            outcomes[cell] = outcome
    except KeyboardInterrupt:
        complete = False
    infos = tuple(model.info for model in described)
    return SuiteResult(infos, names, chosen_tasks, sizes, settings, text, outcomes, parameters, complete, revision())


def _outcome(result: Mapping[str, Any]) -> Outcome:
    scores = tuple(map(float, result["scores"]))
    depths = tuple(None if depth is None else float(depth) for depth in result["depths"])
    if len(depths) != len(scores) or not isinstance(result["refused"], str | None):
        raise ValueError("scores, depths and refused do not go together")
    return Outcome(scores, depths, float(result["seconds"]), result["refused"])


def _describe(name: str, source: str) -> _Described:
    held = own_method(source)
    train_length = MesaConfig.from_model(source).train_length if held is None else held.train_length
    return _Described(GridModel(name, source, train_length, fingerprint(source)), held)


def _check_lengths(
    writer: Writer, source: str, tasks: Iterable[str], lengths: Sequence[int], settings: Settings
) -> None:
    for name in tasks:
        least = len(writer.prefix_ids) + settings.scored + 1
        if name != PERPLEXITY:
            least = find_task(name, settings.scale).minimum_length(writer)
        if lengths[0] < least:
            raise InputError(
                f"task {name} needs at least {least} tokens of the tokenizer of {source}, not {lengths[0]}; "
                "ask for longer prompts, or leave the task out"
            )


def _run(waiting: Sequence[Job], jobs: int, progress: bool) -> Iterator[tuple[Cell, Outcome]]:
    """Outcomes as they come. In tokens, not cells: the time that is left is then guessed well."""
    total = sum(job.tokens for job in waiting)
    with progress_bar(
        total=total, unit="tok", unit_scale=True, desc="suite", disable=not progress or not waiting
    ) as bar:
        if jobs == 1 or len(waiting) == 1:
            for job in waiting:
                bar.set_postfix_str(f"{job.cell.method}, {job.cell.task}, {job.cell.length} tokens")
                yield job.cell, run_cell(job)
                bar.update(job.tokens)
            return
        # An interrupt from the keyboard reaches the processes too: they end at once and without a word, unless this
        # process is one that ignores it (a shell's background job).
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        quietly = (signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
        others = set(multiprocessing.active_children())
        workers = min(jobs, len(waiting))
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal, quietly)
        try:
            running: dict[Future[Outcome], Job] = {pool.submit(run_cell, job): job for job in waiting}
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    yield job.cell, future.result()
                    bar.set_postfix_str(f"{job.cell.method}, {job.cell.task}, {job.cell.length} tokens")
                    bar.update(job.tokens)
        except KeyboardInterrupt:  # also of SIGTERM, which reaches this process alone
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        except BrokenProcessPool as error:
            raise InputError(
                "a process of the suite was killed, most likely for want of memory; what was finished is kept: call "
                "again with fewer --jobs"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


__all__ = ["JOURNAL_FILE", "run_suite"]

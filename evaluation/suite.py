"""The grid of models x methods x tasks x lengths: every method asked the same seeded questions, on every model.

A cell of the grid is one method on one model, task and length. Cells run in several processes, are written down as
they end (:mod:`~mesart.evaluation.journal`), and are not run again when an interrupted run is started anew.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from mesart.evaluation.arguments import require_device, require_lengths, require_seed, require_whole
from mesart.evaluation.held_out import Text, held_out_text
from mesart.evaluation.journal import Journal, Key
from mesart.evaluation.methods import METHODS, parse_method
from mesart.evaluation.output import require_folder
from mesart.evaluation.perplexity import places_in
from mesart.evaluation.progress import progress_bar
from mesart.evaluation.provenance import fingerprint, revision, versions
from mesart.evaluation.systems import CheckpointModel, System
from mesart.evaluation.tasks import Task, Writer, find_task
from mesart.graphs.errors import InputError, MesaError

PERPLEXITY: Final = "perplexity"
"""The one task without answers: scored are the last tokens of a text, in nats."""

JOURNAL_FILE: Final = "journal.jsonl"


@dataclass(frozen=True, order=True)
class Cell:
    """One method on one model, task and length."""

    model: str
    method: str
    task: str
    length: int

    @property
    def key(self) -> Key:
        return (self.model, self.method, self.task, self.length)


@dataclass(frozen=True)
class Outcome:
    """What a cell gave."""

    scores: tuple[float, ...] = ()
    """Of each prompt, 0 to 1; of perplexity the mean loss at each place, in nats a token."""
    depths: tuple[float | None, ...] = ()
    """Where in each prompt the answer stood, 0 to 1, where the task has one such place."""
    seconds: float = 0.0
    refused: str | None = None
    """Why the method cannot take the model, or this task and length."""


@dataclass(frozen=True)
class Settings:
    """What all cells of a run have in common."""

    prompts: int = 20
    """Of each cell."""
    places: int = 60
    """In the text, of each cell of perplexity."""
    scored: int = 32
    """Tokens of each place."""
    seed: int = 0
    scale: str = "small"
    """Of the tasks' pieces, see :func:`mesart.evaluation.tasks.tasks`."""
    text: str | None = None
    """A file of the user's as haystack; held-out library text if left out."""
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False
    """Run the Python code that the checkpoints bring, if they do."""

    def require(self) -> None:
        """Raises a :class:`MesaError` if one of them is out of its range."""
        for name in ("prompts", "places", "scored"):
            require_whole(name, getattr(self, name))
        require_seed(self.seed)
        if self.device != "cpu":  # PyTorch is slow to import
            require_device(self.device)


_APART: Final = ("text", "trust_remote_code")
"""Settings that a journal does not compare: the text has a record of its own, and trust changes no number."""


@dataclass(frozen=True)
class ModelInfo:
    """A model of the grid."""

    name: str
    source: str
    train_length: int
    fingerprint: str


@dataclass(frozen=True)
class SuiteResult:
    """All cells that are known."""

    models: tuple[ModelInfo, ...]
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


@dataclass(frozen=True)
class _Job:
    """All that a process needs to run a cell."""

    cell: Cell
    source: str
    settings: Settings
    max_tokens: int
    threads: int


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
        models: checkpoints' folders or hub ids by the names that reports give them.
        output: folder of the journal.
        methods: names of :data:`~mesart.evaluation.methods.METHODS`, some with parameters of their own, see
            :func:`parse_method`; all, with their defaults, if left out.
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
    text = held_out_text(settings.text)
    infos = tuple(_describe(name, os.fspath(source)) for name, source in models.items())
    if lengths is None:
        lengths = [infos[0].train_length << power for power in range(6)]
    sizes = tuple(sorted(set(lengths)))
    if not sizes:
        raise InputError("name a length")
    parameters: dict[tuple[str, str], dict[str, Any]] = {}
    for info in infos:
        for method in names:
            parameters[info.name, method] = parse_method(method, info.train_length, sizes[-1]).parameters
    for info in infos:
        _check_lengths(_open(info.source, settings), chosen_tasks, sizes, settings, text)
    journal = Journal(Path(output) / JOURNAL_FILE)
    shared = {
        "versions": versions(),
        "settings": {name: value for name, value in vars(settings).items() if name not in _APART},
        "text": text.record(),
    }
    conditions: dict[Cell, dict[str, Any]] = {}
    outcomes: dict[Cell, Outcome] = {}
    waiting: list[_Job] = []
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for length in sizes:
        for info in infos:
            for task in chosen_tasks:
                for method in names:
                    cell = Cell(info.name, method, task, length)
                    conditions[cell] = {
                        "model": info.fingerprint,
                        "parameters": parameters[info.name, method],
                        **shared,
                        **({"longest": sizes[-1]} if task == PERPLEXITY else {}),  # the places follow from it
                    }
                    known = journal.find(cell.key, conditions[cell], _outcome)
                    if known is not None:
                        outcomes[cell] = known
                    else:
                        waiting.append(_Job(cell, info.source, settings, sizes[-1], threads))
    complete = True
    try:
        for cell, outcome in _run(waiting, jobs, settings, progress):
            journal.add(cell.key, conditions[cell], vars(outcome))
            outcomes[cell] = outcome
    except KeyboardInterrupt:
        complete = False
    return SuiteResult(infos, names, chosen_tasks, sizes, settings, text, outcomes, parameters, complete, revision())


def _outcome(result: Mapping[str, Any]) -> Outcome:
    scores = tuple(map(float, result["scores"]))
    depths = tuple(None if depth is None else float(depth) for depth in result["depths"])
    if len(depths) != len(scores) or not isinstance(result["refused"], str | None):
        raise ValueError("scores, depths and refused do not go together")
    return Outcome(scores, depths, float(result["seconds"]), result["refused"])


def _describe(name: str, source: str) -> ModelInfo:
    from mesart.graphs.config import MesaConfig  # noqa: PLC0415

    return ModelInfo(name, source, MesaConfig.from_model(source).train_length, fingerprint(source))


def _check_lengths(
    model: CheckpointModel, tasks: Iterable[str], lengths: Sequence[int], settings: Settings, text: Text
) -> None:
    writer = _writer(model, text)
    for name in tasks:
        least = len(model.prefix_ids) + settings.scored + 1
        if name != PERPLEXITY:
            least = find_task(name, settings.scale).minimum_length(writer)
        if lengths[0] < least:
            raise InputError(
                f"task {name} needs at least {least} tokens of the tokenizer of {model.source}, not {lengths[0]}; "
                "ask for longer prompts, or leave the task out"
            )


def _run(waiting: Sequence[_Job], jobs: int, settings: Settings, progress: bool) -> Iterator[tuple[Cell, Outcome]]:
    """Outcomes as they come. In tokens, not cells: the time that is left is then guessed well."""

    def tokens(job: _Job) -> int:
        return job.cell.length * (settings.places if job.cell.task == PERPLEXITY else settings.prompts)

    total = sum(map(tokens, waiting))
    with progress_bar(
        total=total, unit="tok", unit_scale=True, desc="suite", disable=not progress or not waiting
    ) as bar:
        if jobs == 1 or len(waiting) == 1:
            for job in waiting:
                bar.set_postfix_str(f"{job.cell.method}, {job.cell.task}, {job.cell.length} tokens")
                yield job.cell, run_cell(job)
                bar.update(tokens(job))
            return
        # An interrupt from the keyboard reaches the processes too: they end at once and without a word, unless this
        # process is one that ignores it (a shell's background job).
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        quietly = (signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
        others = set(multiprocessing.active_children())
        workers = min(jobs, len(waiting))
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal, quietly)
        try:
            running: dict[Future[Outcome], _Job] = {pool.submit(run_cell, job): job for job in waiting}
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    yield job.cell, future.result()
                    bar.set_postfix_str(f"{job.cell.method}, {job.cell.task}, {job.cell.length} tokens")
                    bar.update(tokens(job))
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


def run_cell(job: _Job) -> Outcome:
    """Runs one cell in this process, which keeps the model for the next."""
    import torch  # noqa: PLC0415

    from mesart.evaluation.methods.system import MethodSystem  # noqa: PLC0415

    torch.set_num_threads(job.threads)
    settings, cell = job.settings, job.cell
    model = _open(job.source, settings)
    start = time.monotonic()
    try:
        system = MethodSystem(model.model, parse_method(cell.method, model.train_length, job.max_tokens))
        if cell.task == PERPLEXITY:
            system.require_scores(cell.length, settings.scored)
    except MesaError as error:
        return Outcome(refused=str(error))
    text = _text(settings.text)
    depths: list[float | None] = []
    if cell.task == PERPLEXITY:
        scores = _losses(model, system, cell.length, job.max_tokens, settings, text)
        depths = [None] * len(scores)
    else:
        task, writer, scores = find_task(cell.task, settings.scale), _writer(model, text), []
        for index in range(settings.prompts):
            score, depth = _ask(model, system, task, writer, cell.length, settings, index)
            scores.append(score)
            depths.append(depth)
    return Outcome(tuple(scores), tuple(depths), round(time.monotonic() - start, 2))


def _ask(
    model: CheckpointModel,
    system: System,
    task: Task,
    writer: Writer,
    length: int,
    settings: Settings,
    index: int,
) -> tuple[float, float | None]:
    """The score of one prompt, which depends on task, seed, length and index only, and the depth of its answer."""
    rng = random.Random(f"eval-{task.name}-{settings.seed}-{length}-{index}")
    sample = task.sample(writer, length, rng, depth=(index + 0.5) / settings.prompts)
    answer = system.generate(sample.input_ids, sample.new_tokens, model.tokenizer.eos_token_ids)
    depth = sample.facts.get("depth")
    return task.score(sample, model.tokenizer.decode(answer)), None if depth is None else round(float(depth), 4)


def _losses(
    model: CheckpointModel, system: System, length: int, longest: int, settings: Settings, text: Text
) -> list[float]:
    """Mean loss of the last tokens at each place, the same places for all methods and lengths."""
    stream = _stream(model, text)
    prefix = list(model.prefix_ids)
    losses = []
    for end in places_in(len(stream), longest - len(prefix), settings.places, settings.seed):
        body = stream[end - (length - len(prefix)) : end]
        losses.append(round(-float(system.log_probs(prefix + body, settings.scored).mean()), 6))
    return losses


@lru_cache(1)
def _open(source: str, settings: Settings) -> CheckpointModel:
    from transformers.utils import logging  # noqa: PLC0415

    quiet: Any = logging.disable_progress_bar  # of transformers' loading, which each process does
    quiet()
    return CheckpointModel.load(source, settings.dtype, settings.device, trust_remote_code=settings.trust_remote_code)


_text = lru_cache(1)(held_out_text)  # megabytes, read once a process and not once a cell


@lru_cache(1)
def _writer(model: CheckpointModel, text: Text) -> Writer:
    # The same few sentences are encoded again and again.
    return Writer(lru_cache(4096)(model.encode), tuple(model.prefix_ids), text.content)


@lru_cache(1)
def _stream(model: CheckpointModel, text: Text) -> list[int]:
    return model.encode(text.content)


__all__ = ["JOURNAL_FILE", "PERPLEXITY", "Cell", "ModelInfo", "Outcome", "Settings", "SuiteResult", "run_suite"]

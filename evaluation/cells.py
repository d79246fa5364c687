"""A cell of the suite's grid: one method on one model, task and length, run in whatever process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from mesart.evaluation.arguments import require_device, require_seed, require_whole
from mesart.evaluation.held_out import Text, held_out_text
from mesart.evaluation.journal import Key
from mesart.evaluation.measure import Examiner
from mesart.evaluation.systems import Model, System, open_model
from mesart.evaluation.systems.model import is_bundle
from mesart.evaluation.tasks import find_task
from mesart.graphs.errors import MesaError

PERPLEXITY: Final = "perplexity"
"""The one task without answers: scored are the last tokens of a text, in nats."""


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
    """Of checkpoints; a bundle has its own."""
    device: str = "cpu"
    """Of PyTorch."""
    backend: str = "auto"
    """What runs the graphs of bundles."""
    trust_remote_code: bool = False
    """Run the Python code that the models bring, if they do."""

    def require(self) -> None:
        """Raises a :class:`MesaError` if one of them is out of its range."""
        for name in ("prompts", "places", "scored"):
            require_whole(name, getattr(self, name))
        require_seed(self.seed)
        if self.device != "cpu":  # PyTorch is slow to import
            require_device(self.device)


@dataclass(frozen=True)
class Job:
    """All that a process needs to run a cell."""

    cell: Cell
    source: str
    settings: Settings
    max_tokens: int
    threads: int

    @property
    def tokens(self) -> int:
        """Of all its prompts: what it costs, roughly."""
        count = self.settings.places if self.cell.task == PERPLEXITY else self.settings.prompts
        return self.cell.length * count


def run_cell(job: Job) -> Outcome:
    """Runs one cell in this process, which keeps the model for the next."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(job.threads)
    settings, cell = job.settings, job.cell
    model = opened(job.source, settings, job.threads)
    examiner = examiner_of(model, text_of(settings))
    start = time.monotonic()
    try:
        system = model.method(cell.method, job.max_tokens)
        if cell.task == PERPLEXITY:
            system.require_scores(cell.length, settings.scored)
        else:
            system.logits_of(cell.length)
    except MesaError as error:
        return Outcome(refused=str(error))
    depths: tuple[float | None, ...]
    if cell.task == PERPLEXITY:
        scores = _losses(examiner, system, job)
        depths = (None,) * len(scores)
    else:
        scores, depths = _answers(examiner, system, job)
    return Outcome(tuple(scores), depths, round(time.monotonic() - start, 2))


def _answers(examiner: Examiner, system: System, job: Job) -> tuple[list[float], tuple[float | None, ...]]:
    """The score of each prompt, and the depth of its answer."""
    settings, cell = job.settings, job.cell
    task, answers = find_task(cell.task, settings.scale), []
    for index in range(settings.prompts):
        depth = (index + 0.5) / settings.prompts
        sample = task.prompt(examiner.writer, cell.length, settings.seed, index, depth)
        answers.append(examiner.ask(system, task, sample))
    return [answer.score for answer in answers], tuple(answer.depth for answer in answers)


def _losses(examiner: Examiner, system: System, job: Job) -> list[float]:
    """The mean loss of the last tokens at each place, the same places for all methods and lengths."""
    settings = job.settings
    ends = examiner.places(job.max_tokens, settings.places, settings.seed)
    return [round(examiner.loss(system, end, job.cell.length, settings.scored), 6) for end in ends]


@lru_cache(1)
def opened(source: str, settings: Settings, threads: int) -> Model:
    """The model of a run's settings; the last one is kept."""
    from transformers.utils import logging  # noqa: PLC0415

    quiet: Any = logging.disable_progress_bar  # of transformers' loading, which each process does
    quiet()
    return open_model(
        source,
        settings.backend if is_bundle(source) else "auto",
        settings.dtype,
        settings.device,
        threads,
        trust_remote_code=settings.trust_remote_code,
    )


_held_out_text = lru_cache(1)(held_out_text)  # megabytes, read once a process and not once a cell


def text_of(settings: Settings) -> Text:
    """The text of a run's settings, read once a process."""
    return _held_out_text(settings.text)


@lru_cache(1)
def examiner_of(model: Model, text: Text) -> Examiner:
    """The last one is kept: encoding a long text takes seconds."""
    return Examiner(model.tokenizer, text)


__all__ = ["PERPLEXITY", "Cell", "Job", "Outcome", "Settings", "examiner_of", "opened", "run_cell", "text_of"]

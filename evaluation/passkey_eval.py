"""The passkey evaluation: how often each system finds the key, by length and filler. The suite's task, in one table."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

from mesart.evaluation.arguments import require_lengths, require_seed, require_whole
from mesart.evaluation.held_out import Text, held_out_text
from mesart.evaluation.measure import Answer, Examiner
from mesart.evaluation.passkey import Filler
from mesart.evaluation.progress import progress_bar
from mesart.evaluation.report import table, times, wilson_interval
from mesart.evaluation.result import Result, subject_record
from mesart.evaluation.systems import SYSTEMS, OpenSystems, Source, Subject, open_systems
from mesart.evaluation.tasks.passkey import FILLERS, MOST_PROMPTS, NumberedPasskey
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig

_MAX_DIGITS: Final = 1000
"""Of a key; Python reads no numbers of many thousands."""


@dataclass(frozen=True)
class WrongAnswer:
    """A prompt whose key was not found."""

    depth: float
    expected: str
    got: str


@dataclass(frozen=True)
class PasskeyCell:
    """One system on the prompts of one length and filler (and depth, if depths were asked for)."""

    system: str
    length: int
    """Tokens asked for; a prompt may have a few fewer."""
    filler: Filler
    depth: float | None
    """Of all the prompts; ``None`` if they are spread evenly over the depths."""
    prompts: int
    correct: int
    wrong: tuple[WrongAnswer, ...]

    @property
    def rate(self) -> float:
        return self.correct / self.prompts

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the rate."""
        return wilson_interval(self.correct, self.prompts)


@dataclass(frozen=True)
class PasskeyResult(Result):
    """What :func:`run_passkey` found."""

    subject: Subject
    seed: int
    prompts: int
    """Of each cell."""
    digits: int
    text: Text | None
    """What random filler was cut from."""
    cells: tuple[PasskeyCell, ...]
    complete: bool
    """False if the run was interrupted; ``cells`` are those that were finished."""
    seconds: float

    def pooled(self) -> list[PasskeyCell]:
        """The cells with all depths taken together."""
        groups: dict[tuple[str, int, Filler], list[PasskeyCell]] = {}
        for cell in self.cells:
            groups.setdefault((cell.system, cell.length, cell.filler), []).append(cell)
        return [_pool(group) for group in groups.values()]

    def table(self) -> str:
        """The rates, a row for each length (and depth, if depths were asked for): Markdown that reads well as it is."""
        fillers = list(dict.fromkeys(cell.filler for cell in self.cells))
        columns = [(system, filler) for system in self.subject.engines for filler in fillers]
        rates = {(c.length, c.depth, c.system, c.filler): f"{c.rate:.2f}" for c in self.cells}
        places = list(dict.fromkeys((cell.length, cell.depth) for cell in self.cells))
        by_depth = any(depth is not None for _, depth in places)
        rows = [
            [
                f"{length:,}",
                times(length, self.subject.config.train_length),
                *([f"{depth:g}"] if by_depth else []),
                *(rates.get((length, depth, *column), "") for column in columns),
            ]
            for length, depth in places
        ]
        header = ["tokens", "of T_r", *(["depth"] if by_depth else []), *(f"{s}, {f}" for s, f in columns)]
        title = (
            f"Passkey: share of keys of {self.digits} digits that were found exactly, by system and filler; "
            f"{self.prompts} prompts each, seed {self.seed}, {self.subject.source}"
        )
        note = "" if self.complete else "\n\nInterrupted: what was finished by then."
        return f"{title}\n\n{table(header, rows)}{note}"

    def record(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "prompts": self.prompts,
            "digits": self.digits,
            "text": self.text and self.text.record(),
            "seconds": round(self.seconds, 1),
            "cells": [{**asdict(c), "rate": c.rate, "interval95": c.interval} for c in self.cells],
        }
        return subject_record("passkey", self.subject, self.seed, self.complete, fields)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the rates against the length as a picture; its format follows the suffix, such as ``.png``."""
        from mesart.evaluation.plots import plot_passkey  # noqa: PLC0415  (matplotlib only where it is needed)

        plot_passkey(self, path)


def run_passkey(
    source: Source,
    *,
    systems: Sequence[str] = SYSTEMS,
    lengths: Sequence[int] | None = None,
    fillers: Sequence[str] = FILLERS,
    prompts: int = 20,
    depths: Sequence[float] | None = None,
    seed: int = 0,
    backend: str = "auto",
    text: str | os.PathLike[str] | None = None,
    digits: int = 5,
    config: MesaConfig | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> PasskeyResult:
    """Hides keys in prompts that training never used, and asks each system for them; the same prompts for all.

    A key counts as found if it is the first number of the answer, whole and with no digit more. An interrupt
    (Ctrl-C) ends the run; the result then holds the cells that were finished.

    Args:
        source: a bundle, a checkpoint's folder or a hub id.
        systems: ``mesa``, ``origin`` or both.
        lengths: of the prompts in tokens; if left out, 1, 2, 4, ... 32 times the trained length, as far as a bundle
            goes (a checkpoint: 16 times).
        fillers: names of :data:`~mesart.evaluation.tasks.passkey.FILLERS`.
        prompts: for each length, filler and system, and for each of ``depths``.
        depths: shares of the filler before the key, 0 to 1; if left out, the prompts are spread evenly over them.
        seed: of the prompts, in a namespace that training does not draw from.
        backend: what runs a bundle's graphs.
        text: a file from which random filler is cut; library text that the demo model never saw, if left out.
        digits: of a key.
        config: Mesa's, for a checkpoint.
        progress: show a progress bar on stderr.
        trust_remote_code: run the Python code that the source brings, if it does.

    Raises:
        MesaError: an option out of its range, or a length that the task or the bundle cannot have, before any run.
    """
    _check_options(lengths, fillers, prompts, depths, digits, seed, text)
    filler_text = held_out_text(text) if "random" in fillers else None
    with open_systems(source, systems, backend, config, trust_remote_code=trust_remote_code) as opened:
        examiner = Examiner(opened.tokenizer, filler_text)
        tasks = {filler: NumberedPasskey(filler, digits) for filler in cast(list[Filler], list(dict.fromkeys(fillers)))}
        chosen = _lengths(opened, lengths, max(task.minimum_length(examiner.writer) for task in tasks.values()))
        names = list(opened.systems)
        spread: Sequence[float | None] = depths or (None,)
        grid = [(length, filler, depth) for length in chosen for filler in tasks for depth in dict.fromkeys(spread)]
        cells: list[PasskeyCell] = []
        complete, start = True, time.monotonic()
        total = prompts * len(names) * sum(length for length, _, _ in grid)
        try:
            # In tokens, not prompts: the time that is left is then guessed well.
            with progress_bar(total=total, unit="tok", unit_scale=True, desc="passkey", disable=not progress) as bar:
                for length, filler, depth in grid:
                    task = tasks[filler]
                    batch = [
                        task.prompt(
                            examiner.writer, length, seed, index, (index + 0.5) / prompts if depth is None else depth
                        )
                        for index in range(prompts)
                    ]
                    for name in names:
                        bar.set_postfix_str(f"{name}, {length} tokens, {filler} filler")
                        wrong = []
                        for prompt in batch:
                            wrong += _wrong(examiner.ask(opened.systems[name], task, prompt))
                            bar.update(length)
                        correct = prompts - len(wrong)
                        cells.append(PasskeyCell(name, length, filler, depth, prompts, correct, tuple(wrong)))
        except KeyboardInterrupt:
            complete = False
        seconds = time.monotonic() - start
    return PasskeyResult(opened.subject, seed, prompts, digits, filler_text, tuple(cells), complete, seconds)


def _wrong(answer: Answer) -> list[WrongAnswer]:
    """Nothing if the answer is right."""
    if answer.score == 1:
        return []
    return [WrongAnswer(round(float(answer.sample.facts["depth"]), 4), answer.sample.references[0], answer.said)]


def _lengths(opened: OpenSystems, lengths: Sequence[int] | None, shortest: int) -> list[int]:
    if lengths is None:
        lengths = [length for length in opened.default_lengths if length >= shortest] or [shortest]
    chosen = sorted(set(lengths))
    if not chosen:
        raise InputError("name a length")
    if chosen[0] < shortest:
        raise InputError(
            f"a length of {chosen[0]} tokens is too short: a passkey prompt takes at least {shortest} tokens of this "
            "model's tokenizer"
        )
    for system in opened.systems.values():
        system.logits_of(chosen[-1])
    return chosen


def _check_options(
    lengths: Sequence[int] | None,
    fillers: Sequence[str],
    prompts: int,
    depths: Sequence[float] | None,
    digits: int,
    seed: int,
    text: str | os.PathLike[str] | None,
) -> None:
    for filler in fillers:
        if filler not in FILLERS:
            raise InputError(f"unknown filler {filler!r}; there are {', '.join(FILLERS)}")
    if not fillers:
        raise InputError(f"name a filler; there are {', '.join(FILLERS)}")
    require_whole("prompts", prompts, most=MOST_PROMPTS)
    require_lengths(lengths)
    require_seed(seed)
    for depth in depths or ():
        if not 0 <= depth <= 1:
            raise InputError(f"a depth is a share between 0 and 1, not {depth:g}")
    if not 1 <= digits <= _MAX_DIGITS:
        raise InputError(f"a key of {digits} digits cannot be; it has at least 1, and at most {_MAX_DIGITS}")
    if text is not None and "random" not in fillers:
        raise InputError("a text is what random filler is cut from; ask for that filler too, or leave the text out")


def _pool(cells: Sequence[PasskeyCell]) -> PasskeyCell:
    first = cells[0]
    wrong = tuple(answer for cell in cells for answer in cell.wrong)
    prompts, correct = sum(cell.prompts for cell in cells), sum(cell.correct for cell in cells)
    depth = first.depth if len(cells) == 1 else None
    return PasskeyCell(first.system, first.length, first.filler, depth, prompts, correct, wrong)


__all__ = ["FILLERS", "PasskeyCell", "PasskeyResult", "WrongAnswer", "run_passkey"]

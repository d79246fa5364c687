"""The perplexity evaluation: the same held-out tokens, with more and more text before them."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mesart.evaluation.arguments import require_lengths, require_seed, require_whole
from mesart.evaluation.held_out import Text, held_out_text
from mesart.evaluation.measure import Examiner
from mesart.evaluation.progress import progress_bar
from mesart.evaluation.report import Z95, table, times
from mesart.evaluation.result import Result, subject_record
from mesart.evaluation.systems import SYSTEMS, OpenSystems, Source, Subject, open_systems
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig


@dataclass(frozen=True)
class PerplexityCell:
    """One system with contexts of one length."""

    system: str
    length: int
    """Tokens of a text, those that are scored included."""
    losses: tuple[float, ...]
    """Mean negative log-probability of the scored tokens at each place, in nats a token."""

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.losses))


@dataclass(frozen=True)
class PerplexityResult(Result):
    """What :func:`run_perplexity` found."""

    subject: Subject
    seed: int
    tokens: int
    """Tokens scored at each place."""
    places: int
    text: Text
    cells: tuple[PerplexityCell, ...]
    complete: bool
    """False if the run was interrupted; ``cells`` are those that were finished."""
    seconds: float

    def shortest(self, system: str) -> PerplexityCell:
        """A system's cell with the shortest context."""
        return min((cell for cell in self.cells if cell.system == system), key=lambda cell: cell.length)

    def ratio(self, cell: PerplexityCell) -> float:
        """The perplexity of a cell over that of the same system, for the same tokens, with the shortest context."""
        return cell.perplexity / self.shortest(cell.system).perplexity

    def ratio_interval(self, cell: PerplexityCell) -> tuple[float, float]:
        """The 95% interval of the ratio, from its spread over the places; one place tells nothing: the ratio itself.

        Places are compared each with itself, so that it does not matter that some are harder to predict than others.
        """
        pairs = zip(cell.losses, self.shortest(cell.system).losses, strict=True)
        changes = [loss - before for loss, before in pairs]
        spread = statistics.stdev(changes) if len(changes) > 1 else 0.0
        half, ratio = Z95 * spread / math.sqrt(len(changes)), self.ratio(cell)
        return ratio * math.exp(-half), ratio * math.exp(half)

    def table(self) -> str:
        """The perplexities, a row for each length, as Markdown that reads well as it is."""
        names = list(dict.fromkeys(cell.system for cell in self.cells))
        found = {(c.length, c.system): (f"{c.perplexity:.2f}", f"x{self.ratio(c):.2f}") for c in self.cells}
        rows = [
            [
                f"{length:,}",
                times(length, self.subject.config.train_length),
                *(text for name in names for text in found.get((length, name), ("", ""))),
            ]
            for length in dict.fromkeys(cell.length for cell in self.cells)
        ]
        header = ["context", "of T_r", *(title for name in names for title in (name, "change"))]
        title = (
            f"Perplexity of the same {self.tokens} tokens at each of {self.places} places, with longer and longer "
            f"contexts (change: against the shortest); seed {self.seed}, {self.subject.source}"
        )
        note = "" if self.complete else "\n\nInterrupted: what was finished by then."
        return f"{title}\n\n{table(header, rows)}{note}"

    def record(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "tokens": self.tokens,
            "places": self.places,
            "text": self.text.record(),
            "seconds": round(self.seconds, 1),
            "cells": [
                {
                    "system": c.system,
                    "length": c.length,
                    "perplexity": c.perplexity,
                    "ratio_to_shortest": self.ratio(c),
                    "ratio_interval95": self.ratio_interval(c),
                    "losses": [round(loss, 6) for loss in c.losses],
                }
                for c in self.cells
            ],
        }
        return subject_record("perplexity", self.subject, self.seed, self.complete, fields)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the perplexity against the length as a picture; its format follows the suffix, such as ``.png``."""
        from mesart.evaluation.plots import plot_perplexity  # noqa: PLC0415  (matplotlib only where it is needed)

        plot_perplexity(self, path)


def run_perplexity(
    source: Source,
    *,
    systems: Sequence[str] = SYSTEMS,
    lengths: Sequence[int] | None = None,
    places: int = 32,
    tokens: int = 32,
    seed: int = 0,
    backend: str = "auto",
    text: str | os.PathLike[str] | None = None,
    config: MesaConfig | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> PerplexityResult:
    """Scores the same tokens of a held-out text with contexts of several lengths, all ending at the same places.

    What differs between two lengths is then the context alone. An interrupt (Ctrl-C) ends the run; the result then
    holds the cells that were finished.

    Args:
        source: a bundle, a checkpoint's folder or a hub id.
        systems: ``mesa``, ``origin`` or both.
        lengths: of the texts in tokens, the scored ones included; if left out, 1, 2, 4, ... 32 times the
            trained length, as far as a bundle goes (a checkpoint: 16 times).
        places: number of random places in the text.
        tokens: scored at each place; Mesa gives logits of the tail's tokens only, at least ``tail_min``.
        seed: of the places.
        backend: what runs a bundle's graphs.
        text: a file to use instead of library text that the demo model never saw.
        config: Mesa's, for a checkpoint.
        progress: show a progress bar on stderr.
        trust_remote_code: run the Python code that the source brings, if it does.

    Raises:
        MesaError: an option out of its range, a text too short, or a length that the task or the bundle cannot have;
            before anything runs.
    """
    require_whole("places", places)
    require_whole("tokens", tokens)
    require_lengths(lengths)
    require_seed(seed)
    scored = held_out_text(text)
    with open_systems(source, systems, backend, config, trust_remote_code=trust_remote_code) as opened:
        examiner = Examiner(opened.tokenizer, scored)
        chosen = _lengths(opened, lengths, len(examiner.writer.prefix_ids) + tokens + 1, tokens)
        ends = examiner.places(chosen[-1], places, seed)
        cells: list[PerplexityCell] = []
        complete, start = True, time.monotonic()
        try:
            # In tokens, not texts: the time that is left is then guessed well.
            total = len(ends) * len(opened.systems) * sum(chosen)
            with progress_bar(total=total, unit="tok", unit_scale=True, desc="perplexity", disable=not progress) as bar:
                for length in chosen:
                    for name, system in opened.systems.items():
                        bar.set_postfix_str(f"{name}, {length} tokens")
                        losses = []
                        for end in ends:
                            losses.append(examiner.loss(system, end, length, tokens))
                            bar.update(length)
                        cells.append(PerplexityCell(name, length, tuple(losses)))
        except KeyboardInterrupt:
            complete = False
        seconds = time.monotonic() - start
    return PerplexityResult(opened.subject, seed, tokens, len(ends), scored, tuple(cells), complete, seconds)


def _lengths(opened: OpenSystems, lengths: Sequence[int] | None, shortest: int, tokens: int) -> list[int]:
    chosen = sorted(set(opened.default_lengths if lengths is None else lengths))
    if not chosen:
        raise InputError("name a length")
    if chosen[0] < shortest:
        raise InputError(
            f"a context of {chosen[0]} tokens is too short to score {tokens}; it takes at least {shortest}"
        )
    for system in opened.systems.values():
        for length in reversed(chosen):
            system.require_scores(length, tokens)
    return chosen


__all__ = ["PerplexityCell", "PerplexityResult", "run_perplexity"]

"""What is measured of a configuration: the time to the first token, passkeys, and the loss of held-out tokens.

All configurations get the same prompts and the same places, so they are compared place by place.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from mesart.evaluation.arguments import require_lengths, require_seed
from mesart.evaluation.held_out import held_out_text
from mesart.evaluation.journal import Journal, Key
from mesart.evaluation.machine import cpu_name
from mesart.evaluation.measure import Examiner
from mesart.evaluation.provenance import versions
from mesart.evaluation.systems import Source, System
from mesart.evaluation.tasks.passkey import NumberedPasskey
from mesart.evaluation.tuning.report import Measured, Tried
from mesart.evaluation.tuning.subject import open_tunable
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig
from mesart.graphs.method.plan import Plan

DIGITS: Final = 5
"""Of a passkey."""


class Bench:
    """A model whose configuration is free, the prompts and places that judge it, and the journal of what is known.

    Args:
        most: the most prompts and places of each length that are ever asked for; fewer are some of these.
        source, start, lengths, seed, backend, text, journal, trust_remote_code: of :func:`~mesart.evaluation.tune`.

    Raises:
        MesaError: an option out of its range, or a model or text that cannot be used.
    """

    def __init__(
        self,
        source: Source,
        start: MesaConfig | None,
        lengths: Sequence[int] | None,
        most: tuple[int, int],
        seed: int,
        backend: str,
        text: str | os.PathLike[str] | None,
        journal: str | os.PathLike[str] | None,
        trust_remote_code: bool,
    ) -> None:
        require_lengths(lengths)
        require_seed(seed)
        self._journal = None if journal is None else Journal(journal)
        self.text, self._seed, self._most = held_out_text(text), seed, most
        self._model = open_tunable(source, start, backend, trust_remote_code=trust_remote_code)
        self.subject, self.start = self._model.subject, self._model.subject.config
        train_length = self.start.train_length
        self.lengths = tuple(sorted(set([4 * train_length, 16 * train_length] if lengths is None else lengths)))
        self.scored = min(32, self.start.tail_min)
        self._examiner, self._task = Examiner(self._model.tokenizer, self.text), NumberedPasskey("random", DIGITS)
        shortest = self._task.minimum_length(self._examiner.writer)
        if self.lengths[0] < shortest:
            raise InputError(
                f"a length of {self.lengths[0]} tokens is too short: a passkey prompt takes at least {shortest} tokens "
                "of this model's tokenizer"
            )
        self._examiner.places(self.lengths[-1], max(1, most[1]), seed)  # long enough, or an error now

    def require(self, config: MesaConfig) -> None:
        """Raises a :class:`MesaError` if the configuration cannot run all lengths."""
        for length in self.lengths:
            self._check(config, length)

    def judge(self, config: MesaConfig, stage: str, prompts: int, places: int, runs: int) -> Tried:
        """One configuration at all lengths."""
        self.require(config)
        return Tried(config, stage, tuple(self.measure(config, n, prompts, places, runs) for n in self.lengths))

    def measure(self, config: MesaConfig, length: int, prompts: int, places: int, runs: int) -> Measured:
        """One configuration at one length, with so many timed ``runs``, from the journal if it is known.

        Raises:
            MesaError: the configuration cannot run this length.
        """
        self._check(config, length)
        key: Key = (json.dumps(config.to_dict(), sort_keys=True), length, prompts, places, runs)
        conditions = {
            "model": self._model.fingerprint,
            "engine": self.subject.engines["mesa"],
            "machine": cpu_name(),
            "seed": self._seed,
            "most": list(self._most),  # the few of the search are some of these
            "longest": self.lengths[-1],
            "scored": self.scored,
            "text": self.text.record(),
            "versions": versions(),
        }
        known = self._journal.find(key, conditions, _measured) if self._journal is not None else None
        if known is not None:
            return known
        measured = self._measure(config, length, prompts, places, runs)
        if self._journal is not None:
            self._journal.add(key, conditions, dataclasses.asdict(measured))
        return measured

    def _measure(self, config: MesaConfig, length: int, prompts: int, places: int, runs: int) -> Measured:
        clock = time.monotonic()
        system, examiner = self._model.run(config, length), self._examiner
        found = 0.0
        for index in spread(prompts, self._most[0]):
            depth = (index + 0.5) / self._most[0]
            prompt = self._task.prompt(examiner.writer, length, self._seed, index, depth)
            found += examiner.ask(system, self._task, prompt).score
        losses: list[float] = []
        if places:
            ends = examiner.places(self.lengths[-1], self._most[1], self._seed)
            losses += (examiner.loss(system, ends[i], length, self.scored) for i in spread(places, self._most[1]))
        # Other texts in each run: none is one that was computed before.
        ends = examiner.places(self.lengths[-1], 1 + runs, self._seed + 1)
        first = first_token(system, [examiner.text_at(end, length) for end in ends])
        return Measured(length, round(found), prompts, tuple(losses), first, round(time.monotonic() - clock, 3))

    def _check(self, config: MesaConfig, length: int) -> None:
        plan = Plan.of(config, length - 1)
        Plan.of(config, length)
        if len(plan.tail) < self.scored:
            raise InputError(
                f"the tail of a text of {length} tokens is {len(plan.tail)} tokens, and {self.scored} are scored"
            )


def first_token(system: System, prompts: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Seconds from a prompt to its first logits, of all prompts but the first: engines compile on their first run."""
    found = []
    for prompt in prompts:
        clock = time.perf_counter()
        system.prefill(prompt, 1)
        found.append(round(time.perf_counter() - clock, 6))
    return tuple(found[1:])


def spread(count: int, most: int) -> Iterator[int]:
    """``count`` of ``most`` indices, evenly: few prompts are some of the many, at all depths.

    Raises:
        MesaError: there are not so many.
    """
    if count > most:
        raise InputError(f"the search has {count} prompts or places, more than the final's {most}; ask for fewer there")
    return ((2 * index + 1) * most // (2 * count) for index in range(count))


def _measured(found: Mapping[str, Any]) -> Measured:
    """What the journal keeps of it."""
    length, correct, prompts = (int(found[name]) for name in ("length", "correct", "prompts"))
    losses, first = (tuple(map(float, found[name])) for name in ("losses", "first_token"))
    if not 0 <= correct <= prompts or not first:
        raise ValueError("it counts no passkeys, or has no times")
    return Measured(length, correct, prompts, losses, first, float(found["seconds"]))


__all__ = ["DIGITS", "Bench", "first_token", "spread"]

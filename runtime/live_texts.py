"""The texts that a model is at, a row each, and the calls that change them: all rows or none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from mesart.graphs.errors import InputError
from mesart.graphs.method.plan import Plan
from mesart.runtime.backends import Array
from mesart.runtime.chunk_store.stored import StoredChunks
from mesart.runtime.engine import Engine, Turn
from mesart.runtime.memory import enough_memory
from mesart.runtime.prompts import PromptIds
from mesart.runtime.reading import plan_of_turn
from mesart.runtime.runners.runner import Logits
from mesart.runtime.sampling import Sampler, SamplingConfig
from mesart.runtime.sequence import Sequence
from mesart.runtime.usage import Usage

Progress: TypeAlias = Callable[[int, int], None]
"""Called while a prompt is read, with the tokens that are there and those that there are to be."""


@dataclass(frozen=True)
class ReadOptions:
    """How prompts are read."""

    stored: StoredChunks | None
    """Where chunks are that were computed before."""
    reuses: bool = True
    """Whether a live text that differs in its tail only goes on with another."""
    progress: Progress | None = None


class LiveTexts:
    """The rows of one model on its engine.

    A call that fails leaves the texts as they were before; a failed :meth:`prefill` leaves none. Calls from several
    threads wait for each other.

    Attributes:
        usage: what became of the last prompt's tokens, of all rows together; ``None`` before the first.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self._manifest = engine, engine.manifest
        self.usage: Usage | None = None
        self._process = os.getpid()
        self._rows: list[Sequence] = []
        self._changes = 0  # counts the calls that changed the texts

    def close(self) -> bool:
        """Frees the engine and all texts; false in a process that was forked since, whose parent they are."""
        if os.getpid() != self._process:
            return False
        self.engine.close()
        return True

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread computes meanwhile."""
        if os.getpid() != self._process:  # before the lock, which another thread of the parent may have held
            raise InputError(
                "the process was forked after the model was loaded, and an engine's threads do not survive that; "
                "load the model in the new process"
            )
        with self.engine.lock:
            self.engine.require_open()  # first: texts may have been lost before
            with enough_memory():
                yield

    @property
    def rows(self) -> list[Sequence]:
        """The texts; none before the first prompt."""
        return list(self._rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of the texts, a number for each."""
        return [len(text) for text in self._rows] or [0]

    def clear(self) -> None:
        """Forgets the texts, and frees what they hold."""
        with self.alone():
            self._forget()
            self.engine.store.trim()
            self._changes += 1

    def _forget(self) -> None:
        for text in self._rows:
            self.engine.close_text(text)
        self._rows = []

    def snapshot(self, row: int) -> tuple[list[Array], list[Array]]:
        """Copies of a text's keys and values, ``[K, tokens, D]``, a layer each, as the engine keeps them."""
        with self.alone():
            return self.engine.store.read(self._rows[row].require_kv())

    def prefill(self, prompts: list[PromptIds], how: ReadOptions, *, all_logits: bool = False) -> Logits:
        """New texts; see :meth:`~mesart.runtime.MesaModel.prefill`."""
        with self.alone():
            turns = self._new_turns(prompts, how, all_logits=all_logits)
            return self._computed(self._begin(turns), undo_to_nothing=True)

    def extend(self, prompts: list[PromptIds], how: ReadOptions, *, all_logits: bool = False) -> Logits:
        """More tokens of each text; see :meth:`~mesart.runtime.MesaModel.extend`."""
        with self.alone():
            return self._computed(self._begin(self._later_turns(prompts, how, all_logits=all_logits)))

    def step(self, tokens: list[PromptIds], how: ReadOptions) -> Logits:
        """One more token of each text, of which there are some."""
        with self.alone():
            if not any(self.lengths):
                raise InputError("step needs a prompt in the cache; call prefill first")
            return self._computed(self._begin(self._later_turns(tokens, how)))

    def generate(
        self,
        prompts: list[PromptIds],
        count: int,
        choice: SamplingConfig,
        ends: frozenset[int],
        how: ReadOptions,
        *,
        append: bool,
        ended: list[bool],
    ) -> Iterator[list[int | None]]:
        """Up to ``count`` tokens of each row, all in step; see :meth:`~mesart.runtime.MesaModel.generate_ids`.

        Args:
            ends: tokens that end a row.
            ended: of each row, whether it has; the caller may end more of them between two tokens.
        """
        turns: list[Turn] = []
        changes = 0
        try:
            for index in range(count):
                with self.alone():
                    if index == 0:
                        turns = self._begin_generating(prompts, count, choice, ends, how, append=append)
                    elif self._changes != changes:
                        raise InputError(
                            "another call has changed the cache since this generation's last token; finish one "
                            "generation before the next, give both prompts to one, or load the model twice"
                        )
                    chosen = self._next_tokens(
                        turns, ended, None if index else how.progress, new=index == 0 and not append
                    )
                    if index == 0:
                        self._note_usage(turns)
                    changes = self._changes
                yield chosen
                if all(ended):
                    return
        finally:
            if os.getpid() == self._process:
                self.engine.settle(turns)

    def _begin_generating(
        self,
        prompts: list[PromptIds],
        count: int,
        choice: SamplingConfig,
        ends: frozenset[int],
        how: ReadOptions,
        *,
        append: bool,
    ) -> list[Turn]:
        turns = self._later_turns(prompts, how) if append else self._new_turns(prompts, how)
        for row, turn in enumerate(turns):
            turn.sampler = Sampler(replace(choice, seed=None if choice.seed is None else choice.seed + row))
            turn.max_new_tokens, turn.ends, turn.goes_on = count, ends, True
            turn.sampler.note([*turn.text.ids, *turn.text.shown, *turn.ids])
        return self._begin(turns)

    def _next_tokens(
        self, turns: list[Turn], ended: list[bool], progress: Progress | None, *, new: bool
    ) -> list[int | None]:
        """The next token of each turn that has not ended, computed together."""
        waiting = [turn for turn, end in zip(turns, ended, strict=True) if not end]
        for turn, end in zip(turns, ended, strict=True):
            if end:
                self.engine.abort(turn)
        for turn in waiting:
            turn.allowed = len(turn.tokens) + 1
        try:
            self._run(waiting, lambda turn: turn.is_paused, progress)
        except BaseException:
            self._undo(turns if new else waiting, to_nothing=new)
            self._changes += 1
            raise
        chosen = [turn.tokens[-1] if turn in waiting else None for turn in turns]
        for row, turn in enumerate(turns):
            ended[row] = ended[row] or (turn.tokens[-1] in turn.ends)
        return chosen

    def _stop_generating(self, text: Sequence) -> None:
        """A generation that nobody goes on with gives way to the next call."""
        turn = text.turn
        if turn is not None:
            self.engine.abort(turn)
            self.engine.settle([turn])

    def _new_turns(self, prompts: list[PromptIds], how: ReadOptions, *, all_logits: bool = False) -> list[Turn]:
        """Turns of new texts, which take the place of the live ones; those are forgotten."""
        plans = [plan_of_turn(self._manifest, None, len(prompt.ids), prompt.edges) for prompt in prompts]
        wanted = self._wanted(plans, prompts, all_logits)
        kept = self._kept_texts(plans, prompts) if how.reuses else [None] * len(prompts)
        for text in self._rows:
            if not any(text is other for other in kept):
                self.engine.close_text(text)
        self._rows = [text for text in kept if text is not None]
        self._rows = [self.engine.open_text() if text is None else text for text in kept]
        rest = [
            PromptIds(prompt.ids[len(text) :], prompt.edges) for text, prompt in zip(self._rows, prompts, strict=True)
        ]
        return self._turns(rest, wanted, how.stored)

    def _kept_texts(self, plans: list[Plan], prompts: list[PromptIds]) -> list[Sequence | None]:
        """For each prompt, a live text that differs from it in its tail at most, and has lost that."""
        left, kept = list(self._rows), []
        for plan, prompt in zip(plans, prompts, strict=True):
            same = next((text for text in left if text.begins(plan, prompt.ids)), None)
            if same is not None:
                self._stop_generating(same)
                left = [text for text in left if text is not same]
                self.engine.cut_text(same, plan.tail.start)
            kept.append(same)
        return kept

    def _later_turns(self, prompts: list[PromptIds], how: ReadOptions, *, all_logits: bool = False) -> list[Turn]:
        """Turns of the live texts; whatever is wrong with one of them is said before anything is changed."""
        self._require_texts(len(prompts))
        for text in self._rows:
            text.require_kv()
        pairs = zip(self._rows, prompts, strict=True)
        plans = [plan_of_turn(self._manifest, text, len(prompt.ids)) for text, prompt in pairs]
        return self._turns(prompts, self._wanted(plans, prompts, all_logits), how.stored)

    def _turns(self, prompts: list[PromptIds], wanted: int, stored: StoredChunks | None) -> list[Turn]:
        return [
            Turn(text, np.array(prompt.ids, np.int64), wanted, keep_undo=True, edges=prompt.edges, stored=stored)
            for text, prompt in zip(self._rows, prompts, strict=True)
        ]

    def _wanted(self, plans: list[Plan], prompts: list[PromptIds], all_logits: bool) -> int:
        """Of how many of the last tokens of each prompt the logits can be had, as one array."""
        if not all_logits:
            return 1
        if self.engine.runner.last_logits_only:
            raise InputError("these graphs give the last logits only, no all_logits; load the symbolic graph")
        sizes = {min(len(plan.tail), len(prompt.ids)) for plan, prompt in zip(plans, prompts, strict=True)}
        if len(sizes) > 1:
            raise InputError(
                f"all_logits of a batch needs tails of one length, these have {', '.join(map(str, sorted(sizes)))}; "
                "run the prompts one by one"
            )
        return sizes.pop()

    def _begin(self, turns: list[Turn]) -> list[Turn]:
        """Queues turns, all or none."""
        for turn in turns:
            self._stop_generating(turn.text)
        added = []
        try:
            for turn in turns:
                added.append(self.engine.add(turn))
        except BaseException:
            for turn in added:
                self.engine.abort(turn)
            raise
        self._changes += 1
        return turns

    def _computed(self, turns: list[Turn], *, undo_to_nothing: bool = False) -> Logits:
        """The logits ``[B, S, V]`` of turns, once all are computed; if one fails, all are undone."""
        try:
            self._run(turns, lambda turn: turn.is_finished)
            logits = np.stack([turn.logits for turn in turns if turn.logits is not None])
        except BaseException:
            self._undo(turns, to_nothing=undo_to_nothing)
            raise
        self._note_usage(turns)
        self.engine.settle(turns)
        return logits

    def _note_usage(self, turns: list[Turn]) -> None:
        self.usage = sum((turn.usage for turn in turns if turn.usage is not None), start=Usage())

    def _run(self, turns: list[Turn], is_done: Callable[[Turn], bool], progress: Progress | None = None) -> None:
        """Computes until all turns are done; raises the first error."""
        while not all(turn.is_finished or is_done(turn) for turn in turns):
            self.engine.step()
            if progress is not None:
                progress(*map(sum, zip(*(turn.progress for turn in turns), strict=True)))
            failed = next((turn for turn in turns if turn.error is not None), None)
            if failed is not None and failed.error is not None:
                raise failed.error

    def _undo(self, turns: list[Turn], *, to_nothing: bool) -> None:
        self.engine.settle(turns, undo=True)
        if to_nothing:
            self._forget()

    def _require_texts(self, rows: int) -> None:
        if not self._rows and rows == 1:
            self._rows = [self.engine.open_text()]  # to append to nothing is to begin
        live = len(self._rows)
        if not live:
            raise InputError("the cache is empty; call prefill first with a batch")
        if rows != live:
            raise InputError(f"the cache holds {live} prompts, got tokens for {rows}")


__all__ = ["LiveTexts", "Progress", "ReadOptions"]

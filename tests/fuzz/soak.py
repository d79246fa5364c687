"""Random conversations on one model for minutes: its numbers stay those of a fresh model, its memory stays what it was.

    python -m tests.fuzz.soak --minutes 5 BUNDLE [--seed 7] [--backend openvino]

Prompts, turns, batches, steps, texts with stops, generators that are left half way, graphs that fail at any run, and
other threads that interfere. After each refusal or failure the conversation must be what it was before, or be refused
until the next prompt; never another.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from mesart.graphs.errors import MesaError
from mesart.runtime import MesaModel
from mesart.runtime.backends import OnnxRuntimeBackend, OpenVinoBackend

TOLERANCE = 2e-3
"""Of logits, to a model that computes the same tokens in one prompt: another order of the same sums."""
GROWTH = 1.05
"""Of resident memory after warming up, with some room for what the allocator keeps."""
ROOM = 24 << 20


class _Wrapped:
    """A graph that is run by ``run(graph, *arguments)``."""

    def __init__(self, graph: Any, run: Callable[..., Any]) -> None:
        self._graph, self._run = graph, run

    def __call__(self, *arguments: Any) -> Any:
        return self._run(self._graph, *arguments)

    def bind(self, name: str, array: Any) -> None:
        self._graph.bind(name, array)


@contextmanager
def _wrapped_graphs(run: Callable[..., Any]) -> Iterator[None]:
    """Graphs that are opened meanwhile are run by ``run(graph, *arguments)``."""

    def wrap(open_graph: Any) -> Any:
        return lambda *arguments, **options: _Wrapped(open_graph(*arguments, **options), run)

    kinds: tuple[Any, ...] = (OnnxRuntimeBackend, OpenVinoBackend)
    names = ("open", "open_in_place", "open_paged")
    before = [(kind, name, getattr(kind, name)) for kind in kinds for name in names if hasattr(kind, name)]
    for kind, name, opens in before:
        setattr(kind, name, wrap(opens))
    try:
        yield
    finally:
        for kind, name, opens in before:
            setattr(kind, name, opens)


@dataclass
class Soak:
    """One model, and what its live texts should be.

    ``rows`` are the token ids of each row; ``None`` where only a new prompt is certain to work.
    """

    bundle: Path
    rng: Random
    backend: str = "onnxruntime"
    rows: list[list[int]] | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.left = 0
        """Runs of graphs until one fails; 0: none will."""
        self.history: list[Any] = []
        """Of each row: its prompt, then turns (lists) and steps (numbers)."""
        self.fresh = self._load()
        with _wrapped_graphs(self._run):
            self.model = self._load()
        self.vocabulary = int(self.model.manifest.model["vocab_size"])
        self.longest = self.model.max_tokens

    def _load(self) -> MesaModel:
        return MesaModel.load(self.bundle, self.backend, threads=1)

    def close(self) -> None:
        self.model.close()
        self.fresh.close()

    def act(self) -> None:
        """One thing that a user may do."""
        acts: tuple[tuple[int, Callable[[], None]], ...] = (
            (4, self.prefill),
            (5, self.extend),
            (5, self.steps),
            (3, self.generate),
            (3, self.abandon),
            (2, self.refused),
            (3, self.failing),
            (1, self.interfere),
            (3, self.compare),
        )
        act = self.rng.choices([act for _, act in acts], [weight for weight, _ in acts])[0]
        self.counts[act.__name__] = self.counts.get(act.__name__, 0) + 1
        act()

    def prefill(self) -> None:
        rows = [self._ids(self._length()) for _ in range(self.rng.choice((1, 1, 1, 2, 3)))]
        self._changing(lambda: self.model.prefill(rows), rows, is_prompt=True)

    def extend(self) -> None:
        if self.rows is None:
            return
        turns = [self._ids(self.rng.choice((1, 2, 9, 40, 90))) for _ in self.rows]
        after = [row + turn for row, turn in zip(self.rows, turns, strict=True)]
        self._changing(lambda: self.model.extend(turns), after, is_turn=True)

    def steps(self) -> None:
        for _ in range(self.rng.choice((1, 3, 20))):
            if self.rows is None:
                return
            tokens = [self.rng.randrange(self.vocabulary) for _ in self.rows]
            after = [[*row, token] for row, token in zip(self.rows, tokens, strict=True)]
            self._changing(partial(self.model.step, tokens), after)

    def generate(self) -> None:
        """Text with stops and options; what was generated cannot be told from outside, so a prompt follows."""
        self.rows = None
        options: dict[str, Any] = {"seed": self.rng.randrange(100)}
        if self.rng.random() < 0.5:
            options |= {"temperature": self.rng.uniform(0.1, 2), "top_k": self.rng.randint(1, 50)}
        stop = self.rng.choice(((), ("e",), ["the", " "], "\n"))
        prompt = self.rng.choice(("The grass is green.", "Here we go. " * 9, ["a", "The sky", "is blue " * 5]))
        with self._refusals():
            text = self.model.generate(prompt, self.rng.randint(1, 12), stop=stop, **options)
            again = self.fresh.generate(prompt, 1, **options) if self.rng.random() < 0.2 else None
            assert isinstance(text, str | list)
            assert again is None or isinstance(again, str | list)

    def abandon(self) -> None:
        """A generator that is left half way; it must not go on in the next prompt's cache."""
        prompt = self._ids(self._length())
        self.rows = None
        stream: Any = self.model.generate_ids([prompt], 20)
        begun = self.rng.choice((0, 1, 3))
        with self._refusals():
            for _ in range(begun):
                next(stream, None)
        if self.rng.random() < 0.5:
            stream.close()
            return
        self.prefill()
        if self.rows is None:
            return
        try:
            next(stream)
        except (MesaError, StopIteration):
            self._check_lengths()
            return
        if begun:
            raise AssertionError("a generator went on in the cache of a later prompt")
        self.rows = None  # it has only begun now, and is the newest prompt

    def refused(self) -> None:
        """What cannot be: it is refused in a line, and nothing changes."""
        cases: tuple[Callable[[], Any], ...] = (
            lambda: self.model.prefill([]),
            lambda: self.model.prefill([[1, self.vocabulary]]),
            lambda: self.model.prefill(self._ids(self.longest + 1)),
            lambda: self.model.prefill([[1.5, 2]]),
            lambda: self.model.extend([[-1]]),
            lambda: self.model.extend([[1]] * (len(self.rows or [1]) + 1)),
            lambda: self.model.step([1] * (len(self.rows or [1]) + 1)),
            lambda: self.model.generate("x", 0),
            lambda: self.model.generate("x", 3, nope=1),
        )
        try:
            self.rng.choice(cases)()
        except MesaError:
            self._check_lengths()
            return
        raise AssertionError("what cannot be was done")

    def failing(self) -> None:
        """A graph fails at some run: the text is what it was, or is refused until the next prompt."""
        self.left = self.rng.choice((1, 1, 2, 3, 5, 8, 13))
        self.rng.choice((self.prefill, self.extend, self.steps))()
        self.left = 0

    def interfere(self) -> None:
        """Another thread uses the model meanwhile: it waits or is refused, and both are right."""
        rows = [self._ids(self._length())]
        wrong: list[BaseException] = []

        def other() -> None:
            try:
                for _ in range(3):
                    self.model.step([1] * len(self.model.lengths))
            except MesaError:
                pass
            except BaseException as error:  # noqa: BLE001  (handed to the thread that started this one)
                wrong.append(error)

        self.rows = None
        threads = [threading.Thread(target=other) for _ in range(2)]
        for thread in threads:
            thread.start()
        with self._refusals():
            self.model.prefill(rows)
        for thread in threads:
            thread.join()
        if wrong:
            raise wrong[0]
        self.prefill()

    def compare(self) -> None:
        """The next token's logits are those of a model that has seen the same prompt, turns and steps, no failure."""
        if self.rows is None or max(map(len, self.rows)) > self.longest:
            return
        token = self.rng.randrange(self.vocabulary)
        got = self._changing(
            lambda: self.model.step([token] * len(self.rows or [])), [[*row, token] for row in self.rows]
        )
        if got is None:
            return
        for index, (prompt, *others) in enumerate(self.history):
            wanted = self.fresh.prefill(prompt)
            for part in others:
                wanted = self.fresh.extend(part) if isinstance(part, list) else self.fresh.step(part)
            self._equal(got[index, -1], wanted[0, -1])

    def _changing(
        self, do: Callable[[], Any], after: list[list[int]], *, is_prompt: bool = False, is_turn: bool = False
    ) -> Any:
        """Logits, or ``None`` if it was refused or failed; notes what each row now is."""
        before = self.rows
        try:
            logits = do()
        except MesaError:
            # A prompt that fails after it began leaves nothing; a turn leaves what was there.
            if is_prompt and self.model.lengths != [len(row) for row in before or [[]]]:
                self.rows = None
            else:
                self._check_lengths()
            return None
        if not np.isfinite(logits).all():
            raise AssertionError("logits that are no numbers")
        if is_prompt or self.rows is None:
            self.history = [[row] for row in after]
        else:
            for history, old, new in zip(self.history, self.rows, after, strict=True):
                more = new[len(old) :]
                history.append(more if is_turn else more[0])
        self.rows = after
        self._check_lengths()
        return logits

    def _check_lengths(self) -> None:
        if self.rows is not None and self.model.lengths != [len(row) for row in self.rows]:
            raise AssertionError(f"the cache holds {self.model.lengths}, not {[len(row) for row in self.rows]}")

    @staticmethod
    def _equal(got: Any, wanted: Any) -> None:
        if float(np.abs(got - wanted).max()) > TOLERANCE * max(1.0, float(np.abs(wanted).max())):
            raise AssertionError(f"logits differ by {float(np.abs(got - wanted).max())}")

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except MesaError:
            self.rows = None

    def _run(self, graph: Any, *arguments: Any) -> Any:
        if self.left:
            self.left -= 1
            if not self.left:
                raise MesaError("a graph failed, as it was made to")
        return graph(*arguments)

    def _length(self) -> int:
        return self.rng.choice((1, 5, 30, self.rng.randint(1, self.longest), self.longest - 20))

    def _ids(self, count: int) -> list[int]:
        return [self.rng.randrange(self.vocabulary) for _ in range(count)]


def resident() -> int:
    """Bytes of this process in memory now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def soak(bundle: Path, seconds: float, seed: int, backend: str = "onnxruntime", *, quiet: bool = False) -> Soak:
    """Goes on for ``seconds``; a third of them warms up.

    Raises:
        AssertionError: other numbers, a text that is not what it was, or memory that grows.
    """
    state = Soak(bundle, Random(seed), backend)
    start = told = time.monotonic()
    warm = 0
    try:
        for index in itertools.count():
            try:
                state.act()
            except Exception as error:
                raise AssertionError(f"action {index} of seed {seed}, after {state.counts}: {error!r}") from error
            now = time.monotonic() - start
            if not warm and now > seconds / 3:
                gc.collect()
                warm = resident()
            if not quiet and time.monotonic() - told > 30:
                told = time.monotonic()
                print(f"{now:.0f} s, {index} actions, {resident() >> 20} MiB", flush=True)
            if now > seconds:
                break
        gc.collect()
        if resident() > warm * GROWTH + ROOM:
            raise AssertionError(f"memory grew from {warm >> 20} to {resident() >> 20} MiB")
    finally:
        state.close()
    return state


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.soak", description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="default: a small one is exported")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="onnxruntime")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle
        if bundle is None:
            from tests.fuzz.golden import make_bundle
            from tests.fuzz.workers import make_in_fork

            make_in_fork(lambda: make_bundle(Path(folder)))
            bundle = Path(folder) / "bundle"
        state = soak(bundle, 60 * options.minutes, options.seed, options.backend)
    print(f"{sum(state.counts.values())} actions, {resident() >> 20} MiB: {state.counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a long-context method is: which keys a query sees, and at which positions both stand. Integers and numpy only.

A method says for a block of queries which *parts* of the past they see. Within a part every query sees an interval of
the keys, the keys stand at the positions of one *view* of them, and each query at one position; so a part is an
ordinary attention, and several are merged by their log-sum-exp (:mod:`mesart.evaluation.methods.attention`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import InputError
from mesart.graphs.method.protocol import StaticMethod

Indices = NDArray[np.int64]
Positions = NDArray[np.float64]
Span = tuple[int, int]
"""Tokens ``start .. stop - 1``."""

TOKEN: Final = "token"
"""The view in which a key stands at its own index."""
ZERO: Final = "zero"
"""The view in which all keys stand at 0: a part's queries then stand at the distance to all of them."""

DEFAULT_REACH: Final = 16
"""Times the trained length that a method is set up for unless told otherwise."""

Self = TypeVar("Self", bound="Method")


@dataclass(frozen=True)
class Part:
    """What a block of queries sees of the keys in one view. Parts of a block share no key that one query sees."""

    view: str
    first: Indices
    """``[Q]``; a query sees the keys of tokens ``first .. stop - 1``, none if that is empty."""
    stop: Indices
    """``[Q]``."""
    queries: Positions
    """``[Q]``, where the queries stand, on the same scale as the view's keys."""
    looked_up: bool = False
    """Not the keys ``first .. stop - 1``, but as many that the layer's memory finds for these queries (InfLLM)."""


class Rule(ABC):
    """What the executor asks of a method while it computes one prompt and its continuation."""

    views: ClassVar[tuple[str, ...]] = (TOKEN,)
    """The views of the keys that the cache keeps."""
    turns_again: ClassVar[bool] = False
    """Whether all keys turn differently with every new token, so that they are kept unturned (Dynamic-NTK)."""
    moves: ClassVar[bool] = False
    """Whether keys of the cache may change their positions from one run to the next (Mesa)."""
    window_by_position: ClassVar[bool] = False
    """Whether a layer with a sliding window measures it in positions (Mesa), not in tokens."""

    @abstractmethod
    def parts(self, start: int, stop: int) -> list[Part]:
        """What the queries ``start .. stop - 1`` see; each sees itself."""

    def key_positions(self, view: str, tokens: Indices) -> Positions:
        """Where the keys of some tokens stand in a view, float64 ``[N]``."""
        return np.zeros(len(tokens)) if view == ZERO else tokens.astype(np.float64)

    def needed(self, start: int) -> tuple[int, int]:
        """``(g, f)``: queries from ``start`` on see only keys before ``g``, which is fixed, and from ``f`` on."""
        del start
        return 0, 0

    def turn(self, frequencies: Positions, tokens: int) -> tuple[Positions, float]:
        """The angles a position that pairs of dimensions turn by, and a factor of turned queries and keys.

        Args:
            frequencies: the model's own, radians a position, a pair each, float64 ``[R / 2]``.
            tokens: the number of tokens that the prompt has now.
        """
        del tokens
        return frequencies, 1.0

    def query_scales(self, start: int, stop: int) -> Positions | None:
        """What multiplies the queries (log-n scaling), float64 ``[Q]``; None for 1."""
        del start, stop
        return None

    def runs(self, start: int, stop: int, size: int) -> Iterator[Span]:
        """Cuts new tokens into runs through the model, of at most ``size`` where possible."""
        return cut(start, stop, size)

    def blocks(self, start: int, stop: int, size: int) -> Iterator[Span]:
        """Cuts a run into blocks of queries, of at most ``size``."""
        return cut(start, stop, size)

    def enter(self, start: int, stop: int) -> None:  # noqa: B027  (most rules have no state)
        """Called before tokens ``start .. stop - 1`` run, for rules with a state."""

    def step(self, cached: int) -> None:  # noqa: B027
        """Called before a token is generated behind ``cached`` tokens, for rules with a state."""

    def memory(self) -> Any:
        """A memory for one layer, see :class:`~mesart.evaluation.methods.infllm_memory.LayerMemory`; mostly none."""
        return None


@dataclass(frozen=True)
class Method(Rule):
    """A long-context method with its parameters. Lengths are in tokens.

    The fields of a subclass are its parameters; :meth:`of` chooses those that are left out.
    """

    name: ClassVar[str]
    rotary_only: ClassVar[bool] = False
    """Whether it is defined by what rotary embeddings do, and so says nothing of ALiBi or NoPE."""

    train_length: int
    """T_r, the positions that the model was trained on."""
    log_n: bool = field(default=False, kw_only=True)
    """Queries multiplied by ``max(1, ln(t + 1) / ln T_r)``: no part of most methods, a switch for fair comparisons."""

    @classmethod
    def of(cls: type[Self], train_length: int, max_tokens: int | None = None, **parameters: Any) -> Self:
        """The method with the given parameters, the others chosen for a model and the longest prompt.

        Args:
            train_length: T_r.
            max_tokens: the longest prompt; 16 times ``train_length`` if left out. Not a limit: beyond it a method may
                leave the trained positions.
            parameters: the method's own fields.

        Raises:
            MesaError: an unknown parameter, or one out of its range.
        """
        if train_length < 16:
            raise InputError(f"train_length is {train_length}; a window of at least 16 tokens is needed")
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}; it must be at least 1")
        known = cls.parameter_names()
        unknown = [name for name in parameters if name not in known]
        if unknown:
            raise InputError(f"{cls.name} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
        require_types(cls.parameter_class(), parameters)
        reach = max(train_length, max_tokens or DEFAULT_REACH * train_length)
        return cls.with_parameters(train_length, {**cls.defaults(train_length, reach, parameters), **parameters})

    @classmethod
    def parameter_class(cls) -> type:
        """The dataclass whose fields the parameters are."""
        return cls

    @classmethod
    def parameter_names(cls) -> list[str]:
        """The names of the method's parameters, ``log_n`` last, as it is an addition to most."""
        own = [f.name for f in dataclasses.fields(cls) if f.name not in ("train_length", "log_n")]
        return [*own, "log_n"]

    @classmethod
    def with_parameters(cls: type[Self], train_length: int, parameters: Mapping[str, Any]) -> Self:
        """The method with all its parameters.

        Raises:
            MesaError: one is out of its range.
        """
        return cls(train_length, **parameters)

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that depend on the model and the longest prompt (at least T_r), in view of those given."""
        del train_length, max_tokens, given
        return {}

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters, for the record."""
        return {name: getattr(self, name) for name in self.parameter_names()}

    def parts(self, start: int, stop: int) -> list[Part]:
        raise InputError(f"what a query sees under {self.name} depends on the prompt: ask for_prompt(tokens)")

    def for_prompt(self, tokens: int) -> Rule:
        """The rule for a prompt of ``tokens`` tokens and what is generated behind it."""
        del tokens
        return self

    def logits_of(self, tokens: int) -> int:
        """Of how many last tokens of a prompt the method gives the logits it stands for."""
        return tokens

    def pairs(self, tokens: int) -> int:
        """Scores of a query with a key that the prefill of ``tokens`` tokens needs, a layer and head."""
        rule = self.for_prompt(tokens)
        total = 0
        for start, stop in rule.runs(0, tokens, 4096):
            rule.enter(start, stop)
            for first, last in rule.blocks(start, stop, 1024):
                total += sum(int((part.stop - part.first).clip(0).sum()) for part in rule.parts(first, last))
        return total

    def kept(self, tokens: int) -> int:
        """Keys that a layer and head need once the last of ``tokens`` tokens is computed, its own among them."""
        pinned, first = self.needed(tokens - 1)
        return tokens - max(0, first - pinned)

    def query_scales(self, start: int, stop: int) -> Positions | None:
        if not self.log_n:
            return None
        scales: Positions = np.maximum(1.0, np.log(np.arange(start, stop) + 1.0) / math.log(self.train_length))
        return scales

    def static(self) -> StaticMethod:
        """What an export of the method fixes.

        Raises:
            MesaError: its graphs are not static.
        """
        raise InputError(
            f"{self.name} takes several attentions a layer that depend on the prompt, so it cannot be exported; its "
            "PyTorch form runs in `mesart eval`"
        )

    def require(self, **least: float) -> None:
        """Raises a :class:`MesaError` if a parameter is below the least value it may have."""
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"{self.name}: {name} is {getattr(self, name)}; it must be at least {value:g}")


def require_types(owner: type, parameters: Mapping[str, Any]) -> None:
    """Raises a :class:`MesaError` unless each parameter has the type of the dataclass field of its name."""
    # Annotations are texts; a number may be written without a decimal point.
    kinds: dict[str, tuple[str, tuple[type, ...]]] = {
        "bool": ("true or false", (bool,)),
        "int": ("a whole number", (int,)),
        "float": ("a number", (int, float)),
        "int | None": ("a whole number or null", (int, type(None))),
    }
    for field_ in dataclasses.fields(owner):
        if field_.name in parameters and field_.type in kinds:
            value = parameters[field_.name]
            (expected, types) = kinds[str(field_.type)]
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise InputError(f"{field_.name} is {value!r}; it must be {expected}")


def cut(start: int, stop: int, size: int, offset: int = 0, period: int | None = None) -> Iterator[Span]:
    """Spans of at most ``size``, none across ``offset + n * period``."""
    while start < stop:
        end = min(stop, start + size)
        if period is not None:
            end = min(end, offset + ((start - offset) // period + 1) * period)
        yield start, end
        start = end


def arange(start: int, stop: int) -> Indices:
    """int64 ``start .. stop - 1``."""
    return np.arange(start, stop, dtype=np.int64)


def constant(value: int, like: Indices) -> Indices:
    """The same integer for every query."""
    return np.full_like(like, value)

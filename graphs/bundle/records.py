"""From JSON to checked dataclasses. What a field may hold is said by its type alone, and checked once, while reading.

A record is a dataclass or a ``TypedDict``; its fields are records, lists, dictionaries, literals, unions and plain
values, narrowed by :class:`Must` in an ``Annotated``. JSON from elsewhere is never trusted: no field may be missing or
unknown, ``true`` is no number, no number is NaN or leaves 64 bits, every string can be printed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from mesart.graphs.errors import MesaError

T = TypeVar("T")


class Must(NamedTuple):
    """Narrows a type: ``Annotated[int, Must("a number of at least 1", lambda value: value >= 1)]``."""

    be: str
    """What is expected, for people."""
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True, eq=False)  # told apart by identity, so that it can be a key of a cache
class Tagged:
    """One of several records, named by a field: ``Annotated[Shape, Tagged("shape", {"circle": Circle, ...})]``."""

    field: str
    """Beside the fields of the record itself."""
    kinds: Mapping[str, type]


class Mismatch(Exception):
    """A value is not what its type says; ``steps`` lead to it from the outermost record."""

    def __init__(self, problem: str, *steps: str) -> None:
        super().__init__(problem)
        self.problem, self.steps = problem, list(steps)

    def __str__(self) -> str:
        path = "".join(self.steps).removeprefix(".")
        return f"{path} {self.problem}" if path else self.problem


class _Rule(NamedTuple):
    """What JSON of one of Python's types has to be, and what becomes of it."""

    limits: tuple[Must, ...] = ()
    make: Callable[[Any], Any] | None = None
    """``None``: it is the value already."""


class _Reader:
    """Turns JSON into a value, by a rule for each of Python's types that it may have."""

    def __init__(self, expected: str, rules: Mapping[type, _Rule]) -> None:
        self.expected, self.rules = expected, rules
        find = rules.get

        def read(value: Any) -> Any:  # a closure: manifests have thousands of values
            rule = find(type(value))
            if rule is None:
                raise Mismatch(f"is {shown(value)}, expected {expected}")
            limits, make = rule
            for be, holds in limits:
                if not holds(value):
                    raise Mismatch(f"is {shown(value)}, expected {be}")
            return value if make is None else make(value)

        self.read = read


def read_record(kind: type[T], value: Any) -> T:
    """The record that JSON stands for.

    Args:
        kind: a dataclass or a ``TypedDict``.
        value: what ``json.loads`` gave.

    Raises:
        Mismatch: names the field, as ``graphs[3].inputs[0].shape[1]``, what was expected and what came.
    """
    record: T = _reader(cast(Hashable, kind)).read(value)
    return record


def parse_json(text: bytes) -> Any:
    """The value of a JSON text, which may have no key twice, no NaN and no infinity.

    Raises:
        ValueError: no such JSON, nested too deeply, or not UTF-8.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} is there twice")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def shown(value: Any) -> str:
    """A value of JSON as it is quoted in a message: short, and printable whatever it holds."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, str):
        value = value if len(value) <= 60 else value[:60] + "..."
        return ascii(value) if not value.isprintable() else repr(value)
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of more than 64 bits"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


@functools.cache
def _reader(kind: Hashable) -> _Reader:
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *limits = get_args(kind)
        if isinstance(limits[0], Tagged):
            return _tagged(limits[0])
        return functools.reduce(_narrowed, limits, _reader(inner))
    if origin is Literal:
        return _literal(get_args(kind))
    if origin in (Union, types.UnionType):
        return _union([_reader(part) for part in get_args(kind)])
    if origin is list:
        return _list(_reader(get_args(kind)[0]))
    if origin is dict:
        return _dictionary(*map(_reader, get_args(kind)))
    if dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return _record(kind)
    return _PLAIN[kind]


def _narrowed(reader: _Reader, must: Must) -> _Reader:
    return _Reader(must.be, {kind: rule._replace(limits=(*rule.limits, must)) for kind, rule in reader.rules.items()})


def _literal(values: tuple[Any, ...]) -> _Reader:
    expected = "one of " + ", ".join(values)
    return _Reader(expected, {str: _Rule((Must(expected, frozenset(values).__contains__),))})


def _union(parts: list[_Reader]) -> _Reader:
    rules = {kind: rule for part in parts for kind, rule in part.rules.items()}
    return _Reader(" or ".join(dict.fromkeys(part.expected for part in parts)), rules)


def _list(item: _Reader) -> _Reader:
    read = item.read

    def make(values: list[Any]) -> list[Any]:
        result: list[Any] = []
        try:
            for value in values:
                result.append(read(value))
        except Mismatch as error:
            error.steps.insert(0, f"[{len(result)}]")
            raise
        return result

    return _Reader("a list", {list: _Rule((), make)})


def _dictionary(key: _Reader, item: _Reader) -> _Reader:
    def make(values: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in values.items():
            try:
                result[key.read(name)] = item.read(value)
            except Mismatch as error:
                error.steps.insert(0, f"[{shown(name)}]")
                raise
        return result

    return _Reader("an object", {dict: _Rule((), make)})


def _record(kind: Any) -> _Reader:
    hints = get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else list(hints)
    readers = {name: _reader(hints[name]).read for name in names}

    def make(values: dict[str, Any]) -> Any:
        if values.keys() != readers.keys():
            raise Mismatch(_other_fields(values, readers))
        name = ""
        try:
            result = {}
            for name, read in readers.items():
                result[name] = read(values[name])
        except Mismatch as error:
            error.steps.insert(0, f".{name}")
            raise
        try:
            return kind(**result)
        except (MesaError, ArithmeticError) as error:  # values that do not go together
            raise Mismatch(f"cannot be: {error}") from error

    return _Reader("an object", {dict: _Rule((), make)})


def _tagged(tag: Tagged) -> _Reader:
    named = _literal(tuple(tag.kinds))
    readers = {name: _reader(kind) for name, kind in tag.kinds.items()}

    def make(values: dict[str, Any]) -> Any:
        if tag.field not in values:
            raise Mismatch(f"lacks the field {tag.field!r}, {named.expected}")
        fields = dict(values)
        try:
            name = named.read(fields.pop(tag.field))
        except Mismatch as error:
            error.steps.insert(0, f".{tag.field}")
            raise
        return readers[name].read(fields)

    return _Reader("an object", {dict: _Rule((), make)})


def _other_fields(values: Mapping[str, Any], known: Iterable[str]) -> str:
    missing = [name for name in known if name not in values]
    if missing:
        return f"lacks the field {missing[0]!r}"
    unknown = next(name for name in values if name not in known)
    return f"has the unknown field {shown(unknown)}; known are {', '.join(known)}"


def _is_finite(value: float) -> bool:
    return value in _INT64 if type(value) is int else math.isfinite(value)


_INT64 = range(-(2**63), 2**63)
_FINITE = (Must("a finite number of 64 bits", _is_finite),)
_PLAIN: dict[Any, _Reader] = {
    type(None): _Reader("null", {type(None): _Rule()}),
    bool: _Reader("true or false", {bool: _Rule()}),
    int: _Reader("a whole number", {int: _Rule((Must("a whole number of 64 bits", _INT64.__contains__),))}),
    float: _Reader("a number", {int: _Rule(_FINITE), float: _Rule(_FINITE)}),
    str: _Reader("a string", {str: _Rule((Must("a printable string", str.isprintable),))}),
}

__all__ = ["Mismatch", "Must", "Tagged", "parse_json", "read_record", "shown"]

"""Limits on what a ``tokenizer.json`` may do with a text: it comes with a checkpoint, and the library obeys it blindly.

Two things protect a process. What would fill the memory is refused before it runs, because a failed allocation in the
library ends the process: rules that lengthen a text again and again. What would run for ever (a regular expression that
backtracks) runs in a thread of its own that is left behind after a while.
"""

from __future__ import annotations

import base64
import binascii
import re
import reprlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from mesart.graphs.errors import BundleError, InputError
from mesart.graphs.json_file import type_name

T = TypeVar("T")

_GROWTH: Final = 64  # times that rules may lengthen a text; real tokenizers: up to 4
_CHARACTERS: Final = 1 << 27  # of a text after that
_RULES: Final = 256  # normalisers, pre-tokenisers, decoders each
_PATTERN: Final = 1 << 15  # characters of a regular expression
_REPEATS: Final = 100_000  # that its {n,m} multiply to: the library writes them out
_FIELD: Final = 4096  # characters of a piece of text in a rule
_TOKEN: Final = 1 << 16  # characters of a token
_PIECES: Final = 4096  # special tokens around a text
_COUNT: Final = 1 << 20  # any whole number in a rule
_IDS: Final = 1 << 24  # of a vocabulary; the largest have a million. Saving it, the library lists all that are left out

_SECONDS: Final = 3.0
_CHARACTERS_PER_SECOND: Final = 50_000  # about a tenth of what a slow machine does

_SECTIONS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_REPEAT: Final = re.compile(r"\{(\d*)(?:,(\d*))?\}")


@dataclass(frozen=True)
class Limits:
    """What was found out about a tokenizer."""

    growth: float
    """Times that its rules may lengthen a text, at most."""

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Limits:
        """Checks the content of a ``tokenizer.json`` before the library reads it.

        Args:
            values: its JSON.
            where: the file, for messages.

        Raises:
            MesaError: a rule is larger than any that makes sense, or all together lengthen a text too much.
        """
        for section in _SECTIONS:
            rules = list(_objects(values.get(section)))
            if len(rules) > _RULES:
                raise BundleError(f"{where}: {section} has {len(rules)} rules; {_RULES} are expected at most")
            for rule in rules:
                _check_rule(rule, f"{where}: {section}")
        _check_template(values.get("post_processor"), where)
        _check_vocabulary(values, where)
        growths = {section: _growth(values.get(section), f"{where}: {section}") for section in _SECTIONS}
        growths["normalizer"] *= growths.pop("pre_tokenizer")
        growth, section = max((growth, section) for section, growth in growths.items())
        if growth > _GROWTH:
            raise BundleError(
                f"{where}: the {section} may make a text {growth:.3g} times as long; {_GROWTH} is the most allowed"
            )
        return cls(growth)

    def seconds_for(self, text: str, what: str) -> float:
        """How long the library may take for a text.

        Raises:
            MesaError: the text is too long for rules that lengthen it so much.
        """
        if len(text) * self.growth > _CHARACTERS:
            raise InputError(
                f"{what} may make {self.growth:.3g} times as much of a text, too much for {len(text):,} characters"
            )
        return _SECONDS + len(text) / _CHARACTERS_PER_SECOND


def within_seconds(seconds: float, what: str, call: Callable[[], T]) -> T:
    """The result of a call into the library that lets other threads run meanwhile.

    Raises:
        MesaError: it takes longer. Its thread goes on until it is done, or the process ends: nothing can stop it.
        BaseException: whatever the call raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001  (handed to the caller, below)
            errors.append(error)

    thread = threading.Thread(target=run, name="mesart-tokenizer", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise BundleError(f"{what} was not done after {seconds:.0f} s: its rules take too long for this text")
    return results[0]


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in a value, itself included."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield found
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(found)


def _check_rule(rule: Mapping[str, Any], where: str) -> None:
    for name, value in rule.items():
        if name == "Regex" and isinstance(value, str):
            _check_pattern(value, where)
        elif name == "precompiled_charsmap":
            _check_charsmap(value, where)
        elif isinstance(value, str) and len(value) > _FIELD:
            raise BundleError(f"{where}: {name[:40]} has {len(value):,} characters; {_FIELD} are expected at most")
        elif isinstance(value, int) and abs(value) > _COUNT and name not in ("id", "type_id"):
            raise BundleError(f"{where}: {name[:40]} is {reprlib.repr(value)}; no more than {_COUNT} is expected")


def _check_pattern(pattern: str, where: str) -> None:
    repeats = 1
    for least, most in _REPEAT.findall(pattern):
        digits = most or least
        repeats *= min(int(digits[:7] or 1), _COUNT) or 1
    if len(pattern) > _PATTERN or repeats > _REPEATS:
        raise BundleError(f"{where}: the regular expression {pattern[:40]!r}... is larger than any that makes sense")


def _check_charsmap(value: Any, where: str) -> None:
    """A table of replacements: its length, a search tree, then the replacements, each ended by a zero byte."""
    try:
        table = base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise BundleError(f"{where}: precompiled_charsmap is not base64") from error
    start = 4 + int.from_bytes(table[:4], "little")
    if start > len(table):
        raise BundleError(f"{where}: precompiled_charsmap is cut off")
    longest = max(map(len, table[start:].split(b"\0")))
    if longest > _GROWTH:
        raise BundleError(f"{where}: precompiled_charsmap has a replacement of {longest:,} bytes")


def _check_template(processor: Any, where: str) -> None:
    """A template puts tokens around a text: those that it names must be there (or the library panics) and few, and the
    text must be there once."""
    for rule in _objects(processor):
        known = rule.get("special_tokens")
        if "single" not in rule or not isinstance(known, dict):
            continue
        longest = max((len(it["ids"]) for it in known.values() if _has_list(it, "ids")), default=0)
        for name in ("single", "pair"):
            pieces = rule.get(name)
            if not isinstance(pieces, list):
                continue
            special = [piece["SpecialToken"] for piece in pieces if _has(piece, "SpecialToken")]
            unknown = [it.get("id") for it in special if not (isinstance(it.get("id"), str) and it["id"] in known)]
            if unknown:
                raise BundleError(f"{where}: post_processor: {name} has the special token {unknown[0]!r:.40}, "
                                "which special_tokens lacks")  # fmt: skip
            texts = sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces)
            if len(special) * longest > _PIECES or texts > 2:
                raise BundleError(f"{where}: post_processor: {name} adds more to a text than makes sense")


def _has(value: Any, name: str) -> bool:
    return isinstance(value, dict) and isinstance(value.get(name), dict)


def _has_list(value: Any, name: str) -> bool:
    return isinstance(value, dict) and isinstance(value.get(name), list)


def _check_vocabulary(values: Mapping[str, Any], where: str) -> None:
    model = values.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    check_ids(vocabulary.values() if isinstance(vocabulary, dict) else (), where)
    if isinstance(vocabulary, dict):
        longest = max(map(len, vocabulary), default=0)
    elif isinstance(vocabulary, list):  # of pairs of a token and its score
        tokens = (it[0] for it in vocabulary if isinstance(it, list) and it)
        longest = max((len(token) for token in tokens if isinstance(token, str)), default=0)
    else:
        longest = 0
    added = values.get("added_tokens")
    check_ids((it.get("id") for it in (added if isinstance(added, list) else []) if isinstance(it, dict)), where)
    for it in added if isinstance(added, list) else []:
        if isinstance(it, dict) and isinstance(it.get("content"), str):
            longest = max(longest, len(it["content"]))
    if isinstance(model, dict):
        _check_rule({name: it for name, it in model.items() if isinstance(it, str | int)}, f"{where}: model")
    if longest > _TOKEN:
        raise BundleError(f"{where}: a token has {longest:,} characters; {_TOKEN} are expected at most")


def check_ids(ids: Iterable[Any], where: str) -> None:
    """Refuses ids that are no index of any table of embeddings.

    Raises:
        BundleError: names the largest.
    """
    largest = max((index for index in ids if isinstance(index, int)), default=0)
    if largest >= _IDS:
        raise BundleError(f"{where}: a token has the id {reprlib.repr(largest)}; no vocabulary has {_IDS:,} tokens")


def _growth(section: Any, where: str) -> float:
    """Times that the rules of a section, one after the other, may lengthen a text."""
    growth, splits = 1.0, 0
    for rule in _objects(section):
        kind, content = rule.get("type"), rule.get("content")
        if kind == "Replace" and isinstance(content, str):
            growth *= max(1.0, len(content) / _least_match(rule.get("pattern"), where))
        elif kind == "Prepend" and isinstance(rule.get("prepend"), str):
            growth *= 1 + len(rule["prepend"])  # once for each piece, and a piece may have one character
        elif kind in ("ByteLevel", "Metaspace") and "decoder" not in where:
            growth *= 2 if splits else 1  # those after the first spell out what the first has made
            splits += 1
    return growth


def _least_match(pattern: Any, where: str) -> float:
    """How many characters a pattern replaces at the least; half of one stands for none: before and after each."""
    if not isinstance(pattern, dict):
        raise BundleError(f"{where}: pattern is {type_name(pattern)}; an object is expected")
    if isinstance(pattern.get("String"), str):
        return len(pattern["String"]) or 0.5
    return 0.5


__all__ = ["Limits", "check_ids", "within_seconds"]

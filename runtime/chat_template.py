"""Chat templates: programs that come with a checkpoint, run in Jinja's sandbox and within limits.

The sandbox keeps a template from what lies outside it; the limits keep it from running for ever and from filling the
memory. They need no process and no signal, so a template renders in any thread:

- every turn of a loop, every call, filter and test is counted, and looks at the clock;
- whatever makes a text or a list is paid for from a budget that grows with the messages, before it is made where its
  size can be told before;
- values that would be much larger written out than they are in memory (a list that holds itself twice, again and again)
  are measured before anything walks through them.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import ext, nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace

from mesart.graphs.errors import BundleError
from mesart.graphs.user_data import user_data

_SOURCE: Final = 1 << 16  # characters; the longest templates that are known have 30 thousand
_SECONDS: Final = 2.0
_TEXT: Final = 1 << 17  # characters, and 16 for each of the values: tools, dates and names add some thousands
_STEPS: Final = 3_000_000
_BYTES: Final = 1 << 28
_NODES: Final = 250_000  # parts of one value
_BITS: Final = 1 << 16  # of a whole number
_WIDTH: Final = 100_000  # that a text is padded or indented to
_ODD: Final = 1 << 16  # bytes for the filters that are seldom used

_ITEM: Final = 64  # bytes of an entry in a list, about
_WIDE: Final = re.compile(r"\d{5,}")  # in a format: a width, or a number of digits
_WIDE_PERCENT: Final = re.compile(r"%(?:\([^)]*\))?[-+ #0]*\d*\.?(?:\d{5,}|\*)")  # the star: an argument is the width

# Those that do not look into the parts of a value; before all others, values are measured.
_SHALLOW_FILTERS: Final = frozenset(
    {"abs", "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random"}
    | {"reject", "rejectattr", "reverse", "round", "select", "selectattr", "slice"}
)
_SHALLOW_TESTS: Final = frozenset(
    {"boolean", "callable", "defined", "false", "filter", "float", "integer", "iterable", "mapping", "none", "number"}
    | {"sameas", "sequence", "string", "test", "true", "undefined"}
)
# Filters that can be slow; chat templates use none of them, or for short texts.
_SELDOM: Final = frozenset(
    {"filesizeformat", "pprint", "striptags", "title", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"}
)
_PADDED: Final = frozenset({"batch", "center", "indent", "round", "slice", "truncate", "wordwrap"})

# Methods whose result may be far larger than what they get; and those that are slow where two texts are long.
_FORBIDDEN: Final = frozenset(
    {"encode", "expandtabs", "from_bytes", "fromkeys", "maketrans", "striptags"} | {"to_bytes", "translate"}
)
_SCANNING: Final = frozenset({"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"})
_OWN: Final = frozenset({"measured", "paid", "sliced", "step"})  # of the environment, put into every template


class TemplateLimit(jinja2.TemplateError):
    """A template takes too long, or makes too much."""


class ChatTemplate:
    """A template that was compiled; rendering it is safe in several threads at once.

    Args:
        source: Jinja source.
        where: the folder that it comes from, for messages.

    Raises:
        MesaError: it is no template, or far too long.
    """

    def __init__(self, source: str, where: str) -> None:
        if len(source) > _SOURCE:
            raise BundleError(f"the chat template of {where} has {len(source):,} characters; {_SOURCE:,} are allowed")
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(f"the chat template of {where} is damaged: line {error.lineno}: {error}") from error
        except (RecursionError, MemoryError, SyntaxError) as error:  # of Python's compiler, which has limits of its own
            raise BundleError(f"the chat template of {where} is nested too deeply, or too long") from error

    def render(self, values: Mapping[str, Any], size: int) -> str:
        """The text for these values.

        Args:
            values: JSON types only.
            size: their length as JSON, which the limits grow with.

        Raises:
            MesaError: the template refuses the values, fails, takes too long or makes too much of them.
        """
        self._environment.meters.current = _Meter(size)
        try:
            # A template may raise whatever Python does; often it raises an error of its own about the messages.
            with user_data("the chat template cannot render these messages"):
                text = self._template.render(values)
                if len(text) > _TEXT + 16 * size:  # the tokenizer would be busy with it
                    raise TemplateLimit("it makes too much text")
                return text
        finally:
            self._environment.meters.current = None


class _Meter:
    """What one rendering may still use."""

    def __init__(self, size: int) -> None:
        self._until = time.monotonic() + _SECONDS + size / 1e6
        self._steps = _STEPS + size
        self._bytes = _BYTES + 256 * size

    def step(self) -> None:
        self._steps -= 1
        if self._steps < 0 or time.monotonic() > self._until:
            raise TemplateLimit("it takes too long")

    def spend(self, size: int) -> None:
        """Pays for a text or list of about this many bytes."""
        self._bytes -= size
        if self._bytes < 0:
            raise TemplateLimit("it makes too much text")

    def check(self, size: int) -> None:
        """Refuses what could not be paid for, without paying."""
        if size > self._bytes:
            raise TemplateLimit("it makes too much text")


class _Meters(threading.local):
    """Each thread's: a template may render in several."""

    current: _Meter | None = None


class _Environment(ImmutableSandboxedEnvironment):
    """The environment for which the templates on the hub are written, that of transformers, with limits."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        self.meters = _Meters()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, ext.loopcontrols],
            optimized=False,  # which would compute constants before there is a meter
            finalize=self._finalize,
        )
        self.filters = {name: self._metered(name, it, _SHALLOW_FILTERS) for name, it in self.filters.items()}
        self.tests = {name: self._metered(name, it, _SHALLOW_TESTS) for name, it in self.tests.items()}
        self.filters["tojson"] = self._metered("tojson", self._tojson, _SHALLOW_FILTERS)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _dict
        del self.globals["lipsum"]  # makes as much text as it is asked for

    @property
    def meter(self) -> _Meter:
        return self.meters.current or _Meter(0)

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        for loop in source.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            line = loop.lineno
            loop.body.insert(0, nodes.ExprStmt(_call("step", [], line), lineno=line))  # type: ignore[attr-defined]
        for comparison in list(source.find_all(nodes.Compare)):
            comparison.expr = _call("measured", [comparison.expr], comparison.lineno)
            for operand in comparison.ops:
                operand.expr = _call("measured", [operand.expr], comparison.lineno)
        for pair in list(source.find_all(nodes.Pair)):  # of a dict: the key is hashed
            if not isinstance(pair.key, nodes.Const):
                pair.key = _call("measured", [pair.key], pair.lineno)
        for sliced in list(source.find_all(nodes.Getitem)):
            if isinstance(sliced.arg, nodes.Slice):
                sliced.node = _call("sliced", [sliced.node], sliced.lineno)
        for joined in list(source.find_all(nodes.Concat)):
            joined.nodes = [_call("paid", [part], joined.lineno) for part in joined.nodes]
        return super()._generate(source, name, filename, defer_init)

    def step(self) -> None:
        self.meter.step()

    def measured(self, value: Any) -> Any:
        """The value, which may be walked through."""
        if not isinstance(value, str):
            _measure(value, self.meter)
        return value

    def paid(self, value: Any) -> Any:
        """The value, which may be written out as text."""
        self.meter.spend(_measure(value, self.meter))
        return value

    def sliced(self, value: Any) -> Any:
        """The value, of which a part may be copied."""
        self.meter.spend(_shallow_size(value))
        return value

    def _finalize(self, value: Any) -> Any:
        self.meter.step()
        return self.paid(value)

    def concat(self, parts: Iterable[str]) -> str:
        """The pieces of a whole template, of a macro or of a block as one text."""
        kept = []
        for part in parts:
            self.meter.spend(_text_size(part))
            kept.append(part)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        meter.step()
        if operator == "%" and isinstance(left, str):
            _check_percent(left, right, meter)
        elif operator in ("**", "*"):
            _check_product(operator, left, right, meter)
        result = super().call_binop(context, operator, left, right)
        meter.spend(_shallow_size(result))
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Named so that no keyword of a template can be taken for one of these.
        if getattr(__obj, "__self__", None) is __self and getattr(__obj, "__name__", "") in (
            "step",
            "measured",
            "paid",
        ):
            return __obj(*args)
        meter = __self.meter
        meter.step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            _check_method(owner, name, args, kwargs, meter)
        elif name in ("index", "count"):  # which compare
            _measure(owner, meter)
        if not isinstance(__obj, Macro):  # whose own code is metered; others may write, compare or hash what they get
            for value in (*args, *kwargs.values()):
                __self.measured(value)
        result = super().call(__context, __obj, *args, **kwargs)
        meter.spend(_shallow_size(result))
        return result

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            _measure(argument, self.meter)
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _FORBIDDEN and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text, by_map = value.__self__, value.__name__ == "format_map"
        marked = hasattr(text, "__html__")  # as safe
        formatter = _EscapeFormatter(self, escape=text.escape) if marked else _Formatter(self)

        @functools.wraps(wrapped)
        def format(*args: Any, **kwargs: Any) -> str:  # noqa: A001
            if by_map:
                args, kwargs = (), dict(*args)
            _check_format(text, (*args, *kwargs.values()), self.meter)
            made: str = type(text)(formatter.vformat(text, args, kwargs))
            return made

        return format

    def _metered(self, name: str, function: Any, shallow: frozenset[str]) -> Callable[..., Any]:
        """A filter or test that is counted, measured and paid for."""
        takes_more = getattr(function, "jinja_pass_arg", None) is not None  # the context comes first

        @functools.wraps(function)  # keeps what Jinja notes at a function, too
        def metered(*args: Any, **kwargs: Any) -> Any:
            meter = self.meter
            meter.step()
            value, *others = (args[1:] if takes_more else args) or (None,)
            others += kwargs.values()
            if name == "join":
                value = list(value) if not isinstance(value, str) else value
                args = (args[0], value, *args[2:]) if takes_more else (value, *args[1:])
            if name not in shallow:
                for it in (value, *others):
                    _measure(it, meter)
            _check_filter(name, value, others, meter)
            result = function(*args, **kwargs)
            meter.spend(_shallow_size(result))
            return self._counted(result) if isinstance(result, Iterator) else result

        return metered

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.meter.step()
            self.meter.spend(_ITEM + _shallow_size(value) if isinstance(value, list) else _ITEM)
            yield value

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes HTML, which no model was trained on.
        options: dict[str, Any] = {"ensure_ascii": ensure_ascii, "sort_keys": sort_keys}
        for option in (indent, *(separators or ())):
            if (len(option) if isinstance(option, str) else option or 0) > 100:
                raise TemplateLimit("tojson is asked for more space than makes sense")
        if indent is None:
            return json.dumps(value, separators=separators, **options)
        parts, meter = [], self.meter
        for part in json.JSONEncoder(indent=indent, separators=separators, **options).iterencode(value):
            meter.spend(len(part))
            parts.append(part)
        return "".join(parts)


class _Narrow:
    """No padding to gigabytes."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if _WIDE.search(format_spec):
            raise TemplateLimit("a format is wider than makes sense")
        return str(super().format_field(value, format_spec))  # type: ignore[misc]


class _Formatter(_Narrow, SandboxedFormatter):
    """``str.format`` in the sandbox."""


class _EscapeFormatter(_Narrow, SandboxedEscapeFormatter):
    """The same of a text that a template has marked as safe."""


class _Generation(ext.Extension):
    """``{% generation %}``: marks the assistant's text for training; here it only passes it through."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    """A call of a method of the environment, as part of a template."""
    method = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(method, arguments, [], None, None, lineno=line)


def _text_size(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)


def _shallow_size(value: Any) -> int:
    """Bytes of what was just made, without its parts, which were there before."""
    if isinstance(value, str):
        return _text_size(value)
    if isinstance(value, list | tuple | dict):
        return _ITEM * len(value)
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise TemplateLimit("a number is larger than makes sense")
    return 0


def _measure(value: Any, meter: _Meter) -> int:
    """Bytes of a value written out, its parts as often as they are in it."""
    if isinstance(value, str):
        return _text_size(value)
    size, count, waiting = 0, 0, [value]
    while waiting:
        it = waiting.pop()
        count += 1
        if isinstance(it, str):
            size += _text_size(it)
        elif isinstance(it, dict):
            waiting.extend(it)
            waiting.extend(it.values())
        elif isinstance(it, list | tuple) or (isinstance(it, MappingView) and isinstance(it, Iterable)):
            waiting.extend(it)
        elif isinstance(it, Namespace):
            waiting.append(object.__getattribute__(it, "_Namespace__attrs"))  # which it writes out
        if count + len(waiting) > _NODES:
            raise TemplateLimit("it makes too large a value")
    size += _ITEM * count
    meter.check(size)
    return size


def _check_product(operator: str, left: Any, right: Any, meter: _Meter) -> None:
    if operator == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, str | list | tuple) and isinstance(times, int):
                meter.check(max(times, 0) * _shallow_size(text))
                return
    if not (isinstance(left, int) and isinstance(right, int)):
        return
    bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
    if bits > _BITS:
        raise TemplateLimit("a number is larger than makes sense")


def _check_format(text: str, values: Any, meter: _Meter) -> None:
    """A text with places for values, each of which may stand in every place."""
    meter.check(_measure(values, meter) * (1 + text.count("{") + text.count("%")) + _text_size(text))


def _check_percent(text: str, values: Any, meter: _Meter) -> None:
    if _WIDE_PERCENT.search(text):
        raise TemplateLimit("a format is wider than makes sense")
    _check_format(text, values, meter)


def _check_method(owner: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], meter: _Meter) -> None:
    """Methods of texts whose result is not bounded by what is there already."""
    values = (*args, *kwargs.values())
    if name == "replace":
        _check_replace(owner, values, meter)
    elif name == "join" and values:
        _check_join(owner, values[0], meter)
    elif name in ("center", "ljust", "rjust", "zfill"):
        _check_width(values)
    elif name in _SCANNING:
        for value in values:
            if isinstance(value, str) and len(owner) * len(value) > 1 << 30:
                raise TemplateLimit("it takes too long")
    elif name in ("split", "splitlines", "partition"):
        meter.spend(_text_size(owner))


def _check_filter(name: str, value: Any, others: list[Any], meter: _Meter) -> None:
    if name in _SELDOM and _measure(value, meter) > _ODD:
        raise TemplateLimit(f"the filter {name} gets more than makes sense")
    if name in _PADDED:
        _check_width(others)
    if name == "indent":
        lines = str(value).count("\n") + 1
        meter.check(lines * max((it if isinstance(it, int) else len(str(it)) for it in others), default=4))
    elif name == "sum" and any(isinstance(it, list | tuple) for it in others) and len(value) > 1000:
        raise TemplateLimit("it adds up too many lists")
    elif name == "replace":
        _check_replace(str(value), others, meter)
    elif name == "join":
        _check_join(str(others[0]) if others else "", value, meter)
    elif name == "format":
        _check_percent(str(value), others, meter)
    elif name == "list" and isinstance(value, str):
        meter.spend(_ITEM * len(value))
    elif name == "trim" and others and isinstance(others[0], str) and len(str(value)) * len(others[0]) > 1 << 30:
        raise TemplateLimit("it takes too long")


def _check_replace(text: str, values: Iterable[Any], meter: _Meter) -> None:
    old, new, *_ = (*(str(value) for value in values), "", "")
    meter.check(_text_size(text) + _text_size(new) * (text.count(old) if old else len(text) + 1))


def _check_join(between: str, values: Any, meter: _Meter) -> None:
    if isinstance(values, list | tuple | dict | str):
        meter.check(_measure(values, meter) + len(values) * _text_size(between))


def _check_width(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and value > _WIDTH for value in values):
        raise TemplateLimit("it is wider than makes sense")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 1000:
        raise TemplateLimit("a date is longer than makes sense")
    return datetime.now().strftime(pattern)


def _dict(*arguments: Any, **items: Any) -> dict[Any, Any]:
    return dict(*arguments, **items)  # a function: the type itself leads out of the sandbox


__all__ = ["ChatTemplate"]

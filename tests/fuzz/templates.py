"""Chat templates of hostile checkpoints: ways out of a sandbox, endless loops, texts that blow up, broken syntax."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Template = Callable[[Random], str]

_DOORS = (
    *(
        "cycler",
        "joiner",
        "namespace",
        "lipsum",
        "range",
        "dict",
        "raise_exception",
        "strftime_now",
        "messages",
        "self",
    ),
    *("''", "[]", "messages[0]", "loop", "caller", "bos_token", "tools", "messages.append", "''.format", "varargs"),
)
_STEPS = (
    *("__class__", "__base__", "__mro__", "__subclasses__()", "__init__", "__globals__", "__code__", "__closure__"),
    *("__self__", "__func__", "gi_frame", "f_globals", "__builtins__", "__reduce_ex__(4)", "__dict__", "mro()"),
)


def _size(rng: Random) -> int:
    return rng.choice((10**4, 10**6, 10**8, 10**10, 10**12, 2**63))


def _escape(rng: Random) -> str:
    path = rng.choice(_DOORS)
    for _ in range(rng.randint(1, 5)):
        step = rng.choice(_STEPS)
        path = f"({path}|attr('{step.removesuffix('()')}'))" if rng.random() < 0.3 else f"{path}.{step}"
    return "{% for m in messages %}{{ " + path + " }}{% endfor %}"


def _command(rng: Random) -> str:
    command = "touch ../victim/canary"
    ways = (
        f"{{{{ cycler.__init__.__globals__.os.popen('{command}').read() }}}}",
        f"{{{{ lipsum.__globals__['os'].system('{command}') }}}}",
        f"{{{{ (''|attr('__class__')).__base__.__subclasses__()[{rng.randrange(400)}]('{command}', shell=True) }}}}",
        f"{{{{ raise_exception.__globals__.__builtins__.__import__('os').system('{command}') }}}}",
        "{{ ('{0.__class__.__init__.__globals__[os]}').format(messages) }}",
        f"{{{{ namespace.__init__.__globals__['__builtins__']['exec'](\"import os; os.system('{command}')\") }}}}",
        "{% set x = messages.__iter__ %}{{ x.__self__.__class__ }}",
        "{{ ['{0.__class__.__mro__}']|map('format', messages)|list }}",
    )
    return rng.choice(ways)


def _loops(rng: Random) -> str:
    depth, size = rng.randint(1, 5), rng.choice((100, 9000, 99_999))
    return (
        f"{{% for i in range({size}) %}}" * depth
        + rng.choice(("", "x", "{{ i }}", "{% if i %}{% endif %}"))
        + ("{% endfor %}" * depth)
    )


def _doubling(rng: Random) -> str:
    start = rng.choice(("'xxxxxxxxxx'", "[0, 1]", "'x' ~ messages|string", "[messages]"))
    again = rng.choice(("ns.x + ns.x", "ns.x * 2", "ns.x ~ ns.x", "(ns.x, ns.x)", "[ns.x, ns.x]|list"))
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range({rng.choice((20, 40, 60, 3000))}) %}}"
        f"{{% set ns.x = {again} %}}{{% endfor %}}{{{{ ns.x{rng.choice(('', '|length', '|string', '|tojson'))} }}}}"
    )


def _large(rng: Random) -> str:
    size = _size(rng)
    ways = (
        f"'x' * {size}", f"[0] * {size}", f"'x'|center({size})", f"'%{size}d' % 1", f"'%.{size}f' % 1.5",
        f"'{{:>{size}}}'.format(1)",
        f"range({size})|length", f"range({size})|list|length", f"10 ** {size}", f"10 ** 10 ** {rng.randint(3, 12)}",
        "(10 ** 5000)|string",
        f"lipsum({size})", f"'x'|indent({size})", f"('a' * 99999)|replace('', 'b' * {min(size, 99_999)})|length",
        f"'x'.ljust({size})",
        f"'x'.zfill({size})", f"('a' * 99999).join('a' * {min(size, 99_999)})", f"('\\t' * 999).expandtabs({size})",
        f"'x'|wordwrap({-size})",
        f"[1]|batch({size}, 'x')|list", f"range(9)|slice({size})|list", f"1 / {size} ** 200", f"2 ** 0.5 ** {-size}",
        f"1 % ({size} - {size})",
        f"strftime_now('%Y' * {min(size, 10**6)})", f"('x' * {min(size, 10**8)})|urlize", f"{size}|round({size})",
        f"'x'|truncate({-size})",
        f"'1' * {min(size, 10**6)}|int", f"('1' * {min(size, 10**6)})|int", f"'\\u{rng.randrange(0xD800, 0xDFFF):x}'",
    )  # fmt: skip
    return "{{ " + rng.choice(ways) + " }}"


def _nested(rng: Random) -> str:
    depth = rng.choice((50, 150, 1000, 20_000))
    ways = (
        "{{ " + "(" * depth + "1" + ")" * depth + " }}",
        "{% if 1 %}" * depth + "x" + "{% endif %}" * depth,
        "{{ " + "[" * depth + "]" * depth + " }}",
        "{{ " + "-" * depth + "1 }}",
        "{{ " + "not " * depth + "1 }}",
        "{{ 1" + " + 1" * depth + " }}",
        "{{ 'x'" + "|upper" * depth + " }}",
        "{{ x" + ".a" * depth + " }}",
        "{{ 1 }}" * (depth * 10),
        "{% set a" * depth,
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(n) %}{{ m(n + 1) ~ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    )
    return rng.choice(ways)


def _types(rng: Random) -> str:
    ways = (
        "{{ nope.x.y }}", "{{ 1 / 0 }}", "{{ raise_exception({}) }}", "{{ raise_exception('a\\nb\\x1b[2J') }}",
        "{{ strftime_now(3) }}",
        "{{ [1, 'a']|sort }}", "{{ {}|dictsort(by='x') }}", "{{ messages|first|items|next }}",
        "{{ messages.__aiter__() }}",
        "{{ messages|map('nope')|list }}", "{{ messages|groupby('role', 3) }}", "{{ 'x'|int('y', 99) }}",
        "{{ messages|sum }}",
        "{{ messages|join(attribute=3) }}", "{{ messages|tojson(indent='x') }}", "{{ messages|tojson(separators=3) }}",
        "{{ 'é'|format(*messages) }}",
        "{{ messages[99].content }}", "{{ messages['x'] }}", "{{ messages|random }}", "{{ ''|random }}",
        "{{ ''|first }}", "{{ {}|xmlattr(3) }}",
        "{{ messages|map(attribute='a.b.c.__class__')|list }}", "{{ 'x'|filesizeformat }}", "{{ undefined() }}",
        "{{ messages() }}",
        "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends '/etc/passwd' %}",
        "{% from '../victim' import x %}",
        "{% generation %}x", "{% break %}", "{% continue %}", "{% endfor %}", "{{", "{%", "{#", "{{ }}", "{% set %}",
        "{% for %}", "{{ 'x }}",
        "{% do messages.append(1) %}", "{{ messages.append(1) }}", "{% call m() %}{% endcall %}",
        "{% block a %}{% endblock %}{% block a %}{% endblock %}",
        "{% set messages = 3 %}{{ messages.x() }}", "{% autoescape true %}{{ messages }}{% endautoescape %}",
        "{% trans %}x{% endtrans %}", "\0{{ 1 }}",
        "{{ 1e999 }}", "{{ -1e999|int }}", "{{ 'x' % 'y' }}", "{{ '%' % messages }}", "{{ '{'.format(1) }}",
        "{{ '{0[}'.format(1) }}", "{{ '\\N{nope}' }}",
        "{{ messages|selectattr('role', 'nope')|list }}", "{{ messages|batch(0)|list }}",
        "{{ messages|slice(0)|list }}", "{{ range(1, 9, 0) }}",
        "{{ cycler().next() }}", "{{ joiner(messages)() }}", "{{ namespace(3) }}",
        "{% set ns = namespace() %}{{ ns.x.y }}{% set ns.__class__ = 3 %}",
    )  # fmt: skip
    return rng.choice(ways)


KINDS: tuple[Template, ...] = (_escape, _command, _loops, _doubling, _large, _nested, _types)


def hostile_template(rng: Random) -> str:
    """One of a kind, behind a beginning that renders or not."""
    text = rng.choice(KINDS)(rng)
    return rng.choice(("", "", "{{ bos_token }}", "{% for m in messages %}{{ m.content }}{% endfor %}")) + text

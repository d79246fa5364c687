"""Templates of strangers end in one line: no hang, no memory without bounds, no traceback."""

from __future__ import annotations

import threading
import time
import tracemalloc

import pytest

from mesart.graphs.errors import MesaError
from mesart.runtime import chat_template
from mesart.runtime.chat_template import ChatTemplate

MESSAGES = {"messages": [{"role": "user", "content": "Hi"}]}
DOUBLE = "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"


def render(source: str, size: int = 100) -> str:
    return ChatTemplate(source, "folder").render(MESSAGES, size)


LIMITED = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop in a macro": "{% macro m() %}{% for i in range(99999) %}{{ m }}{% endfor %}{% endmacro %}"
    "{% for i in range(99999) %}{{ m() }}{% endfor %}",
    "lazy loop": "{% for i in range(99999) %}{{ range(99999) | select('even') | list | length }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "power": "{{ 3 ** 999999999 }}",
    "growing number": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "times": "{{ 'x' * 10 ** 11 }}",
    "list times": "{{ [0] * 10 ** 10 }}",
    "doubling": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "zfill": "{{ 'x'.zfill(10 ** 10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10 ** 10, 1) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "safe format": "{{ ('{:>10000000000}' | safe).format(1) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "indent": "{{ ('a\n' * 999999) | indent(9999) }}",
    "tojson": "{{ [1] | tojson(indent=10 ** 10) }}",
    "replace": "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "replace filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
    "strip": "{{ ('a' * 9999999).strip('b' * 9999999) }}",
    "rfind": "{% set a = 'a' * 9999999 %}{{ a.rfind('b' + a) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "wordwrap": "{{ ('x ' * 99999) | wordwrap(1) }}",
    "batch": "{{ [1] | batch(10 ** 10, 0) | list }}",
    "sum of lists": "{{ range(99999) | batch(1) | list | sum(start=[]) }}",
    "round": "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "stored slices": "{% set a = 'a' * 9999999 %}{% set ns = namespace(x=[]) %}"
    "{% for i in range(9999) %}{% set ns.x = ns.x + [a[i:]] %}{% endfor %}",
    "large block": "{% set x %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "large output": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "lipsum": "{{ lipsum(10 ** 6) }}",
    "date": "{{ strftime_now('%c' * 9999) }}",
    "large int as text": "{{ 10 ** 5000 }}",
    "shared, printed": DOUBLE + "{{ ns.x }}",
    "shared, in a namespace": DOUBLE + "{{ ns }}",
    "shared, as JSON": DOUBLE + "{{ ns.x | tojson }}",
    "shared, compared": DOUBLE + "{{ ns.x == ns.x[0] }}",
    "shared, joined": DOUBLE + "{{ ns.x ~ '' }}",
    "shared, a key": DOUBLE + "{{ {ns.x: 1} }}",
    "shared, looked up": DOUBLE + "{{ {}.get(ns.x) }}{{ {}[ns.x] }}",
    "shared, formatted": DOUBLE + "{{ '{}'.format(ns.x) }}",
    "shared, upper": DOUBLE + "{{ ns.x | upper }}",
    "shared, raised": DOUBLE + "{{ raise_exception(ns.x) }}",
    "division": "{{ 1 / 0 }}",
    "include": "{% include 'x' %}",
}


@pytest.mark.parametrize("name", LIMITED)
def test_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 0.3)
    with pytest.raises(MesaError, match="cannot render these messages: ") as caught:
        render(LIMITED[name])
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_the_text_grows_with_the_values_only() -> None:
    """What is cheap to make may still keep the tokenizer busy for minutes."""
    long = "{{ 'x' * 100_000 }}{{ 'x' * 100_000 }}"
    with pytest.raises(MesaError, match="cannot render these messages: .*makes too much text"):
        render(long)
    assert len(render(long, size=10_000)) == 200_000


@pytest.mark.parametrize("name", ["times", "doubling", "stored slices", "large block", "replace filter"])
def test_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MesaError, match="it makes too much text"):
            render(LIMITED[name])
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 1 }}" * 300_000, "has 2,100,000 characters"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{% if 1 %}" * 200 + "{% endif %}" * 200, "nested too deeply"),
        ("{{ 1 | nope }}", "is damaged: line 1"),
    ],
)
def test_what_is_no_template(source: str, message: str) -> None:
    with pytest.raises(MesaError, match=message):
        ChatTemplate(source, "folder")


def test_the_clock_stops_a_template() -> None:
    start = time.monotonic()
    with pytest.raises(MesaError, match="takes too long"):
        render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    assert time.monotonic() - start < 9


def test_ordinary_work_is_not_limited() -> None:
    """What a template does with a conversation of megabytes."""
    content = "日本語 text </think> answer\n" * 20_000
    messages = [{"role": "user", "content": content} for _ in range(10)] + [{"role": "user", "content": "x"}] * 1000
    source = """{%- set ns = namespace(text='', last=0) -%}
    {%- for message in messages -%}
        {%- if message.content is string and '</think>' in message.content -%}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') -%}
        {%- else -%}{%- set content = message.content | trim -%}{%- endif -%}
        {%- if messages[loop.index0 - 1] == message and message not in messages[:2] -%}{%- set ns.last = loop.index -%}
        {%- endif -%}
        {%- set ns.text = ns.text + content[:3] -%}
        {{- '<|' ~ message.role ~ '|>' + content + message.content.replace('text', 'words')[:5] }}
    {%- endfor -%}|{{ ns.text | length }}|{{ ns.last }}|{{ messages | tojson | length }}"""
    text = ChatTemplate(source, "folder").render({"messages": messages}, sum(len(it["content"]) for it in messages))
    assert text.endswith(f"|{1000 + 30}|1010|{text.rsplit('|', 1)[1]}")
    assert int(text.rsplit("|", 1)[1]) > 5_000_000


def test_a_template_renders_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    template, results = ChatTemplate("{% for i in range(2000) %}{{ messages[0].content }}{% endfor %}", "folder"), []
    threads = [threading.Thread(target=lambda: results.append(template.render(MESSAGES, 1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["Hi" * 2000] * 4

"""Odd values, and documents changed by them: JSON trees, their text, plain bytes. All choices are a ``Random``'s."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, MutableMapping, MutableSequence
from random import Random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(
        0,
        -1,
        1,
        2,
        3,
        7,
        100,
        2**15,
        2**31 - 1,
        2**31,
        -(2**31) - 1,
        2**32,
        2**53 + 1,
        2**63 - 1,
        2**63,
        -(2**63),
        2**64,
    ),
    *(10**30, 10**400, 0.5, 1.5, -0.0, 1e-320, 1e308, 1e30, math.nan, math.inf, -math.inf),
)
STRINGS: tuple[str, ...] = (
    *("", " ", "x", "0", "-1", "1e9", "null", "true", "float32", "int8", "any", "é", "日本", "\0", "\ud800", "\u202e"),
    *("\x1b]0;title\x07\x1b[2J", "a" * 300, "a" * 70_000, "line\nline", "%s%n{0}{x}", "${HOME}", "<0x0A>"),
)
HOSTILE_NAMES: tuple[str, ...] = (
    *(
        "../victim/model.safetensors",
        "../victim/model.onnx",
        "../victim/new",
        "../../x",
        "./model.onnx",
        "a/../model.onnx",
    ),
    *(".", "..", "/", "", "/dev/zero", "/etc/hostname", "/proc/self/mem", "model.onnx/", "model.onnx\0", "a\\b", "-rf"),
    *("manifest.json", ".hidden", "x" * 300, "con\n", "engines/../model.onnx", "~/x", "file:///etc/hostname"),
)
_RAW = "\u0001RAW:"
_RAW_TEXT = re.compile(r'"\\u0001RAW:(?:[^"\\]|\\.)*"')
RAW_VALUES: tuple[Callable[[Random], str], ...] = (
    lambda rng: "[" * (depth := rng.choice((50, 900, 3000, 100_000))) + "]" * depth,
    lambda rng: '{"a":' * (depth := rng.choice((50, 900, 3000, 100_000))) + "1" + "}" * depth,
    lambda rng: "1" * rng.choice((5000, 50_000)),
    lambda rng: "1e999",
    lambda rng: "-0",
    lambda rng: "nan",
    lambda rng: "[" + "0," * rng.choice((1000, 1_000_000)) + "0]",
)


def raw(text: str) -> str:
    """A value that :func:`dump` writes as this very text, be it JSON or not."""
    return _RAW + text


def dump(tree: Any, **options: Any) -> str:
    """JSON text of a tree that may hold :func:`raw` values."""
    return _RAW_TEXT.sub(lambda found: json.loads(found[0])[len(_RAW) :], json.dumps(tree, **options))


def odd_value(rng: Random) -> Any:
    """A value of any type, most of them wrong wherever they stand."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(STRINGS)
    if kind == 5:
        return rng.choice(HOSTILE_NAMES)
    if kind == 6:
        return rng.choice((None, True, False))
    if kind == 7:
        return raw(rng.choice(RAW_VALUES)(rng))
    return copy.deepcopy(rng.choice(([], {}, [[]], [None], [0], ["x"], {"a": 1}, {"x": {}}, [1, "x"], [[1, 2], [3]])))


def near_value(rng: Random, value: Any) -> Any:
    """A value of the same type, a little or a good deal off."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(
            (value + 1, value - 1, -value, 2 * value, value // 2, value * 1000, value + 2**32, float(value))
        )
    if isinstance(value, float):
        return rng.choice(
            (-value, value * 2, value / 3, value * 1e30, math.nan, int(value) if math.isfinite(value) else 0)
        )
    ways: tuple[Any, ...]
    if isinstance(value, str):
        at = rng.randint(0, len(value))
        letter = chr(rng.choice((0, 32, 46, 47, 65, 0x7F, 0xE9, 0x1F600)))
        ways = (value.upper(), value[:at], value[:at] + letter + value[at:], value + value, value + " ", value[::-1])
        return rng.choice(ways)
    if isinstance(value, list):
        ways = (value[::-1], value[1:], value[:-1], value + value, value * 100, [value], rng.sample(value, len(value)))
        return copy.deepcopy(rng.choice(ways))
    if isinstance(value, dict):
        return rng.choice((list(value.items()), list(value), {**value, "extra": 1}, {"x": copy.deepcopy(value)}))
    return 0


Step = tuple[Any, Any]


def pick(rng: Random, tree: Any, stop: float = 0.25) -> tuple[Any, Any]:
    """A container in the tree and a key of it, not so that large parts drown the small ones."""
    parent: Any = None
    key: Any = None
    while isinstance(tree, MutableMapping | MutableSequence) and len(tree):
        if parent is not None and rng.random() < stop:
            break
        parent = tree
        key = rng.choice(list(tree)) if isinstance(tree, MutableMapping) else rng.randrange(len(tree))
        tree = tree[key]
    return parent, key


def mutate_tree(rng: Random, tree: Any) -> str:
    """Changes one thing in a tree, in place; says what."""
    parent, key = pick(rng, tree)
    if parent is None:
        return "nothing"
    way = rng.randrange(10)
    if way < 4:
        value = odd_value(rng)
    elif way < 7:
        value = near_value(rng, parent[key])
    elif way == 7:
        other, place = pick(rng, tree)
        value = copy.deepcopy(other[place])
    elif way == 8 or isinstance(parent, MutableSequence):
        del parent[key]
        return f"{key}: deleted"
    else:
        name = rng.choice(("extra", str(key) + "x", str(key).upper(), "", "__class__", "sha256"))
        parent[name] = parent.pop(key) if rng.random() < 0.5 else odd_value(rng)
        return f"{key}: renamed or joined by {name!r}"
    was, parent[key] = parent[key], value
    return f"{key}: {_short(was)} -> {_short(value)}"


def _short(value: Any) -> str:
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge number"
    return text if len(text) < 60 else f"{text[:40]}... ({type(value).__name__})"


def mutate_text(rng: Random, text: str) -> tuple[bytes, str]:
    """The text of a JSON file, damaged as text; some of it says the same as before."""
    ways: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "truncated": lambda: text.encode(errors="replace")[: rng.randrange(len(text) + 1)],
        "byte order mark": lambda: text.encode("utf-8-sig", errors="replace"),
        "UTF-16": lambda: text.encode("utf-16", errors="replace"),
        "not UTF-8": lambda: text.encode(errors="replace") + b"\xff\xfe",
        "garbage behind": lambda: text.encode(errors="replace") + rng.choice((b"}", b"\0", b" x", b"[]")),
        "spaces": lambda: (" \n\t" + text.replace("\n", "\r\n") + "\n \n").encode(errors="replace"),
        "duplicate field": lambda: text.replace("{", rng.choice(('{"schema_version": 1,', '{"config": 1,', '{"": 0,')),
            1).encode(errors="replace"),
        "a list around": lambda: f"[{text}]".encode(errors="replace"),
        "a comment": lambda: f"// x\n{text}".encode(errors="replace"),
        "another value": lambda: dump(odd_value(rng)).encode(errors="replace"),
        "bytes": lambda: mutate_bytes(rng, text.encode(errors="replace"))[0],
    }  # fmt: skip
    way = rng.choice(list(ways))
    return ways[way](), way


def mutate_bytes(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Bytes flipped, cut out, put in, cut off."""
    if not data:
        return b"\0", "a byte"
    at = rng.randrange(len(data))
    size = min(len(data) - at, rng.choice((1, 2, 8, 100, 5000)))
    way = rng.randrange(7)
    if way < 3:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 10, 100))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed), "bits flipped"
    if way == 3:
        return data[:at], f"cut off at {at}"
    if way == 4:
        return data[:at] + data[at + size :], f"{size} bytes cut out at {at}"
    if way == 5:
        return data[:at] + rng.randbytes(size) + data[at:], f"{size} bytes put in at {at}"
    return data[:at] + bytes(size) + data[at + size :], f"{size} zeros at {at}"


def mutate_json(rng: Random, data: bytes, also: Callable[[Random, Any], str] | None = None) -> tuple[bytes, str]:
    """A JSON file with one to three things changed, in its tree or text; ``also``: changes that know the file."""
    if rng.random() < 0.1:
        return mutate_text(rng, data.decode())
    tree = json.loads(data)
    said = [
        (also if also is not None and rng.random() < 0.5 else mutate_tree)(rng, tree)
        for _ in range(rng.choice((1, 1, 1, 2, 3)))
    ]
    return dump(tree).encode(errors="surrogatepass"), "; ".join(said)


def once_more(change: Callable[[], str], is_changed: bool) -> str:
    """Makes a change; of what is changed already, only if it is not too damaged for that."""
    try:
        return change()
    except Exception:
        if is_changed:
            return "no more"
        raise

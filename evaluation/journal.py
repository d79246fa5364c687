"""Results as they come, a JSON line each: an interrupted run goes on where it stopped, and runs can be joined.

A line holds what was asked (``key``), under which circumstances (``conditions``: versions, seed, settings, the model's
fingerprint) and the answer (``result``). Lines made under other circumstances are refused, not mixed in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mesart.evaluation.json_lines import JsonLines
from mesart.graphs.errors import InputError

Key = tuple[str | int | float, ...]
Found = TypeVar("Found")


class Journal:
    """The lines of one file, which is made with its first line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads what is there; a last line that was cut short does not count, and is dropped by the next.

        Raises:
            MesaError: the file is no journal, or cannot be read and written.
        """
        self._file = JsonLines(path, '{"key": ')
        self.path = self._file.path
        self._lines: dict[Key, dict[str, Any]] = {}
        for number, row in enumerate(self._file.read(), start=1):
            try:
                line = json.loads(row)
                key = tuple(line["key"])
                hash(key)
                if not isinstance(line["conditions"], dict) or "result" not in line:
                    raise TypeError("no journal's line")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise self._file.foreign(number) from error
            self._lines[key] = line

    def find(
        self, key: Key, conditions: Mapping[str, Any], read: Callable[[Any], Found] = lambda result: result
    ) -> Found | None:
        """The result that is known for ``key``, as ``read`` makes it of its JSON, or ``None``.

        Raises:
            MesaError: it was found under other conditions; the message names the first that differs. Or ``read`` cannot
                take it, which it says by a ``ValueError``, ``TypeError`` or ``KeyError``.
        """
        line = self._lines.get(key)
        if line is None:
            return None
        known, asked = line["conditions"], json.loads(json.dumps(conditions))
        for name in dict.fromkeys((*asked, *known)):
            if known.get(name) != asked.get(name):
                raise InputError(
                    f"{self.path} has {' '.join(map(str, key))} from a run with another {name} "
                    f"({_difference(known.get(name), asked.get(name))}); write to another place, or delete that file"
                )
        try:
            return read(line["result"])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self.path} has a result of {' '.join(map(str, key))} that is none ({error}); delete that line"
            ) from error

    def add(self, key: Key, conditions: Mapping[str, Any], result: Any) -> None:
        """Appends a line and sees to it that it is on the disk.

        Raises:
            WriteError: it cannot be written; what was there before is kept.
        """
        line = {"key": list(key), "conditions": dict(conditions), "result": result}
        self._file.append(line)
        self._lines[key] = json.loads(json.dumps(line))


def _difference(known: Any, asked: Any) -> str:
    if isinstance(known, dict) and isinstance(asked, dict):
        names = [name for name in dict.fromkeys((*known, *asked)) if known.get(name) != asked.get(name)]
        return ", ".join(f"{name}: {known.get(name)}, now {asked.get(name)}" for name in names[:3])
    return f"{known}, now {asked}"


__all__ = ["Journal", "Key"]

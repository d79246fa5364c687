"""Results as they come, a JSON line each: an interrupted run goes on where it stopped, and runs can be joined.

A line holds what was asked (``key``), under which circumstances (``conditions``: versions, seed, settings, the model's
fingerprint) and the answer (``result``). Lines made under other circumstances are refused, not mixed in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mesart.graphs.errors import MesaError

Key = tuple[str | int | float, ...]

_BEGINNING = '{"key": '
"""Of each line."""


class Journal:
    """The lines of one file, which is made with its first line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads what is there; a last line that was cut short is dropped.

        Raises:
            MesaError: the file is no journal, or cannot be read.
        """
        self.path = Path(path)
        self._lines: dict[Key, dict[str, Any]] = {}
        for line in self._read():
            self._lines[tuple(line["key"])] = line

    def _read(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MesaError(f"{self.path} cannot be read: {error}") from error
        rows = text.splitlines(keepends=True)
        whole = 0
        for number, row in enumerate(rows, start=1):
            try:
                line = json.loads(row)
                complete = row.endswith("\n") and {"key", "conditions", "result"} <= line.keys()
            except (json.JSONDecodeError, AttributeError):
                complete = False
            if complete:
                whole += len(row.encode())
                yield line
            elif number == len(rows) and _BEGINNING.startswith(row[: len(_BEGINNING)]):
                # An interrupt came while it was written.
                os.truncate(self.path, whole)
            else:
                raise MesaError(f"line {number} of {self.path} is no result of an evaluation; write to another place")

    def find(self, key: Key, conditions: Mapping[str, Any]) -> Any:
        """The result that is known for ``key``, or ``None``.

        Raises:
            MesaError: it was found under other conditions; the message names the first that differs.
        """
        line = self._lines.get(key)
        if line is None:
            return None
        known, asked = line["conditions"], json.loads(json.dumps(conditions))
        for name in dict.fromkeys((*asked, *known)):
            if known.get(name) != asked.get(name):
                raise MesaError(
                    f"{self.path} has {' '.join(map(str, key))} from a run with another {name} "
                    f"({_difference(known.get(name), asked.get(name))}); write to another place, or delete that file"
                )
        return line["result"]

    def add(self, key: Key, conditions: Mapping[str, Any], result: Any) -> None:
        """Appends a line and sees to it that it is on the disk."""
        line = {"key": list(key), "conditions": dict(conditions), "result": result}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines[key] = json.loads(json.dumps(line))


def _difference(known: Any, asked: Any) -> str:
    if isinstance(known, dict) and isinstance(asked, dict):
        names = [name for name in dict.fromkeys((*known, *asked)) if known.get(name) != asked.get(name)]
        return ", ".join(f"{name}: {known.get(name)}, now {asked.get(name)}" for name in names[:3])
    return f"{known}, now {asked}"


__all__ = ["Journal", "Key"]

"""Tasks that tell how well a model uses a long prompt, each in two scales.

`tasks("paper")`, which is `TASKS`, has the sizes of the sources. `tasks("small")` has the same templates with shorter
and fewer keys and values, so that prompts start at some hundred tokens: for models with small windows. Numbers have 4
digits there, UUIDs 8, words come from 32 adjectives and 32 nouns; what else differs stands at each `small`.

RULER's question answering is left out: it is made from data sets.
"""

from __future__ import annotations

from typing import Final

from mesart.evaluation.tasks.base import Sample, Task, Writer
from mesart.evaluation.tasks.counting import CommonWords, FrequentWords
from mesart.evaluation.tasks.lookup import Lines, Pairs
from mesart.evaluation.tasks.niah import (
    NiahMultikey1,
    NiahMultikey2,
    NiahMultikey3,
    NiahMultiquery,
    NiahMultivalue,
    NiahSingle1,
    NiahSingle2,
    NiahSingle3,
)
from mesart.evaluation.tasks.passkey import Needle, Passkey, RandomPasskey
from mesart.evaluation.tasks.vt import VariableTracking
from mesart.graphs.errors import InputError

SCALES: Final = ("paper", "small")

_KINDS: Final[tuple[type[Task], ...]] = (
    Passkey,
    RandomPasskey,
    Needle,
    NiahSingle1,
    NiahSingle2,
    NiahSingle3,
    NiahMultikey1,
    NiahMultikey2,
    NiahMultikey3,
    NiahMultivalue,
    NiahMultiquery,
    VariableTracking,
    CommonWords,
    FrequentWords,
    Lines,
    Pairs,
)


def tasks(scale: str = "paper") -> dict[str, Task]:
    """All tasks by name, in the sizes of their sources or in small ones.

    Raises:
        MesaError: there is no such scale.
    """
    if scale not in SCALES:
        raise InputError(f"there is no scale {scale!r}; there are {', '.join(SCALES)}")
    return {kind.name: kind() if scale == "paper" else kind.small() for kind in _KINDS}


TASKS: Final = tasks("paper")
"""All tasks by name, in the sizes of their sources."""


def find_task(name: str, scale: str = "paper") -> Task:
    """The task of this name.

    Raises:
        MesaError: there is no such task, or no such scale.
    """
    found = tasks(scale)
    if name not in found:
        raise InputError(f"there is no task {name!r}; there are {', '.join(found)}")
    return found[name]


__all__ = ["SCALES", "TASKS", "Sample", "Task", "Writer", "find_task", "tasks"]

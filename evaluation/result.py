"""What every evaluation gives back: a table for people, JSON for machines."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mesart.evaluation.provenance import versions

if TYPE_CHECKING:
    from mesart.evaluation.systems import Subject


class Result(ABC):
    """What was found; a dataclass."""

    @abstractmethod
    def table(self) -> str:
        """A table for people, which reads well as it is."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Everything that was found, and what it depends on; dataclasses in it stand for their fields."""

    def to_json(self) -> str:
        """The record as JSON, for machines."""
        return json.dumps(self.record(), indent=1, default=dataclasses.asdict) + "\n"


def subject_record(task: str, subject: Subject, seed: int, complete: bool, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an evaluation of one model, which says all that is needed to run it again."""
    return {
        "task": task,
        "complete": complete,
        "seed": seed,
        "source": {"path": subject.source, "kind": subject.kind},
        "config": subject.config.to_dict(),
        "systems": subject.engines,
        **fields,
        "versions": versions(),
    }


__all__ = ["Result", "subject_record"]

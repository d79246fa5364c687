"""Methods whose graphs are static too: the executor's rule for what an export fixes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from mesart.evaluation.methods.method import Method, Positions
from mesart.graphs.method.all_tail import AllTail

Config = TypeVar("Config", bound=AllTail)
Self = TypeVar("Self", bound="Exported[Any]")


@dataclass(frozen=True)
class Exported(Method, Generic[Config]):
    """A method around its configuration in :mod:`mesart.graphs.method`, whose parameters and checks are its own."""

    kind: ClassVar[type[AllTail]]
    """The class of ``config``."""

    config: Config

    @classmethod
    def parameter_class(cls) -> type:
        return cls.kind

    @classmethod
    def parameter_names(cls) -> list[str]:
        return cls.kind.parameter_names()

    @classmethod
    def with_parameters(cls: type[Self], train_length: int, parameters: Mapping[str, Any]) -> Self:
        config = cls.kind(train_length, **parameters)
        return cls(train_length, config, log_n=config.log_n)

    @property
    def parameters(self) -> dict[str, Any]:
        return self.config.parameters

    def turn(self, frequencies: Positions, tokens: int) -> tuple[Positions, float]:
        return self.config.rescaled(frequencies, tokens)

    def static(self) -> Config:
        return self.config


__all__ = ["Exported"]

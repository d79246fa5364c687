"""What the threshold probe found: curves, points where they cross, and the table of both for each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from mesart.evaluation.provenance import versions
from mesart.evaluation.report import table, wilson_interval
from mesart.evaluation.result import Result

ORIGIN: Final = "origin"
"""The plain model, whose failure is to be told."""


@dataclass(frozen=True)
class Curve:
    """A mean over the places at each length, with its 95% interval."""

    positions: tuple[int, ...]
    mean: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]


@dataclass(frozen=True)
class Crossing:
    """Where something passes a limit for good, in tokens; ``None``: not within the lengths that were watched."""

    position: float | None
    lower: float | None
    upper: float | None
    """The 95% interval; an end that is ``None`` is beyond the longest text."""

    def __str__(self) -> str:
        return f"{_words([self.position])} ({_words([self.lower, self.upper], ' to ')})"


def _words(points: Sequence[float | None], between: str = ", ") -> str:
    return between.join("never" if point is None else f"{point:,.0f}" for point in points)


@dataclass(frozen=True)
class MethodProbe:
    """One method on the same tokens."""

    values: Curve
    """Of the chosen dimension. The interval is of the change from the plain model's value at T_r."""
    strays: Curve
    """Of the chosen dimension: distance of each place's value from its own under the plain model at T_r."""
    losses: Curve
    """Change of the loss from the plain model's at T_r, in nats a token."""
    predicted: Crossing
    """Where the stray passes ``limit``."""
    mean_predicted: Crossing
    """Where the mean value is farther from the threshold, to either side, than ``margin`` times since T_r / 2."""
    actual: Crossing
    """Where the loss has risen by ``ln(factor)``."""
    passing: float
    """Share of all dimensions to choose from whose stray passes a limit of its own."""
    quartiles: tuple[float | None, float | None, float | None]
    """Of the point where it does, over all those dimensions; ``None``: never."""


@dataclass(frozen=True)
class PasskeyRate:
    """The plain model's passkeys at one length."""

    length: int
    correct: int
    prompts: int

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.prompts)


@dataclass(frozen=True)
class ThresholdResult(Result):
    """What :func:`probe_threshold` found."""

    train_length: int
    seed: int
    places: int
    """Of the evaluation, and as many of the choice."""
    tokens: int
    """Watched at each place."""
    factor: float
    margin: float
    layer: int
    """Counted from 1."""
    dimension: int
    choice_t: float
    """Of the slope within the window on the places of the choice: the largest of ``candidates``."""
    check_t: float
    """The same on the places of the evaluation; below 2 in size the dimension tells nothing of the position."""
    candidates: int
    """Dimensions that were there to choose from."""
    threshold: float
    """The plain model's value at T_r."""
    limit: float
    """How far from it a value may stray: ``margin`` times the plain model's stray at T_r / 2."""
    methods: dict[str, MethodProbe]
    passkey: tuple[PasskeyRate, ...] = ()
    passkey_failure: Crossing | None = None
    """Where the plain model finds fewer than half of the passkeys."""
    config: dict[str, Any] = field(default_factory=dict)
    """Mesa's."""

    @property
    def predicted(self) -> Crossing:
        return self.methods[ORIGIN].predicted

    @property
    def actual(self) -> Crossing:
        return self.methods[ORIGIN].actual

    def table(self) -> str:
        """Both points of each method, as Markdown that reads well as it is."""
        rows = [
            [name, str(probe.predicted), str(probe.actual), f"{probe.passing:.0%}", _words(probe.quartiles)]
            for name, probe in self.methods.items()
        ]
        header = ["method", "value strays", "loss fails", f"of all {self.candidates}", "quartiles"]
        title = (
            f"Dimension {self.dimension} of layer {self.layer}: where it strays more than {self.limit:.3g} from what "
            f"it is at T_r = {self.train_length}, and where the perplexity of the same tokens has grown "
            f"{self.factor:g}-fold; tokens, 95% intervals, {self.places} places, seed {self.seed}"
        )
        lines = [title, "", table(header, rows), ""]
        if self.passkey_failure is not None:
            lines.append(
                f"The plain model finds fewer than half of the passkeys from {self.passkey_failure} tokens on."
            )
        lines.append(
            f"t of the slope within the window: {self.choice_t:.1f} where it was chosen, {self.check_t:.1f} here. The "
            "last columns: the share of all dimensions that could have been chosen that pass, and where."
        )
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        fields = {**asdict(self), "predicted": asdict(self.predicted), "actual": asdict(self.actual)}
        return {"task": "threshold", **fields, "versions": versions()}


__all__ = ["ORIGIN", "Crossing", "Curve", "MethodProbe", "PasskeyRate", "ThresholdResult"]

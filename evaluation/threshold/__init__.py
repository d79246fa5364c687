"""The hidden-state threshold: probe (what is asked), watch (measurement), crossing (statistics), report."""

from mesart.evaluation.threshold.probe import probe_threshold, run_threshold
from mesart.evaluation.threshold.report import Crossing, Curve, MethodProbe, PasskeyRate, ThresholdResult
from mesart.evaluation.threshold.watch import ProbedModel

__all__ = [
    "Crossing",
    "Curve",
    "MethodProbe",
    "PasskeyRate",
    "ProbedModel",
    "ThresholdResult",
    "probe_threshold",
    "run_threshold",
]

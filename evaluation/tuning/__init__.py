"""Which configuration suits a model, and what each parameter does: search, measurement and report."""

from mesart.evaluation.tuning.grid import PARAMETERS, grid
from mesart.evaluation.tuning.report import Measured, SensitivityResult, SensitivityRow, Tried, TuneResult
from mesart.evaluation.tuning.search import tune
from mesart.evaluation.tuning.sensitivity import sensitivity

__all__ = [
    "PARAMETERS",
    "Measured",
    "SensitivityResult",
    "SensitivityRow",
    "Tried",
    "TuneResult",
    "grid",
    "sensitivity",
    "tune",
]

"""Does it work: the methods of the paper, tasks, measurements and plots. Light to import: no torch, no matplotlib."""

from mesart.evaluation.cells import Settings
from mesart.evaluation.cost import CostResult, run_cost
from mesart.evaluation.passkey_eval import PasskeyResult, run_passkey
from mesart.evaluation.perplexity import PerplexityResult, run_perplexity
from mesart.evaluation.suite import run_suite
from mesart.evaluation.suite_report import SuiteResult
from mesart.evaluation.systems import open_systems
from mesart.evaluation.threshold import ThresholdResult, run_threshold
from mesart.evaluation.tuning import SensitivityResult, TuneResult, sensitivity, tune

__all__ = [
    "CostResult",
    "PasskeyResult",
    "PerplexityResult",
    "SensitivityResult",
    "Settings",
    "SuiteResult",
    "ThresholdResult",
    "TuneResult",
    "open_systems",
    "run_cost",
    "run_passkey",
    "run_perplexity",
    "run_suite",
    "run_threshold",
    "sensitivity",
    "tune",
]

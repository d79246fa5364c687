"""Does it work: the methods of the paper, tasks, measurements and plots. Light to import: no torch, no matplotlib."""

from mesart.evaluation.passkey_eval import PasskeyResult, run_passkey
from mesart.evaluation.perplexity import PerplexityResult, run_perplexity
from mesart.evaluation.systems import open_systems

__all__ = ["PasskeyResult", "PerplexityResult", "open_systems", "run_passkey", "run_perplexity"]

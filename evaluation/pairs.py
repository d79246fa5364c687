"""How many scores of a query with a key a prompt takes: what attention costs, whatever runs it."""

from __future__ import annotations

from mesart.graphs.method.plan import Plan
from mesart.graphs.method.protocol import StaticMethod


def needed_pairs(config: StaticMethod, tokens: int) -> int:
    """Pairs of a query and a key that it sees, over the whole prompt."""
    if config.sink_window is not None:
        kept = min(tokens, config.sink_window.slots)
        return kept * (kept + 1) // 2 + (tokens - kept) * kept
    plan = Plan.of(config, tokens)
    spans = ([] if plan.head is None else [(len(plan.head), 0)]) + [(len(c), config.head_length) for c in plan.chunks]
    spans.append((len(plan.tail), plan.tail.start))
    return sum(new * past + new * (new + 1) // 2 for new, past in spans)


__all__ = ["needed_pairs"]

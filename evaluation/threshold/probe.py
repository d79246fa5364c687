"""The hidden-state threshold: can a value inside an early layer, watched within the window, tell where a model fails?

Source: arXiv 2410.15859 v3, section 3 and figure 2. There a dimension of an early layer moves with the position, its
value at the trained length T_r is the threshold, and a method extrapolates as long as it keeps the value from passing.

What is measured here, so that the answer can be wrong:

* **Position** is how much text stands before the same tokens. At random places of a held-out text the last ``tokens``
  tokens are kept, and the text before them is made longer and longer. Every place is compared with itself at T_r: what
  the tokens say cancels, what remains is what the position does.
* **Layer and dimension** are chosen on places of the text's first half, and on lengths up to T_r only: the dimension
  that moves the most surely from T_r / 2 to T_r (largest ``|t|`` of the slope over the places). Layers are those of the
  first half, less the very first: a first layer may write down the position, the next is the first that can act on it.
* **Threshold**: the value at T_r. Which way a value goes past it differs from text to text, and a mean over texts may
  cancel. So what is followed is its *stray*: how far the value of each place is from its own at T_r, whichever way,
  in the mean. Strays are there within the window too, since more text says more. The value counts as past the threshold
  once it strays more than ``margin`` times as far as it does at T_r / 2; left out, the margin is what a value that
  goes with the logarithm of the length makes to the longest text, 2 for 4 T_r. (Without one the threshold would be
  passed right behind T_r by construction.) The paper's rule, the mean itself, is given beside it.
* **Predicted** is where the plain model's value passes for good. **Actual** is where the loss of the same tokens has
  for good risen by ``ln(factor)`` against T_r, and where the plain model no longer finds half of the passkeys.
* **Places of the second half** give threshold, margin, curves and both points. Intervals are 95%: of a curve from its
  spread over the places, of a point from resampling the places (bootstrap).

How far to trust it: the rule (which layers, strays, that margin) was settled on the rotary demo model, whose failure
was known by then; for any other model it is a prediction. Hidden states stray before the loss shows it, so it tends to
be early. It is a symptom, no proof of a cause. One dimension may be luck: :attr:`MethodProbe.quartiles` says what all
those that could have been chosen would tell.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from mesart.evaluation.arguments import require_number, require_seed, require_whole
from mesart.evaluation.held_out import held_out_text
from mesart.evaluation.measure import Examiner, places_in
from mesart.evaluation.progress import progress_bar
from mesart.evaluation.systems import CheckpointModel, PlainModel, Source, stretched
from mesart.evaluation.tasks.passkey import NumberedPasskey
from mesart.evaluation.threshold.crossing import all_dimensions, crossing_of, curve_of, passkey_failure, slope_t
from mesart.evaluation.threshold.report import ORIGIN, MethodProbe, PasskeyRate, ThresholdResult
from mesart.evaluation.threshold.watch import ProbedModel, WatchedTexts, blocks_of, mesa_runner, watch
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig

if TYPE_CHECKING:
    from torch import nn

_RESAMPLES: Final = 1000
_ANSWER: Final = 32
"""Tokens behind a prompt that a passkey's answer may take."""
_WINDOW: Final = tuple(k / 8 for k in range(2, 9))
_BEYOND: Final = (*(1 + k / 16 for k in range(1, 9)), 1.75, 2, 2.5, 3, 4, 6, 8, 12, 16, 24, 32)
"""Lengths that are watched, in trained windows."""


def run_threshold(
    source: Source,
    *,
    max_tokens: int | None = None,
    config: MesaConfig | None = None,
    text: str | os.PathLike[str] | None = None,
    places: int = 32,
    tokens: int = 16,
    factor: float = 1.2,
    margin: float | None = None,
    passkey_prompts: int = 0,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> ThresholdResult:
    """:func:`probe_threshold` of a checkpoint, on held-out library text or a file.

    Args:
        source: a checkpoint's folder or hub id.
        max_tokens: the longest text; 4 times the trained length if left out.
        passkey_prompts: of each length, for the plain model's passkeys; 0 leaves them out.
        trust_remote_code: run the Python code that the checkpoint brings, if it does.
        config, text, places, tokens, factor, margin, seed, progress: as there.

    Raises:
        MesaError: as there, or a source or text that cannot be used.
    """
    if max_tokens is not None:
        require_whole("tokens of the longest text", max_tokens)
    require_whole("passkey prompts", passkey_prompts, least=0)
    _require(places, tokens, factor, margin, seed)
    content = held_out_text(text).content
    checkpoint = CheckpointModel.load(source, trust_remote_code=trust_remote_code)
    train_length = checkpoint.train_length if config is None else config.for_model(checkpoint.module).train_length
    return probe_threshold(
        checkpoint.module,
        checkpoint.encode(content),
        train_length,
        max_tokens or 4 * train_length,
        prefix_ids=checkpoint.prefix_ids,
        config=config,
        passkey=_passkey(checkpoint, passkey_prompts, seed, text) if passkey_prompts else None,
        places=places,
        tokens=tokens,
        factor=factor,
        margin=margin,
        seed=seed,
        progress=progress,
    )


def probe_threshold(
    model: nn.Module,
    stream: Sequence[int],
    train_length: int,
    max_tokens: int,
    *,
    prefix_ids: Sequence[int] = (),
    config: MesaConfig | None = None,
    others: Mapping[str, ProbedModel] | None = None,
    passkey: Callable[[int], tuple[int, int]] | None = None,
    layers: Sequence[int] | None = None,
    places: int = 32,
    tokens: int = 16,
    factor: float = 1.2,
    margin: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ThresholdResult:
    """Predicts from within the window where the plain model fails, and measures where it does; see the module.

    Args:
        model: a transformers causal language model of any family.
        stream: token ids of a long held-out text; places are drawn from both halves.
        train_length: T_r.
        max_tokens: the longest text to watch.
        prefix_ids: special tokens that the model's texts begin with.
        config: Mesa's; that of ``train_length`` if left out.
        others: more methods to watch beside ``origin`` and ``mesa``.
        passkey: a length to how many passkeys the plain model found there, out of how many.
        layers: to choose from, counted from 1; the first half less the first if left out.
        places: texts of the choice, and again of the evaluation.
        tokens: watched at the end of each text.
        factor: of the perplexity, at which the model counts as failed.
        margin: times the stray at T_r / 2 that counts as past the threshold; ``log2(max_tokens / T_r)`` if left out.
        seed: of places and resampling.
        progress: show a progress bar on stderr.

    Raises:
        MesaError: a text that is too short, an option out of its range, or a model without a list of layers.
    """
    blocks = blocks_of(model)
    early = list(layers or range(min(2, len(blocks)), max(2, len(blocks) // 2) + 1))
    if not set(early) <= set(range(1, len(blocks) + 1)):
        raise InputError(f"the model has layers 1 to {len(blocks)}; asked for {', '.join(map(str, early))}")
    _require(places, tokens, factor, margin, seed)
    lengths = _lengths(train_length, max_tokens, len(prefix_ids) + tokens + 1)
    margin = math.log2(max_tokens / train_length) if margin is None else margin
    if margin <= 0:
        raise InputError(f"the margin is {margin:g}; it must be above 0")
    window = [length for length in lengths if train_length // 2 <= length <= train_length]
    half, longest = len(stream) // 2, max_tokens - len(prefix_ids)
    choosing = WatchedTexts(stream[:half], places_in(half, train_length, places, seed), prefix_ids)
    judging = WatchedTexts(stream[half:], places_in(len(stream) - half, longest, places, seed), prefix_ids)
    origin = ProbedModel(model, lambda ids, last: model(input_ids=ids, use_cache=False, logits_to_keep=last).logits)
    mesa, used = mesa_runner(model, config or MesaConfig(train_length))
    runners = {ORIGIN: origin, "mesa": mesa, **(others or {})}

    with (
        stretched(model, max_tokens),
        progress_bar(
            total=places * (sum(window) + len(runners) * sum(lengths)),
            unit="tok",
            unit_scale=True,
            desc="threshold",
            disable=not progress,
        ) as bar,
    ):
        seen, _ = watch(origin, choosing, window, early, tokens, bar)
        slopes = slope_t(seen, window)
        layer, dimension = (int(i) for i in np.unravel_index(np.abs(slopes).argmax(), slopes.shape))
        states, losses = {}, {}
        for name, runner in runners.items():
            bar.set_postfix_str(name)
            states[name], losses[name] = watch(runner, judging, lengths, early, tokens, bar)

    at_window, at_half = lengths.index(train_length), lengths.index(window[0])
    base = states[ORIGIN][:, at_window]  # [N, L, H]
    base_loss = losses[ORIGIN][:, at_window]
    way = states[ORIGIN][:, at_half] - base
    resamples = np.random.default_rng(seed).integers(places, size=(_RESAMPLES, places))
    behind = np.asarray(lengths[at_window:], np.float64)
    limits = margin * way[:, layer, dimension]
    threshold = float(base[:, layer, dimension].mean())
    probes = {}
    for name in runners:
        values = states[name][:, :, layer, dimension]
        changes, rises = values - base[:, None, layer, dimension], losses[name] - base_loss[:, None]
        probes[name] = MethodProbe(
            curve_of(lengths, changes, threshold),
            curve_of(lengths, np.abs(changes)),
            curve_of(lengths, rises),
            crossing_of(behind, np.abs(changes[:, at_window:]), np.abs(limits), resamples),
            crossing_of(behind, changes[:, at_window:], limits, resamples, either_side=True),
            crossing_of(behind, rises[:, at_window:], np.full(places, math.log(factor)), resamples),
            *all_dimensions(behind, states[name][:, at_window:] - base[:, None], margin * way),
        )
    rates: tuple[PasskeyRate, ...] = ()
    if passkey is not None:
        with stretched(model, max_tokens + _ANSWER):
            rates = tuple(PasskeyRate(length, *passkey(length)) for length in lengths[at_window:])
    return ThresholdResult(
        train_length=train_length,
        seed=seed,
        places=places,
        tokens=tokens,
        factor=factor,
        margin=margin,
        layer=early[layer],
        dimension=dimension,
        choice_t=float(slopes[layer, dimension]),
        check_t=float(slope_t(states[ORIGIN][:, at_half : at_window + 1], window)[layer, dimension]),
        candidates=slopes.size,
        threshold=threshold,
        limit=float(np.abs(limits).mean()),
        methods=probes,
        passkey=rates,
        passkey_failure=passkey_failure(rates) if rates else None,
        config=used.to_dict(),
    )


def _require(places: int, tokens: int, factor: float, margin: float | None, seed: int) -> None:
    if places < 2 or tokens < 1 or factor <= 1:
        raise InputError("the probe needs 2 or more places, 1 or more tokens and a factor above 1")
    require_whole("places", places)
    require_whole("tokens", tokens)
    require_number("the factor", factor, above=1)
    if margin is not None and margin <= 0:
        raise InputError(f"the margin is {margin:g}; it must be above 0")
    if margin is not None:
        require_number("the margin", margin, above=0)
    require_seed(seed)


def _lengths(train_length: int, max_tokens: int, least: int) -> list[int]:
    if max_tokens < 1.5 * train_length:
        raise InputError(f"watch texts of at least {math.ceil(1.5 * train_length)} tokens, not {max_tokens}")
    if least > train_length // 2:
        raise InputError(f"{least} tokens are more than half the window of {train_length}; watch fewer at each place")
    asked = {round(share * train_length) for share in (*_WINDOW, *_BEYOND)} | {max_tokens, train_length // 2}
    return sorted(length for length in asked if least <= length <= max_tokens)


def _passkey(
    checkpoint: CheckpointModel, prompts: int, seed: int, text: str | os.PathLike[str] | None
) -> Callable[[int], tuple[int, int]]:
    """The plain model's passkeys, those of :func:`~mesart.evaluation.run_passkey` with random filler."""
    origin = PlainModel(checkpoint.module, checkpoint.train_length)
    examiner, task = Examiner(checkpoint.tokenizer, held_out_text(text)), NumberedPasskey("random")

    def rate(length: int) -> tuple[int, int]:
        asked = (task.prompt(examiner.writer, length, seed, index, (index + 0.5) / prompts) for index in range(prompts))
        return round(sum(examiner.ask(origin, task, prompt).score for prompt in asked)), prompts

    return rate


__all__ = ["probe_threshold", "run_threshold"]

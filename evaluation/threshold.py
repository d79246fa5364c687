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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from mesart.evaluation.arguments import require_number, require_seed, require_whole
from mesart.evaluation.held_out import held_out_text
from mesart.evaluation.passkey_eval import PromptMaker, ask
from mesart.evaluation.perplexity import places_in
from mesart.evaluation.progress import progress_bar
from mesart.evaluation.provenance import versions
from mesart.evaluation.report import Z95, table, wilson_interval
from mesart.evaluation.result import Result
from mesart.evaluation.systems import CheckpointModel, OpenSystems, Origin, Source, Subject, stretched
from mesart.graphs.config import MesaConfig
from mesart.graphs.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

ORIGIN: Final = "origin"
"""The plain model, whose failure is to be told."""

Array = NDArray[np.float64]

_RESAMPLES: Final = 1000
_BATCH: Final = 8
"""Texts that are run at a time."""
_ANSWER: Final = 32
"""Tokens behind a prompt that a passkey's answer may take."""
_WINDOW: Final = tuple(k / 8 for k in range(2, 9))
_BEYOND: Final = (*(1 + k / 16 for k in range(1, 9)), 1.75, 2, 2.5, 3, 4, 6, 8, 12, 16, 24, 32)
"""Lengths that are watched, in trained windows."""


@dataclass(frozen=True)
class Runner:
    """A model under some method."""

    module: nn.Module
    """What holds the layers that are watched while it runs."""
    run: Callable[[Tensor, int], Tensor]
    """Token ids ``[B, T]`` and a count to the logits of the last tokens, ``[B, count, V]``."""


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
    train_length = checkpoint.train_length if config is None else config.for_model(checkpoint.model).train_length
    return probe_threshold(
        checkpoint.model,
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
    others: Mapping[str, Runner] | None = None,
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
    blocks = _blocks(model)
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
    choosing = _Texts(stream[:half], places_in(half, train_length, places, seed), prefix_ids)
    judging = _Texts(stream[half:], places_in(len(stream) - half, longest, places, seed), prefix_ids)
    origin = Runner(model, lambda ids, last: model(input_ids=ids, use_cache=False, logits_to_keep=last).logits)
    mesa, used = _mesa(model, config or MesaConfig(train_length))
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
        seen, _ = _watch(origin, choosing, window, early, tokens, bar)
        slopes = _slope_t(seen, window)
        layer, dimension = (int(i) for i in np.unravel_index(np.abs(slopes).argmax(), slopes.shape))
        states, losses = {}, {}
        for name, runner in runners.items():
            bar.set_postfix_str(name)
            states[name], losses[name] = _watch(runner, judging, lengths, early, tokens, bar)

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
            _curve(lengths, changes, threshold),
            _curve(lengths, np.abs(changes)),
            _curve(lengths, rises),
            _crossing(behind, np.abs(changes[:, at_window:]), np.abs(limits), resamples),
            _crossing(behind, changes[:, at_window:], limits, resamples, either_side=True),
            _crossing(behind, rises[:, at_window:], np.full(places, math.log(factor)), resamples),
            *_all_dimensions(behind, states[name][:, at_window:] - base[:, None], margin * way),
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
        check_t=float(_slope_t(states[ORIGIN][:, at_half : at_window + 1], window)[layer, dimension]),
        candidates=slopes.size,
        threshold=threshold,
        limit=float(np.abs(limits).mean()),
        methods=probes,
        passkey=rates,
        passkey_failure=_passkey_failure(rates) if rates else None,
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


@dataclass(frozen=True)
class _Texts:
    """Texts that end at the same places, whatever their length."""

    stream: Sequence[int]
    ends: Sequence[int]
    prefix: Sequence[int]

    def of(self, length: int) -> list[list[int]]:
        return [[*self.prefix, *self.stream[end - length + len(self.prefix) : end]] for end in self.ends]


def _lengths(train_length: int, max_tokens: int, least: int) -> list[int]:
    if max_tokens < 1.5 * train_length:
        raise InputError(f"watch texts of at least {math.ceil(1.5 * train_length)} tokens, not {max_tokens}")
    if least > train_length // 2:
        raise InputError(f"{least} tokens are more than half the window of {train_length}; watch fewer at each place")
    asked = {round(share * train_length) for share in (*_WINDOW, *_BEYOND)} | {max_tokens, train_length // 2}
    return sorted(length for length in asked if least <= length <= max_tokens)


def _mesa(model: nn.Module, config: MesaConfig) -> tuple[Runner, MesaConfig]:
    from mesart.graphs.reference import TorchReference  # noqa: PLC0415  (torch only where it is needed)

    config = config.for_model(model)
    reference = TorchReference(model, config)

    def run(ids: Tensor, last: int) -> Tensor:
        logits = reference.prefill(ids, all_logits=True)
        if logits.shape[1] < last:
            raise InputError(
                f"Mesa's tail of a text of {ids.shape[1]} tokens is {logits.shape[1]} tokens, and {last} are needed; "
                "watch fewer tokens, or raise tail_min"
            )
        return logits[:, -last:]

    return Runner(reference.role.model, run), replace(config, short_length=reference.config.short_length)


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the outermost list of as many modules as the config says."""
    from torch import nn  # noqa: PLC0415

    config: Any = model.config
    count = int(config.get_text_config().num_hidden_layers)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(model).__name__} keeps its {count} layers in no list; its hidden states cannot be watched")


@contextmanager
def _tapped(module: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What the layers gave in the latest run: of a method that cuts the text, in the run of its end."""
    latest: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            latest[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    blocks = _blocks(module)
    handles = [blocks[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield latest
    finally:
        for handle in handles:
            handle.remove()


def _watch(
    runner: Runner, texts: _Texts, lengths: Sequence[int], layers: Sequence[int], tokens: int, bar: Any
) -> tuple[Array, Array]:
    """Means over the last tokens of each text: hidden states ``[N, P, L, H]``, losses ``[N, P]``."""
    import torch  # noqa: PLC0415
    from torch.nn.functional import cross_entropy  # noqa: PLC0415

    states, losses = [], []
    with torch.inference_mode(), _tapped(runner.module, layers) as latest:
        for length in lengths:
            ids = torch.tensor(texts.of(length))
            rows, costs = [], []
            for batch in torch.split(ids, _BATCH):
                logits = runner.run(batch, tokens + 1)[:, :-1].float()
                loss = cross_entropy(logits.transpose(1, 2), batch[:, -tokens:], reduction="none")
                costs.append(loss.double().mean(1))
                rows.append(torch.stack([latest[layer][:, -tokens:].double().mean(1) for layer in layers], 1))
                bar.update(batch.numel())
            states.append(torch.cat(rows).numpy())
            losses.append(torch.cat(costs).numpy())
    return np.stack(states, 1), np.stack(losses, 1)


def _slope_t(states: Array, lengths: Sequence[int]) -> Array:
    """How surely each dimension moves with the length: t of the places' slopes, ``[layers, H]``."""
    x = np.asarray(lengths[-states.shape[1] :], np.float64)
    x -= x.mean()
    slopes = np.einsum("nplh,p->nlh", states, x) / (x**2).sum()
    error = slopes.std(axis=0, ddof=1) / math.sqrt(len(slopes))
    t: Array = np.divide(slopes.mean(axis=0), error, out=np.zeros_like(error), where=error > 0)
    return t


def _curve(lengths: Sequence[int], changes: Array, start: float = 0.0) -> Curve:
    mean = start + changes.mean(axis=0)
    half = Z95 * changes.std(axis=0, ddof=1) / math.sqrt(len(changes))
    return Curve(tuple(lengths), tuple(mean.tolist()), tuple((mean - half).tolist()), tuple((mean + half).tolist()))


def _crossing(
    positions: Array, changes: Array, limits: Array, resamples: NDArray[np.int64], *, either_side: bool = False
) -> Crossing:
    """Where the mean of ``changes``, ``[N, positions]``, passes the mean of ``limits`` for good."""

    def point(rows: NDArray[np.int64]) -> float:
        mean, limit = changes[rows].mean(axis=0), abs(limits[rows].mean())
        return _passes_at(positions, np.abs(mean) if either_side else mean, limit)

    at = point(np.arange(len(changes)))
    # Ends are points that were found, never between one that was and "never".
    low, high = np.quantile([point(rows) for rows in resamples], (0.025, 0.975), method="nearest")
    return Crossing(_found(at), _found(low), _found(high))


def _passes_at(positions: Array, values: Array, limit: float) -> float:
    """Where ``values`` pass ``limit`` and do not come back, between two positions by a straight line; else infinity."""
    within = np.flatnonzero(values <= limit)
    if len(within) == 0:
        return float(positions[0])
    last = int(within[-1])
    if last + 1 == len(values):
        return math.inf
    share = (limit - values[last]) / (values[last + 1] - values[last])
    return float(positions[last] + share * (positions[last + 1] - positions[last]))


def _all_dimensions(
    positions: Array, changes: Array, ways: Array
) -> tuple[float, tuple[float | None, float | None, float | None]]:
    """Share that passes and quartiles of where: ``changes`` is ``[N, P, L, H]``, ``ways`` ``[N, L, H]``."""
    means, limits = np.abs(changes).mean(axis=0).reshape(len(positions), -1), np.abs(ways).mean(axis=0).ravel()
    points = np.asarray([_passes_at(positions, means[:, i], limit) for i, limit in enumerate(limits)])
    low, middle, high = (_found(point) for point in np.quantile(points, (0.25, 0.5, 0.75), method="nearest"))
    return float(np.isfinite(points).mean()), (low, middle, high)


def _found(point: float) -> float | None:
    return float(point) if math.isfinite(point) else None


def _passkey_failure(rates: Sequence[PasskeyRate]) -> Crossing:
    """Where the rate falls below a half for good; the interval ends where all intervals are on one side of it."""
    lengths = np.asarray([rate.length for rate in rates], np.float64)
    at = _passes_at(lengths, -np.asarray([rate.correct / rate.prompts for rate in rates]), -0.5)
    intervals = np.asarray([rate.interval for rate in rates])
    surely_below = _passes_at(lengths, -intervals[:, 1], -0.5)
    surely_above = next((rate.length for rate in rates if rate.interval[0] <= 0.5), math.inf)
    return Crossing(_found(at), _found(surely_above), _found(surely_below))


def _passkey(
    checkpoint: CheckpointModel, prompts: int, seed: int, text: str | os.PathLike[str] | None
) -> Callable[[int], tuple[int, int]]:
    """The plain model's passkeys, asked as :func:`~mesart.evaluation.run_passkey` does, with random filler."""
    origin = Origin(checkpoint.model, checkpoint.train_length)
    subject = Subject(checkpoint.source, "checkpoint", MesaConfig(checkpoint.train_length), {ORIGIN: origin.engine})
    opened = OpenSystems(subject, checkpoint.tokenizer, checkpoint.train_length)
    maker = PromptMaker(opened, held_out_text(text), 5, seed)

    def rate(length: int) -> tuple[int, int]:
        asked = [maker.prompt(length, "random", None, index, prompts) for index in range(prompts)]
        return prompts - sum(len(ask(opened, origin, prompt)) for prompt in asked), prompts

    return rate


__all__ = [
    "Crossing",
    "Curve",
    "MethodProbe",
    "PasskeyRate",
    "Runner",
    "ThresholdResult",
    "probe_threshold",
    "run_threshold",
]

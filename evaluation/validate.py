"""Is a bundle right? Every phase and bucket against PyTorch, judged by what its own precision costs PyTorch.

The tokens are forced: both sides see the same prompt and the same continuation. The truth is computed by
:class:`~mesart.graphs.TorchReference` in a higher precision (float64 for a float32 bundle, else float32). The noise
floor is what the same reference loses in the bundle's precision; an engine may lose a small multiple of that, no more.

A quantised bundle, judged by its own weights, is one like any other: those are the weights dequantised. Judged by the
checkpoint, its errors are those of the quantisation, and the noise floor is what PyTorch loses with the checkpoint's
weights quantised anew: so a pass means that the bundle is as its scheme has it, and the table says what that costs.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mesart.evaluation.arguments import require_seed, require_whole
from mesart.evaluation.progress import progress_bar
from mesart.evaluation.result import Result
from mesart.graphs import InputError, Plan, Span, TorchReference
from mesart.graphs.bundle.manifest import Manifest, Quantisation
from mesart.graphs.method.plan import Bucket
from mesart.graphs.method.protocol import StaticMethod
from mesart.runtime import MesaModel

FACTOR = 4.0
"""Times the noise floor that an engine may lose: engines add in another order, and round between other operations."""

FLOOR = 5e-7
"""Relative error that is always allowed: float32 rounding of norms that PyTorch does in either precision."""

Floats = NDArray[np.float64]
Which = Literal["symbolic", "specialised", "engines"]


@dataclass(frozen=True)
class Check:
    """One phase of one bucket."""

    graphs: str
    bucket: int
    phase: str
    quantity: str
    """``logits``, or ``keys`` and ``values`` of all layers together."""
    max_error: float
    mean_error: float
    relative_error: float
    """Root mean square of the error over that of the truth: what is judged."""
    noise: float
    """The same of PyTorch in the bundle's precision."""
    cosine: float
    kl: float | None
    """Mean Kullback-Leibler divergence of the next-token distributions, nats; logits only."""
    top1: float | None
    """Share of equal most likely tokens; logits only."""
    first_layer: int | None
    """The first layer whose keys or values are beyond the limit."""

    @property
    def limit(self) -> float:
        return FACTOR * max(self.noise, FLOOR)

    @property
    def passed(self) -> bool:
        return self.first_layer is None and self.relative_error <= self.limit


@dataclass(frozen=True)
class Validation(Result):
    """The verdict and what it rests on."""

    bundle: str
    against: str
    backend: str
    dtype: str
    truth: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def verdict(self) -> str:
        """One line; of a failure it names where the bundle first diverges."""
        if self.passed:
            return f"passed: {len(self.checks)} checks, on {self.backend} in {self.dtype}, against {self.truth}"
        failed = [check for check in self.checks if not check.passed]
        worst = failed[0]
        layers = [check.first_layer for check in failed if check.first_layer is not None]
        where = f"first at layer {min(layers)}" if layers else "after the last layer's keys (last layer, norm or head)"
        return (
            f"FAILED: {len(failed)} of {len(self.checks)} checks; diverges {where}, seen in the {worst.phase} of "
            f"bucket {worst.bucket}: {worst.quantity} are off by {worst.relative_error:.1e}, allowed {worst.limit:.1e}"
        )

    def table(self) -> str:
        """A table for people."""
        head = f"{'graphs':<12} {'bucket':>6} {'phase':<6} {'of':<7} {'max':>8} {'mean':>8} {'rel':>8} {'limit':>8} "
        lines = [head + f"{'1-cos':>8} {'KL':>8} {'top-1':>6}  verdict"]
        for c in self.checks:
            kl, top1 = ("" if c.kl is None else f"{c.kl:.1e}"), ("" if c.top1 is None else f"{c.top1:.3f}")
            verdict = "ok" if c.passed else "FAILED" + ("" if c.first_layer is None else f" from layer {c.first_layer}")
            lines.append(
                f"{c.graphs:<12} {c.bucket:>6} {c.phase:<6} {c.quantity:<7} {c.max_error:>8.1e} {c.mean_error:>8.1e} "
                f"{c.relative_error:>8.1e} {c.limit:>8.1e} {1 - c.cosine:>8.1e} {kl:>8} {top1:>6}  {verdict}"
            )
        return "\n".join([*lines, self.verdict()])

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"passed": self.passed, "verdict": self.verdict()}


def validate(
    bundle: str | Path,
    against: str | Path | None = None,
    *,
    backend: str = "auto",
    graphs: Sequence[Which] | None = None,
    buckets: Sequence[int] | None = None,
    steps: int = 8,
    seed: int = 0,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Validation:
    """Compares a bundle with PyTorch.

    Args:
        bundle: the bundle's folder.
        against: the checkpoint that it was made from; the bundle's own weights if left out (that would not notice a
            wrong weight). Of a quantised bundle, the errors include what the quantisation costs.
        backend: what runs the bundle.
        graphs: which of the bundle's graphs to run; all that the backend runs if left out: its engines with TensorRT,
            else the symbolic and the specialised ones.
        buckets: numbers of chunks; all buckets if left out.
        steps: decoding steps after each prompt.
        seed: of the random tokens.
        progress: show a bar.
        trust_remote_code: run the Python code that the bundle or checkpoint brings, if it does.

    Raises:
        MesaError: a bucket that the bundle does not have, or anything that loading the two can raise.
    """
    require_whole("steps", steps, least=0)
    require_seed(seed)
    folder = Path(bundle)
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    chosen = _buckets(manifest, buckets)
    high = torch.float64 if manifest.dtype == "float32" else torch.float32
    plain = _plain_model(folder, manifest, against, trust_remote_code)
    truth = TorchReference(copy.deepcopy(plain).to(high), manifest.config)
    if against is not None and manifest.quantisation is not None:
        _quantise(plain, folder, manifest.quantisation)
    how = manifest.quantisation
    if how is not None and how.scheme == "fp8" and manifest.dtype == "float32":
        # Inputs that differ by 1e-7 may be rounded apart: how far off float32 is depends on a few chances.
        plain = plain.to(torch.float16)
    noisy = TorchReference(plain, manifest.config)
    checks: list[Check] = []
    name = backend
    graphs = graphs or (("engines",) if backend.startswith("tensorrt") else ("symbolic", "specialised"))
    runs = [(bucket, which) for bucket in chosen for which in graphs]
    expected: dict[int, list[tuple[list[PhaseResult], list[PhaseResult]]]] = {}
    with progress_bar(total=len(runs), desc="validate", unit="run", disable=not progress) as bar:
        for which in graphs:
            with MesaModel.load(
                folder,
                backend,
                specialised=which == "specialised",
                verify=False,  # it was a moment ago
                trust_remote_code=trust_remote_code,
            ) as model:
                name = model.backend
                for bucket in chosen:
                    if bucket not in model.manifest.buckets and buckets is None:
                        bar.update()  # `mesart build` was told to leave it out
                        continue
                    bar.set_postfix_str(f"{which}, {bucket.chunks} chunks")
                    texts = _texts(manifest, bucket, steps, seed)
                    if bucket.chunks not in expected:
                        expected[bucket.chunks] = [
                            (list(_reference_results(truth, *text)), list(_reference_results(noisy, *text)))
                            for text in texts
                        ]
                    for text, known in zip(texts, expected[bucket.chunks], strict=True):
                        for right, rounded, got in zip(*known, _engine_results(model, *text), strict=True):
                            checks.extend(_compare(which, bucket.chunks, right, rounded, got))
                    bar.update()
    source = str(against) if against is not None else "the bundle's own weights"
    return Validation(str(bundle), source, name, manifest.dtype, f"PyTorch {str(high).removeprefix('torch.')}", checks)


@dataclass(frozen=True)
class PhaseResult:
    """What one phase left behind: logits ``[S, V]`` and, a layer each, keys and values ``[K, S, D]``, re-rotated."""

    phase: str
    logits: Floats | None
    keys: list[Floats]
    values: list[Floats]


def _buckets(manifest: Manifest, wanted: Sequence[int] | None) -> list[Bucket]:
    if wanted is None:
        return manifest.buckets
    known = {bucket.chunks: bucket for bucket in manifest.buckets}
    if not wanted:
        raise InputError("name a bucket, or none at all for every bucket")
    for chunks in wanted:
        if chunks not in known:
            raise InputError(f"the bundle has no bucket of {chunks} chunks; it has {', '.join(map(str, known))}")
    return [known[chunks] for chunks in wanted]


def _plain_model(folder: Path, manifest: Manifest, against: str | Path | None, trust_remote_code: bool) -> nn.Module:
    """The model that the bundle is compared with, in the bundle's dtype."""
    if against is not None:
        from mesart.export.checkpoint import load_model  # noqa: PLC0415  (export needs more packages)

        return load_model(against, manifest.dtype, trust_remote_code=trust_remote_code)
    from mesart.graphs.model.torch_graph import load_bundle_model  # noqa: PLC0415

    return load_bundle_model(folder, manifest, trust_remote_code=trust_remote_code)


def _quantise(model: nn.Module, folder: Path, how: Quantisation) -> None:
    """Gives the model the weights that the scheme makes of its own, where the bundle has them quantised."""
    from mesart.export.quantise import quantise  # noqa: PLC0415  (export needs more packages)
    from mesart.graphs.model.torch_fp8 import round_inputs  # noqa: PLC0415
    from mesart.graphs.model.torch_weights import dequantise, read_quantised_names, replace_products  # noqa: PLC0415

    def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
        del name
        return dequantise(quantise(weight, how), tuple(weight.shape), how)

    with torch.no_grad():
        names = read_quantised_names(folder)
        if how.scheme == "fp8":
            round_inputs(model, names)
        replace_products(model, names, rounded)


def _texts(manifest: Manifest, bucket: Bucket, steps: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """A random prompt that fills the bucket as far as the steps allow, and the tokens of the steps.

    Where short texts turn by frequencies of their own, also a prompt whose steps leave those behind.
    """
    generator = np.random.default_rng([seed, bucket.chunks])
    lengths = [max(1, bucket.max_tokens - steps)]
    if manifest.config.short_length and not bucket.chunks:
        lengths.append(max(1, manifest.config.short_length - steps // 2))
    ids = generator.integers(0, int(manifest.model["vocab_size"]), lengths[0] + steps).tolist()
    return [(ids[:length], ids[length : length + steps]) for length in lengths]


def _reference_results(reference: TorchReference, prompt: list[int], forced: list[int]) -> Iterator[PhaseResult]:
    logits = reference.prefill(prompt)
    config = reference.config
    yield from _pieces(config, len(prompt), logits[0], lambda: (reference.keys, reference.values))
    if forced:
        rows = [reference.step(token)[0] for token in forced]
        span = _kept(config, len(prompt), len(prompt) + len(forced))
        yield _phase_result("decode", torch.cat(rows), reference.keys, reference.values, span)


def _engine_results(model: MesaModel, prompt: list[int], forced: list[int]) -> Iterator[PhaseResult]:
    logits = model.prefill(prompt)

    def cache() -> tuple[list[Any], list[Any]]:
        keys, values = model.snapshot(0)
        return [_floats(key[None]) for key in keys], [_floats(value[None]) for value in values]

    config = model.manifest.config
    yield from _pieces(config, len(prompt), logits[0], cache)
    if forced:
        rows = [model.step(token)[0] for token in forced]
        yield _phase_result(
            "decode", np.concatenate(rows), *cache(), _kept(config, len(prompt), len(prompt) + len(forced))
        )


def _pieces(
    config: StaticMethod, tokens: int, logits: Any, cache: Callable[[], tuple[Sequence[Any], Sequence[Any]]]
) -> Iterator[PhaseResult]:
    plan = Plan.of(config, tokens)
    keys, values = cache()
    if plan.head is not None:
        yield _phase_result("prefix", None, keys, values, plan.head)
        yield _phase_result("chunk", None, keys, values, Span(plan.chunks[0].start, plan.chunks[-1].stop))
    yield _phase_result("tail", logits, keys, values, _kept(config, plan.tail.start, plan.tail.stop))


def _kept(config: StaticMethod, start: int, stop: int) -> Span:
    """The tokens ``start .. stop - 1``, less those whose keys a method has dropped by then."""
    return Span(start if config.sink_window is None else max(start, stop - config.sink_window.window), stop)


def _phase_result(phase: str, logits: Any, keys: Sequence[Any], values: Sequence[Any], span: Span) -> PhaseResult:
    part = slice(span.start, span.stop)
    return PhaseResult(
        phase,
        None if logits is None else _floats(logits),
        [_floats(key[0, :, part]) for key in keys],
        [_floats(value[0, :, part]) for value in values],
    )


def _floats(array: Any) -> Floats:
    """float64, of a tensor, an array, or bfloat16 bits in an array of uint16."""
    if isinstance(array, torch.Tensor):
        array = array.double().numpy()
    plain = (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array
    return np.asarray(plain, dtype=np.float64)


def _compare(graphs: str, bucket: int, right: PhaseResult, rounded: PhaseResult, got: PhaseResult) -> Iterator[Check]:
    for quantity in ("keys", "values"):
        truth, noise, engine = (getattr(piece, quantity) for piece in (right, rounded, got))
        first = next(
            (
                layer
                for layer in range(len(truth))
                if not _relative(engine[layer], truth[layer])
                <= FACTOR * max(_relative(noise[layer], truth[layer]), FLOOR)
            ),
            None,
        )
        flat = [np.concatenate([part.ravel() for part in parts]) for parts in (truth, noise, engine)]
        yield _check(graphs, bucket, right.phase, quantity, *flat, first_layer=first)
    if right.logits is not None and rounded.logits is not None and got.logits is not None:
        expected, found = _log_softmax(right.logits), _log_softmax(got.logits)
        kl = float((np.exp(expected) * (expected - found)).sum(-1).mean())
        top1 = float(np.mean(right.logits.argmax(-1) == got.logits.argmax(-1)))
        flat = [piece.logits.ravel() for piece in (right, rounded, got)]  # type: ignore[union-attr]
        yield _check(graphs, bucket, right.phase, "logits", *flat, kl=kl, top1=top1)


def _check(
    graphs: str,
    bucket: int,
    phase: str,
    quantity: str,
    truth: Floats,
    noise: Floats,
    got: Floats,
    *,
    kl: float | None = None,
    top1: float | None = None,
    first_layer: int | None = None,
) -> Check:
    error = np.abs(got - truth)
    norms = float(np.linalg.norm(got) * np.linalg.norm(truth))
    return Check(
        graphs,
        bucket,
        phase,
        quantity,
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        relative_error=_relative(got, truth),
        noise=_relative(noise, truth),
        cosine=float(got @ truth) / norms if norms else 1.0,
        kl=kl,
        top1=top1,
        first_layer=first_layer,
    )


def _relative(got: Floats, truth: Floats) -> float:
    scale = float(np.linalg.norm(truth))
    return float(np.linalg.norm(got - truth)) / scale if scale else float(np.linalg.norm(got))


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result

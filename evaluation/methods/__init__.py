"""Long-context methods side by side, on any model that transformers can load: prefill and decoding, in PyTorch.

One file a method; the rules are integers and numpy (:mod:`~mesart.evaluation.methods.method`), one executor computes
them all with fused attention (:mod:`~mesart.evaluation.methods.execution`). NoPE and ALiBi are models here, not
methods.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

from mesart.evaluation.methods.dual_chunk import DualChunk
from mesart.evaluation.methods.dynamic_ntk import DynamicNTK
from mesart.evaluation.methods.infllm import InfLLM
from mesart.evaluation.methods.leaky_rerope import LeakyReRoPE
from mesart.evaluation.methods.lm_infinite import LMInfinite
from mesart.evaluation.methods.mesa import Mesa
from mesart.evaluation.methods.method import Method
from mesart.evaluation.methods.origin import Origin
from mesart.evaluation.methods.rerope import ReRoPE
from mesart.evaluation.methods.self_extend import SelfExtend
from mesart.evaluation.methods.star_attention import StarAttention
from mesart.evaluation.methods.streaming_llm import StreamingLLM
from mesart.evaluation.methods.yarn import YaRN
from mesart.graphs.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from mesart.evaluation.methods.system import MethodSystem

METHODS: Final[dict[str, type[Method]]] = {
    method.name: method
    for method in (
        Origin,
        DynamicNTK,
        ReRoPE,
        LeakyReRoPE,
        LMInfinite,
        StreamingLLM,
        SelfExtend,
        DualChunk,
        YaRN,
        StarAttention,
        InfLLM,
        Mesa,
    )
}
"""The methods by name."""


def make_method(name: str, train_length: int, max_tokens: int | None = None, **parameters: Any) -> Method:
    """The named method, see :meth:`Method.of <mesart.evaluation.methods.method.Method.of>`.

    Raises:
        MesaError: no such method, no such parameter, or one out of its range.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name].of(train_length, max_tokens, **parameters)


def parse_method(spec: str, train_length: int, max_tokens: int) -> Method:
    """The method of ``NAME`` or ``NAME:PARAMETER=VALUE,...``, such as ``rerope:window=64,log_n=true``.

    Raises:
        MesaError: no such method or parameter, or a value that is none.
    """
    name, _, rest = spec.partition(":")
    parameters: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, text = part.partition("=")
        try:
            parameters[key] = _parameter(text)
        except ValueError as error:
            raise InputError(
                f"{spec!r} is no method: {part!r} is not PARAMETER=VALUE with a number, true or false"
            ) from error
    return make_method(name, train_length, max_tokens, **parameters)


def _parameter(text: str) -> bool | int | float | None:
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("no number") from error
    if not isinstance(value, bool | int | float | None) or (value is not None and not math.isfinite(value)):
        raise ValueError("neither a finite number nor true, false or null")
    return value


def open_method(
    name: str, model: nn.Module, train_length: int, max_tokens: int | None = None, **parameters: Any
) -> MethodSystem:
    """A model under the named method. The model itself is left as it is, and its weights are shared, not copied.

    Args:
        name: of :data:`METHODS`.
        model: a transformers causal language model, on any device and in any dtype.
        train_length: T_r, the positions that it was trained on.
        max_tokens: the longest prompt that the method is set up for, 16 times ``train_length`` if left out.
        parameters: the method's own, chosen from ``train_length`` and ``max_tokens`` if left out.

    Raises:
        MesaError: no such method or parameter, or a model that it cannot be used on.
    """
    method = make_method(name, train_length, max_tokens, **parameters)
    from mesart.evaluation.methods.system import MethodSystem  # noqa: PLC0415  (torch only where it is needed)

    return MethodSystem(model, method)


__all__ = ["METHODS", "Method", "make_method", "open_method", "parse_method"]

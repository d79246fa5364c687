"""MesaRT under EleutherAI's lm-evaluation-harness: ``--model mesart`` runs a bundle on any of its tasks.

    python -m mesart.evaluation.lm_harness --model mesart --model_args bundle=demo_bundle --tasks lambada_openai

The harness knows models that are not its own only once they are imported: this module is its command line with that
done. From Python: ``lm_eval.simple_evaluate(model=MesaLM("demo_bundle"), tasks=[...])``.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mesart import __version__
from mesart.evaluation.systems import Source, System, open_systems
from mesart.graphs.errors import InputError, MesaError
from mesart.graphs.method.config import MesaConfig
from mesart.runtime.sampling import Sampler, SamplingConfig
from mesart.runtime.stream import TextStream
from mesart.runtime.text import Tokenizer

_INSTALLED: Final = find_spec("lm_eval") is not None

if _INSTALLED:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
else:  # the functions below need none of it; MesaLM says what is missing
    TemplateLM = object

Pair: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, and of a continuation whose log-likelihood is asked for."""

Score: TypeAlias = tuple[float, bool]
"""Natural log-likelihood of a continuation, and whether each of its tokens is the most likely one."""

_SAMPLING: Final = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
"""What tasks may ask of a generation, beside its length and its stop strings."""


def next_logits(system: System, tokens: Sequence[int], count: int) -> Iterator[NDArray[np.float32]]:
    """The logits behind each of the last ``count`` tokens, a row ``[V]`` at a time, teacher-forced.

    A prompt gives those of its plan's tail. Where the tail is shorter than ``count``, the prompt ends earlier, as late
    as its tail allows, and the tokens behind it follow step by step, as if they had been generated.

    Raises:
        MesaError: more tokens than the system takes.
    """
    first = len(tokens) - count + 1  # the shortest prompt: its last token gives the first row
    length = next(n for n in range(len(tokens), first - 1, -1) if n - first < system.logits_of(n))
    yield from system.prefill(tokens[:length], length - first + 1)
    for token in tokens[length:]:
        yield system.step(token)


def score_continuations(system: System, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
    """Scores continuations, each given its context; pairs that differ in their last token alone share one prefill.

    So the choices of a multiple-choice question cost one prompt where each is one token.

    Yields:
        The index of a pair and its score, in the order in which they are found.

    Raises:
        MesaError: an empty context or continuation, or more tokens than the system takes.
    """
    sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise InputError("a context and a continuation of at least one token each are needed for a log-likelihood")
        tokens = (*context, *continuation[:-1])
        sharing[tokens].append(index)
    for tokens, indices in sharing.items():
        count = max(len(pairs[index][1]) for index in indices)
        rows = next_logits(system, tokens, count)
        known = [_score_token(next(rows), token) for token in tokens[len(tokens) - count + 1 :]]
        last = next(rows)
        for index in indices:
            continuation = pairs[index][1]
            scores = [*known[count - len(continuation) :], _score_token(last, continuation[-1])]
            yield index, (sum(score for score, _ in scores), all(best for _, best in scores))


def _score_token(logits: NDArray[np.float32], token: int) -> Score:
    row = logits.astype(np.float64) - logits.max()
    score = float(row[token] - np.log(np.exp(row).sum()))
    if np.isnan(score):
        raise InputError("the logits are not finite: did the model overflow its precision?")
    return score, bool(row.argmax() == token)


def generate_text(
    system: System, tokenizer: Tokenizer, prompt: Sequence[int], count: int, stop: Sequence[str], sampler: Sampler
) -> str:
    """The text of at most ``count`` tokens behind a prompt; it ends before a stop string or at the end of text.

    As the harness's own models do, it reads the new tokens by themselves: what a tokenizer leaves out at the beginning
    of a text (often a space) is left out.
    """
    text, pieces, token = TextStream(tokenizer, stop), [], -1
    sampler.note(prompt)
    for index in range(count):
        logits = system.step(token) if index else system.prefill(prompt, 1)[-1]
        token = sampler(logits)
        if token in tokenizer.eos_token_ids:
            break
        sampler.note([token])
        pieces.append(text.push(token))
        if text.stopped:
            break
    return "".join([*pieces, text.flush()])


def sampling_config(options: Mapping[str, Any], seed: int) -> SamplingConfig:
    """How a task wants its tokens chosen, from its ``generation_kwargs`` less lengths and stop strings.

    Raises:
        MesaError: an option that there is not, or a value out of its range.
    """
    unknown = sorted(set(options) - _SAMPLING - ({"num_beams"} if options.get("num_beams") == 1 else set()))
    if unknown:
        raise InputError(
            f"a task's generation_kwargs ask for {', '.join(unknown)}; there are {', '.join(sorted(_SAMPLING))}: "
            "override them with --gen_kwargs, or leave the task out"
        )
    return SamplingConfig.from_generation_config(options, seed)


class MesaLM(TemplateLM):  # type: ignore[misc]  # the harness ships no types
    """A bundle, or a checkpoint, as a model of the harness.

    Requests run one by one. A prompt is never cut to fit: one that is longer than the largest bucket is an error. Texts
    of rolling log-likelihoods are scored whole up to ``max_length`` tokens, longer ones in disjoint windows.

    Args:
        bundle: a bundle, a checkpoint's folder or a hub id.
        system: of ``mesa``, or ``origin``, the plain model.
        backend: what runs a bundle's graphs, see :meth:`~mesart.runtime.MesaModel.load`.
        max_length: the longest prompt; if left out, that of a bundle's largest bucket. ``origin`` and a checkpoint have
            no limit; their windows are then as long as :func:`~mesart.evaluation.open_systems` evaluates them.
        seed: of sampled texts; the n-th request takes ``seed + n``, so that repeated ones differ.
        config: Mesa's, for a checkpoint.
        batch_size: 1, which the harness's command line gives.
        max_batch_size: as ``batch_size``.
        device: ``cuda:0``, which the harness's command line gives; the backend says where a model runs.
        trust_remote_code: run the Python code that the source brings, if it does.

    Raises:
        MesaError: the harness is not installed, an option that cannot be honoured, or a source without a tokenizer.
    """

    def __init__(
        self,
        bundle: Source,
        system: str = "mesa",
        backend: str = "auto",
        max_length: int | None = None,
        seed: int = 0,
        config: MesaConfig | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        _require_harness()
        super().__init__()
        if str(batch_size) != "1" or max_batch_size not in (None, 1):
            raise InputError(f"batch_size is {batch_size}, but requests run one by one: leave it out")
        if max_length is not None and max_length < 1:
            raise InputError(f"max_length is {max_length}; it must be at least 1")
        if device not in (None, "cuda:0"):
            raise InputError(f"device is {device!r}, but the backend says where a model runs: leave it out")
        self.opened = open_systems(os.fspath(bundle), [system], backend, config, trust_remote_code=trust_remote_code)
        (self.system,) = self.opened.systems.values()
        self.tokenizer = self.opened.tokenizer
        self._name, self._seed, self._limit = system, seed, max_length
        if max_length is not None:
            self._require_fit(max_length)

    def close(self) -> None:
        """Frees the engine and the cache."""
        self.system.close()

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, a request's only argument; the windows are those of the harness's models.

        A tokenizer that begins texts with a special token has that token scored too, behind itself, as there.
        """
        totals = []
        for request in tqdm(requests, desc="mesart, texts", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            scores = score_continuations(self.system, [make_disjoint_window(window) for window in windows])
            totals.append(sum(log_likelihood for _, (log_likelihood, _) in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts behind prompts; a request's arguments are a prompt and the task's ``generation_kwargs``."""
        texts = []
        for index, request in enumerate(tqdm(requests, desc="mesart, generations", disable=disable_tqdm)):
            prompt, options = request.args
            chosen = normalize_gen_kwargs(options, self.max_gen_toks)
            stop = [text for text in chosen.pop("until") if text]
            count = chosen.pop("max_gen_toks")
            sampler = Sampler(sampling_config(chosen, self._seed + index))
            ids = self.tok_encode(prompt)
            self._require_fit(len(ids))
            texts.append(generate_text(self.system, self.tokenizer, ids, count, stop, sampler))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Score]:
        """What TemplateLM makes of ``loglikelihood``: the request's texts, and the ids of context and continuation."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        for context, continuation in pairs:  # all of them before the first: a run may take hours
            self._require_fit(len(context) + len(continuation) - 1)
        found: dict[int, Score] = {}
        scores = score_continuations(self.system, pairs)
        for index, score in tqdm(scores, total=len(pairs), desc="mesart, continuations", disable=disable_tqdm):
            found[index] = score
            self.cache_hook.add_partial("loglikelihood", requests[index][0], score)
        return [found[index] for index in range(len(pairs))]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; without a second argument a beginning-of-text token that the text already has is not doubled."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    @property
    def eot_token_id(self) -> int:
        if not self.tokenizer.eos_token_ids:
            raise InputError("the tokenizer names no end-of-text token; name one in its tokenizer_config.json")
        return self.tokenizer.eos_token_ids[0]

    @cached_property
    def prefix_token_id(self) -> int:
        """What the first token of a text is conditioned on: the beginning-of-text token, else the end-of-text token."""
        beginning = self.tokenizer.special_tokens.get("bos_token")
        return self.eot_token_id if beginning is None else self.tokenizer.encode(beginning, add_special_tokens=False)[0]

    @cached_property
    def _prefix_text(self) -> str:
        return self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt, and of a window."""
        return self._limit or self.opened.max_tokens

    @property
    def max_gen_toks(self) -> int:
        """Tokens that a task gets which names no number; that of the harness's own models."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """What the harness caches requests by."""
        return self.opened.subject.source.replace(os.sep, "__")

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt the last message is the beginning of the answer."""
        text = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        answer = str(chat_history[-1]["content"])
        for begun in (answer.lstrip(), answer.strip()):  # some templates strip it
            start = text.rfind(begun)
            if start >= 0:
                return text[: start + len(begun)]
        raise InputError("the chat template changes the beginning of an answer, which can then not be continued")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """For the record; a name is refused, since a bundle's tokenizer has one template."""
        if isinstance(chat_template, str):
            raise InputError(f"there is one chat template, not one named {chat_template!r}: leave the name out")
        template: str | None = super().chat_template(chat_template)
        return template

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        subject = self.opened.subject
        return {
            "mesart_version": __version__,
            "mesart_source": subject.source,
            "mesart_system": self._name,
            "mesart_engine": self.system.engine,
            "mesart_config": dataclasses.asdict(subject.config),
            "max_length": self.max_length,
        }

    def _require_fit(self, tokens: int) -> None:
        if self._limit is not None and tokens > self._limit:
            raise InputError(f"a prompt of {tokens} tokens is longer than max_length={self._limit}; raise it")
        self.system.logits_of(tokens)  # names the export's option where a bundle ends


def _require_harness() -> None:
    if not _INSTALLED:
        raise InputError("this needs lm-evaluation-harness: pip install 'mesart[lm-eval]'")


if _INSTALLED:
    register_model("mesart")(MesaLM)


def main() -> int:
    """The harness's own command line, which now knows ``--model mesart``; 0: done, 2: an error of the user's input."""
    try:
        _require_harness()
        from lm_eval.__main__ import cli_evaluate  # noqa: PLC0415  (an extra)

        cli_evaluate()
    except MesaError as error:
        print(f"mesart: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

__all__ = ["MesaLM", "generate_text", "main", "next_logits", "sampling_config", "score_continuations"]

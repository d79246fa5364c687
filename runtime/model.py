"""The model of a bundle, as its users see it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mesart.graphs.bundle_files import BundleFiles
from mesart.graphs.errors import InputError
from mesart.graphs.manifest import Manifest
from mesart.graphs.plan import bucket_for
from mesart.runtime.backends import Activations, Array
from mesart.runtime.device_cache import DeviceCache, DeviceMemory
from mesart.runtime.executor import Executor
from mesart.runtime.load import load_cache, read_texts, require_digest
from mesart.runtime.sampling import Sampler, SamplingConfig
from mesart.runtime.stream import TextStream
from mesart.runtime.text import Tokenizer, configured_eos_ids, default_sampling
from mesart.runtime.text_files import TEXT_FILES

Logits: TypeAlias = NDArray[np.float32]
Prompt: TypeAlias = "str | Sequence[int]"


class MesaModel:
    """A bundle on a backend. Holds one live cache, of one prompt or of a batch.

    Made by :meth:`load`; close it, or use it in a ``with`` statement, to free the engine's memory.

    A call that fails leaves the cache as it was before; a failed :meth:`prefill` leaves it empty, as after loading.
    Calls from several threads wait for each other. There is one cache all the same: a generation whose cache another
    call has changed meanwhile (another generation, from the same thread or not) ends in a :class:`MesaError` at its
    next token. A process that is forked after loading has to load the model again.

    Attributes:
        backend: the backend's name, ``device`` where it runs and ``choice`` why it was chosen.
        manifest: what the bundle holds.
    """

    def __init__(
        self, files: BundleFiles, manifest: Manifest, executor: Executor, backend: str, device: str, choice: str
    ) -> None:
        self.bundle, self.manifest = files.folder, manifest
        self._texts = read_texts(files)  # now: the folder may be another bundle's by the time that they are needed
        self.backend, self.device, self.choice = backend, device, choice
        self._executor: Executor | None = executor
        self._lock, self._process = RLock(), os.getpid()
        # Each row's last generated token, shown but not yet in the cache, if the cache is as it was then.
        self._unfed: list[list[int]] = []
        self._unfed_turn = executor.turn

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        backend: str = "auto",
        *,
        threads: int | None = None,
        specialised: bool = False,
        verify: bool = True,
        digest: str | None = None,
        trust_remote_code: bool = False,
        activations: Activations | None = None,
    ) -> MesaModel:
        """Opens a bundle.

        What was checked is what is used: files that are opened later (graphs of other buckets) have to be unchanged.

        Args:
            bundle: a folder made by ``mesart export``.
            backend: ``tensorrt`` or ``tensorrt-rtx`` for the engines of ``mesart build``; ``onnxruntime``,
                ``openvino`` or ``torch`` for the graphs; ``auto`` for the fastest that runs here.
            threads: CPU threads; all that the process may use if left out.
            specialised: run the graphs of fixed shapes, one for each role and bucket, instead of the symbolic one.
            verify: check the SHA-256 of every file; otherwise only that it is there and has its size (an engine is
                checked in any case, before it is opened).
            digest: the only bundle that may be opened, ``sha256:...`` as ``mesart inspect --digest`` prints it. The
                hashes in a bundle say that it is whole, not who made it: engines are native code, so give the digest of
                a bundle that comes from elsewhere, if whoever made it has told you.
            trust_remote_code: let backend ``torch`` run the Python code that the bundle brings, if it does.
            activations: ``int8`` lets onnxruntime and OpenVINO round activations to 8 bits in front of quantised
                weights: faster, and not the model that was exported (docs/decoding.md has both in numbers).

        Raises:
            MesaError: no bundle, another one than ``digest`` says, a missing or altered file, a backend that is unknown
                or not installed, engines that do not run on this machine, or rounding where there is nothing to round.
        """
        folder = Path(bundle)
        manifest = Manifest.read(folder)
        if digest is not None:
            require_digest(folder, manifest, digest, verify=verify)
        files = manifest.open_files(folder)
        files.verify(contents=verify, keep=TEXT_FILES)
        it = load_cache(
            files,
            manifest,
            backend,
            threads=threads,
            specialised=specialised,
            verify=verify,
            trust_remote_code=trust_remote_code,
            activations=activations,
        )
        return cls(files, it.manifest, Executor(it.manifest, it.cache), it.backend, it.device, it.choice)

    def __enter__(self) -> MesaModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the engine and the cache, after a call that is still computing; the model cannot be used any more."""
        if os.getpid() != self._process:
            return  # the engine is the parent's
        with self._lock:
            if self._executor is not None:
                self._executor.cache.close()
            self._executor = None

    @property
    def executor(self) -> Executor:
        if self._executor is None:
            raise InputError("the model was closed; load it again")
        return self._executor

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer; an error if the checkpoint had none."""
        return Tokenizer.of(self._texts.contents, self.bundle)

    @cached_property
    def default_sampling(self) -> SamplingConfig:
        """What ``generation_config.json`` asks for; greedy if there is none."""
        return default_sampling(self._texts)

    @property
    def max_tokens(self) -> int:
        """The longest prompt, in tokens."""
        return self.manifest.buckets[-1].max_tokens

    def bucket(self, tokens: int) -> int:
        """The number of chunks of the bucket that a prompt of ``tokens`` tokens is dispatched to."""
        return bucket_for(self.manifest.config, tokens).chunks

    def prefill(self, input_ids: ArrayLike | Sequence[Sequence[int]], *, all_logits: bool = False) -> Logits:
        """Computes a prompt, or a batch of prompts of any lengths; what was in the cache is forgotten.

        Args:
            input_ids: ``[T]``, ``[B, T]``, or a list of lists of different lengths.
            all_logits: of all the tail's tokens, not only of the last; their number must be the same in all rows.

        Returns:
            float32 ``[B, S, V]``, or ``[B, 1, V]`` of the last tokens.

        Raises:
            MesaError: an empty prompt, ids outside the vocabulary, a prompt longer than the largest bucket.
        """
        prompts = self._prompts(input_ids)
        with self._alone() as executor:
            return np.stack(executor.prefill(prompts, all_logits=all_logits))

    def extend(self, input_ids: ArrayLike | Sequence[Sequence[int]], *, all_logits: bool = False) -> Logits:
        """Appends tokens to the live cache, such as a second turn; arguments and result as of :meth:`prefill`.

        The text may outgrow the largest bucket, as it may by :meth:`step`, where the graph leaves lengths free.
        """
        prompts = self._prompts(input_ids)
        with self._alone() as executor:
            self._require_rows(len(prompts))
            return np.stack(executor.extend(prompts, all_logits=all_logits))

    def step(self, token: int | ArrayLike) -> Logits:
        """Appends one token to each row of the cache; logits of the next, float32 ``[B, 1, V]``."""
        with _token_ids(token):
            column = np.asarray(token).reshape(-1, 1)
        tokens = self._prompts(column)
        with self._alone() as executor:
            executor.require_cache()
            if not executor.rows[0].tokens:
                raise InputError("step needs a prompt in the cache; call prefill first")
            self._require_rows(len(tokens))
            return executor.step([row[0] for row in tokens])[:, None]

    @contextmanager
    def _alone(self) -> Iterator[Executor]:
        """No other thread computes meanwhile."""
        if os.getpid() != self._process:  # before the lock, which another thread of the parent may have held
            raise InputError(
                "the process was forked after the model was loaded, and an engine's threads do not survive that; "
                "load the model in the new process"
            )
        with self._lock:
            try:
                yield self.executor
            except MemoryError as error:
                raise InputError(
                    f"out of memory{f' ({error})' if str(error) else ''}: use fewer rows or shorter prompts, or give "
                    "the process more memory"
                ) from error

    @property
    def device_memory(self) -> DeviceMemory | None:
        """What the model takes of the GPU's memory now; ``None`` where no engines run it."""
        cache = self.executor.cache
        return cache.memory if isinstance(cache, DeviceCache) else None

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache, a number for each row."""
        return [len(row.tokens) for row in self.executor.rows]

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        sampling: SamplingConfig | None = None,
        *,
        append: bool = False,
    ) -> Iterator[list[int | None]]:
        """Generates tokens for a batch of prompts, all rows in step.

        Args:
            prompts: token ids of each row.
            max_new_tokens: the most tokens that a row gets.
            sampling: how tokens are chosen; as the bundle's ``generation_config.json`` says if left out.
            append: to the live cache (a second turn), instead of starting anew.

        Yields:
            The next token of each row, ``None`` once a row has ended. The end-of-text token itself is yielded.
        """
        yield from self._generate(prompts, max_new_tokens, sampling, append, [False] * len(self._prompts(prompts)))

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingConfig | None,
        append: bool,
        ended: list[bool],
    ) -> Iterator[list[int | None]]:
        """See :meth:`generate_ids`. ``ended``: of each row; the caller may end more of them between two tokens."""
        count = _require_count(max_new_tokens)
        choice, end, rows = sampling or self.default_sampling, set(self.eos_token_ids), range(len(ended))
        seeds = [None if choice.seed is None else choice.seed + row for row in rows]
        samplers = [Sampler(replace(choice, seed=seed)) for seed in seeds]
        history: list[list[int]] = []
        turn = 0
        for index in range(count):
            with self._alone() as executor:
                if index == 0:
                    logits = self._begin(executor, self._prompts(prompts), append=append)
                    history = [list(row.tokens) for row in executor.rows]
                    for sampler, tokens in zip(samplers, history, strict=True):
                        sampler.note(tokens)
                elif executor.turn != turn:
                    raise InputError(
                        "another call has changed the cache since this generation's last token; finish one generation "
                        "before the next, give both prompts to one, or load the model twice"
                    )
                else:
                    logits = executor.step([None if ended[row] else history[row][-1] for row in rows])
                    self._hold([history[row][-1:] if ended[row] else [] for row in rows])
                chosen = [None if ended[row] else samplers[row](logits[row]) for row in rows]
                for row, token in enumerate(chosen):
                    if token is not None:
                        history[row].append(token)
                        samplers[row].note([token])
                        ended[row] = token in end
                self._hold([tokens[-1:] for tokens in history])
                turn = executor.turn
            yield chosen
            if all(ended):
                return

    def _begin(self, executor: Executor, prompts: list[list[int]], *, append: bool) -> Logits:
        """The logits ``[B, V]`` behind prompts, appended to what was shown or on their own."""
        if not append:
            return np.concatenate(executor.prefill(prompts))
        self._require_rows(len(prompts))
        if self._unfed and self._unfed_turn == executor.turn:
            prompts = [[*unfed, *prompt] for unfed, prompt in zip(self._unfed, prompts, strict=True)]
        return np.concatenate(executor.extend(prompts))

    def _hold(self, unfed: list[list[int]]) -> None:
        """Remembers tokens of each row that were shown and are not in the cache: a later turn begins with them."""
        self._unfed, self._unfed_turn = unfed, self.executor.turn

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Any of them ends the text."""
        if "tokenizer.json" in self._texts:
            return self.tokenizer.eos_token_ids
        return configured_eos_ids(self._texts)

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        stop: str | Sequence[str] = (),
        append: bool = False,
        sampling: SamplingConfig | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Generates text piece by piece; a piece never ends within a character, nor in what may be a stop string.

        Args:
            prompt: text or token ids.
            max_new_tokens: the most tokens to generate.
            stop: strings that end the text; they are not part of it.
            append: to the live cache (a second turn), instead of starting anew.
            sampling: how tokens are chosen; as the bundle's ``generation_config.json`` says if left out.
            **options: fields of :class:`~mesart.runtime.SamplingConfig` that differ from it, such as
                ``temperature=0.7, top_p=0.9, seed=1``.
        """
        choice = self._sampling(sampling, options)
        ids = self._encode(prompt, append=append)
        text = TextStream(self.tokenizer, stop, context=ids)
        for (token,) in self.generate_ids([ids], max_new_tokens, choice, append=append):
            if token is None or token in self.eos_token_ids:
                break
            piece = text.push(token)
            if piece:
                yield piece
            if text.stopped:
                return
        rest = text.flush()
        if rest:
            yield rest

    def generate(
        self,
        prompt: Prompt | Sequence[str],
        max_new_tokens: int = 256,
        *,
        stop: str | Sequence[str] = (),
        append: bool = False,
        sampling: SamplingConfig | None = None,
        **options: Any,
    ) -> str | list[str]:
        """Generates text for one prompt, or for each of a list of texts in one batch; options as of :meth:`stream`."""
        if not _is_batch(prompt):
            return "".join(
                self.stream(
                    prompt,  # type: ignore[arg-type]
                    max_new_tokens,
                    stop=stop,
                    append=append,
                    sampling=sampling,
                    **options,
                )
            )
        choice = self._sampling(sampling, options)
        ids = [self._encode(str(text), append=append) for text in prompt]
        texts = [TextStream(self.tokenizer, stop, context=row) for row in ids]
        pieces: list[list[str]] = [[] for _ in ids]
        ended = [False] * len(ids)
        for tokens in self._generate(ids, max_new_tokens, choice, append, ended):
            for row, token in enumerate(tokens):
                if token is not None and token not in self.eos_token_ids:
                    pieces[row].append(texts[row].push(token))
                    ended[row] = texts[row].stopped
        return ["".join([*row, text.flush()]) for row, text in zip(pieces, texts, strict=True)]

    def chat(self, messages: Sequence[Mapping[str, Any]], max_new_tokens: int = 256, **options: Any) -> Iterator[str]:
        """Streams the answer to a conversation, put into the bundle's chat template; options as of :meth:`stream`."""
        text = self.tokenizer.apply_chat_template([dict(message) for message in messages])
        return self.stream(self.tokenizer.encode(text, add_special_tokens=False), max_new_tokens, **options)

    def _sampling(self, sampling: SamplingConfig | None, options: Mapping[str, Any]) -> SamplingConfig:
        try:
            return replace(sampling or self.default_sampling, **options)
        except TypeError as error:
            raise InputError(f"unknown sampling option: {error}") from error

    def _encode(self, prompt: Prompt, *, append: bool) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=not append)
        rows = self._prompts(prompt)
        if len(rows) != 1:
            raise InputError(f"one text is one list of token ids, got {len(rows)}; generate_ids takes a batch of them")
        return rows[0]

    def _prompts(self, input_ids: ArrayLike | Sequence[Sequence[int]]) -> list[list[int]]:
        """The rows of a batch, checked."""
        with _token_ids(input_ids):
            nested = isinstance(input_ids, (list, tuple)) and any(np.ndim(row) for row in input_ids)
            rows: list[Array] = [np.asarray(row) for row in input_ids] if nested else list(np.atleast_2d(input_ids))  # type: ignore[union-attr]
        vocabulary = int(self.manifest.model["vocab_size"])
        if not rows:
            raise InputError("the prompt is empty; give at least one token")
        for row in rows:
            if row.size == 0:
                raise InputError("the prompt is empty; give at least one token")
            if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
                raise InputError(f"token ids must be integers, [T] or [B, T]; got {row.dtype} of shape {row.shape}")
            if row.min() < 0 or row.max() >= vocabulary:
                raise InputError(
                    f"token id {int(row.max() if row.max() >= vocabulary else row.min())} is outside the vocabulary of "
                    f"{vocabulary}; is the tokenizer this model's own?"
                )
        return [[int(token) for token in row] for row in rows]

    def _require_rows(self, rows: int) -> None:
        self.executor.require_cache()
        live = len(self.executor.rows)
        if rows != live:
            if not self.executor.rows[0].tokens:
                raise InputError("the cache is empty; call prefill first with a batch")
            raise InputError(f"the cache holds {live} prompts, got tokens for {rows}")


@contextmanager
def _token_ids(value: object) -> Iterator[None]:
    """What numpy cannot make an array of is no token ids."""
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"token ids must be integers, [T] or [B, T]; got {type(value).__name__}: {error}") from error


def _is_batch(prompt: object) -> bool:
    """Whether it is texts, not one text or its ids."""
    if not isinstance(prompt, (list, tuple)) or not any(isinstance(text, str) for text in prompt):
        return False
    other = next((text for text in prompt if not isinstance(text, str)), None)
    if other is not None:
        raise InputError(f"a batch is a list of texts; one of them is {type(other).__name__}")
    return True


def _require_count(tokens: int) -> int:
    if isinstance(tokens, bool) or not isinstance(tokens, (int, np.integer)):
        raise InputError(f"max_new_tokens is {tokens!r}; it must be a whole number")
    if tokens < 1:
        raise InputError(f"max_new_tokens is {tokens}; it must be at least 1")
    return int(tokens)

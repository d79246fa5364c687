"""The model of a bundle, as its users see it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mesart.graphs.bundle.files import BundleFiles
from mesart.graphs.errors import InputError
from mesart.graphs.method.plan import bucket_for
from mesart.runtime.backends import Activations, Array, KvDtype
from mesart.runtime.chunk_store.store import ChunkStore, require_store
from mesart.runtime.chunk_store.stored import StoredChunks
from mesart.runtime.chunk_store.warm import warm
from mesart.runtime.document_texts import DocumentTexts
from mesart.runtime.documents import Reuse, check_reuse
from mesart.runtime.engine import Engine
from mesart.runtime.kv.device import DeviceMemory, DeviceStore
from mesart.runtime.live_texts import LiveTexts, Progress, ReadOptions
from mesart.runtime.load import Loaded, load_bundle, read_texts
from mesart.runtime.memory import enough_memory
from mesart.runtime.prompts import Prompt, PromptIds, checked_count, checked_prompts, is_batch, token_ids
from mesart.runtime.runners.runner import Logits
from mesart.runtime.sampling import SamplingConfig
from mesart.runtime.scheduler import Scheduler
from mesart.runtime.sequence import Sequence
from mesart.runtime.stream import TextStream
from mesart.runtime.text import Tokenizer, configured_eos_ids, default_sampling
from mesart.runtime.usage import Usage, WarmReport


class MesaModel:
    """A bundle on a backend, and the text or the batch of texts that it is at.

    Made by :meth:`load`; close it, or use it in a ``with`` statement, to free the engine's memory.

    A call that fails leaves the texts as they were before; a failed :meth:`prefill` leaves none, as after loading.
    Calls from several threads wait for each other. They speak of the same texts all the same: a generation whose texts
    another call has changed meanwhile (another generation, from the same thread or not) ends in a :class:`MesaError` at
    its next token. A process that is forked after loading has to load the model again.

    Attributes:
        backend: the backend's name, ``device`` where it runs and ``choice`` why it was chosen.
        manifest: what the bundle holds.
        fingerprint: names what computes keys and values; only models of the same find each other's chunks in a store.
        engine: runs any number of texts side by side; the model's own texts are some of them.
    """

    def __init__(self, files: BundleFiles, loaded: Loaded, store: ChunkStore | None = None) -> None:
        self.bundle, self.manifest = files.folder, loaded.manifest
        self._texts = read_texts(files)  # now: the folder may be another bundle's by the time that they are needed
        self.backend, self.device, self.choice = loaded.backend, loaded.device, loaded.choice
        self.fingerprint = loaded.fingerprint
        self.engine = Engine(loaded.manifest, loaded.store, loaded.runner, Scheduler())
        self._live = LiveTexts(self.engine)
        self._vocabulary = int(self.manifest.model["vocab_size"])
        self._stored = None if store is None else StoredChunks(store, loaded.fingerprint, loaded.store.layout)

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
        kv_memory: int | str | None = None,
        kv_dtype: KvDtype | None = None,
        store: ChunkStore | None = None,
    ) -> MesaModel:
        """Opens a bundle.

        What was checked is what is used: files that are opened later (graphs of other buckets) have to be unchanged.

        Args:
            bundle: a folder made by ``mesart export``.
            backend: ``tensorrt`` or ``tensorrt-rtx`` for the engines of ``mesart build``; ``onnxruntime``,
                ``openvino`` or ``torch`` for the graphs; ``auto`` for the fastest that runs here.
            threads: CPU threads; all that the process may use if left out.
            specialised: run the graphs of fixed shapes, one for each phase and bucket, instead of the symbolic one.
            verify: check the SHA-256 of every file; otherwise only that it is there and has its size (an engine is
                checked in any case, before it is opened).
            digest: the only bundle that may be opened, ``sha256:...`` as ``mesart inspect --digest`` prints it. The
                hashes in a bundle say that it is whole, not who made it: engines are native code, so give the digest of
                a bundle that comes from elsewhere, if whoever made it has told you.
            trust_remote_code: let backend ``torch`` run the Python code that the bundle brings, if it does.
            activations: ``int8`` lets onnxruntime and OpenVINO round activations to 8 bits in front of quantised
                weights: faster, and not the model that was exported (docs/decoding.md has both in numbers).
            kv_memory: the most that keys and values of all texts may take, in bytes or as ``"2GiB"``; three quarters of
                the memory that is free if left out. Engines of ``mesart build`` take what their buckets need.
            kv_dtype: ``float16`` keeps keys and values of a float32 bundle in half the memory, on OpenVINO: faster
                behind long texts, and rounded (docs/decoding.md has both in numbers).
            store: keeps the chunks of prompts, and finds those that it has: nothing is computed twice. Several models
                may share one.

        Raises:
            MesaError: no bundle, another one than ``digest`` says, a missing or altered file, a backend that is unknown
                or not installed, engines that do not run on this machine, or rounding where there is nothing to round.
        """
        require_store(store)
        files, loaded = load_bundle(
            bundle,
            backend,
            digest=digest,
            threads=threads,
            specialised=specialised,
            verify=verify,
            trust_remote_code=trust_remote_code,
            activations=activations,
            kv_memory=kv_memory,
            kv_dtype=kv_dtype,
        )
        return cls(files, loaded, store)

    def __enter__(self) -> MesaModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def store(self) -> ChunkStore | None:
        """The store that it was loaded with."""
        return None if self._stored is None else self._stored.store

    def close(self) -> None:
        """Frees the engine and all texts, after a call that is still computing; the model cannot be used any more."""
        if self._live.close() and self._stored is not None:
            self._stored.store.flush()

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

    def prefill(self, input_ids: ArrayLike | Tokens[Tokens[int]], *, all_logits: bool = False) -> Logits:
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
        return self._live.prefill(prompts, ReadOptions(self._stored, reuses=False), all_logits=all_logits)

    def extend(self, input_ids: ArrayLike | Tokens[Tokens[int]], *, all_logits: bool = False) -> Logits:
        """Appends tokens to the live texts, such as a second turn; arguments and result as of :meth:`prefill`.

        A text may outgrow the largest bucket, as it may by :meth:`step`, where the graph leaves lengths free.
        """
        prompts = self._prompts(input_ids)
        return self._live.extend(prompts, ReadOptions(self._stored), all_logits=all_logits)

    def step(self, token: int | ArrayLike) -> Logits:
        """Appends one token to each live text; logits of the next, float32 ``[B, 1, V]``."""
        with token_ids(token):
            column = np.asarray(token).reshape(-1, 1)
        return self._live.step(self._prompts(column), ReadOptions(self._stored))

    @property
    def device_memory(self) -> DeviceMemory | None:
        """What the model takes of the GPU's memory now; ``None`` where no engines run it."""
        store = self.engine.store
        return store.memory if isinstance(store, DeviceStore) else None

    def clear(self) -> None:
        """Forgets the live texts, and frees what they hold."""
        self._live.clear()

    def snapshot(self, row: int) -> tuple[list[Array], list[Array]]:
        """Copies of a live text's keys and values, ``[K, tokens, D]``, a layer each, as the engine keeps them."""
        return self._live.snapshot(row)

    @property
    def texts(self) -> list[Sequence]:
        """The live texts, a row each; none before the first prompt."""
        return self._live.rows

    @property
    def lengths(self) -> list[int]:
        """Tokens of the live texts, a number for each."""
        return self._live.lengths

    @property
    def usage(self) -> Usage | None:
        """What became of the last prompt's tokens, of all rows together; ``None`` before the first."""
        return self._live.usage

    def generate_ids(
        self,
        prompts: Tokens[Tokens[int]],
        max_new_tokens: int = 256,
        sampling: SamplingConfig | None = None,
        *,
        append: bool = False,
        documents: Tokens[Prompt] = (),
        lead: Prompt = "",
        reuse: Reuse = "auto",
        cache_salt: str = "",
        progress: Progress | None = None,
    ) -> Iterator[list[int | None]]:
        """Generates tokens for a batch of prompts, all rows in step; see :meth:`stream` for what is not said here.

        Args:
            prompts: token ids of each row.
            max_new_tokens: the most tokens that a row gets.
            sampling: how tokens are chosen; as the bundle's ``generation_config.json`` says if left out.
            append: to the live texts (a second turn), instead of starting anew.

        Yields:
            The next token of each row, ``None`` once a row has ended. The end-of-text token itself is yielded.
        """
        how = self._options(reuse, cache_salt, progress)
        rows = [self._prompt(row.ids, documents, lead, reuse, append=append) for row in self._prompts(prompts)]
        yield from self._tokens(rows, max_new_tokens, sampling or self.default_sampling, how, append=append)

    def _tokens(
        self,
        rows: list[PromptIds],
        count: int,
        choice: SamplingConfig,
        how: ReadOptions,
        *,
        append: bool,
        ended: list[bool] | None = None,
    ) -> Iterator[list[int | None]]:
        """See :meth:`~mesart.runtime.live_texts.LiveTexts.generate`."""
        count, ends = checked_count(count), frozenset(self.eos_token_ids)
        ended = [False] * len(rows) if ended is None else ended
        return self._live.generate(rows, count, choice, ends, how, append=append, ended=ended)

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
        stop: str | Tokens[str] = (),
        append: bool = False,
        sampling: SamplingConfig | None = None,
        documents: Tokens[Prompt] = (),
        lead: Prompt = "",
        reuse: Reuse = "auto",
        cache_salt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Generates text piece by piece; a piece never ends within a character, nor in what may be a stop string.

        Args:
            prompt: text or token ids.
            max_new_tokens: the most tokens to generate.
            stop: strings that end the text; they are not part of it.
            append: to the live texts (a second turn), instead of starting anew.
            sampling: how tokens are chosen; as the bundle's ``generation_config.json`` says if left out.
            documents: texts, or lists of token ids, that stand before the prompt; docs/documents.md has how they are
                read and reused.
            lead: text or token ids that stand before the documents.
            reuse: see :data:`~mesart.runtime.documents.Reuse`.
            cache_salt: only prompts of the same salt share chunks in the store.
            progress: called while the prompt is read, with the tokens that are there and those that there are to be.
            **options: fields of :class:`~mesart.runtime.SamplingConfig` that differ from it, such as
                ``temperature=0.7, top_p=0.9, seed=1``.
        """
        choice = self._sampling(sampling, options)
        row = self._prompt(prompt, documents, lead, reuse, append=append)
        how = self._options(reuse, cache_salt, progress)
        yield from self._streamed(row, max_new_tokens, stop, choice, how, append=append)

    def _streamed(
        self,
        prompt: PromptIds,
        max_new_tokens: int,
        stop: str | Tokens[str],
        choice: SamplingConfig,
        how: ReadOptions,
        *,
        append: bool,
    ) -> Iterator[str]:
        text = TextStream(self.tokenizer, stop, context=prompt.ids)
        for (token,) in self._tokens([prompt], max_new_tokens, choice, how, append=append):
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
        prompt: Prompt | Tokens[str],
        max_new_tokens: int = 256,
        *,
        stop: str | Tokens[str] = (),
        append: bool = False,
        sampling: SamplingConfig | None = None,
        documents: Tokens[Prompt] = (),
        lead: Prompt = "",
        reuse: Reuse = "auto",
        cache_salt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> str | list[str]:
        """Generates text for one prompt, or for each of a list of texts in one batch; options as of :meth:`stream`."""
        choice, how = self._sampling(sampling, options), self._options(reuse, cache_salt, progress)
        prompts = list(prompt) if is_batch(prompt) else [prompt]
        rows = [self._prompt(text, documents, lead, reuse, append=append) for text in prompts]  # type: ignore[arg-type]
        if not is_batch(prompt):
            pieces = self._streamed(rows[0], max_new_tokens, stop, choice, how, append=append)
            return "".join(pieces)
        texts = [TextStream(self.tokenizer, stop, context=row.ids) for row in rows]
        written: list[list[str]] = [[] for _ in rows]
        ended = [False] * len(rows)
        for tokens in self._tokens(rows, max_new_tokens, choice, how, append=append, ended=ended):
            for row, token in enumerate(tokens):
                if token is not None and token not in self.eos_token_ids:
                    written[row].append(texts[row].push(token))
                    ended[row] = texts[row].stopped
        return ["".join([*row, text.flush()]) for row, text in zip(written, texts, strict=True)]

    def chat(
        self,
        messages: Tokens[Mapping[str, Any]],
        max_new_tokens: int = 256,
        *,
        stop: str | Tokens[str] = (),
        append: bool = False,
        sampling: SamplingConfig | None = None,
        documents: Tokens[Prompt] = (),
        reuse: Reuse = "auto",
        cache_salt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Streams the answer to a conversation, put into the bundle's chat template; options as of :meth:`stream`.

        Documents stand where the template has a place for them, else before the first message of the user.
        """
        choice, how = self._sampling(sampling, options), self._options(reuse, cache_salt, progress)
        if len(documents):
            self._require_first(append=append)
            row = self._document_texts.chat(messages, documents).joined(self.manifest, reuse)
        else:
            text = self.tokenizer.apply_chat_template(messages)
            (row,) = self._prompts([self.tokenizer.encode(text, add_special_tokens=False)])
        return self._streamed(row, max_new_tokens, stop, choice, how, append=append)

    def warm(
        self,
        documents: Tokens[Prompt],
        *,
        lead: Prompt = "",
        messages: Tokens[Mapping[str, Any]] | None = None,
        cache_salt: str = "",
        progress: Progress | None = None,
    ) -> WarmReport:
        """Has documents in the store before anybody asks about them; the live texts stay as they are.

        Args:
            documents: as of :meth:`stream`.
            lead: what will stand before them.
            messages: the conversation that they will be part of, as far as it is known; what the chat template puts
                before the documents is what matters.
            cache_salt: as of :meth:`stream`.
            progress: called with the tokens of documents that are there, and all of them.

        Raises:
            MesaError: the model has no store, or a document is longer than the largest bucket.
        """
        stored = self._options("always", cache_salt, progress).stored
        if stored is None:
            raise InputError("there is no store to warm: load the model with store=ChunkStore(...)")
        if messages is None:
            prompt = self._document_texts.plain(lead, documents, [0])
        else:
            prompt = self._document_texts.chat(messages, documents)
        with self._live.alone():
            report = warm(self.engine, stored, prompt, progress)
        stored.store.flush()
        return report

    @cached_property
    def _document_texts(self) -> DocumentTexts:
        return DocumentTexts(self.tokenizer if "tokenizer.json" in self._texts else None, self._vocabulary)

    def _options(self, reuse: Reuse, salt: str, progress: Progress | None) -> ReadOptions:
        check_reuse(reuse)
        if not isinstance(salt, str):
            raise InputError(f"cache_salt is {type(salt).__name__}; it is a text")
        stored = None if self._stored is None or reuse == "off" else replace(self._stored, salt=salt)
        return ReadOptions(stored, reuse != "off", progress)

    def _prompt(
        self, prompt: Prompt, documents: Tokens[Prompt], lead: Prompt, reuse: Reuse, *, append: bool
    ) -> PromptIds:
        if len(documents) or len(lead):
            self._require_first(append=append)
            return self._document_texts.plain(lead, documents, prompt).joined(self.manifest, reuse)
        return PromptIds(self._encode(prompt, append=append))

    def _require_first(self, *, append: bool) -> None:
        if append:
            raise InputError("documents stand at the beginning of a text; leave append out")

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
        return rows[0].ids

    def _prompts(self, input_ids: ArrayLike | Tokens[Tokens[int]]) -> list[PromptIds]:
        with enough_memory():
            return checked_prompts(input_ids, self._vocabulary)


__all__ = ["MesaModel"]

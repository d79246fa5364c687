"""What a system is asked, and what its answers are worth. All evaluations of quality ask here: answers and losses."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property, lru_cache

from mesart.evaluation.held_out import Text
from mesart.evaluation.systems import System, prefix_ids
from mesart.evaluation.tasks import Sample, Task, Writer
from mesart.graphs.errors import InputError
from mesart.runtime.text import Tokenizer


@dataclass(frozen=True)
class Answer:
    """What was said to a prompt."""

    sample: Sample
    said: str
    score: float
    """0 to 1."""

    @property
    def depth(self) -> float | None:
        """Where in the prompt the answer stood, 0 to 1, where the task has one such place."""
        depth = self.sample.facts.get("depth")
        return None if depth is None else round(float(depth), 4)


class Examiner:
    """Asks systems that share a tokenizer, on one text. What is asked depends on neither systems nor other questions.

    Args:
        tokenizer: of the systems.
        text: the haystack of tasks and the tokens that are scored; not needed where neither is asked for.
    """

    def __init__(self, tokenizer: Tokenizer, text: Text | None = None) -> None:
        self.tokenizer = tokenizer
        self._content = "" if text is None else text.content
        # The same few sentences are encoded again and again.
        encode = lru_cache(4096)(self.encode)
        self.writer = Writer(encode, prefix_ids(tokenizer), self._content)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def ask(self, system: System, task: Task, sample: Sample) -> Answer:
        """The most likely answer to a prompt, and its score."""
        answer = system.generate(sample.input_ids, sample.new_tokens, self.tokenizer.eos_token_ids)
        said = self.tokenizer.decode(answer)
        return Answer(sample, said, task.score(sample, said))

    @cached_property
    def stream(self) -> list[int]:
        """The token ids of the text."""
        return self.encode(self._content)

    def places(self, longest: int, count: int, seed: int) -> list[int]:
        """Ends of scored texts of up to ``longest`` tokens, see :func:`places_in`: the same for all shorter lengths."""
        return places_in(len(self.stream), longest - len(self.writer.prefix_ids), count, seed)

    def text_at(self, end: int, length: int) -> list[int]:
        """The ``length`` tokens of the text that end at a place, special tokens in front among them."""
        prefix = self.writer.prefix_ids
        return [*prefix, *self.stream[end - (length - len(prefix)) : end]]

    def loss(self, system: System, end: int, length: int, scored: int) -> float:
        """The mean loss of the last ``scored`` tokens of the text of ``length`` that ends at a place, nats a token.

        Raises:
            MesaError: the system gives logits of fewer tokens of a text of this length.
        """
        return -float(system.log_probs(self.text_at(end, length), scored).mean())


def places_in(size: int, longest: int, count: int, seed: int) -> list[int]:
    """Ends of texts in a stream of ``size`` tokens: different ones, each with the longest context before it.

    Raises:
        MesaError: the stream is too short.
    """
    possible = range(longest, size + 1)
    if len(possible) < count:
        raise InputError(
            f"the text has {size} tokens; {count} places with {longest} tokens before each need at least "
            f"{longest + count - 1}: give a longer text (--text), or shorter lengths"
        )
    return sorted(random.Random(f"eval-perplexity-{seed}").sample(possible, count))


__all__ = ["Answer", "Examiner", "places_in"]

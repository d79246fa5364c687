"""The tasks: that references follow from the text, by readers of their own; lengths, seeds, scores, errors."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from mesart.evaluation.corpus import library_text
from mesart.evaluation.passkey import prompt_rng
from mesart.evaluation.tasks import SCALES, TASKS, Sample, Task, Writer, find_task, tasks
from mesart.evaluation.tasks.counting import FrequentWords
from mesart.evaluation.tasks.niah import NiahMultikey2
from mesart.evaluation.tasks.values import Words
from mesart.evaluation.tasks.words import ADJECTIVES, NOUNS
from mesart.graphs import MesaError
from mesart.runtime.text import Tokenizer
from tests.evaluation.conftest import DEMO_MODEL

TEXT = library_text("held_out")[:200_000]
ALL = [(scale, name) for scale in SCALES for name in TASKS]
ONE_PLACE = {
    *("passkey", "passkey-random", "needle", "niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "longeval-lines", "kv-retrieval"),
}


@dataclass(frozen=True)
class Language:
    """A tokenizer, as a writer and back."""

    writer: Writer
    decode: Callable[[Sequence[int]], str]


def demo() -> Language:
    tokenizer = Tokenizer(DEMO_MODEL)
    encode = lru_cache(1 << 16)(lambda text: tokenizer.encode(text, add_special_tokens=False))
    return Language(Writer(encode, (0,), TEXT), tokenizer.decode)


def single_bytes() -> Language:
    """One token for each byte, and no special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = FastTokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Language(Writer(lambda text: list(tokenizer.encode(text).ids), (), TEXT), tokenizer.decode)


LANGUAGES = {"demo": demo(), "bytes": single_bytes()}


def task_of(scale: str, name: str) -> Task:
    return tasks(scale)[name]


def lengths(task: Task, language: Language) -> list[int]:
    least = task.minimum_length(language.writer)
    return [least, least + 7, 2 * least, 3 * least + 211]


# What the references must be, read out of the text.


def read_niah(text: str) -> list[str]:
    stated: dict[str, list[str]] = {}
    for key, value in re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text):
        stated.setdefault(key, []).append(value)
    (asked,) = re.findall(r"What (?:is|are) .* for (.*) mentioned in the provided text\?", text)
    return [value for key in re.split(r",? and |, ", asked) for value in stated[key]]


def read_vt(text: str) -> list[str]:
    problem = text[text.rindex("Memorize and track") :]
    stated = dict(re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|[0-9]+)\.", problem))
    (number,) = re.findall(r"assigned the value ([0-9]+) in the text above", problem)

    def value(name: str) -> str:
        return value(stated[name]) if name in stated else name

    return [name for name in stated if value(name) == number]


def read_cwe(text: str) -> list[str]:
    problem = text[text.rindex("Below is a numbered list") :]
    listed, question = problem.split("\nQuestion: ")
    entries = re.findall(r" ([0-9]+)\. (\S+)", listed)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    (count,) = re.findall(r"the ([0-9]+) most common words", question)
    counts = Counter(word for _, word in entries).most_common()
    assert counts[int(count) - 1][1] > counts[int(count)][1] if len(counts) > int(count) else True
    return [word for word, _ in counts[: int(count)]]


def read_fwe(text: str) -> list[str]:
    listed = re.split(r"coded words?\. ", text.split("\nQuestion: ", maxsplit=1)[0])[-1]
    counts = Counter(word for word in listed.split(" ") if word != "....").most_common()
    asked = 3 if "three most" in text else 1
    frequencies = [count for _, count in counts[: asked + 1]]
    assert len(set(frequencies)) == len(frequencies), "a tie"
    return [word for word, _ in counts[:asked]]


def read_lines(text: str) -> list[str]:
    stated = dict(re.findall(r"^line (\S+): REGISTER_CONTENT is <([0-9]+)>$", text, re.MULTILINE))
    (asked,) = re.findall(r"is the <REGISTER_CONTENT> in line (\S+)\?", text)
    return [stated[asked]]


def read_pairs(text: str) -> list[str]:
    (listed, asked) = re.findall(r'JSON data:\n(\{.*\})\n\nKey: "(.*)"\n', text, re.DOTALL)[0]
    return [json.loads(listed)[asked]]


def read_passkey(text: str) -> list[str]:
    found = set(re.findall(r"The pass key is ([0-9]+)\. Remember it\. ([0-9]+) is the pass key\.", text))
    ((first, second),) = found
    assert first == second
    return [first]


def read_needle(text: str) -> list[str]:
    (asked,) = re.findall(r"What is the special magic (\w+) number\?", text)
    return re.findall(rf"The special magic {asked} number is: ([0-9]+)\.", text)


READERS: dict[str, Callable[[str], list[str]]] = {
    **{name: read_niah for name in TASKS if name.startswith("niah")},
    "vt": read_vt,
    "cwe": read_cwe,
    "fwe": read_fwe,
    "longeval-lines": read_lines,
    "kv-retrieval": read_pairs,
    "passkey": read_passkey,
    "passkey-random": read_passkey,
    "needle": read_needle,
}


def item(name: str, text: str) -> str:
    """The longest of what the prompt is filled with; a word, where it is filled with words."""
    form = {
        "niah_multikey_2": r" One of the special.*?\.",
        "niah_multikey_3": r" One of the special.*?\.",
        "cwe": r" [0-9]+\. \S+",
        "longeval-lines": r"line .*\n",
        "kv-retrieval": r' ".*": ".*",\n',
    }.get(name, "pass")
    return max(re.findall(form, text) or [form], key=len)


def slack(task: Task, language: Language, text: str) -> int:
    """Tokens that a prompt may fall short of its length: one item, rather longer than the longest there is."""
    times = getattr(task, "uncommon_times", 1)
    return 5 + times * len(language.writer.encode(item(task.name, text))) * 3 // 2


def assert_right(task: Task, language: Language, sample: Sample, length: int) -> None:
    assert length - slack(task, language, sample.text) <= len(sample.input_ids) <= length
    prefix = language.writer.prefix_ids
    assert sample.input_ids[: len(prefix)] == prefix
    assert language.decode(sample.input_ids[len(prefix) :]) == sample.text
    found = READERS[task.name](sample.text)
    assert sorted(found) == sorted(sample.references)
    assert len(set(sample.references)) == len(sample.references)
    start, end = sample.body
    assert len(prefix) < start < end < len(sample.input_ids)
    body = language.decode(sample.input_ids[start:end])
    assert all(reference in body for reference in sample.references)
    answer = task.answer(sample)
    assert task.score(sample, answer) == task.score(sample, answer.upper()) == 1
    assert len(language.writer.encode(answer)) < sample.new_tokens
    assert task.score(sample, " I do not know.") == task.score(sample, "") == 0


@pytest.mark.parametrize("tongue", LANGUAGES)
@pytest.mark.parametrize(("scale", "name"), ALL)
def test_prompts_have_their_length_and_their_answer(scale: str, name: str, tongue: str) -> None:
    task, language = task_of(scale, name), LANGUAGES[tongue]
    for length in lengths(task, language):
        for index in range(3):
            assert_right(task, language, task.sample(language.writer, length, prompt_rng("eval", 0, index)), length)


@settings(deadline=None, max_examples=150)
@given(name=st.sampled_from([*TASKS]), more=st.integers(0, 900), seed=st.integers(0, 10**6), depth=st.floats(0, 1))
def test_small_prompts_of_any_length_depth_and_seed(name: str, more: int, seed: int, depth: float) -> None:
    task, language = task_of("small", name), LANGUAGES["demo"]
    length = task.minimum_length(language.writer) + more
    sample = task.sample(language.writer, length, random.Random(seed), depth=depth)
    assert_right(task, language, sample, length)
    assert sample.facts.get("depth") == (depth if name in ONE_PLACE else None)


@pytest.mark.parametrize(("scale", "name"), ALL)
def test_a_prompt_depends_on_its_random_numbers_alone(scale: str, name: str) -> None:
    task, writer = task_of(scale, name), LANGUAGES["demo"].writer
    length = 2 * task.minimum_length(writer)
    first = [task.sample(writer, length, prompt_rng("eval", 5, index)) for index in range(4)]
    uncached = Writer(lambda text: list(writer.encode(text)), writer.prefix_ids, writer.text)
    again = [task_of(scale, name).sample(uncached, length, prompt_rng("eval", 5, index)) for index in (3, 2, 1, 0)]
    assert first == again[::-1]
    assert len({sample.input_ids for sample in first}) == 4


@pytest.mark.parametrize("name", TASKS)
def test_training_and_evaluation_have_no_prompt_in_common(name: str) -> None:
    task, writer = task_of("small", name), LANGUAGES["demo"].writer
    least = task.minimum_length(writer)
    train, evaluation = (
        {task.sample(writer, least, prompt_rng(split, 0, index)).input_ids for index in range(30)}
        for split in ("train", "eval")
    )
    draws = [prompt_rng(split, 0, index).getrandbits(128) for split in ("train", "eval") for index in range(30)]
    assert len(set(draws)) == len(draws)
    assert len(train) == len(evaluation) == 30
    assert train.isdisjoint(evaluation)


@pytest.mark.parametrize("tongue", LANGUAGES)
@pytest.mark.parametrize(("scale", "name"), ALL)
def test_shorter_than_the_minimum_is_refused(scale: str, name: str, tongue: str) -> None:
    task, writer = task_of(scale, name), LANGUAGES[tongue].writer
    least = task.minimum_length(writer)
    with pytest.raises(MesaError, match=rf"^a {name} prompt of {least - 1} tokens is too short.* at least {least}$"):
        task.sample(writer, least - 1, random.Random(0))
    for seed in range(12):
        assert len(task.sample(writer, least, random.Random(seed)).input_ids) <= least


@pytest.mark.parametrize("name", TASKS)
def test_small_tasks_fit_a_window_of_256_tokens(name: str) -> None:
    task, writer = task_of("small", name), LANGUAGES["demo"].writer
    sample = task.sample(writer, 256 - 20, random.Random(0))
    assert len(sample.input_ids) + sample.new_tokens <= 256


@pytest.mark.parametrize("name", sorted(ONE_PLACE))
def test_depth_orders_what_is_asked_for_and_changes_nothing_else(name: str) -> None:
    task, language = task_of("small", name), LANGUAGES["bytes"]
    length = task.minimum_length(language.writer) + 3000
    samples = [
        task.sample(language.writer, length, random.Random(3), depth=depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert len({sample.references for sample in samples}) == 1
    shares = []
    for sample in samples:
        start, end = sample.body
        text = language.decode(sample.input_ids[start:end])
        shares.append(text.index(sample.references[0]) / len(text))
    assert shares == sorted(set(shares))
    for depth, share in zip((0.0, 0.25, 0.5, 0.75, 1.0), shares, strict=True):
        assert abs(depth - share) < 0.1


def test_paper_sizes() -> None:
    writer = LANGUAGES["bytes"].writer

    def references(name: str) -> tuple[str, ...]:
        return TASKS[name].sample(writer, TASKS[name].minimum_length(writer), random.Random(1)).references

    number, uuid = "[0-9]{7}", "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    forms = {
        **dict.fromkeys(["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2"], (1, number)),
        **dict.fromkeys(["niah_single_3", "niah_multikey_3", "kv-retrieval"], (1, uuid)),
        **dict.fromkeys(["niah_multivalue", "niah_multiquery"], (4, number)),
        "vt": (5, "[A-Z]{5}"),
        "cwe": (10, "[a-z]+-[a-z]+"),
        "fwe": (3, "[a-z]{6}"),
        "passkey": (1, "[0-9]{5}"),
        "longeval-lines": (1, "[0-9]{5}"),
    }
    for name, (count, form) in forms.items():
        found = references(name)
        assert len(found) == count, name
        assert all(re.fullmatch(form, reference) for reference in found), name


def test_scores() -> None:
    writer = LANGUAGES["demo"].writer
    several = TASKS["niah_multiquery"].sample(writer, 400, random.Random(1))
    first, second, *_ = several.references
    assert TASKS["niah_multiquery"].score(several, f"they are {second} and {first}.") == 0.5
    named = TASKS["cwe"].sample(writer, 5000, random.Random(1))
    assert TASKS["cwe"].score(named, named.references[3].upper()) == pytest.approx(0.1)
    # Another value of the same text is wrong.
    for name in ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"):
        sample = TASKS[name].sample(writer, 600, random.Random(1))
        values = re.findall(r" is: (\S+)\.", sample.text)
        assert len(values) > 1
        assert [TASKS[name].score(sample, value) for value in values].count(1.0) == 1
    # Where the answer is a number, it is the first one, whole.
    for name in ("passkey", "needle", "longeval-lines"):
        sample = TASKS[name].sample(writer, 400, random.Random(1))
        (number,) = sample.references
        scores = [TASKS[name].score(sample, answer) for answer in (f"<{number}>.", f"{number}0", f"1 {number}")]
        assert scores == [1, 0, 0]


def test_frequencies_fall_by_the_power_law() -> None:
    counts = FrequentWords().counts(10_000)
    assert counts[0] == pytest.approx(10_000 * 6 / 9.8696, rel=0.01)
    assert counts[1] == pytest.approx(counts[0] / 4, rel=0.01)
    assert counts[4] == pytest.approx(counts[0] / 25, rel=0.01)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 5000), st.integers(1, 5))
def test_asked_words_are_never_tied(words: int, asked: int) -> None:
    counts = [*FrequentWords(asked=asked).counts(words), 0][1:]
    asked_for = counts[: asked + 1]
    assert asked_for == sorted(set(asked_for), reverse=True)
    assert all(count <= counts[asked] for count in counts[asked:])


def test_words_cannot_be_taken_for_one_another() -> None:
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words)
        assert all(word.isalpha() and word.islower() for word in words)
    assert not [(a, b) for a in ADJECTIVES for b in ADJECTIVES if a != b and b.endswith(a)]
    assert not [(a, b) for a in NOUNS for b in NOUNS if a != b and b.startswith(a)]


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    assert find_task("vt", "small") == tasks("small")["vt"] != find_task("vt") == TASKS["vt"]
    with pytest.raises(MesaError, match="no task 'qa'; there are passkey, .*kv-retrieval"):
        find_task("qa")
    with pytest.raises(MesaError, match="no scale 'huge'; there are paper, small"):
        tasks("huge")
    assert all(task.name == name and task.title and task.source for name, task in TASKS.items())


@pytest.mark.parametrize("depth", [-0.1, 1.5])
def test_depths_are_shares(depth: float) -> None:
    with pytest.raises(MesaError, match="between 0 and 1"):
        TASKS["needle"].sample(LANGUAGES["demo"].writer, 400, random.Random(0), depth=depth)


@pytest.mark.parametrize("text", ["", " \n "])
def test_tasks_that_hide_in_a_text_need_one(text: str) -> None:
    writer = Writer(LANGUAGES["demo"].writer.encode, (), text)
    in_text = {"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"}
    for name, task in tasks("small").items():
        if name in in_text | {"passkey-random", "needle"}:
            with pytest.raises(MesaError, match="a text: give one"):
                task.sample(writer, 300, random.Random(0))
        else:
            assert len(task.sample(writer, 300, random.Random(0)).input_ids) <= 300


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("lossy", "found"),
    [
        (lambda text: [ord(letter) for letter in re.sub(r"\w", "?", text)], "have the same tokens"),
        (lambda text: [], "has no tokens"),
    ],
)
def test_a_tokenizer_that_loses_what_matters_is_refused(
    name: str, lossy: Callable[[str], list[int]], found: str
) -> None:
    with pytest.raises(MesaError, match=f"this tokenizer cannot write the task {name}: .*{found}"):
        TASKS[name].minimum_length(Writer(lossy, (), TEXT))


def test_more_keys_than_there_are_words() -> None:
    with pytest.raises(MesaError, match="more than 4 different words"):
        NiahMultikey2(keys=Words(2)).sample(LANGUAGES["demo"].writer, 2000, random.Random(0))

"""How prompts are given as documents, and the questions about functions."""

from __future__ import annotations

import random

import pytest

from mesart.evaluation.tasks import Sample, Writer
from mesart.graphs.method.config import MesaConfig
from mesart.scripts import quality_documents as quality

CONFIG = MesaConfig(256)
SAMPLE = Sample(tuple(range(1000)), "", ("7",), 3, (20, 980))


@pytest.mark.parametrize("way", quality.WAYS)
def test_every_way_gives_the_same_tokens(way):
    lead, documents, question = quality.WAYS[way](SAMPLE, CONFIG)
    assert [*lead, *(token for document in documents for token in document), *question] == list(SAMPLE.input_ids)
    assert all(documents)


def test_the_ways_differ_in_documents_and_question():
    found = {way: cut(SAMPLE, CONFIG) for way, cut in quality.WAYS.items()}
    assert found["fixed cuts"][1] == []
    assert {len(document) for document in found["documents"][1][:-1]} == {CONFIG.chunk_length}
    assert {len(document) for document in found["documents of C / 4"][1][:-1]} == {CONFIG.chunk_length // 4}
    assert len(found["documents"][2]) == 20
    assert len(found["documents, tail of tail_min"][2]) == CONFIG.tail_min


def test_functions_are_asked_for_by_their_first_line():
    writer = Writer(lambda text: list(text.encode()), (1,))
    sample = quality.functions(writer, 8000, random.Random(3))
    text = bytes(sample.input_ids[1:]).decode()
    (name,) = sample.references
    assert len(sample.input_ids) < 8000 + 200
    start, stop = sample.body
    line = bytes(sample.input_ids[stop:]).decode().split('"')[1]
    assert f"Function {name}\n{line}" in bytes(sample.input_ids[start:stop]).decode()
    assert text.startswith("Functions and their documentation.")
    assert quality._names(sample, f" is {name}.") == 1
    assert quality._names(sample, " is none") == 0

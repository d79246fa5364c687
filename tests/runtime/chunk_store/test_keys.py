"""Keys: all that keys and values follow from is in them, and nothing else."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesart.graphs.bundle.manifest import Manifest, Quantisation
from mesart.runtime.chunk_store.keys import chunk_key, fingerprint, head_key

IDS = st.lists(st.integers(0, 2**40), max_size=4)


def ids(values: list[int]) -> Any:
    return np.array(values, np.int64)


@pytest.fixture(scope="module")
def manifest(bundle) -> Manifest:
    return Manifest.read(bundle())


NAMES = st.sampled_from(["", "a", "b", "ab"])


@given(st.lists(st.tuples(NAMES, IDS, IDS, NAMES), unique_by=str, max_size=8))
@settings(max_examples=30)
def test_no_two_chunks_share_a_key(parts):
    """However their ids run together, and whoever's they are."""
    keys = [chunk_key(name, ids(head), ids(chunk), salt) for name, head, chunk, salt in parts]
    heads = {(name, *head, salt): head_key(name, ids(head), salt) for name, head, _, salt in parts}
    assert len({*keys, *heads.values()}) == len(parts) + len(heads)
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)


def test_a_key_is_the_same_tomorrow():
    """Those of other processes find what is on a disk."""
    expected = "85362eeac02e74508a318cc4711559ea21767517af7d36fe78ef7e370e086f1e"
    assert chunk_key("f", ids([1, 2]), ids([3]), "s") == expected


def test_the_ids_alone_matter_not_how_they_lie():
    head, chunk = ids([1, 2]), ids([3, 4, 5])
    strided = np.array([[3, 9], [4, 9], [5, 9]], np.int64)[:, 0]
    assert chunk_key("f", head, strided) == chunk_key("f", head, chunk)
    assert chunk_key("f", head.astype(">i8"), chunk.astype(np.int32)) == chunk_key("f", head, chunk)


class TestFingerprint:
    def test_names_what_computes(self, manifest):
        """Another dtype, another weight, another graph, another engine or rounding: another name."""
        weights = manifest.weight_files[0]
        other = {**manifest.files, weights: dataclasses.replace(manifest.files[weights], sha256="0" * 64)}
        names = [
            fingerprint(manifest, ["a", "b"], ("onnxruntime", "cpu")),
            fingerprint(manifest, ["a"], ("onnxruntime", "cpu")),
            fingerprint(manifest, ["a", "b"], ("openvino", "cpu")),
            fingerprint(manifest, ["a", "b"], ("onnxruntime", "cpu", "int8")),
        ]
        for changed in (
            dataclasses.replace(manifest, dtype="float16"),
            dataclasses.replace(manifest, files=other),
            dataclasses.replace(manifest, quantisation=Quantisation("int8", 8, None, True)),
        ):
            names.append(fingerprint(changed, ["a", "b"], ("onnxruntime", "cpu")))
        assert len(set(names)) == len(names) == 7

    def test_does_not_name_what_changes_no_chunk(self, manifest):
        """Nor the method's numbers, nor the order of the graphs, nor texts and other graphs of the bundle."""
        config = dataclasses.replace(manifest.config, chunk_length=20, linear_window=9, log_n=False)
        other = dataclasses.replace(manifest, config=config, buckets=manifest.buckets[:1], filler=[3] * 8)
        assert fingerprint(other, ["b", "a"], ("torch",)) == fingerprint(manifest, ["a", "b"], ("torch",))

"""Questions about documents that were read before: what is asked, the worker's answers, and the table."""

from __future__ import annotations

import argparse
from pathlib import Path

from mesart.scripts import bench_documents as bench
from mesart.scripts import peer_worker


def test_medians_by_name_and_how_many_times_sooner():
    seconds = bench.rows_of(bench.PEERS, [8.0, 1.0, 3.0, 4.0])
    assert seconds == {"first time": 8.0, "same order": 2.0, "other order": 4.0}
    lines = bench.table([bench.Row("one", seconds), bench.Row("two", {}, "crashed: it | died")])
    assert lines[2].startswith("| one | 8 s | 2 s (4x) | 4 s (2x) | - | - |")
    assert "crashed: it / died" in lines[3]


def test_every_question_is_another_and_peers_get_the_same(tmp_path):
    texts = [[index] * 4 for index in range(12)]
    options = argparse.Namespace(documents=3, threads=1)
    ours = bench.job_of("mesart-documents", tmp_path, texts, bench.OURS, options)["questions"]
    peers = bench.job_of("llama.cpp", tmp_path, texts, bench.PEERS, options)["questions"]
    assert ours[: len(peers)] == peers
    assert len({tuple(asked["question"]) for asked in ours}) == len(bench.OURS)
    assert [asked["documents"] == texts[:3] for asked in ours[:4]] == [True, True, True, False]
    assert ours[-1]["documents"] == texts[2::-1]


def test_the_worker_answers_from_memory_disk_and_after_a_restart(bundle, tmp_path):
    options = argparse.Namespace(documents=3, threads=1)
    texts = [[7 + index, 5, 6, 9] * 12 for index in range(3)] + [[index + 9, 4] for index in range(8)]
    job = bench.job_of("mesart-documents", Path(bundle()), texts, bench.OURS, options)
    job["settings"] = {"backend": "onnxruntime", "memory": "64MiB", "folder": str(tmp_path)}
    found = peer_worker.measure(peer_worker.Job(**job))
    assert len(found["first_tokens"]) == len(bench.OURS)
    assert all(seconds > 0 for seconds in found["first_tokens"])
    assert found["versions"].keys() == {"mesart", "onnxruntime"}

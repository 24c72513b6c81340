# SPDX-License-Identifier: Apache-2.0
"""The judgement of `make soak`: each thing that it looks for is found, and nothing where nothing is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soak
from launched_ranks import Server

COUNTERS = {
    "passes_skipped_total": dict.fromkeys("0123", 50.0),
    "passes_synced_total": dict.fromkeys("0123", 0.0),
    "mc2_only_errors_total": dict.fromkeys("0123", 0.0),
}


def sample(at: int, *, rss: float = 100.0, files: int = 30, segments: int = 5, pid: int = 7) -> soak.Sample:
    return soak.Sample(float(at), {pid: rss}, {pid: files}, segments)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"rss": 100.0 + soak.ALLOWED_MIB}, []),
        ({"rss": 101.0 + soak.ALLOWED_MIB}, ["process 7: 17.0 MiB more memory"]),
        ({"files": 32}, ["process 7: 2 more open files"]),
        ({"segments": 6}, ["1 more shared segments"]),
        ({"pid": 8}, ["processes came or went"]),
    ],
)
def test_growth(change: dict[str, Any], told: list[str]) -> None:
    """Between the first third of the samples and the last."""
    assert soak.grown([*map(sample, range(6)), *(sample(at, **change) for at in (6, 7, 8))]) == told


def test_few_samples_tell_nothing() -> None:
    assert soak.grown([sample(at) for at in range(5)]) == ["5 samples are too few to tell whether anything grows"]


def test_a_peak_in_one_sample_is_no_growth_of_memory() -> None:
    assert soak.grown([*map(sample, range(8)), sample(8, rss=500.0)]) == []


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("passes_skipped_total", {**COUNTERS["passes_skipped_total"], "2": 49.0}),
        ("passes_skipped_total", dict.fromkeys("012", 50.0)),
        ("passes_skipped_total", dict.fromkeys("0123", 0.0)),
        ("passes_synced_total", {**COUNTERS["passes_synced_total"], "3": 1.0}),
        ("mc2_only_errors_total", {**COUNTERS["mc2_only_errors_total"], "0": 1.0}),
        ("mc2_only_errors_total", None),
    ],
)
def test_counters(name: str, values: dict[str, float] | None) -> None:
    assert soak.inconsistent(COUNTERS) == []
    changed = {**COUNTERS, name: values} if values is not None else {k: v for k, v in COUNTERS.items() if k != name}
    assert len(soak.inconsistent(changed)) == 1


def test_answers_and_beginnings() -> None:
    load = soak.Load(answers={0: {(1, 2)}, 2: {(5, 6)}}, beginnings={0: {(1,), ()}, 1: {(3,)}})
    assert soak.differing(load, [[1, 2], [3, 4], [5, 6]]) == []
    load.answers[0].add((1, 3))
    load.beginnings[1].add((4,))
    assert soak.differing(load, [[1, 2], [3, 4], [5, 7]]) == [
        "prompt 0: 2 answers, and not that of stock",
        "prompt 2: 1 answers, and not that of stock",
        "prompt 1: left with other tokens than those of stock",
    ]


def test_ledgers(tmp_path: Path) -> None:
    events = [
        {"ev": "ep", "op": "dispatch", "step": -1, "mode": "eager"},
        {"ev": "ep", "op": "dispatch", "step": 0, "mode": "graph"},
        {"ev": "ep", "op": "dispatch", "step": 0, "mode": "graph"},
        {"ev": "ep", "op": "combine", "step": 0, "mode": "graph"},
        {"ev": "ep", "op": "dispatch", "step": 1, "mode": "eager"},
        {"ev": "violation", "step": 1, "rule": "mixed_modes"},
    ]
    lines = [json.dumps(event, separators=(",", ":")) for event in events]
    (tmp_path / "ledger-1.jsonl").write_text("\n".join(lines) + "\n")
    modes, violations = soak.in_ledgers(Server(None, "", tmp_path))  # type: ignore[arg-type]
    assert modes == {"graph": 1, "eager": 1}
    assert violations == [lines[-1]]


def test_the_pool_needs_one_block_and_has_prompts_within_the_bound() -> None:
    pool = soak.make_pool(1)
    assert len(pool) == soak.POOL
    assert all(0 < len(prompt) + count <= 128 and count > 0 for prompt, count in pool)
    assert sum(len(prompt) <= 8 for prompt, _ in pool) >= soak.POOL // 3
    assert pool == soak.make_pool(1) != soak.make_pool(2)

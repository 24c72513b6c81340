# SPDX-License-Identifier: Apache-2.0
"""One verdict over a real torch store between real processes: equal, differing, slow, late and missing ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_sync_patch.agreement import Verdict, decide

pytestmark = pytest.mark.timeout(120)

_RANK = """
import json, sys, time
from dataclasses import asdict
from datetime import timedelta
import torch.distributed as dist
from dp_sync_patch.agreement import decide

address, rank, world, record, timeout, grace, delay = json.loads(sys.argv[1])
kind, where = address
if kind == "tcp":
    store = dist.TCPStore("127.0.0.1", where, None, rank == 0, timedelta(seconds=60), wait_for_workers=False)
else:
    store = dist.FileStore(where, -1)
store = dist.PrefixStore("default_pg", store)
if delay is None:
    sys.stdin.readline()
else:
    time.sleep(delay)
print("deciding", flush=True)
started = time.monotonic()
verdict = decide(store, record, round_name="start", rank=rank, world_size=world, timeout_s=timeout, grace_s=grace)
print(json.dumps({**asdict(verdict), "seconds": time.monotonic() - started}), flush=True)
sys.stdin.read()  # rank 0 hosts the TCP store: it stays until every rank has its verdict
"""


class Ranks:
    """Starts ranks as processes, and collects what each of them decided."""

    def __init__(self, kind: str, folder: Path, world: int, timeout: float, grace: float = 2.0) -> None:
        self.address: tuple[str, Any] = (kind, _free_port() if kind == "tcp" else str(folder / "store"))
        self.world, self.timeout, self.grace = world, timeout, grace
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def start(self, rank: int, record: dict[str, Any], delay: float | None = 0.0) -> None:
        """`delay`: seconds before it decides; None: until `go`."""
        arguments = json.dumps([self.address, rank, self.world, record, self.timeout, self.grace, delay])
        self.processes[rank] = subprocess.Popen(
            [sys.executable, "-c", _RANK, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # The store needs no device; without this torch would attach one in every rank.
            env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )

    def go(self, rank: int) -> None:
        stdin = self.processes[rank].stdin
        assert stdin is not None
        stdin.write("\n")
        stdin.flush()

    def wait_until_deciding(self, rank: int) -> None:
        stdout = self.processes[rank].stdout
        assert stdout is not None
        assert stdout.readline() == "deciding\n"

    def result(self, rank: int) -> dict[str, Any]:
        stdout = self.processes[rank].stdout
        assert stdout is not None
        result: dict[str, Any] = json.loads(next(line for line in stdout if line != "deciding\n"))
        return result

    def close(self) -> None:
        for process in self.processes.values():
            process.communicate(timeout=30)
            assert process.returncode == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


RECORD = {"version": "0.1.0", "facts": {"max_num_seqs": 32, "soc": "A3"}, "plan": {"state": "SKIP"}}


@pytest.fixture(params=["tcp", "file"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_equal_ranks_agree_even_if_one_is_slow(kind: str, tmp_path: Path) -> None:
    ranks = Ranks(kind, tmp_path, world=3, timeout=30)
    for rank in range(3):
        ranks.start(rank, RECORD, delay=None if rank == 2 else 0.0)
    for rank in range(2):
        ranks.wait_until_deciding(rank)
    time.sleep(0.6)
    ranks.go(2)
    results = [ranks.result(rank) for rank in range(3)]
    ranks.close()
    assert [result["agreed"] for result in results] == [True] * 3
    assert results[0]["seconds"] > 0.5, "rank 0 did not wait for the slow rank"


def test_a_differing_rank_is_named_with_its_fields(kind: str, tmp_path: Path) -> None:
    ranks = Ranks(kind, tmp_path, world=3, timeout=30)
    ranks.start(0, RECORD)
    ranks.start(1, {**RECORD, "facts": {"max_num_seqs": 16, "soc": "A3"}})
    ranks.start(2, {**RECORD, "version": "0.2.0"})
    results = [ranks.result(rank) for rank in range(3)]
    ranks.close()
    assert {result["code"] for result in results} == {"DSP201"}
    assert {result["agreed"] for result in results} == {False}
    (why,) = {result["why"] for result in results}
    assert "rank 1: facts.max_num_seqs 16 instead of 32" in why
    assert "rank 2: version '0.2.0' instead of '0.1.0'" in why
    assert "soc" not in why


def test_a_missing_rank_is_named_and_a_late_one_follows(kind: str, tmp_path: Path) -> None:
    # Long enough for what ranks 0 and 1 do on a busy machine; the verdict is there without the grace.
    ranks = Ranks(kind, tmp_path, world=4, timeout=4.0, grace=10.0)
    ranks.start(0, RECORD, delay=None)
    ranks.start(1, RECORD)
    ranks.wait_until_deciding(1)  # processes may need longer to start than rank 0 waits
    ranks.go(0)
    first = [ranks.result(rank) for rank in (0, 1)]
    # This one would have agreed, had it been in time.
    ranks.start(3, RECORD)
    late = ranks.result(3)
    ranks.close()
    for result in first:
        assert (result["agreed"], result["code"]) == (False, "DSP202")
    assert first[0]["why"].endswith("from rank(s) 2, 3")
    assert {name: late[name] for name in ("agreed", "code", "why")} == {
        name: first[0][name] for name in ("agreed", "code", "why")
    }


def test_a_silent_rank_0_leaves_the_fallback(tmp_path: Path) -> None:
    # Only a file store outlives a rank 0 that never comes.
    ranks = Ranks("file", tmp_path, world=3, timeout=0.5, grace=0.5)
    for rank in (1, 2):
        ranks.start(rank, RECORD)
    results = [ranks.result(rank) for rank in (1, 2)]
    # A rank 0 that comes after all finds every record, but not a free verdict.
    ranks.start(0, RECORD)
    rank_0 = ranks.result(0)
    ranks.close()
    for result in [*results, rank_0]:
        assert (result["agreed"], result["code"]) == (False, "DSP203")


class DictStore:
    """The store interface in one process, for properties of the comparison."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        self.values[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        return self.values[key]

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        assert expected == ""
        return self.values.setdefault(key, desired.encode())


def _verdicts(records: list[dict[str, Any]]) -> list[Verdict]:
    store = DictStore()
    for rank, record in enumerate(records):
        store.set(f"dp_sync_patch/start/rank/{rank}", json.dumps(record))
    return [
        decide(store, record, round_name="start", rank=rank, world_size=len(records), timeout_s=0.1)
        for rank, record in enumerate(records)
    ]


@given(st.lists(st.sampled_from([16, 32]), min_size=2, max_size=4))
def test_the_verdict_does_not_depend_on_which_rank_has_which_record(sizes: list[int]) -> None:
    outcomes = set()
    for order in set(permutations(sizes)):
        verdicts = _verdicts([{"facts": {"max_num_seqs": size}} for size in order])
        assert len({json.dumps(asdict(verdict)) for verdict in verdicts}) == 1
        outcomes.add(verdicts[0].agreed)
    assert outcomes == {len(set(sizes)) == 1}


def test_rounds_do_not_see_each_other() -> None:
    store = DictStore()
    assert not decide(store, RECORD, round_name="start", rank=0, world_size=2, timeout_s=0.05).agreed
    assert decide(store, RECORD, round_name="kv-cache", rank=0, world_size=1, timeout_s=0.05).agreed


def test_a_follower_waits_no_longer_than_it_says() -> None:
    started = time.monotonic()
    verdict = decide(DictStore(), RECORD, round_name="start", rank=1, world_size=2, timeout_s=0.1, grace_s=0.1)
    assert verdict.code == "DSP203"
    assert 0.2 <= time.monotonic() - started < 2

# SPDX-License-Identifier: Apache-2.0
"""One verdict over a real torch store between real processes: equal, differing, slow, late and missing ranks."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_sync_patch import agreement
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
    assert first[0]["why"].endswith("from ranks 2-3")
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


def _why(records: list[dict[str, Any]]) -> str:
    """What rank 0 says of these records, which differ."""
    store = DictStore()
    for rank, record in enumerate(records):
        store.set(f"dp_sync_patch/start/rank/{rank}", json.dumps(record, sort_keys=True))
    verdict = decide(store, records[0], round_name="start", rank=0, world_size=len(records), timeout_s=0.1)
    assert (verdict.agreed, verdict.code) == (False, "DSP201")
    return verdict.why


def _record(soc: str, more: int = 0) -> dict[str, Any]:
    """`more`: how many fields follow from the one."""
    return {"facts": {"max_num_seqs": 32, "soc": soc, **{f"option_{number:02}": soc for number in range(more)}}}


@pytest.mark.parametrize("odd", [0, 100, 255])
def test_one_odd_rank_of_256_is_named_alone(odd: int) -> None:
    """Also where it is rank 0, which judges."""
    why = _why([_record("A2" if rank == odd else "A3", more=40) for rank in range(256)])
    others = {0: "ranks 1-255", 100: "ranks 0-99, 101-255", 255: "ranks 0-254"}[odd]
    assert why.startswith(f"ranks differ from {others}; rank {odd}: facts.option_00 'A2' instead of 'A3', ")
    assert why.count("rank ") == 1
    assert why.endswith(", 33 more")
    assert len(why) < 1000


def test_equal_ranks_are_told_of_once() -> None:
    why = _why([_record({3: "A2", 4: "A2", 5: "A2", 9: "A2", 7: "A5"}.get(rank, "A3")) for rank in range(12)])
    assert why == (
        "ranks differ from ranks 0-2, 6, 8, 10-11; ranks 3-5, 9: facts.soc 'A2' instead of 'A3'; "
        "rank 7: facts.soc 'A5' instead of 'A3'"
    )


@pytest.mark.parametrize(
    ("socs", "why"),
    [
        (["A3", "A2"], "ranks differ from rank 0; rank 1: facts.soc 'A2' instead of 'A3'"),
        (["A3", "A2", "A2", "A3"], "ranks differ from ranks 0, 3; ranks 1-2: facts.soc 'A2' instead of 'A3'"),
        # Rank 0 is not among the larger groups; the first of them counts.
        (
            ["A5", "A2", "A3", "A2", "A3"],
            "ranks differ from ranks 1, 3; rank 0: facts.soc 'A5' instead of 'A2'; "
            "ranks 2, 4: facts.soc 'A3' instead of 'A2'",
        ),
    ],
)
def test_of_groups_of_one_size_the_first_is_the_reference(socs: list[str], why: str) -> None:
    assert _why([_record(soc) for soc in socs]) == why


@pytest.mark.parametrize("groups", [256, 64, 10])
def test_many_different_minorities_stay_readable(groups: int) -> None:
    """Each with many fields, and in the worst order for lists of ranks."""
    why = _why([_record(f"A{rank % groups:03}", more=40) for rank in range(256)])
    assert why.count(" instead of 'A000'") == 8 * 8
    assert why.endswith(f"; {groups - 9} more groups of ranks")
    assert len(why) < 5000


def test_missing_ranks_are_told_of_in_runs() -> None:
    store = DictStore()
    for rank in (1, 2, 6, 250):
        store.set(f"dp_sync_patch/start/rank/{rank}", json.dumps(RECORD, sort_keys=True))
    verdict = decide(store, RECORD, round_name="start", rank=0, world_size=256, timeout_s=0.01)
    assert (verdict.code, verdict.why) == (
        "DSP202",
        "no answer within 0.01 s from ranks 3-5, 7-249, 251-255",
    )
    assert decide(DictStore(), RECORD, round_name="start", rank=0, world_size=2, timeout_s=0.01).why.endswith(
        "from rank 1"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_verdict_of_another_version_is_read(rank: int) -> None:
    """It has a field that this version does not know."""
    written = {"agreed": False, "code": "DSP201", "why": "rank 1: version", "since": 3}
    store = DictStore()
    store.set("dp_sync_patch/start/verdict", json.dumps(written))
    verdict = decide(store, RECORD, round_name="start", rank=rank, world_size=2, timeout_s=0.01)
    assert verdict == Verdict(False, "DSP201", "rank 1: version")


class LateStore(DictStore):
    """Counts the looks at it. A key is there from its time on, by a clock that only sleeping moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **appearing: float) -> None:
        super().__init__()
        self.now, self.looks, self.appearing = 1000.0, 0, appearing
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(agreement, "time", clock)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now = max(self.now + seconds, math.nextafter(self.now, math.inf))  # time goes on

    def check(self, keys: list[str], /) -> bool:
        self.looks += 1
        for key in keys:
            if self.now - 1000.0 >= self.appearing.get(key.rpartition("/")[2], math.inf) and key not in self.values:
                appeared = asdict(Verdict(True)) if key.endswith("verdict") else RECORD
                self.values[key] = json.dumps(appeared, sort_keys=True).encode()
        return super().check(keys)


def test_a_follower_that_waits_in_vain_asks_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """255 of them ask the process of rank 0, which is late and has other things to do."""
    store = LateStore(monkeypatch)
    verdict = decide(store, RECORD, round_name="start", rank=7, world_size=256, timeout_s=50, grace_s=10)
    assert verdict.code == "DSP203"
    assert store.now - 1000.0 == pytest.approx(60)
    assert store.looks < 200  # 3,000 at 20 ms


def test_rank_0_that_waits_in_vain_asks_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    store = LateStore(monkeypatch)
    verdict = decide(store, RECORD, round_name="start", rank=0, world_size=2, timeout_s=60)
    assert verdict.code == "DSP202"
    assert store.now - 1000.0 == pytest.approx(60)
    assert store.looks < 200


@pytest.mark.parametrize("late_s", [0, 0.01, 0.3, 2, 9.99, 30, 59.9])
@pytest.mark.parametrize(("rank", "key"), [(7, "verdict"), (0, "1")])
def test_what_comes_late_is_noticed_soon(monkeypatch: pytest.MonkeyPatch, late_s: float, rank: int, key: str) -> None:
    """A verdict by a follower, the record of rank 1 by rank 0."""
    store = LateStore(monkeypatch, **{key: late_s})
    world_size = 2 if rank == 0 else 256
    verdict = decide(store, RECORD, round_name="start", rank=rank, world_size=world_size, timeout_s=60, grace_s=0)
    assert verdict.agreed
    assert late_s <= store.now - 1000.0 <= 1.1 * late_s + 0.02 + 1e-6
    assert store.looks < 200

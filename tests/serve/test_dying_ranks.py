# SPDX-License-Identifier: Apache-2.0
"""A rank dies at a chosen moment, or is late: what the other one does, how soon, and what its operator reads.

Every rank is a `vllm serve` of its own. Rank 0 also holds torch's key-value store, through which the ranks agree. The
moment is chosen by a copy of the overlay on one rank which ends its process, or sleeps, there.
"""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from demo import Cluster
from launched_ranks import (
    RECOMPUTE,
    VOTE_EVERY,
    Baseline,
    Server,
    changed_overlay,
    launched_apart,
    read_ranks,
    wait_until_idle,
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

DIE = '__import__("os").kill(__import__("os").getpid(), 9)'
PUBLISH = "    store.set(_key(round_name, rank), json.dumps(record, sort_keys=True))\n"
REPORT = "    _report(_latched)\n    if"
AGREEMENT_S, DEVICE_S = 5, 8
SKIPS = "DSP000 skip: no DP metadata all_reduce on rank {}; "
# What stock's own start-up needs after either limit until the server has ended; generous, since machines differ.
STOCK_S = 60
JOINING = rf"\[virtual NPU\] HCCL: joining .*rank 0 of 2: timeout, waited {DEVICE_S} s for rank 1 \(has not joined\)"


@dataclass(frozen=True)
class Death:
    """`text` of `file` is replaced on `rank`. The other rank's log matches `told`."""

    rank: int
    file: str
    text: str
    instead: str
    told: tuple[str, ...]
    within_s: float


DEATHS = {
    "before it publishes": Death(
        1, "agreement.py", PUBLISH, f"    {DIE}\n{PUBLISH}",
        (rf"DSP202 no answer within {AGREEMENT_S} s from rank 1; in force on rank 0: sync", JOINING),
        AGREEMENT_S + DEVICE_S + STOCK_S,
    ),
    "before the verdict": Death(
        1, "agreement.py", PUBLISH, f"{PUBLISH}    {DIE}\n", (SKIPS.format(0), JOINING), DEVICE_S + STOCK_S
    ),
    "after the verdict": Death(
        1, "runtime.py", REPORT, f"    {DIE}\n{REPORT}", (SKIPS.format(0), JOINING), DEVICE_S + STOCK_S
    ),
    "with the store": Death(
        0, "agreement.py", PUBLISH, f"{PUBLISH}    {DIE}\n",
        ("AgreementError: DSP207 rank 1 lost the key-value store in the process of rank 0: ",), STOCK_S,
    ),
}  # fmt: skip


def started(cluster: Cluster, servers: list[Server]) -> None:
    for one in servers:
        cluster.start(one.process)
    cluster.wait_until_ready({one.process: f"{one.url}/health" for one in servers})


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
def test_a_rank_dies_in_start_up(baseline: Baseline, tmp_path: Path, death: Death) -> None:
    """The other one ends by itself, with the rank named: by the overlay, or by the first thing that needs both."""
    common = {"DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S": str(AGREEMENT_S), "VIRTUAL_NPU_TIMEOUT_S": str(DEVICE_S)}
    environments = [common, common]
    environments[death.rank] = common | changed_overlay(tmp_path / "copy", death.file, death.text, death.instead)
    servers = launched_apart(tmp_path, baseline.model, RECOMPUTE, overlay=[True, True], environments=environments)
    other = servers[1 - death.rank]
    with Cluster() as cluster:
        for one in servers:
            cluster.start(one.process)
        assert servers[death.rank].ended_within(180)
        began = time.monotonic()
        assert other.ended_within(death.within_s), "it hangs"
        took = time.monotonic() - began
    assert "Engine core initialization failed" in servers[death.rank].log
    for told in death.told:
        assert re.search(told, other.log), told
    print(f"ended {took:.1f} s after its peer")


def test_a_rank_is_killed_in_a_step_and_the_node_is_started_again(baseline: Baseline, tmp_path: Path) -> None:
    """Rank 1 is killed inside a dispatch; rank 0 ends with a report that names it. A new start serves as before."""
    stuck_at = 120  # its n-th dispatch: two layers, so about step 60, after start-up and the first answer
    stuck = {"VIRTUAL_NPU_DELAY": f"1:120000@{stuck_at}"}
    servers = launched_apart(
        tmp_path / "first", baseline.model, RECOMPUTE, overlay=[True, True], environments=[stuck, stuck]
    )
    prompt, count = baseline.prompts[1]
    with Cluster() as cluster, ThreadPoolExecutor(1) as pool:
        started(cluster, servers)
        assert servers[0].complete(prompt, count) == baseline.tokens[1]
        answer = pool.submit(servers[0].complete, prompt, 100)
        engine = engine_of(servers[1])
        dispatches = 0
        while (now := dispatches_of(servers[1])) != dispatches or now < stuck_at - 20:
            dispatches = now
            time.sleep(3)
        engine.kill()
        began = time.monotonic()
        with pytest.raises(httpx.HTTPError):
            answer.result()
        assert servers[0].ended_within(STOCK_S), "it hangs"
        assert servers[1].ended_within(STOCK_S)
        took = time.monotonic() - began
    assert re.search(
        rf"MoeDistribute\w+.*rank 0 of 2: waits for rank 1 \(process {engine.pid}.*has died", servers[0].log
    )
    print(f"ended {took:.1f} s after its peer")

    again = launched_apart(tmp_path / "again", baseline.model, RECOMPUTE, overlay=[True, True])
    with Cluster() as cluster:
        started(cluster, again)
        assert again[0].complete(prompt, count) == baseline.tokens[1]
        assert wait_until_idle(again) >= VOTE_EVERY
        cluster.check()
    for rank, one in enumerate(again):
        assert SKIPS.format(rank) in one.log


def engine_of(server: Server) -> psutil.Process:
    """The process that writes the ledger; its name holds the process id."""
    assert server.process.popen is not None
    children = psutil.Process(server.process.popen.pid).children(recursive=True)
    (engine,) = [child for child in children if any(str(child.pid) in path.name for path in server.ledger.iterdir())]
    return engine


def dispatches_of(server: Server) -> int:
    return sum(path.read_bytes().count(b'"op":"dispatch"') for path in server.ledger.iterdir())


def test_two_nodes_on_one_host_and_a_rank_that_is_late_to_agree(baseline: Baseline, tmp_path: Path) -> None:
    """Rank 1 publishes its record 4 s late. With 60 s to wait that is nothing, with 1 s all ranks take the fallback."""
    late = changed_overlay(tmp_path / "copy", "agreement.py", PUBLISH, f"    time.sleep(4 * rank)\n{PUBLISH}")
    nodes = {
        seconds: launched_apart(
            tmp_path / f"{seconds}s",
            baseline.model,
            RECOMPUTE,
            overlay=[True, True],
            environments=[late | {"DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S": str(seconds)}] * 2,
        )
        for seconds in (60, 1)
    }
    with Cluster() as cluster, ThreadPoolExecutor(4) as pool:
        started(cluster, [one for servers in nodes.values() for one in servers])
        for (prompt, count), tokens in zip(baseline.prompts, baseline.tokens, strict=True):
            answers = [pool.submit(one.complete, prompt, count) for servers in nodes.values() for one in servers]
            assert [answer.result() for answer in answers] == [tokens] * 4
        for servers in nodes.values():
            wait_until_idle(servers)
        cluster.check()
    for seconds, servers in nodes.items():
        for rank, (one, events) in enumerate(zip(servers, read_ranks(servers), strict=True)):
            reduced = [event for event in events if event.get("group") == "dp:0" and event["step"] >= 0]
            if seconds == 60:
                assert SKIPS.format(rank) in one.log
                assert not reduced
            else:
                assert f"DSP202 no answer within 1 s from rank 1; in force on rank {rank}: sync" in one.log
                assert len(reduced) >= VOTE_EVERY

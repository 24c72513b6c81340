# SPDX-License-Identifier: Apache-2.0
"""Four DP ranks with the overlay, each launched by a `vllm serve` of its own, as behind an external load balancer."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from demo import Cluster
from launched_ranks import (
    MAX_NUM_SEQS,
    RECOMPUTE,
    VOTE_EVERY,
    Baseline,
    Event,
    launched_apart,
    one_at_a_time,
    read_ranks,
    wait_until_idle,
)

SIZE = 4
LAYERS = 2
BUSY, ALSO_BUSY = 2, 0
LATE, LATE_S = 1, 5  # this rank enters its first MC2 operator, in the profile run, 5 s after the others


@dataclass(frozen=True)
class Run:
    """Steps below `alone` have requests for rank 2 only; from there on there is one request, then two, then none."""

    logs: list[str]
    ranks: list[list[Event]]
    tokens: list[list[int]]
    few: list[list[int]]
    alone: int


@pytest.fixture(scope="module")
def run(baseline: Baseline, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("external")
    late = [{"VIRTUAL_NPU_DELAY": f"{LATE}:{LATE_S * 1000}@1"}] * SIZE
    servers = launched_apart(folder, baseline.model, RECOMPUTE, overlay=[True] * SIZE, environments=late)
    with Cluster() as cluster, ThreadPoolExecutor(2) as pool:
        for one in servers:
            cluster.start(one.process)
        cluster.wait_until_ready({one.process: f"{one.url}/health" for one in servers})
        tokens = one_at_a_time(servers[BUSY], baseline.prompts)
        alone = wait_until_idle(servers)

        prompt, _ = baseline.prompts[1]
        few = [servers[BUSY].complete(prompt, 30)]
        wait_until_idle(servers)
        both = [pool.submit(servers[rank].complete, prompt, count) for rank, count in ((BUSY, 60), (ALSO_BUSY, 40))]
        few += [answer.result() for answer in both]
        after = wait_until_idle(servers)
        assert wait_until_idle(servers, quiet_s=1) == after, "steps without a request"
        cluster.check()
    return Run([one.log for one in servers], read_ranks(servers), tokens, few, alone)


def test_field_case_44_external_load_balancer(baseline: Baseline, run: Run) -> None:
    bound, global_bs = MAX_NUM_SEQS, MAX_NUM_SEQS * SIZE
    assert len(run.ranks) == SIZE
    for rank, (log, events) in enumerate(zip(run.logs, run.ranks, strict=True)):
        assert f"DSP000 skip: no DP metadata all_reduce on rank {rank}; bound {bound} tokens per DP rank, " in log
        assert f"global_bs {global_bs}, EP size {SIZE}" in log
        groups = {event["name"]: (event["rank"], event["size"]) for event in events if event["ev"] == "group"}
        assert groups["dp:0"] == groups["mc2:0"] == (rank, SIZE)

        kinds = Counter(event["kind"] for event in events if event["ev"] == "step" and event["step"] < run.alone)
        assert kinds.total() == run.alone >= VOTE_EVERY * len(baseline.prompts)
        assert (kinds["execute"] > 0) == (rank == BUSY)

        ep = [event for event in events if event["ev"] == "ep"]
        assert {event["global_bs"] for event in ep} == {global_bs}
        assert not any(event["mask"] for event in ep)
        assert not [event for event in events if event["ev"] == "violation"]
    # Its prompts are computed in chunks of the bound while the others hand one row each to the experts.
    rows = [{event["bs"] for event in events if event["ev"] == "ep" and event["step"] >= 0} for events in run.ranks]
    assert max(rows[BUSY]) == bound
    assert rows[1] == rows[3] == {1}
    assert run.tokens == baseline.tokens


def test_field_case_21_fewer_requests_than_ranks(baseline: Baseline, run: Run) -> None:
    """Also what field case 18 is about: one request, and ranks that have nothing but dummies beside it."""
    known = baseline.tokens[1]
    assert [len(answer) for answer in run.few] == [30, 60, 40]
    assert [answer[: len(known)] for answer in run.few] == [known] * 3
    assert run.few[1][:30] == run.few[0]
    assert run.few[1][:40] == run.few[2]
    per_step = []
    for events in run.ranks:
        counts: dict[int, Counter[str]] = {}
        for event in events:
            if event["ev"] == "step":
                counts[event["step"]] = Counter()
            elif event.get("step", -1) >= 0:
                what = event["op"] if event["ev"] == "ep" else f"{event['group']} {event['kind']}"
                counts[event["step"]][what] += 1
        per_step.append(counts)
    assert per_step[0] == per_step[1] == per_step[2] == per_step[3]
    steps = per_step[0]
    assert len(steps) >= run.alone + 3 * VOTE_EVERY
    for step, counts in steps.items():
        # The vote of the engines is all that is left; no collective on the device at all.
        vote = {"stateless all_reduce": 1} if (step + 1) % VOTE_EVERY == 0 else {}
        assert counts == {"dispatch": LAYERS, "combine": LAYERS} | vote, f"step {step}"
    executed = [
        {event["step"] for event in events if event["ev"] == "step" and event["kind"] == "execute"}
        for events in run.ranks
    ]
    assert executed[1] == executed[3] == set()
    assert executed[ALSO_BUSY] & executed[BUSY]
    assert min(executed[ALSO_BUSY]) >= run.alone + VOTE_EVERY


def test_field_case_28_a_rank_is_late_in_start_up(run: Run) -> None:
    """The others wait inside the operator; then all of them serve. A rank later than the device waits: test_faults."""
    for rank, events in enumerate(run.ranks):
        first = next(event for event in events if event["ev"] == "ep")
        assert (first["op"], first["ordinal"], first["step"]) == ("dispatch", 1, -1)
        if rank != LATE:
            assert first["host_us"] > 0.8e6 * LATE_S
        assert max(event["host_us"] for event in events if event["ev"] == "ep" and event is not first) < 0.8e6 * LATE_S

# SPDX-License-Identifier: Apache-2.0
"""Sixteen DP ranks on the A2, from where on stock uses MC2 there; of the toy's experts one is left for each rank.

On the A2 stock passes no mask, so its profile run, which draws experts with repetition, breaks a rule of the operator.
The overlay's must not: a row that names one expert twice is refused here.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from demo import Cluster
from launched_ranks import (
    A2,
    A2_SIZE,
    MAX_NUM_SEQS,
    RECOMPUTE,
    VOTE_EVERY,
    Baseline,
    one_at_a_time,
    read_ranks,
    server,
    wait_until_idle,
)

LAYERS = 2


@pytest.mark.timeout(600)
def test_sixteen_ranks_on_a2_skip(baseline: Baseline, tmp_path: Path) -> None:
    flags = ["--data-parallel-size", str(A2_SIZE), "--api-server-count", "1", *RECOMPUTE]
    node = server(tmp_path / "node", baseline.model, flags, overlay=True, environment=A2)
    with Cluster() as cluster, ThreadPoolExecutor(2) as pool:
        cluster.start(node.process)
        cluster.wait_until_ready({node.process: f"{node.url}/health"})
        tokens = one_at_a_time(node, baseline.prompts[:1])
        together = [pool.submit(node.complete, *request) for request in baseline.prompts[1:]]
        tokens += [answer.result() for answer in together]
        steps = wait_until_idle([node])
        cluster.check()

    # As of stock on two ranks of an A3: what a request gets depends neither on the device nor on the number of ranks.
    assert tokens == baseline.tokens
    ranks = read_ranks([node])
    assert len(ranks) == A2_SIZE
    assert steps >= 2 * VOTE_EVERY
    for rank, events in enumerate(ranks):
        assert f"DSP000 skip: no DP metadata all_reduce on rank {rank}; bound {MAX_NUM_SEQS} tokens" in node.log
        assert not [event for event in events if event["ev"] == "violation"]
        serving = [event for event in events if event.get("step", -1) >= 0]
        groups = {event["group"] for event in serving if event["ev"] == "collective"}
        assert groups == {"stateless"}, "there is more than the engines' vote"
        ep = [event for event in events if event["ev"] == "ep"]
        assert {event["global_bs"] for event in ep} == {MAX_NUM_SEQS * A2_SIZE}
        assert not any(event["mask"] for event in ep)
        # The profile run is among them, and every step after it has all MoE layers.
        assert min(event["step"] for event in ep) == -1
        dispatched = [event["step"] for event in ep if event["op"] == "dispatch" and event["step"] >= 0]
        assert dispatched == [step for step in range(steps) for _ in range(LAYERS)]
    # A chunk of a prompt on one rank, beside the single row of an idle one.
    first = [{event["bs"] for event in events if event["ev"] == "ep" and event["step"] >= 0} for events in ranks]
    assert MAX_NUM_SEQS in first[0]
    assert first[-1] == {1}

# SPDX-License-Identifier: Apache-2.0
"""`sync` and `off` are stock: the same calls in the same order with the same arguments, start-up included.

The ledger of the virtual NPU has every collective (gloo's too) and every dispatch and combine with its arguments. A run
in `skip` is in the other files of this folder.
"""

from __future__ import annotations

import re

import pytest
from demo import Cluster
from launched_ranks import MAX_NUM_SEQS, SMALL, VOTE_EVERY, Baseline, Event, Server, one_at_a_time, read_ranks, server

BUDGET = int(SMALL[SMALL.index("--max-num-batched-tokens") + 1])
VOTE = "stateless"  # the ledger's name for the group of the engines' vote
VARYING = {"t", "host_us", "step", "ordinal"}
STATES = {
    # Without the recompute scheduler a step may hold max_num_batched_tokens, which is above the MC2 capacity.
    "sync": {},
    "off": {"DP_SYNC_PATCH_MODE": "off"},
}


@pytest.fixture(scope="module")
def runs(baseline: Baseline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Server, list[list[int]]]]:
    """The server (ended) and the tokens of each state; the servers start side by side, but serve one after another."""
    folder = tmp_path_factory.mktemp("states")
    flags = ["--data-parallel-size", "2", "--api-server-count", "1"]
    servers = {
        state: server(folder / state, baseline.model, flags, overlay=True, environment=environment)
        for state, environment in STATES.items()
    }
    with Cluster() as cluster:
        for one in servers.values():
            cluster.start(one.process)
        cluster.wait_until_ready({one.process: f"{one.url}/health" for one in servers.values()})
        result = {state: (one, one_at_a_time(one, baseline.prompts)) for state, one in servers.items()}
        cluster.check()
    return result


Call = tuple[tuple[str, object], ...]
Step = tuple[tuple[Call, ...], ...]  # the calls of each rank


def call(event: Event) -> Call:
    """An event without what no two runs share: when it happened, how long the host waited, how many came before."""
    return tuple(sorted((name, value) for name, value in event.items() if name not in VARYING))


def by_step(ranks: list[list[Event]]) -> dict[int, Step]:
    """Step -> the calls that the ranks made in it, in order; step -1 is start-up. The first call names the step's kind.

    The engines' vote is left out: it comes after every 32nd step, whatever that step is.
    """
    last = max(event["step"] for event in ranks[0])
    return {
        step: tuple(
            tuple(call(event) for event in events if event.get("step", -1) == step and event.get("group") != VOTE)
            for events in ranks
        )
        for step in range(-1, last + 1)
    }


def idle(step: Step) -> bool:
    return all(("kind", "dummy") in calls[0] for calls in step)


def busy_steps(ranks: list[list[Event]]) -> list[Step]:
    """Steps with a request in them, the calls of its ranks in an order of their own.

    Two things are races between messages of vLLM's: whether an idle step comes first, and which rank gets the request,
    since the balancer's view of the ranks is some 100 ms old.
    """
    return [without_rank(step) for number, step in by_step(ranks).items() if number >= 0 and not idle(step)]


def without_rank(step: Step) -> Step:
    """Without what depends on which of the ranks has the request.

    read_ranks has seen to it that all MC2 calls of a ledger are of the same rank. How much a rank gets of an AlltoAllV
    depends on its experts; that the right rows got there is seen from the tokens.
    """

    def is_left(name: str, one: Call) -> bool:
        return name != "rank" and not (name == "bytes" and ("kind", "AlltoAllV") in one)

    calls = (tuple(tuple(item for item in one if is_left(item[0], one)) for one in calls) for calls in step)
    return tuple(sorted(calls, key=repr))


def idle_steps(ranks: list[list[Event]]) -> set[Step]:
    return {step for number, step in by_step(ranks).items() if number >= 0 and idle(step)}


def votes(events: list[Event]) -> list[tuple[int, int]]:
    """Step and bytes of each vote."""
    return [(event["step"], event["bytes"]) for event in events if event.get("group") == VOTE]


@pytest.mark.parametrize("state", STATES)
def test_every_call_is_the_one_that_stock_makes(
    baseline: Baseline, runs: dict[str, tuple[Server, list[list[int]]]], state: str
) -> None:
    node, tokens = runs[state]
    assert tokens == baseline.tokens
    ranks = read_ranks([node])
    assert len(ranks) == len(baseline.ranks) == 2
    assert by_step(ranks)[-1] == by_step(baseline.ranks)[-1]
    for number, (mine, stock) in enumerate(zip(busy_steps(ranks), busy_steps(baseline.ranks), strict=True)):
        assert mine == stock, f"busy step {number}"
    assert idle_steps(ranks) == idle_steps(baseline.ranks)
    for mine, stock in zip(ranks, baseline.ranks, strict=True):
        assert votes(mine) == votes(stock)


def test_the_stock_run_has_what_the_overlay_would_change(baseline: Baseline) -> None:
    """Otherwise the comparison above would say nothing."""
    assert len(idle_steps(baseline.ranks)) == 1
    assert len(busy_steps(baseline.ranks)) == 2 + 11 + 24 + 9
    for events in baseline.ranks:
        steps = [event["step"] for event in events if event["ev"] == "step"]
        assert steps == list(range(3 * VOTE_EVERY))
        serving = [event for event in events if event.get("step", -1) >= 0]
        collectives = [event for event in serving if event["ev"] == "collective"]
        assert [event["step"] for event in collectives if event["group"] == "dp:0"] == steps
        # Two int32 counts and two flags.
        assert {event["bytes"] for event in collectives if event["group"] == "dp:0"} == {16}
        ep = [event for event in serving if event["ev"] == "ep"]
        assert {event["op"] for event in ep} == {"dispatch", "combine"}
        assert {event["global_bs"] - 2 * event["bs"] for event in ep} == {0}  # stock passes 0: the local count
        assert all(event["mask"] for event in ep)
        # Both methods: a step above the MC2 capacity leaves MC2, on both ranks.
        assert any(event["kind"] == "AlltoAllV" for event in collectives)
        assert max(event["bs"] for event in ep) == 5


def test_the_log_says_what_is_in_force_and_what_would_help(
    runs: dict[str, tuple[Server, list[list[int]]]], baseline: Baseline
) -> None:
    log = runs["sync"][0].log
    for rank in (0, 1):
        (line,) = re.findall(rf".*\bDSP\d+ .*in force on rank {rank}: .*", log)
        assert f"DSP104 the largest possible step does not fit the MC2 capacity: found {BUDGET} tokens per DP" in line
        assert f"needed at most {MAX_NUM_SEQS}; to change it: --additional-config" in line
        assert '{"recompute_scheduler_enable": true}' in line
        assert f"--max-num-batched-tokens {MAX_NUM_SEQS}; in force on rank {rank}: sync (stock vllm-ascend)" in line
    assert "DSP000" not in log
    for other in (runs["off"][0].log, baseline.log):
        assert not re.search(r"\bDSP\d", other)
    # Not merely absent: the same process loaded the overlay's plugin.
    assert "Loading plugin dp_sync_patch" in runs["off"][0].log
    assert "Loading plugin dp_sync_patch" not in baseline.log

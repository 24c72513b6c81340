# SPDX-License-Identifier: Apache-2.0
"""DP4 over two nodes: `vllm serve` with two ranks on each, and a link between them of 2 ms in each direction."""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from demo import Cluster
from launched_ranks import RECOMPUTE, Event, read_ranks, server, wait_until_idle
from node_runs import REFUSED, make_prompts
from split_node import split_node, start
from toy_model import ToyModelShape, write_toy_model
from two_nodes import Link, TwoNodes

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
FOLDER = Path(__file__).resolve().parents[2] / "build" / "two_nodes"
SIZE = 4
DELAY_US = 2000
PROMPTS = make_prompts([(5, 24), (40, 12), (9, 60), (12, 60), (20, 30)])
LAYERS = ToyModelShape().num_hidden_layers


def answers(nodes: TwoNodes, folder: Path, model: Path, *flags: str) -> tuple[list[list[int]], list[list[Event]]]:
    """The tokens of all prompts, one alone and then all at once, and the events of each rank."""
    node = split_node(nodes, folder, model, [*RECOMPUTE, *flags], size=SIZE, overlay=True)
    # Stock 0.11.0 synchronises on the devices: a ring or a halving of two nodes crosses the link twice.
    node.set_hccl_delay(2 * DELAY_US)

    def complete() -> list[list[int]]:
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            tokens = [node.head.complete(*PROMPTS[0])]
            return tokens + list(pool.map(lambda prompt: node.head.complete(*prompt), PROMPTS))

    with Cluster() as cluster:
        start(nodes, cluster, [node])
        tokens = nodes.run(0, complete)
        wait_until_idle(node.halves)
        cluster.check()
    return tokens, read_ranks(node.halves)


def per_step(events: list[Event]) -> list[float]:
    """Milliseconds in collectives of the DP group, of each step."""
    steps: dict[int, float] = {event["step"]: 0.0 for event in events if event["ev"] == "step"}
    for event in events:
        if event["ev"] == "collective" and event["group"] in ("dp", "dp:0") and event.get("step", -1) >= 0:
            steps[event["step"]] += event["host_us"] / 1000
    return list(steps.values())


def test_the_skip_does_not_pay_for_the_link(tmp_path: Path) -> None:
    model = write_toy_model(tmp_path / "model", ToyModelShape())
    one = server(tmp_path / "one", model, ["--data-parallel-size", str(SIZE), *RECOMPUTE], overlay=False)
    with Cluster() as cluster:
        cluster.start(one.process)
        cluster.wait_until_ready({one.process: f"{one.url}/health"})
        expected = [one.complete(*prompt) for prompt in [PROMPTS[0], *PROMPTS]]
    with TwoNodes(FOLDER, Link(DELAY_US)) as nodes:
        skipped, skipping = answers(nodes, tmp_path / "skip", model)
        synced, syncing = answers(nodes, tmp_path / "sync", model, *REFUSED)
    assert skipped == synced == expected
    assert len(skipping) == len(syncing) == SIZE
    for events in skipping:
        assert not any(per_step(events))
        calls = [event for event in events if event["ev"] == "ep" and event["op"] == "dispatch" and event["step"] >= 0]
        assert len(calls) == LAYERS * len(per_step(events))
    assert all(statistics.median(per_step(events)) >= 2 * DELAY_US / 1000 for events in syncing)

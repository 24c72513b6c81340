# SPDX-License-Identifier: Apache-2.0
"""Stock with ACL graphs, DP2 EP2: the tokens of eager mode, and the ledgers say that graphs were replayed for them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from demo import Cluster
from launched_ranks import Baseline, Event, one_at_a_time, read_ranks, server
from toy_model import ToyModelShape

SIZES = [1, 2, 4, 8]
LAYERS = ToyModelShape().num_hidden_layers


def serve(folder: Path, baseline: Baseline, mode: str, environment: dict[str, str]) -> list[list[Event]]:
    """The ledgers of a node that answered the baseline's prompts in graph mode, with the baseline's tokens."""
    compilation = {"cudagraph_mode": mode, "cudagraph_capture_sizes": SIZES}
    flags = [
        *("--data-parallel-size", "2", "--api-server-count", "1", "--no-enforce-eager"),
        *("--compilation-config", json.dumps(compilation)),
    ]
    environment = {"VLLM_DISABLE_COMPILE_CACHE": "1", **environment}
    node = server(folder / mode, baseline.model, flags, overlay=False, environment=environment)
    with Cluster() as cluster:
        cluster.start(node.process)
        cluster.wait_until_ready({node.process: f"{node.url}/health"})
        tokens = one_at_a_time(node, baseline.prompts)
        cluster.check()
    assert tokens == baseline.tokens
    return read_ranks([node])


def steps_with(events: list[Event], **fields: object) -> Counter[int]:
    """Step -> its events with these fields; step -1 is start-up."""
    return Counter(event["step"] for event in events if fields.items() <= event.items())


def assert_graphs_were_replayed(events: list[Event], pieces: int) -> None:
    """Every MC2 call in a graph belongs to a replay, and decoding had them."""
    assert steps_with(events, ev="graph", op="capture") == {-1: pieces * len(SIZES)}
    replays = steps_with(events, ev="graph", op="replay")
    assert len(replays) > 40
    assert set(replays.values()) == {pieces}
    in_graph = steps_with(events, ev="ep", op="dispatch", mode="graph")
    assert in_graph == dict.fromkeys(replays, LAYERS)
    assert in_graph == steps_with(events, ev="ep", op="combine", mode="graph")


def test_piecewise(baseline: Baseline, tmp_path: Path) -> None:
    """Attention is outside the graphs. Ranks are padded to the busiest one, so they use the same graphs."""
    for events in serve(tmp_path, baseline, "PIECEWISE", {}):
        assert_graphs_were_replayed(events, LAYERS + 1)
        serving = [event for event in events if event.get("step", -1) >= 0]
        assert not steps_with(serving, ev="ep", mode="eager")


def test_full_decode_only(baseline: Baseline, tmp_path: Path) -> None:
    """Attention is inside the graphs and updated in them. The idle rank replays a graph while its peer prefills.

    That is upstream issue 13826: a prompt that is small enough for MC2 runs eagerly, its peer's dummy does not.
    """
    ranks = serve(tmp_path, baseline, "FULL_DECODE_ONLY", {"VIRTUAL_NPU_MIXED_MODES": "report"})
    eager = [steps_with(events, ev="ep", op="dispatch", mode="eager") for events in ranks]
    mixed = {step for steps in eager for step in steps if step >= 0}
    assert len(mixed) == 1  # the prompt of 5 tokens
    for events in ranks:
        assert_graphs_were_replayed(events, 1)
        assert set(steps_with(events, ev="violation", rule="mixed_modes")) == mixed

# SPDX-License-Identifier: Apache-2.0
"""ACL graphs, DP2 EP2, by stock and with each graph level: the tokens of eager mode, and which steps were graphs.

With FULL_DECODE_ONLY a rank that prefills runs eagerly while an idle one replays a graph (vllm-ascend#13826).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import httpx
import pytest
from demo import Cluster
from launched_ranks import (
    RECOMPUTE,
    Baseline,
    Event,
    Server,
    changed_overlay,
    one_at_a_time,
    read_ranks,
    server,
)
from load import LoadRequest
from serve_node import PrefillDecodePair
from toy_model import ToyModelShape

SIZES = [1, 2, 4, 8]
LAYERS = ToyModelShape().num_hidden_layers


def node(folder: Path, baseline: Baseline, mode: str, environment: dict[str, str], *, overlay: bool = False) -> Server:
    compilation = {"cudagraph_mode": mode, "cudagraph_capture_sizes": SIZES}
    flags = [
        *("--data-parallel-size", "2", "--api-server-count", "1", "--no-enforce-eager"),
        *("--compilation-config", json.dumps(compilation), *(RECOMPUTE if overlay else ())),
    ]
    environment = {"VLLM_DISABLE_COMPILE_CACHE": "1", **environment}
    return server(folder / mode, baseline.model, flags, overlay=overlay, environment=environment)


def serve(one: Server, baseline: Baseline) -> list[list[Event]]:
    """The ledgers of a node that answered the baseline's prompts, with the baseline's tokens."""
    with Cluster() as cluster:
        cluster.start(one.process)
        cluster.wait_until_ready({one.process: f"{one.url}/health"})
        tokens = one_at_a_time(one, baseline.prompts)
        cluster.check()
    assert tokens == baseline.tokens
    return read_ranks([one])


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


@pytest.mark.long
def test_piecewise(baseline: Baseline, tmp_path: Path) -> None:
    """Attention is outside the graphs. Ranks are padded to the busiest one, so they use the same graphs."""
    for events in serve(node(tmp_path, baseline, "PIECEWISE", {}), baseline):
        assert_graphs_were_replayed(events, LAYERS + 1)
        serving = [event for event in events if event.get("step", -1) >= 0]
        assert not steps_with(serving, ev="ep", mode="eager")


@pytest.mark.long
def test_full_decode_only(baseline: Baseline, tmp_path: Path) -> None:
    """Attention is inside the graphs and updated in them. The idle rank replays a graph while its peer prefills.

    That is upstream issue 13826: a prompt that is small enough for MC2 runs eagerly, its peer's dummy does not.
    """
    ranks = serve(node(tmp_path, baseline, "FULL_DECODE_ONLY", {"VIRTUAL_NPU_MIXED_MODES": "report"}), baseline)
    eager = [steps_with(events, ev="ep", op="dispatch", mode="eager") for events in ranks]
    mixed = {step for steps in eager for step in steps if step >= 0}
    assert len(mixed) == 1  # the prompt of 5 tokens
    for events in ranks:
        assert_graphs_were_replayed(events, 1)
        assert set(steps_with(events, ev="violation", rule="mixed_modes")) == mixed


@pytest.mark.long
def test_stock_that_mixes_graph_and_eager_ends_with_a_report(baseline: Baseline, tmp_path: Path) -> None:
    short = {"VIRTUAL_NPU_TIMEOUT_S": "8"}
    stock = node(tmp_path, baseline, "FULL_DECODE_ONLY", short)
    with Cluster() as cluster:
        cluster.start(stock.process)
        cluster.wait_until_ready({stock.process: f"{stock.url}/health"})
        with pytest.raises(httpx.HTTPError):
            one_at_a_time(stock, baseline.prompts)
        assert stock.ended_within(90)
    assert "mixed_modes" in "".join(path.read_text() for path in stock.ledger.iterdir())


def test_batches_that_are_made_uniform_need_no_collective(baseline: Baseline, tmp_path: Path) -> None:
    """With the overlay as it is: prompts are computed one token per step, so every step of every rank is a graph."""
    overlay = node(tmp_path, baseline, "FULL_DECODE_ONLY", {}, overlay=True)
    ranks = serve(overlay, baseline)
    assert overlay.log.count("decode batches only, so that every step is a FULL graph") == 2
    computed = sum(steps_with(events, ev="step", scheduled_tokens=1).total() for events in ranks)
    assert computed == sum(len(prompt) + count - 1 for prompt, count in baseline.prompts)
    for events in ranks:
        assert_graphs_were_replayed(events, 1)
        serving = [event for event in events if event.get("step", -1) >= 0]
        assert not [event for event in serving if event["ev"] == "collective" and event["group"] in ("dp", "dp:0")]
        assert not steps_with(serving, ev="ep", mode="eager")
        assert not [event for event in events if event["ev"] == "violation"]


@pytest.mark.long
def test_a_batch_that_is_not_uniform_ends_its_rank(baseline: Baseline, tmp_path: Path) -> None:
    """As where the scheduler's limit is undone: the prompt, padded to 8 tokens, would run eagerly, beside a graph."""
    text = "scheduler.scheduler_config.long_prefill_token_threshold = query_len"
    changed = changed_overlay(tmp_path / "copy", "patches/scheduler_bound.py", text, "pass")
    overlay = node(tmp_path, baseline, "FULL_DECODE_ONLY", changed | {"VIRTUAL_NPU_TIMEOUT_S": "8"}, overlay=True)
    with Cluster() as cluster:
        cluster.start(overlay.process)
        cluster.wait_until_ready({overlay.process: f"{overlay.url}/health"})
        with pytest.raises(httpx.HTTPError):
            overlay.complete(*baseline.prompts[1])
        assert overlay.ended_within(90)
    assert "DSP304 DP rank 0: a batch of 8 tokens is no decode batch with a FULL graph" in overlay.log
    events = [json.loads(line) for path in overlay.ledger.iterdir() for line in path.read_text().splitlines()]
    assert not [event for event in events if event["ev"] == "violation"]
    assert not [event for event in events if event.get("step", -1) >= 0 and event.get("mode") == "eager"]


@pytest.mark.long
def test_uniform_batches_behind_a_prefill_node(baseline: Baseline, tmp_path: Path) -> None:
    """Requests with remote KV, and others without it between them: no collective, graphs only, the tokens of stock."""
    draw = random.Random(23)
    lengths = [(40, 30), (150, 20), (7, 40), (200, 12), (33, 33), (5, 17), (141, 9), (90, 25)]
    loads = [
        LoadRequest(index, 0.2 * index, [draw.randrange(3, ToyModelShape().vocab_size) for _ in range(length)], count)
        for index, (length, count) in enumerate(lengths)
    ]
    prefill = ("--max-num-batched-tokens", "512", "--num-gpu-blocks-override", "64")
    flags = ["--data-parallel-size", "2", "--max-num-batched-tokens", "64", *RECOMPUTE]
    compilation = json.dumps({"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES})
    graphs = ["--no-enforce-eager", "--compilation-config", compilation]
    answers = []
    with Cluster() as cluster:
        pair = PrefillDecodePair(cluster, tmp_path, baseline.model, ["--num-gpu-blocks-override", "64"], prefill)
        for name, more, overlay in (("stock", (), False), ("overlay", graphs, True)):
            environment = {"VLLM_DISABLE_COMPILE_CACHE": "1"}
            with pair.decode_node(name, [*flags, *more], overlay=overlay, environment=environment) as decode:
                answers.append(decode.send(loads[:6], loads[6:]))
                decode.wait_until_idle()
    assert answers[0] == answers[1]
    ranks = decode.ranks()
    assert len(ranks) == 2
    for rank in ranks:
        assert rank.dp_collectives == 0
        assert {call["mode"] for calls in rank.dispatches.values() for call in calls} == {"graph"}
        assert {len(calls) for calls in rank.dispatches.values()} == {LAYERS}
    assert any(rank.scheduled[step] != ranks[0].scheduled[step] for rank in ranks for step in range(ranks[0].steps - 1))
    # Of a request that was handed over, the last token of its prompt is computed here.
    computed = sum(sum(rank.scheduled.values()) for rank in ranks)
    assert computed == sum(count for _, count in lengths) + sum(length - 1 for length, _ in lengths[6:])


def test_ranks_agree_on_the_graph_mode(baseline: Baseline, tmp_path: Path) -> None:
    """With the overlay and graph_mode=sync: no metadata, one int per step, and never both modes in one step."""
    overlay = node(tmp_path, baseline, "FULL_DECODE_ONLY", {"DP_SYNC_PATCH_GRAPH_MODE": "sync"}, overlay=True)
    ranks = serve(overlay, baseline)
    assert overlay.log.count("the ranks agree on the graph mode of every step") == 2
    graphs = []
    for events in ranks:
        # The last step may be cut off at the end of the process.
        steps = range(max(event["step"] for event in events))
        collectives = [
            event for event in events if event["ev"] == "collective" and event.get("group") in ("dp", "dp:0")
        ]
        serving = [event for event in collectives if event["step"] in steps]
        assert Counter(event["step"] for event in serving) == dict.fromkeys(steps, 1)
        assert {(event.get("backend"), event["kind"], event["bytes"]) for event in serving} == {
            ("gloo", "all_reduce", 4)
        }
        # Begun early, and the host waited for each of them.
        waits = [event for event in events if event["ev"] == "collective_wait" and event["step"] in steps]
        assert Counter(event["step"] for event in waits) == dict.fromkeys(steps, 1)
        assert {event["group"] for event in waits} == {"dp:0"}
        by_mode = [
            steps_with(events, ev="ep", op="dispatch", mode=mode).keys() & set(steps) for mode in ("graph", "eager")
        ]
        assert not by_mode[0] & by_mode[1]
        assert by_mode[0] | by_mode[1] == set(steps)
        assert len(by_mode[0]) > 40
        assert by_mode[1]  # those in which a rank prefilled
        graphs.append(by_mode[0])
    assert graphs[0] == graphs[1]

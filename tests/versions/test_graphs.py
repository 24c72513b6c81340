# SPDX-License-Identifier: Apache-2.0
"""ACL graphs on a decode node of the installed stock version, DP2 EP2 on a virtual A3.

Stock's own skip, from 0.12.0rc1 on, is blind to the graph mode. With the overlay every step of every rank has the same
one: without any collective, or, where that is not possible, by stock's all_reduce, which carries the mode from 0.13.0
on. 0.12.0rc1 does not start with a capture list of its own; tests/serve/test_graph_mode.py has 0.11.0.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from demo import Cluster
from launched_ranks import MAX_NUM_SEQS, Server, server
from node_runs import DP2, Run, assert_synchronised, graph_flags, make_prompts, run, seeded, serve
from toy_deepseek import LAYERS, write_toy_deepseek
from toy_model import ToyModelShape, write_toy_model

from dp_sync_patch import stock

pytestmark = [pytest.mark.timeout(1200), pytest.mark.matrix]

STOCK = stock.require()
# The first one fits MC2, the second one does not, and the last ones are together on one rank for a while.
PROMPTS = make_prompts([(5, 24), (40, 12), (9, 60), (12, 60)])
RANKS = (0, 1, 0, 0)
SEPARATE = sorted(STOCK.graph_modes & {"FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"})
# MLA adds up the pieces of a prompt in bf16: these are out of those in test_draft_passes.py whose tokens lead by 5/64.
MLA_PROMPTS = seeded((6, 20, 304), (40, 12, 30), (90, 10, 625), (90, 10, 605))
TOY_LAYERS = ToyModelShape().num_hidden_layers
CAPTURES = [1, 2, 4, MAX_NUM_SEQS, 2 * MAX_NUM_SEQS]  # the last one is above the bound


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("model"), ToyModelShape())


@pytest.fixture(scope="module")
def eager(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("eager"), model, PROMPTS, ())


def in_graphs(folder: Path, model: Path, mode: str, *, overlay: bool = True, **environment: str) -> Server:
    flags = [*DP2, *graph_flags(mode, CAPTURES)]
    environment = {"VLLM_DISABLE_COMPILE_CACHE": "1", "VIRTUAL_NPU_TIMEOUT_S": "20", **environment}
    return server(folder, model, flags, overlay=overlay, environment=environment)


def assert_graphs_without_a_collective(result: Run, eager: Run, layers: int = TOY_LAYERS) -> None:
    assert result.log.count("DSP000 skip") == 2
    assert result.tokens == eager.tokens
    for rank in (0, 1):
        assert result.dp_collectives(rank) == {}
        assert set(result.calls_by_step(rank, "dispatch").values()) == {layers}
        assert {event["mode"] for event in result.dispatches(rank)} == {"graph"}
        assert not [event for event in result.ranks[rank] if event["ev"] == "violation"]
    sizes = [[event["bs"] for event in result.dispatches(rank)] for rank in (0, 1)]
    assert sum(len(set(together)) > 1 for together in zip(*sizes, strict=True)) > 10
    # A larger graph has not even been captured.
    assert max(event["bs"] for events in result.ranks for event in events if event["ev"] == "ep") == MAX_NUM_SEQS


def assert_one_mode_in_each_step(result: Run, expected: set[str]) -> None:
    modes = [{event["step"]: event["mode"] for event in result.dispatches(rank)} for rank in (0, 1)]
    common = modes[0].keys() & modes[1].keys()
    assert {modes[0][step] for step in common} == expected
    assert all(modes[0][step] == modes[1][step] for step in common)
    assert not [event for events in result.ranks for event in events if event["ev"] == "violation"]


if STOCK.own_skip and "PIECEWISE" in STOCK.graph_modes:

    def test_stock_with_full_graphs_skips_and_mixes_modes(model: Path, tmp_path: Path) -> None:
        """vllm-ascend#13826: a rank prefills a prompt that fits MC2, eagerly; the idle one replays a graph."""
        node = in_graphs(tmp_path / "stock", model, "FULL_DECODE_ONLY", overlay=False)
        with Cluster() as cluster:
            cluster.start(node.process)
            cluster.wait_until_ready({node.process: f"{node.url}/health"})
            with pytest.raises(httpx.HTTPError):
                node.complete(*PROMPTS[0])
            assert node.ended_within(90)
        events = [json.loads(line) for path in node.ledger.iterdir() for line in path.read_text().splitlines()]
        assert any(event["ev"] == "violation" and event["rule"] == "mixed_modes" for event in events)
        steps = [event for event in events if event.get("step", -1) >= 0]
        assert not [event for event in steps if event.get("group") == "dp:0"], "stock does not skip here"

    def test_piecewise_graphs_without_a_collective(model: Path, eager: Run, tmp_path: Path) -> None:
        result = serve(in_graphs(tmp_path / "node", model, "PIECEWISE"), PROMPTS, RANKS)
        assert_graphs_without_a_collective(result, eager)

    @pytest.mark.parametrize("mode", SEPARATE)
    def test_full_graphs_without_a_collective(model: Path, eager: Run, tmp_path: Path, mode: str) -> None:
        """Graph level `uniform`: one token of each request per step, so every step of every rank is a FULL graph."""
        result = serve(in_graphs(tmp_path / "node", model, mode), PROMPTS, RANKS)
        assert_graphs_without_a_collective(result, eager)
        assert result.log.count("decode batches only, so that every step is a FULL graph") == 2
        computed = sum(sum(result.scheduled(rank).values()) for rank in (0, 1))
        assert computed == sum(len(prompt) + count - 1 for prompt, count in [PROMPTS[0], *PROMPTS])

    def test_full_graphs_of_mla_without_a_collective(tmp_path: Path) -> None:
        """The first token of a prompt is a decode for MLA too, and is so in the graph that is replayed for it."""
        deepseek = write_toy_deepseek(tmp_path / "deepseek")
        result = serve(in_graphs(tmp_path / "node", deepseek, "FULL_DECODE_ONLY"), MLA_PROMPTS, RANKS)
        assert_graphs_without_a_collective(result, run(tmp_path / "eager", deepseek, MLA_PROMPTS, ()), LAYERS)

    @pytest.mark.parametrize("mode", SEPARATE)
    def test_ranks_agree_on_the_graph_mode(model: Path, eager: Run, tmp_path: Path, mode: str) -> None:
        """Graph level `sync`: one int per step, and never both modes in one step."""
        result = serve(in_graphs(tmp_path / "node", model, mode, DP_SYNC_PATCH_GRAPH_MODE="sync"), PROMPTS, RANKS)
        assert result.log.count("the ranks agree on the graph mode of every step") == 2
        assert result.tokens == eager.tokens
        for rank in (0, 1):
            assert result.dp_collectives(rank, "all_reduce") == dict.fromkeys(result.steps(rank), 1)
            assert result.collective_sizes(rank) == {4}
        assert_one_mode_in_each_step(result, {"graph", "eager"} if mode == "FULL_DECODE_ONLY" else {"graph"})
        sizes = [[event["bs"] for event in result.dispatches(rank)] for rank in (0, 1)]
        assert sum(len(set(together)) > 1 for together in zip(*sizes, strict=True)) > 10

    def test_full_graphs_are_synchronised(model: Path, eager: Run, tmp_path: Path) -> None:
        """Where nothing else is allowed, by stock's own all_reduce."""
        node = in_graphs(tmp_path / "node", model, "FULL_DECODE_ONLY", DP_SYNC_PATCH_GRAPH_MODE="refuse")
        result = serve(node, PROMPTS, RANKS)
        assert_synchronised(result, PROMPTS, "DSP122")
        assert_one_mode_in_each_step(result, {"graph", "eager"})
        assert result.tokens == eager.tokens

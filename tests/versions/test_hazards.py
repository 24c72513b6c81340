# SPDX-License-Identifier: Apache-2.0
"""What stock's own skip does not look at: each case hangs or is refused on stock, and works with the overlay.

All cases are of 0.12.0rc1 and 0.13.0, in eager mode, but for the last one, which is of 0.13.0. The overlay's answer to
all of them is `sync`: counts are padded to the busiest rank, and all ranks choose the same method and graph mode.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from demo import Cluster
from launched_ranks import A2, A2_SIZE, MAX_NUM_SEQS, RECOMPUTE, Prompt, Server, server
from node_runs import DP2, Run, assert_stock_skips_and_hangs, make_prompts, run, serve
from toy_deepseek import write_toy_deepseek
from toy_model import ToyModelShape, write_toy_model

from dp_sync_patch import stock

pytestmark = [pytest.mark.timeout(1200), pytest.mark.matrix]

STOCK = stock.require()
SHORT = (5, 24)  # a prompt that fits MC2, and tokens to generate
LONG = (40, 12)
# Three blocks of 128 tokens for each rank: two requests of this length do not fit, and one of them is preempted. Of
# three requests one rank gets two.
GROWING = (5, 150)
FEW_BLOCKS = ("--num-gpu-blocks-override", "4")
HIERARCHY = {"HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "0"}
TWO_DRAFTS = ("--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 2}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("model"), ToyModelShape())


def assert_synchronised(result: Run, prompts: list[Prompt], code: str, *, passes: int = 1) -> None:
    """All requests were answered, and every step has one all_reduce for each of its passes, on every rank."""
    assert [len(tokens) for tokens in result.tokens] == [count for _, count in [prompts[0], *prompts]]
    assert code in result.log
    assert "DSP000" not in result.log
    for rank in range(len(result.ranks)):
        steps = result.steps(rank)
        assert len(steps) > 32
        assert result.dp_collectives(rank, "all_reduce") == dict.fromkeys(steps, passes)


def steps_outside_mc2(result: Run, rank: int) -> set[int]:
    return {event["step"] for event in result.serving(rank) if event.get("kind") == "AlltoAllV"}


if STOCK.vllm_ascend in ("0.12.0rc1", "0.13.0"):

    @pytest.mark.parametrize("harmful", [[LONG], [GROWING] * 3], ids=["long prompt", "preemption"])
    def test_stock_with_kv_both_skips_and_hangs(model: Path, tmp_path: Path, harmful: list[tuple[int, int]]) -> None:
        """For stock such a node is a consumer, but it prefills; and its recompute scheduler does not hand a preempted
        request back, it computes the request again here, in one step beyond the MC2 capacity."""
        harmless, *prompts = make_prompts([SHORT, *harmful])
        assert_stock_skips_and_hangs(
            tmp_path / "stock", model, FEW_BLOCKS, prompts, harmless=harmless, kv_role="kv_both"
        )

    def test_kv_both_is_synchronised(model: Path, tmp_path: Path) -> None:
        prompts = make_prompts([SHORT, LONG, *[GROWING] * 3])
        result = run(tmp_path / "node", model, prompts, FEW_BLOCKS, kv_role="kv_both")
        assert_synchronised(result, prompts, "DSP102")
        left = steps_outside_mc2(result, 0)
        assert left == steps_outside_mc2(result, 1)
        # More steps than the long prompt needs: preempted requests are computed again.
        assert len(left) > 2
        assert any(event["bs"] == 1 for event in result.dispatches(0))

    @pytest.fixture(scope="module")
    def hierarchy_prompts() -> list[Prompt]:
        """Each of them fits MC2. Two that begin in one step of a rank may not, and then all ranks leave it together."""
        return make_prompts([SHORT, (8, 12), (3, 30), (7, 20)])

    def hierarchical(folder: Path, model: Path, *, overlay: bool) -> Server:
        flags = [
            *("--data-parallel-size", str(A2_SIZE), "--api-server-count", "1", *RECOMPUTE),
            *("--distributed-executor-backend", "uni"),  # sixteen processes less
        ]
        return server(folder, model, flags, overlay=overlay, environment=A2 | HIERARCHY)

    def test_stock_with_hierarchical_mc2_is_refused(
        model: Path, hierarchy_prompts: list[Prompt], tmp_path: Path
    ) -> None:
        """The operator takes equal counts only in this mode, with global_bs=0; stock always passes another one."""
        node = hierarchical(tmp_path / "stock", model, overlay=False)
        with Cluster() as cluster:
            cluster.start(node.process)
            cluster.wait_until_ready({node.process: f"{node.url}/health"})
            with pytest.raises(httpx.HTTPError):
                node.complete(*hierarchy_prompts[0])
            assert node.ended_within(90)
        told = f"comm_alg hierarchy cannot work when BS differs between ranks (global_bs={A2_SIZE * MAX_NUM_SEQS}, BS="
        assert told in node.log

    def test_hierarchical_mc2_gets_equal_counts_and_the_mask(
        model: Path, hierarchy_prompts: list[Prompt], tmp_path: Path
    ) -> None:
        result = serve(hierarchical(tmp_path / "node", model, overlay=True), hierarchy_prompts)
        assert len(result.ranks) == A2_SIZE
        assert_synchronised(result, hierarchy_prompts, "DSP110")
        for rank in range(A2_SIZE):
            assert not [event for event in result.ranks[rank] if event["ev"] == "violation"]
            ep = [event for event in result.ranks[rank] if event["ev"] == "ep"]
            assert {event["op"] for event in ep} == {"dispatch", "combine"}
            assert all(event["mask"] for event in ep)
            assert all(event["global_bs"] == A2_SIZE * event["bs"] for event in ep)
        # As without hierarchy, on two ranks of an A3.
        assert result.tokens == run(tmp_path / "a3", model, hierarchy_prompts, ()).tokens

    @pytest.fixture(scope="module")
    def drafting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_toy_deepseek(tmp_path_factory.mktemp("drafting_model"))

    def test_stock_with_two_drafts_skips_and_hangs_on_a_prompt_that_fits_mc2(
        drafting_model: Path, tmp_path: Path
    ) -> None:
        """A batch with prefill stops after the first draft pass, on the rank that has it; the others run both."""
        assert_stock_skips_and_hangs(tmp_path / "stock", drafting_model, TWO_DRAFTS, make_prompts([(6, 200)]))

    def test_two_drafts_are_synchronised(drafting_model: Path, tmp_path: Path) -> None:
        # The tokens of the first one lead by 3/64 or more; those that lead by 1/64 differ now and then in company.
        prompts = [*make_prompts([(20, 40)], seed=1010), *make_prompts([(40, 30), (9, 40)])]
        result = run(tmp_path / "node", drafting_model, prompts, TWO_DRAFTS)
        assert_synchronised(result, prompts, "DSP142", passes=2)
        assert result.tokens[0] == result.tokens[1]


if STOCK.vllm_ascend in ("0.13.0", "0.18.0", "0.23.0"):  # 0.12.0rc1 does not start with a capture list of its own

    def in_graphs(folder: Path, model: Path, *, overlay: bool, mode: str = "FULL_DECODE_ONLY", **more: str) -> Server:
        compilation = json.dumps({"cudagraph_mode": mode, "cudagraph_capture_sizes": [1, 2, 4, 8, 16]})
        flags = [*DP2, "--no-enforce-eager", "--compilation-config", compilation]
        environment = {"VLLM_DISABLE_COMPILE_CACHE": "1", "VIRTUAL_NPU_TIMEOUT_S": "20", **more}
        return server(folder, model, flags, overlay=overlay, environment=environment)

    def test_stock_with_full_graphs_skips_and_mixes_modes(model: Path, tmp_path: Path) -> None:
        """vllm-ascend#13826: a rank prefills a prompt that fits MC2, eagerly; the idle one replays a graph."""
        node = in_graphs(tmp_path / "stock", model, overlay=False)
        (prompt,) = make_prompts([SHORT])
        with Cluster() as cluster:
            cluster.start(node.process)
            cluster.wait_until_ready({node.process: f"{node.url}/health"})
            with pytest.raises(httpx.HTTPError):
                node.complete(*prompt)
            assert node.ended_within(90)
        events = [json.loads(line) for path in node.ledger.iterdir() for line in path.read_text().splitlines()]
        assert any(event["ev"] == "violation" and event["rule"] == "mixed_modes" for event in events)
        steps = [event for event in events if event.get("step", -1) >= 0]
        assert not [event for event in steps if event.get("group") == "dp:0"], "stock does not skip here"

    GRAPH_PROMPTS = make_prompts([SHORT, LONG, (9, 40)])

    @pytest.fixture(scope="module")
    def eager(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
        return run(tmp_path_factory.mktemp("eager"), model, GRAPH_PROMPTS, ())

    def assert_no_collective(result: Run, eager: Run) -> None:
        assert result.tokens == eager.tokens
        assert result.log.count("DSP000 skip") == 2
        for rank in (0, 1):
            assert result.dp_collectives(rank) == {}
            assert set(result.calls_by_step(rank, "dispatch").values()) == {ToyModelShape().num_hidden_layers}
        assert not [event for events in result.ranks for event in events if event["ev"] == "violation"]
        sizes = [[event["bs"] for event in result.dispatches(rank)] for rank in (0, 1)]
        assert sum(len(set(together)) > 1 for together in zip(*sizes, strict=True)) > 10
        # The graph of 16, above the bound, has not been captured.
        captured = [event for event in result.ranks[0] if event["ev"] == "graph" and event["op"] == "capture"]
        assert captured
        assert max(map(max, sizes)) <= MAX_NUM_SEQS

    def test_full_graphs_without_a_collective(model: Path, eager: Run, tmp_path: Path) -> None:
        """Graph level `uniform`: one token of each request per step, so every step of every rank is a graph."""
        result = serve(in_graphs(tmp_path / "node", model, overlay=True), GRAPH_PROMPTS)
        assert_no_collective(result, eager)
        assert result.log.count("decode batches only, so that every step is a FULL graph") == 2
        assert {event["mode"] for rank in (0, 1) for event in result.dispatches(rank)} == {"graph"}
        computed = sum(sum(result.scheduled(rank).values()) for rank in (0, 1))
        assert computed == sum(len(prompt) + count - 1 for prompt, count in [GRAPH_PROMPTS[0], *GRAPH_PROMPTS])

    def test_piecewise_graphs_without_a_collective(model: Path, eager: Run, tmp_path: Path) -> None:
        result = serve(in_graphs(tmp_path / "node", model, overlay=True, mode="PIECEWISE"), GRAPH_PROMPTS)
        assert_no_collective(result, eager)
        assert {event["mode"] for rank in (0, 1) for event in result.dispatches(rank)} == {"graph"}

    def test_full_graphs_are_synchronised(model: Path, eager: Run, tmp_path: Path) -> None:
        """Where nothing else is allowed, by stock's own all_reduce."""
        refused = in_graphs(tmp_path / "node", model, overlay=True, DP_SYNC_PATCH_GRAPH_MODE="refuse")
        result = serve(refused, GRAPH_PROMPTS)
        assert_synchronised(result, GRAPH_PROMPTS, "DSP122")
        modes = [{event["step"]: event["mode"] for event in result.dispatches(rank)} for rank in (0, 1)]
        common = modes[0].keys() & modes[1].keys()
        assert {modes[0][step] for step in common} == {"graph", "eager"}
        assert all(modes[0][step] == modes[1][step] for step in common)
        assert not [event for events in result.ranks for event in events if event["ev"] == "violation"]
        assert result.tokens == eager.tokens

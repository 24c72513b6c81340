# SPDX-License-Identifier: Apache-2.0
"""What stock's own skip does not look at: each case hangs or is refused on stock, and works with the overlay.

All cases are of 0.12.0rc1 and 0.13.0, in eager mode (test_graphs.py has the graph mode). The overlay's answer to all of
them is `sync`: counts are padded to the busiest rank, and all ranks choose the same method.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from demo import Cluster
from launched_ranks import A2, A2_SIZE, MAX_NUM_SEQS, RECOMPUTE, Prompt, Server, server
from node_runs import Run, assert_stock_skips_and_hangs, assert_synchronised, make_prompts, run, serve
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

# SPDX-License-Identifier: Apache-2.0
"""One decode node of the installed stock version, DP2 EP2 on a virtual A3: stock's own skip, the overlay's, and `sync`.

The requests go straight to the decode node, so each of them is prefilled there, which is what a prompt without remote
KV does. All figures come from the ledgers of the virtual NPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from demo import Cluster
from launched_ranks import MAX_NUM_SEQS, RECOMPUTE, Prompt, launched_apart
from node_runs import REFUSED, Run, assert_stock_skips_and_hangs, make_prompts, run
from toy_model import ToyModelShape, write_toy_model

from dp_sync_patch import stock

pytestmark = pytest.mark.timeout(900)

STOCK = stock.require()
LONG = 40  # tokens of a prompt; one step of it is beyond the MC2 capacity of MAX_NUM_SEQS tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("model"), ToyModelShape())


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return make_prompts(((5, 24), (LONG, 12), (3, 16), (7, 9), (90, 10), (4, 20)))


@pytest.fixture(scope="module")
def synced(model: Path, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("sync"), model, prompts, REFUSED)


@pytest.fixture(scope="module")
def skipped(model: Path, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("skip"), model, prompts, ())


def test_sync_synchronises_every_step_on_every_rank(synced: Run) -> None:
    assert "DSP121" in synced.log
    assert "DSP000" not in synced.log
    for rank in range(2):
        steps = synced.steps(rank)
        assert len(steps) > 32
        assert synced.dp_collectives(rank) == dict.fromkeys(steps, 1)


def test_skip_has_no_collective_and_the_same_tokens(synced: Run, skipped: Run) -> None:
    assert skipped.log.count("DSP000 skip") == 2
    assert skipped.tokens == synced.tokens
    for rank in range(2):
        assert len(skipped.steps(rank)) > 32
        assert skipped.dp_collectives(rank) == {}


def test_skip_is_ragged_with_the_agreed_bound_and_no_mask(skipped: Run) -> None:
    sizes = [[event["bs"] for event in skipped.dispatches(rank)] for rank in range(2)]
    assert len(sizes[0]) == len(sizes[1])
    assert sum(a != b for a, b in zip(*sizes, strict=True)) > 10
    assert max(max(one) for one in sizes) == MAX_NUM_SEQS  # a long prompt comes in pieces of the bound
    events = skipped.dispatches(0) + skipped.dispatches(1)
    assert {event["global_bs"] for event in events} == {2 * MAX_NUM_SEQS}
    assert not any(event["mask"] for event in events)


if STOCK.own_skip:

    def test_stock_skips_by_itself_and_hangs_on_a_long_prompt(
        model: Path, prompts: list[Prompt], tmp_path: Path
    ) -> None:
        """Hazards H2 and H3: stock's condition does not look at what a step can hold (vllm-ascend#8240)."""
        assert_stock_skips_and_hangs(tmp_path / "stock", model, (), [prompts[1]], harmless=prompts[0])

    @pytest.mark.matrix
    def test_a_rank_without_the_overlay_stops_the_others(model: Path, tmp_path: Path) -> None:
        """It would follow stock's skip alone while the others wait for it in the all_reduce."""
        environment = {"DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S": "20"}
        servers = launched_apart(
            tmp_path, model, RECOMPUTE, overlay=[True, False], environments=[environment, environment]
        )
        with Cluster() as cluster:
            for one in servers:
                cluster.start(one.process)
            assert servers[0].ended_within(420)
        assert "AgreementError: DSP202" in servers[0].log
        assert "rank 1; without the overlay they would skip alone" in servers[0].log

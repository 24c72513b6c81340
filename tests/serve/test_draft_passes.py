# SPDX-License-Identifier: Apache-2.0
"""MTP draft passes and a prompt without remote KV, on a decode node with DP2 EP2 and three drafts per step."""

from __future__ import annotations

import json
import random
from itertools import zip_longest

import pytest
from serve_node import Prompt, Served, serve
from toy_deepseek import LAYERS, VOCAB, write_toy_deepseek

DRAFTS = 3
MAX_NUM_SEQS = 32
BOUND = MAX_NUM_SEQS * (1 + DRAFTS)
LONG_PROMPT = 16_000


def _prompts() -> list[Prompt]:
    draw = random.Random(3)
    sizes = [(20, 30), (150, 20), (LONG_PROMPT, 6), (9, 40), (300, 12), (33, 33)]
    return [([draw.randrange(3, VOCAB) for _ in range(length)], count) for length, count in sizes]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    folder = tmp_path_factory.mktemp("drafts")
    model = write_toy_deepseek(folder / "model")
    arguments = [
        *("--data-parallel-size", "2", "--max-model-len", "16384", "--max-num-seqs", str(MAX_NUM_SEQS)),
        *("--max-num-batched-tokens", "1024", "--num-gpu-blocks-override", "160"),
        *("--speculative-config", json.dumps({"method": "deepseek_mtp", "num_speculative_tokens": DRAFTS})),
    ]
    served = {}
    # Engines by spawn, vLLM's own default for `vllm serve`; the demo's are forked.
    spawn = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    for name, overlay, environment in (("stock", False, {}), ("overlay", True, spawn)):
        served[name] = serve(folder / name, model, _prompts(), overlay, arguments, environment)
        assert len(served[name].ranks) == 2
    return served


def test_tokens_equal_stock(runs: dict[str, Served]) -> None:
    assert [len(tokens) for tokens in runs["stock"].tokens] == [count for _, count in _prompts()]
    assert runs["overlay"].tokens == runs["stock"].tokens


def test_no_dp_collective_in_target_and_draft_passes(runs: dict[str, Served]) -> None:
    for rank in runs["stock"].ranks:
        # One for the target pass, one for the drafts. The last step may have been cut short by the end of the node.
        assert rank.dp_collectives >= 2 * (rank.steps - 1) > 0
    for rank in runs["overlay"].ranks:
        assert rank.steps > 100
        assert rank.dp_collectives == 0


def test_a_long_prompt_is_chunked_through_mc2(runs: dict[str, Served]) -> None:
    """Stock leaves MC2 for it; with the overlay no rank ever does, and no call exceeds the agreed bound."""
    assert sum((rank.kinds for rank in runs["stock"].ranks), start=runs["stock"].ranks[0].kinds)["AlltoAllV"] > 0
    sizes = []
    for rank in runs["overlay"].ranks:
        assert not rank.kinds
        calls = [call for step in rank.dispatches.values() for call in step]
        assert {call["global_bs"] for call in calls} == {2 * BOUND}
        assert not any(call["mask"] for call in calls)
        sizes.append([call["bs"] for call in calls])
    assert max(map(max, sizes)) == BOUND
    chunks = sum(size == BOUND for rank_sizes in sizes for size in rank_sizes) / (LAYERS + 1)
    assert chunks > LONG_PROMPT / BOUND * 0.8


def test_every_rank_runs_the_same_ep_operators_in_every_step(runs: dict[str, Served]) -> None:
    """A batch with prefill makes one draft pass in stock; an idle rank's dummy makes all of them."""
    first, second = runs["overlay"].ranks
    steps = sorted(set(first.dispatches) & set(second.dispatches))[:-1]
    assert len(steps) > 100
    for step in steps:
        counts = [len(rank.dispatches[step]) for rank in (first, second)]
        assert counts == [LAYERS + DRAFTS, LAYERS + DRAFTS], f"step {step}"
    ragged = [
        step
        for step in steps
        if any(
            one["bs"] != other["bs"]
            for one, other in zip_longest(first.dispatches[step], second.dispatches[step], fillvalue={"bs": 0})
        )
    ]
    assert len(ragged) > 50

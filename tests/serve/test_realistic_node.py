# SPDX-License-Identifier: Apache-2.0
"""A DeepSeek-style model (MLA, MTP) on a prefill node with TP1 and a decode node with DP2 TP2 EP4, over HTTP.

The prefill node stays up. The decode node runs as stock with three drafts per step, then with the overlay: three
drafts, one draft, and async scheduling without drafts (stock refuses both together). All of them answer the same
greedy requests, so all are compared with the one stock run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from demo import Cluster
from load import LoadRequest
from serve_node import DecodeNode, PrefillDecodePair, Rank
from toy_deepseek import LAYERS, VOCAB, write_toy_deepseek

TP_SIZE, EP_SIZE = 2, 4
MAX_NUM_SEQS = 32
SLOW_RANK, SLOW_MS = 1, 100
LONG_PROMPT = 4_000
# The long request ends at this limit: its last drafts have no room.
MAX_MODEL_LEN = LONG_PROMPT + 8
RECOMPUTE = ("--additional-config", json.dumps({"recompute_scheduler_enable": True}))
# Prompt length and tokens to generate of the requests that every run answers.
COMMON = ((20, 30), (150, 20), (9, 40), (300, 12), (33, 33), (5, 17), (141, 9))


def _requests(sizes: list[tuple[int, int]], seed: int, interval_s: float = 0.3) -> list[LoadRequest]:
    draw = random.Random(seed)
    return [
        LoadRequest(index, interval_s * index, [draw.randrange(3, VOCAB) for _ in range(length)], count)
        for index, (length, count) in enumerate(sizes)
    ]


COMMON_LOAD = _requests(list(COMMON), seed=3)
LONG_LOAD = _requests([(LONG_PROMPT, MAX_MODEL_LEN - LONG_PROMPT)], seed=4)


def speculative(drafts: int) -> tuple[str, str]:
    return "--speculative-config", json.dumps({"method": "deepseek_mtp", "num_speculative_tokens": drafts})


@dataclass
class Run:
    """Tokens per request, the ledgers of the four EP ranks, and the decode node's log."""

    tokens: list[list[int]]
    ranks: list[Rank]
    log: str
    drafts: int
    bound: int  # tokens per DP rank

    @property
    def steps(self) -> list[int]:
        """The steps that all ranks have made in full; the end of the node may have cut the last one short."""
        return list(range(min(rank.steps for rank in self.ranks) - 1))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefillDecodePair]:
    folder = tmp_path_factory.mktemp("realistic")
    model = write_toy_deepseek(folder / "model")
    common = ("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS))
    prefill = ("--max-num-batched-tokens", "1024", "--num-gpu-blocks-override", "32", *speculative(1))
    with Cluster() as cluster:
        yield PrefillDecodePair(cluster, folder, model, common, prefill)


def decode_node(pair: PrefillDecodePair, name: str, *arguments: str, overlay: bool, **environment: str) -> DecodeNode:
    flags = [
        *("--data-parallel-size", "2", "--tensor-parallel-size", str(TP_SIZE), "--num-gpu-blocks-override", "160"),
        *arguments,
    ]
    devices = {"ASCEND_RT_VISIBLE_DEVICES": ",".join(map(str, range(EP_SIZE)))}
    return pair.decode_node(name, flags, overlay=overlay, environment=devices | environment)


def _three_drafts(pair: PrefillDecodePair, name: str, *, overlay: bool, **environment: str) -> Run:
    arguments = ("--max-num-batched-tokens", "1024", *RECOMPUTE, *speculative(3))
    with decode_node(pair, name, *arguments, overlay=overlay, **environment) as node:
        tokens = node.send(COMMON_LOAD, LONG_LOAD)
    return Run(tokens, node.ranks(), node.log, drafts=3, bound=MAX_NUM_SEQS * 4)


@pytest.fixture(scope="module")
def stock(pair: PrefillDecodePair) -> Run:
    return _three_drafts(pair, "stock", overlay=False)


@pytest.fixture(scope="module")
def three_drafts(pair: PrefillDecodePair, stock: Run) -> Run:
    # Processes by spawn, vLLM's own default for `vllm serve`; everywhere else they are forked.
    return _three_drafts(pair, "three_drafts", overlay=True, VLLM_WORKER_MULTIPROC_METHOD="spawn")


@pytest.fixture(scope="module")
def one_draft(pair: PrefillDecodePair, stock: Run) -> Run:
    arguments = ("--max-num-batched-tokens", "1024", *RECOMPUTE, *speculative(1))
    with decode_node(pair, "one_draft", *arguments, overlay=True) as node:
        tokens = node.send(COMMON_LOAD)
    return Run(tokens, node.ranks(), node.log, drafts=1, bound=MAX_NUM_SEQS * 2)


@pytest.fixture(scope="module")
def async_scheduling(pair: PrefillDecodePair, stock: Run) -> Run:
    """No drafts and no recompute scheduler, which async scheduling replaces; rank 1 takes 100 ms more per MoE layer."""
    arguments = ("--async-scheduling", "--max-num-batched-tokens", str(MAX_NUM_SEQS))
    slow = {"VIRTUAL_NPU_DELAY": f"{SLOW_RANK}:{SLOW_MS}"}
    with decode_node(pair, "async_scheduling", *arguments, overlay=True, **slow) as node:
        tokens = node.send(COMMON_LOAD)
        # Slow steps are few steps; the second time is for their number.
        assert node.send(COMMON_LOAD) == tokens
    return Run(tokens, node.ranks(), node.log, drafts=0, bound=MAX_NUM_SEQS)


@pytest.fixture(params=["three_drafts", pytest.param("one_draft", marks=pytest.mark.long), "async_scheduling"])
def overlay(request: pytest.FixtureRequest) -> Run:
    run: Run = request.getfixturevalue(request.param)
    return run


def test_tokens_equal_stock(stock: Run, overlay: Run) -> None:
    """Greedy tokens depend neither on the number of drafts nor on what the peers do; the long request is last."""
    assert [len(tokens) for tokens in stock.tokens] == [count for _, count in COMMON] + [MAX_MODEL_LEN - LONG_PROMPT]
    assert overlay.tokens == stock.tokens[: len(overlay.tokens)]
    assert len(overlay.tokens) >= len(COMMON)


def test_no_dp_collective_in_target_and_draft_passes(stock: Run, overlay: Run) -> None:
    assert len(stock.ranks) == len(overlay.ranks) == EP_SIZE
    for rank in stock.ranks:
        # One for the target pass, one for the drafts.
        assert rank.dp_collectives >= 2 * len(stock.steps) > 0
    assert len(overlay.steps) > 30  # the vote that ends them comes every 32 steps
    for rank in overlay.ranks:
        assert rank.dp_collectives == 0
        # Tensor parallelism inside a DP rank is all that communicates beside dispatch and combine.
        assert rank.groups == {"tp:0"}


def test_field_case_31_odd_counts_under_tp(overlay: Run) -> None:
    """Counts are padded to TP and no further: at least one row on every TP rank, global_bs of the bound, no mask."""
    per_rank = overlay.bound // TP_SIZE
    seen: set[int] = set()
    for rank in overlay.ranks:
        for operator in (rank.dispatches, rank.combines):
            calls = [call for step in operator.values() for call in step]
            assert {call["global_bs"] for call in calls} == {per_rank * EP_SIZE}
            assert not any(call["mask"] for call in calls)
            seen |= {call["bs"] for call in calls}
    assert min(seen) == 1
    assert max(seen) <= per_rank
    odd = [count for rank in overlay.ranks for count in rank.scheduled.values() if count % TP_SIZE]
    assert odd


def test_field_case_22_every_rank_runs_the_same_ep_operators_in_every_step(overlay: Run) -> None:
    """A batch with prefill makes one draft pass in stock; an idle rank's dummy makes all of them.

    The long request ends at max_model_len (field case 23): its last drafts have no room, the passes stay.
    """
    ragged = 0
    for step in overlay.steps:
        for operator in ("dispatches", "combines"):
            counts = [len(getattr(rank, operator)[step]) for rank in overlay.ranks]
            assert counts == [LAYERS + overlay.drafts] * EP_SIZE, f"step {step}"
        sizes = {tuple(call["bs"] for call in rank.dispatches[step]) for rank in overlay.ranks}
        ragged += len(sizes) > 1
    assert ragged > 5


def test_a_prompt_without_remote_kv_is_chunked_through_mc2(stock: Run, three_drafts: Run) -> None:
    """Stock leaves MC2 for it, on all ranks; with the overlay no rank does, and the rank is at its bound."""
    assert all(rank.kinds["AlltoAllV"] > 0 for rank in stock.ranks)
    assert all(rank.kinds["AlltoAllV"] == 0 for rank in three_drafts.ranks)
    largest = [max(rank.scheduled.values()) for rank in three_drafts.ranks]
    assert max(largest) == three_drafts.bound
    chunks = sum(
        count == three_drafts.bound for count in three_drafts.ranks[largest.index(max(largest))].scheduled.values()
    )
    assert chunks >= LONG_PROMPT // three_drafts.bound - len(COMMON)
    rows = {call["bs"] for rank in three_drafts.ranks for step in rank.dispatches.values() for call in step}
    assert max(rows) == three_drafts.bound // TP_SIZE


def test_field_case_27_a_slow_device_holds_the_others_back_by_one_step_at_most(async_scheduling: Run) -> None:
    """Nothing on the host waits for the peers any more, but the operators do.

    Streams of the virtual NPU are synchronous: buffers that a host ahead of its device could overwrite are not shown.
    """
    ranks, steps = async_scheduling.ranks, async_scheduling.steps
    for ahead in ranks:
        for behind in ranks:
            assert all(ahead.began[step + 1] > behind.began[step] for step in steps[:-1])
    waited = [call["host_us"] for step in steps for call in ranks[0].dispatches[step]]
    assert sorted(waited)[len(waited) // 2] > 0.8 * SLOW_MS * 1000

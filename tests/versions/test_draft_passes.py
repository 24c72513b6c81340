# SPDX-License-Identifier: Apache-2.0
"""Decode nodes of the installed stock version with MTP drafts on a DeepSeek-style model (MLA), DP2 on a virtual A3.

The skip against `sync`, over numbers of drafts, TP sizes and both kinds of scheduling. All requests go straight to the
decode node, so they are prefilled there in pieces, between decode steps with drafts. All figures come from the ledgers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from demo import Cluster
from launched_ranks import (
    MAX_NUM_SEQS,
    VOTE_EVERY,
    Prompt,
    Server,
    read_ranks,
    server,
    wait_until_idle,
)
from load import LoadRequest
from node_runs import DP2, REFUSED, Run, graph_flags, make_prompts, seeded
from scipy.stats import chi2_contingency
from serve_node import PrefillDecodePair, Rank
from toy_deepseek import LAYERS, write_toy_deepseek

from dp_sync_patch import stock

pytestmark = [pytest.mark.timeout(1800), pytest.mark.matrix]

STOCK = stock.require()
DP_SIZE = 2
(METHOD,) = STOCK.speculative_methods
# Stock 0.11.0 has no recompute scheduler for async scheduling, and refuses the latter with drafts.
ASYNC = any(name.endswith("AsyncRecomputeScheduler") for name in STOCK.recompute_schedulers)
LEAD = 5 / 64  # between the logits of the two likeliest tokens
LONE_STEPS = 40  # of a request on rank 0 alone, field case 22
# Prompt length, tokens to generate and seed; answered at once, by rank 0 and rank 1 in turn. A step holds 16 or 32
# tokens with the skip and 64 without, so some come in pieces, and MLA adds up the pieces of a prompt in bf16: the two
# largest logits of a token moved against each other by 1/64 from one cut to another. The seeds are those, out of 40 for
# each length, whose tokens lead by 5/64 or more and came out alike in some 40 batches drawn at random, on 0.11.0
# without drafts. (Seed 634 of 90 tokens did not: a lead with one cut is not enough.)
TOGETHER = ((40, 12, 30), (7, 9, 123), (90, 10, 622), (6, 20, 304), (12, 16, 422), (33, 9, 532))
IN_PIECES = (90, 10, 605)
# Behind a prefill node: one is alone; the others arrive three at a time, shortly before they need a second block of 128
# tokens. What is given back is prefilled with the tokens made so far, whose KV is then rounded in another way.
ALONE = (20, 40, 1010)
BURSTS = (
    *((118, 16, 1111), (120, 16, 1310), (120, 16, 1303), (121, 16, 1407), (123, 16, 1608)),
    *((123, 16, 1601), (125, 16, 1808), (126, 16, 1903), (126, 16, 1901)),
)
# From the second draft pass on stock 0.11.0 takes the slot behind the last one, which may be in another request's block
# or, as there are few here, behind the cache (`MtpProposer._propose`: slot_mapping += 1).
HANDED_OVER_DRAFTS = 1 if STOCK.vllm_ascend == "0.11.0" else min(3, STOCK.max_draft_passes)
# Four tokens to draw from, one of which is what a request without drafts of its own is filled up with; prompts of
# which the last piece has one and two tokens.
SAMPLING: dict[str, Any] = {"temperature": 2.0, "allowed_token_ids": [0, 5, 9, 200]}
SAMPLED, SAMPLED_TOKENS = 300, 3
SAMPLED_PROMPTS = ((9, SAMPLED_TOKENS, 6), (10, SAMPLED_TOKENS, 7))
# What else a request may ask for, and a stop at a token of its plain answer. Greedy in effect: the first token has all
# of the probability that `min_p` leaves.
SPECIAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "min_p": {"temperature": 1.0, "min_p": 1.0},
    "grammar": {"structured_outputs": {"regex": "[a-f]{40}"}},
    "logit_bias": {"logit_bias": {"200": 2.0}},
}
SPECIAL_PROMPT, STOP_AT = (7, 24, 123), 9
MORE = 32  # tokens that keep those of one rank together for a while; they are not compared


def speculative(drafts: int) -> tuple[str, str]:
    return "--speculative-config", json.dumps({"method": METHOD, "num_speculative_tokens": drafts})


@dataclass(frozen=True)
class Configuration:
    drafts: int
    tp: int
    async_scheduling: bool
    graphs: str = ""  # their mode
    level: str = ""  # with FULL graphs, how all ranks come to the same mode

    def __str__(self) -> str:
        graphs = "".join(f"-{name.lower()}" for name in (self.graphs, self.level) if name)
        return f"k{self.drafts}-tp{self.tp}-{'async' if self.async_scheduling else 'no_async'}{graphs}"

    @property
    def environment(self) -> dict[str, str]:
        level = {"DP_SYNC_PATCH_GRAPH_MODE": self.level} if self.level else {}
        return {"VLLM_DISABLE_COMPILE_CACHE": "1", **level} if self.graphs else {}

    @property
    def mode_syncs(self) -> int:
        """Of a step with the skip."""
        return int(self.level == "sync")

    @property
    def ranks(self) -> range:
        """Of the EP group."""
        return range(DP_SIZE * self.tp)

    @property
    def rows(self) -> int:
        """Of the largest dispatch call: the agreed bound, by TP rank."""
        return MAX_NUM_SEQS * (1 + self.drafts) // self.tp

    @property
    def one_process(self) -> bool:
        """Whether an engine is its own worker: half of the processes, and its votes are in the ledger. With async
        scheduling the two are apart, as they are by default, so that their steps overlap as on a real node."""
        return self.tp == 1 and not self.async_scheduling

    def arguments(self) -> list[str]:
        arguments = [*DP2, "--tensor-parallel-size", str(self.tp), *speculative(self.drafts)]
        arguments += ["--distributed-executor-backend", "uni" if self.one_process else "mp"]
        if ASYNC:
            arguments.append(f"--{'' if self.async_scheduling else 'no-'}async-scheduling")
        if self.graphs:
            sizes = [requests * (1 + self.drafts) for requests in (1, 2, 4, MAX_NUM_SEQS)]
            arguments += graph_flags(self.graphs, sizes)
        return arguments


# Any two values of two settings meet once.
COVERING = (
    Configuration(3, 1, False),
    Configuration(3, 2, True),
    Configuration(1, 1, True),
    Configuration(1, 2, False),
    Configuration(min(3, STOCK.max_draft_passes), 1, ASYNC, "PIECEWISE"),
    *(
        Configuration(min(3, STOCK.max_draft_passes), 1, ASYNC, mode, "sync")
        for mode in sorted(STOCK.drafts_follow_in & STOCK.graph_modes)
    ),
    *(
        (
            Configuration(3, 1, ASYNC, "FULL_DECODE_ONLY", "uniform"),
            Configuration(1, 2, False, max(STOCK.drafts_follow_in & STOCK.graph_modes), "uniform"),
        )
        if STOCK.uniform_with_drafts
        else ()
    ),
)
POSSIBLE = [
    one
    for one in COVERING
    if one.drafts <= STOCK.max_draft_passes
    and (ASYNC or not one.async_scheduling)
    and one.graphs in (*STOCK.graph_modes, "")
]
CONFIGURATIONS = [pytest.param(one, id=str(one)) for one in POSSIBLE]


Drawn = list[list[tuple[int, ...]]]  # for each of the prompts, what was drawn


@dataclass(frozen=True)
class Compared:
    configuration: Configuration
    skipped: Run
    synced: Run
    # Steps of the run with the skip before a second request came: rank 0 has one request, or a dummy like rank 1.
    lone_steps: int
    drawn: tuple[Drawn, Drawn]  # with graph level `uniform`: with the skip, and by a node without drafts
    certain: int  # tokens of the lone request that have to be equal


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_deepseek(tmp_path_factory.mktemp("model"))


def run(
    folder: Path, model: Path, configuration: Configuration, lone: Prompt, *more: str, sampled: int = 0
) -> tuple[Run, int, Drawn]:
    """`lone` for rank 0 while rank 1 is idle, a long one for rank 1 while rank 0 is, then several at once; then
    `sampled` requests for each of the prompts for that.

    Returns also the number of steps made for the first.
    """
    flags = [*configuration.arguments(), *more]
    node = server(folder, model, flags, overlay=True, environment=configuration.environment)
    long, *together = seeded(IN_PIECES, *TOGETHER)
    with Cluster() as cluster:
        cluster.start(node.process)
        cluster.wait_until_ready({node.process: f"{node.url}/health"})
        tokens = [node.complete(*lone, timeout_s=300, rank=0)]
        lone_steps = wait_until_idle([node])
        tokens.append(node.complete(*long, timeout_s=300, rank=1))
        wait_until_idle([node])
        with ThreadPoolExecutor(len(together)) as pool:
            answers = [
                pool.submit(node.complete, *prompt, timeout_s=300, rank=index % DP_SIZE)
                for index, prompt in enumerate(together)
            ]
            tokens += [answer.result() for answer in answers]
        wait_until_idle([node])
        drawn = draw(node, sampled)
        wait_until_idle([node])
        cluster.check()
    return Run(tokens, read_ranks([node]), node.log), lone_steps, drawn


def draw(node: Server, count: int) -> Drawn:
    with ThreadPoolExecutor(2 * MAX_NUM_SEQS) as pool:
        return [
            list(pool.map(lambda _, one=one: tuple(node.complete(*one, sampling=SAMPLING)), range(count)))
            for one in seeded(*SAMPLED_PROMPTS)
        ]


def without_drafts(folder: Path, model: Path, lone: Prompt) -> tuple[Drawn, list[float]]:
    """What the target model says by itself: what it draws, and by how much each token that follows `lone` leads."""
    node = server(folder, model, [*DP2, *REFUSED], overlay=True)
    with Cluster() as cluster:
        cluster.start(node.process)
        cluster.wait_until_ready({node.process: f"{node.url}/health"})
        leads = node.leads(*lone)
        drawn = draw(node, SAMPLED)
        cluster.check()
    return drawn, leads


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def compared(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    configuration: Configuration = request.param
    folder = tmp_path_factory.mktemp(str(configuration))
    uniform = configuration.level == "uniform"
    # Not more than 1 + k tokens come out of a step. Of 40 seeds 135 is the one with the most tokens that lead at first.
    (lone,) = seeded((9, LONE_STEPS * (1 + configuration.drafts), 135 if uniform else 6))
    sampled = SAMPLED if uniform else 0
    skipped, lone_steps, drawn = run(folder / "skip", model, configuration, lone, sampled=sampled)
    # Stock 0.11.0 mixes graph modes. Where every token shall be right, what it is compared with has to be so as well.
    different = {"async_scheduling": False} if uniform else {}
    reference = replace(configuration, graphs="", level="", **different)
    synced, _, expected = run(folder / "sync", model, reference, lone, *REFUSED)
    certain = lone[1]
    if uniform:
        expected, leads = without_drafts(folder / "without_drafts", model, lone)
        certain = next((place for place, lead in enumerate(leads) if lead < LEAD), certain)
    return Compared(configuration, skipped, synced, lone_steps, (drawn, expected), certain)


def assert_same_distribution(ours: list[tuple[int, ...]], theirs: list[tuple[int, ...]]) -> None:
    """Of the token at each place, by a chi-square test; of 10,000 such checks one fails by chance."""
    for place in range(SAMPLED_TOKENS):
        counts = [Counter(tokens[place] for tokens in drawn) for drawn in (ours, theirs)]
        table = [[count[token] for token in SAMPLING["allowed_token_ids"]] for count in counts]
        assert chi2_contingency(table).pvalue > 1e-4, (place, table)


def test_tokens_are_equal(compared: Compared) -> None:
    """With async scheduling only those of the requests that were alone: there stock, with drafts and the recompute
    scheduler, gives others wrong tokens that depend on what else is in their steps (0.18.0 and 0.23.0, also without the
    overlay). Without async scheduling the same requests get the same, right tokens on both versions.

    A lone request that is prefilled here gets wrong tokens from 0.23.0 too, but always the same: its first step has k
    drafts that do not exist beside the whole prompt, and `update_num_computed_tokens_for_batch_change` takes a step
    with drafts for one of 1 + k tokens. Graph level `uniform` does not run into that: all tokens are right with it. But
    it cuts a prompt into pieces, which MLA rounds in another way, so that the lone request is compared up to its first
    token that leads by little.
    """
    alone = len(compared.skipped.tokens) - len(TOGETHER)
    varying = compared.configuration.async_scheduling
    known = slice(alone) if varying and compared.configuration.level != "uniform" else slice(None)
    assert compared.skipped.log.count("DSP000 skip") == DP_SIZE
    (lone, *ours), (lone_synced, *theirs) = compared.skipped.tokens[known], compared.synced.tokens[known]
    assert ours == theirs
    assert compared.certain > 10
    assert lone[: compared.certain] == lone_synced[: compared.certain]
    if compared.configuration.level != "uniform":
        return
    # The first token is drawn against a draft that nobody has proposed, the others against those of MTP.
    for ours, theirs in zip(*compared.drawn, strict=True):
        assert len(ours) == len(theirs) == SAMPLED
        assert_same_distribution(ours, theirs)


def test_skip_has_no_collective_in_target_and_draft_passes(compared: Compared) -> None:
    """But for an int where the ranks agree on the graph mode."""
    configuration, skipped = compared.configuration, compared.skipped
    for rank in configuration.ranks:
        steps = skipped.steps(rank)
        assert len(steps) > compared.lone_steps
        assert skipped.dp_collectives(rank) == (dict.fromkeys(steps, 1) if configuration.mode_syncs else {})
        assert skipped.collective_sizes(rank) == ({4} if configuration.mode_syncs else set())


def test_sync_synchronises_the_target_and_the_drafts_of_every_step_once(compared: Compared) -> None:
    """Stock asks for the drafts' token counts before the first of k passes, and keeps them for the others."""
    assert "DSP121" in compared.synced.log
    assert "DSP000" not in compared.synced.log
    for rank in compared.configuration.ranks:
        steps = compared.synced.steps(rank)
        assert len(steps) > LONE_STEPS
        assert compared.synced.dp_collectives(rank) == dict.fromkeys(steps, 2)


@pytest.mark.parametrize("operator", ["dispatch", "combine"])
def test_field_case_22_every_rank_makes_the_same_calls_in_every_step(compared: Compared, operator: str) -> None:
    """One per MoE layer of the target and one per draft pass; decoding, prefilling in pieces, or idle."""
    configuration, skipped = compared.configuration, compared.skipped
    for rank in configuration.ranks:
        expected = dict.fromkeys(skipped.steps(0), LAYERS + configuration.drafts)
        assert skipped.calls_by_step(rank, operator) == expected


def test_field_case_22_a_lone_request_leaves_the_other_rank_with_dummies(compared: Compared) -> None:
    configuration, skipped = compared.configuration, compared.skipped
    busy, idle = skipped.scheduled(0), skipped.scheduled(configuration.tp)
    assert sum(busy[step] > 0 for step in range(compared.lone_steps)) >= LONE_STEPS
    assert not any(idle[step] for step in range(compared.lone_steps))
    # The engines vote on going on; they have done so, and stopped together.
    assert compared.lone_steps > VOTE_EVERY
    for rank in configuration.ranks:
        votes = [event for event in skipped.serving(rank) if event.get("group") == "stateless"]
        # An engine without a worker has no ledger.
        assert len(votes) == (len(skipped.steps(rank)) // VOTE_EVERY if configuration.one_process else 0)


def test_skip_is_ragged_with_the_agreed_bound_and_no_mask(compared: Compared) -> None:
    configuration, skipped = compared.configuration, compared.skipped
    events = [[*skipped.calls(rank, "dispatch"), *skipped.calls(rank, "combine")] for rank in configuration.ranks]
    sizes = [[event["bs"] for event in skipped.dispatches(rank)] for rank in configuration.ranks]
    # By target pass and draft passes, as they meet.
    assert sum(len(set(together)) > 1 for together in zip(*sizes, strict=True)) > 10
    largest = max(max(one) for one in sizes)
    if configuration.level == "uniform":
        assert largest <= configuration.rows
    else:
        assert largest == configuration.rows  # a long prompt comes in pieces of the bound
    assert {event["global_bs"] for one in events for event in one} == {configuration.rows * len(configuration.ranks)}
    assert not any(event["mask"] for one in events for event in one)


def test_every_rank_has_the_same_graph_mode_in_every_call(compared: Compared) -> None:
    """The target's is a graph where there are any; that of drafts may not be (stock 0.13.0 with async scheduling)."""
    configuration, skipped = compared.configuration, compared.skipped
    first, *others = [[call["mode"] for call in skipped.dispatches(rank)] for rank in configuration.ranks]
    assert all(modes == first for modes in others)
    if configuration.level == "uniform":
        assert set(first) == {"graph"}
        return
    assert ("graph" in first) == bool(configuration.graphs)
    # A rank that prefills has no full graph.
    assert "eager" in first or configuration.graphs not in ("FULL_DECODE_ONLY", "")


# Field case 23. No step can leave MC2, so that stock's own skip is judged by its draft passes alone.
LIMIT, STEP = 64, 48
AT_THE_LIMIT = Configuration(min(3, STOCK.max_draft_passes), 1, ASYNC)
TO_THE_LIMIT = make_prompts(((LIMIT - 6, 6), (LIMIT - 1, 1), (LIMIT - 3, 3), (LIMIT - 4, 4)), seed=8)
# A drafter's dummy samples where its rank's last step has sampled, which after the last piece of a prompt is behind the
# dummy's rows. Later versions reset `token_indices_to_sample`, and earlier ones have no such tensor.
STALE_SAMPLING = STOCK.vllm_ascend == "0.18.0"
# Overlay or not, and a variable that changes nothing in stock by itself, but the overlay refuses it. (REFUSED does not
# count here: a step may hold all that the scheduler asks for.)
STATES: dict[str, tuple[bool, dict[str, str]]] = {
    "stock": (False, {}),
    "skip": (True, {}),
    "sync": (True, {"DYNAMIC_EPLB": "true"}),
}


def node_at_the_limit(folder: Path, model: Path, state: str, configuration: Configuration = AT_THE_LIMIT) -> Server:
    overlay, environment = STATES[state]
    requests = MAX_NUM_SEQS if configuration.graphs else STEP // (1 + configuration.drafts)
    sizes = ["--max-model-len", str(LIMIT), "--max-num-batched-tokens", str(STEP), "--max-num-seqs", str(requests)]
    flags = [*configuration.arguments(), *sizes]
    environment = {**environment, **configuration.environment}
    return server(folder / state, model, flags, overlay=overlay, environment=environment)


def near_the_limit(folder: Path, model: Path, state: str, configuration: Configuration = AT_THE_LIMIT) -> Run:
    """Rank 0 decodes up to max_model_len while rank 1 is idle; then three prompts of about that length."""
    node = node_at_the_limit(folder, model, state, configuration)
    alone, *together = TO_THE_LIMIT
    with Cluster() as cluster:
        cluster.start(node.process)
        cluster.wait_until_ready({node.process: f"{node.url}/health"})
        tokens = [node.complete(*alone, timeout_s=300, rank=0)]
        wait_until_idle([node])
        with ThreadPoolExecutor(len(together)) as pool:
            answers = [
                pool.submit(node.complete, *prompt, timeout_s=300, rank=rank)
                for rank, prompt in zip((0, 1, 0), together, strict=True)
            ]
            tokens += [answer.result() for answer in answers]
        wait_until_idle([node])
        cluster.check()
    return Run(tokens, read_ranks([node]), node.log)


@pytest.fixture(scope="module")
def skipped_at_the_limit(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return near_the_limit(tmp_path_factory.mktemp("limit"), model, "skip")


def _check_field_case_23(run: Run, collectives: int, *, levelled: bool = True) -> None:
    """`levelled`: the steps of stock 0.11.0 in which a rank prefills have all draft passes as well."""
    for rank in AT_THE_LIMIT.ranks:
        steps = run.steps(0)
        assert run.dp_collectives(rank) == ({step: collectives for step in steps} if collectives else {})
        for operator in ("dispatch", "combine"):
            calls = run.calls_by_step(rank, operator)
            assert calls == run.calls_by_step(0, operator)
            assert set(calls.values()) == {LAYERS + AT_THE_LIMIT.drafts, *([] if levelled else [LAYERS + 1])}
            assert calls.keys() == set(steps)


def test_field_case_23_drafts_without_room_are_made_all_the_same(skipped_at_the_limit: Run) -> None:
    _check_field_case_23(skipped_at_the_limit, 0)
    # A request of the first phase that has no room for its drafts, while the other rank is idle.
    busy, idle = skipped_at_the_limit.scheduled(0), skipped_at_the_limit.scheduled(1)
    assert any(0 < busy[step] <= AT_THE_LIMIT.drafts and not idle[step] for step in range(VOTE_EVERY))


# Stock alone does not survive it there, see below.
@pytest.mark.parametrize("state", ["sync"] if STALE_SAMPLING else ["stock", "sync"])
def test_field_case_23_as_stock_does_it(skipped_at_the_limit: Run, model: Path, tmp_path: Path, state: str) -> None:
    """Vllm-ascend leaves no draft pass out: what it does by itself has the same calls and tokens. (But for 0.11.0 while
    a rank prefills, and then on all ranks, which is what its all_reduce is for.)"""
    run = near_the_limit(tmp_path, model, state)
    levelled = STOCK.vllm_ascend != "0.11.0"
    _check_field_case_23(run, 0 if state == "stock" and STOCK.own_skip else 2, levelled=levelled)
    assert ("DSP137" in run.log) == (state == "sync")
    assert run.tokens[0] == skipped_at_the_limit.tokens[0]  # that of the request that was alone


if STALE_SAMPLING:

    def test_stock_samples_a_dummy_behind_its_rows(model: Path, tmp_path: Path) -> None:
        """The node of `skipped_at_the_limit`, which has the same prompts with the overlay, without this error."""
        node = node_at_the_limit(tmp_path, model, "stock")
        with Cluster() as cluster:
            cluster.start(node.process)
            cluster.wait_until_ready({node.process: f"{node.url}/health"})
            with suppress(httpx.HTTPError):  # the node may end before the answer is sent
                node.complete(*TO_THE_LIMIT[1], rank=0)
            assert node.ended_within(90)  # of the dummies that follow, up to the next vote
        assert re.search(r"IndexError: index \d+ is out of bounds for dimension 0", node.log)


if STOCK.uniform_with_drafts:

    @pytest.mark.parametrize("asynchronous", [False, True], ids=lambda value: f"async_{value}")
    def test_field_case_23_with_decode_batches_only(model: Path, tmp_path: Path, asynchronous: bool) -> None:
        """Where there is no room for drafts, some tokens are computed once more instead."""
        configuration = Configuration(AT_THE_LIMIT.drafts, 1, asynchronous, "FULL_DECODE_ONLY", "uniform")
        run = near_the_limit(tmp_path, model, "skip", configuration)
        _check_field_case_23(run, 0)
        for rank in configuration.ranks:
            assert {call["mode"] for call in run.dispatches(rank)} == {"graph"}
            assert {tokens % (1 + configuration.drafts) for tokens in run.scheduled(rank).values()} == {0}
        reference = near_the_limit(tmp_path, model, "sync", replace(AT_THE_LIMIT, async_scheduling=False))
        assert run.tokens == reference.tokens

    @pytest.mark.parametrize("asynchronous", [False, True], ids=lambda value: f"async_{value}")
    def test_what_requests_ask_for_with_decode_batches_only(model: Path, tmp_path: Path, asynchronous: bool) -> None:
        """Penalties, a grammar, stop conditions: stock's answers. Stock refuses min_p and logit_bias with drafts."""
        configuration = Configuration(3, 1, asynchronous, "FULL_DECODE_ONLY", "uniform")
        reference = replace(configuration, graphs="", level="", async_scheduling=False)
        answers = special_answers(tmp_path / "skip", model, configuration)
        expected = special_answers(tmp_path / "sync", model, reference, *REFUSED)
        plain, late = expected["plain"], expected["late stop"]
        if asynchronous:
            # Stock counts the places of tokens that it does not know yet: `min_tokens` ends up to 1 + k tokens early.
            expected["late stop"] = answers["late stop"]
        assert answers == expected
        assert len(plain) == SPECIAL_PROMPT[1]
        assert expected["stop"] == plain[: STOP_AT + 1]
        assert late[:STOP_AT] == plain[:STOP_AT]
        assert late[STOP_AT] != plain[STOP_AT]
        assert [name for name, answer in expected.items() if isinstance(answer, str)] == ["min_p", "logit_bias"]
        for name in ("penalties", "grammar"):
            assert expected[name] != plain


def special_answers(folder: Path, model: Path, configuration: Configuration, *more: str) -> dict[str, Any]:
    """The tokens, or what the server says against the request; all at once, on both ranks in turn."""
    flags = [*configuration.arguments(), *more]
    node = server(folder, model, flags, overlay=True, environment=configuration.environment)
    ((prompt, count),) = seeded(SPECIAL_PROMPT)

    def answer(request: tuple[int, dict[str, Any]]) -> list[int] | str:
        rank, sampling = request
        try:
            return node.complete(prompt, count, timeout_s=300, rank=rank % DP_SIZE, sampling=sampling)
        except httpx.HTTPStatusError as error:
            return error.response.text

    with Cluster() as cluster:
        cluster.start(node.process)
        cluster.wait_until_ready({node.process: f"{node.url}/health"})
        plain = node.complete(prompt, count, timeout_s=300, rank=0)
        stop = {"stop_token_ids": [plain[STOP_AT]]}
        requests = {**SPECIAL, "stop": stop, "late stop": {**stop, "min_tokens": STOP_AT + 2}}
        with ThreadPoolExecutor(len(requests)) as pool:
            answers = dict(zip(requests, pool.map(answer, enumerate(requests.values())), strict=True))
        wait_until_idle([node])
        cluster.check()
    return answers


@dataclass(frozen=True)
class HandedOver:
    """Runs of a decode node behind a prefill node; `resubmitted`: requests that it gave back to be prefilled again."""

    configuration: Configuration
    skipped: tuple[list[list[int]], list[Rank]]
    synced: tuple[list[list[int]], list[Rank]]
    resubmitted: list[int]


HANDED_OVER = [
    Configuration(HANDED_OVER_DRAFTS, 1, False),
    *([Configuration(HANDED_OVER_DRAFTS, 1, True)] if ASYNC else []),
    *(
        Configuration(HANDED_OVER_DRAFTS, 1, asynchronous, "FULL_DECODE_ONLY", "uniform")
        for asynchronous in ((False, True) if STOCK.uniform_with_drafts else ())
    ),
]


@pytest.fixture(scope="module", params=HANDED_OVER, ids=str)
def handed_over(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> HandedOver:
    """A decode node with three KV blocks for each rank: two requests of a rank soon need more than that.

    No more than three requests at a time. One whose KV has been loaded keeps its block while it waits for the next one,
    and stock takes it away from none: as many of them as there are blocks wait for ever.
    """
    configuration: Configuration = request.param
    reference = replace(configuration, graphs="", level="")
    if configuration.level:
        reference = replace(reference, async_scheduling=False)
    wanted = seeded(ALONE, *BURSTS)
    prompts = [LoadRequest(index, 0.0, prompt, count + MORE) for index, (prompt, count) in enumerate(wanted)]
    loads = [prompts[:1], *(prompts[first : first + 3] for first in range(1, len(prompts), 3))]
    prefill = ["--max-num-batched-tokens", "512", "--num-gpu-blocks-override", "64", *speculative(1)]
    prefill += ["--distributed-executor-backend", "uni", *(["--no-async-scheduling"] if ASYNC else [])]
    folder = tmp_path_factory.mktemp("handed_over")
    found, resubmitted = [], []
    with Cluster() as cluster:
        pair = PrefillDecodePair(cluster, folder, model, ["--num-gpu-blocks-override", "64"], prefill)
        for name, one, more in (("skip", configuration, ()), ("sync", reference, REFUSED)):
            flags = [*one.arguments(), "--num-gpu-blocks-override", "4", "--max-num-batched-tokens", "64"]
            with pair.decode_node(name, [*flags, *more], overlay=True, environment=one.environment) as node:
                answers = [answer for load in loads for answer in node.send(load)]
                node.wait_until_idle()
                resubmitted.append(httpx.get(f"{node.proxy_url}/health", trust_env=False).json()["resubmitted"])
            tokens = [answer[:count] for answer, (_, count) in zip(answers, wanted, strict=True)]
            found.append((tokens, node.ranks()))
    return HandedOver(configuration, *found, resubmitted)


def test_requests_with_remote_kv_and_given_back_for_it(handed_over: HandedOver) -> None:
    """The first step of a request with remote KV has its last prompt token, and drafts that nobody has made."""
    (skipped, ranks), (synced, synced_ranks) = handed_over.skipped, handed_over.synced
    configuration = handed_over.configuration
    varying = configuration.async_scheduling and not configuration.level  # see test_tokens_are_equal
    known = slice(1) if varying else slice(None)
    assert skipped[known] == synced[known]
    first, both = handed_over.resubmitted
    assert 0 < first < both
    for rank in ranks:
        assert rank.dp_collectives == 0
        # The last step may be missing, see Run.
        assert rank.steps == ranks[0].steps
        assert set(rank.dispatches) >= set(range(rank.steps - 1))
        assert {len(calls) for calls in rank.dispatches.values()} == {LAYERS + HANDED_OVER_DRAFTS}
    for rank in synced_ranks:
        assert rank.dp_collectives >= 2 * (rank.steps - 1)

# SPDX-License-Identifier: Apache-2.0
"""No schedule of arrivals makes simulated ranks wait for each other for ever; each mutant of the overlay is caught."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import simulated_ranks
from decode_node import decode_node
from simulated_ranks import ARRIVALS, STOCK, Decision, Node, Outcome, Rank, Violation, node, serve, start
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from dp_sync_patch import agreement, live, plan, runtime
from dp_sync_patch.errors import AgreementError, MC2OnlyError, logger
from dp_sync_patch.facts import Facts
from dp_sync_patch.patches import comm_selector, draft_passes, graph_mode, mc2_arguments, metadata_sync, scheduler_bound
from dp_sync_patch.plan import State
from dp_sync_patch.stock import KNOWN

SEED = 20261127
REQUESTS = 4  # of a rank at a time


def small(stock: str, drafts: int = 0, **changes: Any) -> Facts:
    """A decode node whose largest step is `REQUESTS` requests, and whose scheduler may ask for twice as many tokens."""
    step = REQUESTS * (1 + drafts)
    defaults: dict[str, Any] = {
        **{"stock_version": stock, "data_parallel_size": 2, "max_num_seqs": REQUESTS, "mc2_tokens_capacity": step},
        **{"max_num_batched_tokens": 2 * step, "num_speculative_tokens": drafts},
        **{"speculative_method": "mtp" if drafts else None, "max_draft_passes": 1 if stock == "0.13.0" else 2**31},
    }
    return decode_node(**{**defaults, **changes})


def graphs(stock: str, drafts: int = 0, mode: str = "PIECEWISE", **changes: Any) -> Facts:
    q = 1 + drafts
    captures = changes.pop("capture_sizes", (q, 2 * q, REQUESTS * q))
    separate = mode != "PIECEWISE"
    (entry,) = (entry for entry in KNOWN if entry.vllm_ascend == stock)
    changes = {
        **{
            "drafts_follow_graph_mode": mode in entry.drafts_follow_in,
            "uniform_with_drafts": entry.uniform_with_drafts,
        },
        **changes,
    }
    return small(stock, drafts, graph_mode=mode, separate_routines=separate, capture_sizes=captures, **changes)


SKIPPING = {
    "0.11.0": small("0.11.0"),
    "0.11.0, two drafts": small("0.11.0", 2),
    "0.11.0, graphs": graphs("0.11.0"),
    "0.11.0, graphs and two drafts": graphs("0.11.0", 2),
    "0.11.0, without the recompute scheduler": small("0.11.0", recompute_in_effect=False, max_num_batched_tokens=4),
    "0.11.0, TP": small("0.11.0", 1, tensor_parallel_size=2),
    "0.13.0, one draft": small("0.13.0", 1),
    "0.18.0": small("0.18.0"),
    "0.18.0, two drafts": small("0.18.0", 2),
    "0.13.0, graphs and one draft": graphs("0.13.0", 1),
    "0.18.0, graphs and two drafts": graphs("0.18.0", 2),
}
# With graph_mode=sync.
AGREEING = {
    "0.11.0, graphs of decode batches": graphs("0.11.0", 0, "FULL_DECODE_ONLY"),
    "0.11.0, graphs of decode batches and two drafts": graphs("0.11.0", 2, "FULL_DECODE_ONLY"),
    "0.11.0, two kinds of graphs": graphs("0.11.0", 0, "FULL_AND_PIECEWISE"),
    "0.13.0, graphs of decode batches": graphs("0.13.0", 0, "FULL_DECODE_ONLY"),
    "0.18.0, graphs of decode batches and two drafts": graphs("0.18.0", 2, "FULL_DECODE_ONLY"),
    "0.18.0, two kinds of graphs and two drafts": graphs("0.18.0", 2, "FULL_AND_PIECEWISE"),
}
# With graph_mode=uniform.
UNIFORM = {
    "0.11.0, graphs of decode batches": graphs("0.11.0", 0, "FULL_DECODE_ONLY"),
    "0.11.0, two kinds of graphs": graphs("0.11.0", 0, "FULL_AND_PIECEWISE"),
    "0.11.0, graphs of decode batches, TP": graphs("0.11.0", 0, "FULL_DECODE_ONLY", tensor_parallel_size=2),
    "0.18.0, graphs of decode batches": graphs("0.18.0", 0, "FULL_DECODE_ONLY"),
    "0.23.0, graphs of decode batches and two drafts": graphs("0.23.0", 2, "FULL_DECODE_ONLY"),
    "0.23.0, two kinds of graphs and two drafts": graphs("0.23.0", 2, "FULL_AND_PIECEWISE"),
    "0.23.0, graphs of decode batches, one draft, TP": graphs("0.23.0", 1, "FULL_DECODE_ONLY", tensor_parallel_size=2),
}
SYNCHRONISED = {
    "0.11.0, kv_both": small("0.11.0", 2, kv_role="kv_both"),
    "0.11.0, a large step": small("0.11.0", mc2_tokens_capacity=3),
    "0.13.0, kv_both": small("0.13.0", kv_role="kv_both"),
    "0.13.0, two drafts": small("0.13.0", 2),
    "0.13.0, hierarchy": small("0.13.0", hierarchy="HCCL_INTRA_PCIE_ENABLE"),
    "0.18.0, no recompute scheduler": small("0.18.0", 2, recompute_in_effect=False),
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No line for each of thousands of clamped schedulers."""
    monkeypatch.setattr(graph_mode, "_post", simulated_ranks.post)
    monkeypatch.setattr(graph_mode, "_posted", None)
    for name in ("skip_sizes", "_latched", "_runner", "sync_graph_mode", "uniform_batches", "in_draft_passes"):
        monkeypatch.setattr(runtime, name, getattr(runtime, name))  # put back afterwards
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(level)


def exhaustive(ranks: int, steps: int) -> Iterator[Sequence[Sequence[str]]]:
    """Every schedule of that scope: an arrival, or none, on each rank before each step."""
    return product(product(ARRIVALS, repeat=ranks), repeat=steps)


def drawn(ranks: int, steps: int, count: int) -> Iterator[Sequence[Sequence[str]]]:
    """Seeded schedules in which about every second rank gets something before a step."""
    draw = random.Random(SEED)
    names = list(ARRIVALS)
    weights = [len(names) - 1] + [1] * (len(names) - 1)  # the first is nothing
    for _ in range(count):
        yield [draw.choices(names, weights, k=ranks) for _ in range(steps)]


def run_all(deployment: Node, schedules: Iterator[Sequence[Sequence[str]]]) -> tuple[list[Decision | None], Outcome]:
    """All schedules after one start-up; a Violation names its schedule. Returns what was decided, and the sums."""
    decisions = start(deployment)
    found = []
    for schedule in schedules:
        try:
            found.append(serve(deployment, decisions, schedule))
        except Violation as violation:
            violation.add_note(f"schedule: {schedule}")
            raise
    return decisions, Outcome(
        *(
            sum(getattr(one, name) for one in found)
            for name in ("steps", "all_reduces", "mode_syncs", "eager", "ragged")
        )
    )


def assert_state(
    facts: Facts, expected: State, schedules: Iterator[Sequence[Sequence[str]]], graph_mode: str = "refuse"
) -> None:
    decisions, outcome = run_all(node(facts, graph_mode=graph_mode), schedules)
    assert {decision.state for decision in decisions if decision} == {expected}
    passes = 2 if facts.num_speculative_tokens else 1
    assert outcome.all_reduces == (0 if expected is State.SKIP else passes * outcome.steps)
    assert outcome.mode_syncs == (outcome.steps if graph_mode == "sync" else 0)
    assert outcome.eager == 0 or graph_mode != "uniform"
    assert (outcome.ragged > 0) == (expected is State.SKIP)


DEPLOYMENTS = [
    pytest.param(replace(facts, data_parallel_size=ranks, process_group_size=ranks * facts.tensor_parallel_size), state,
                 setting, id=f"{state.name.lower()}, graph_mode={setting}, DP{ranks}, {name}")
    for state, setting, group in (
        (State.SKIP, "refuse", SKIPPING), (State.SKIP, "sync", AGREEING), (State.SKIP, "uniform", UNIFORM),
        (State.SYNC, "refuse", SYNCHRONISED)
    )
    for name, facts in group.items()
    for ranks in (2, 4)
]  # fmt: skip


@pytest.mark.parametrize(("facts", "state", "setting"), DEPLOYMENTS)
def test_ranks_meet_in_all_that_they_do(facts: Facts, state: State, setting: str) -> None:
    assert_state(facts, state, drawn(facts.data_parallel_size, 6, 60), setting)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("facts", "state", "setting"), DEPLOYMENTS)
def test_ranks_meet_in_many_schedules(facts: Facts, state: State, setting: str) -> None:
    """All that there are of two ranks and two steps, or of four ranks and one; and 5,000 drawn ones of six steps."""
    ranks = facts.data_parallel_size
    assert_state(facts, state, exhaustive(ranks, 4 // ranks), setting)
    assert_state(facts, state, drawn(ranks, 6, 5_000), setting)


# The model shows what stock does without the overlay: the hazards are in it.
STOCK_HANGS = {
    "0.13.0: a prompt that does not fit": (small("0.13.0"), "long prompt"),
    "0.18.0: a prompt that does not fit": (small("0.18.0"), "long prompt"),
    "0.13.0: two drafts, and a prompt that fits": (small("0.13.0", 2), "short prompt"),
    "0.13.0: hierarchy": (small("0.13.0", hierarchy="HCCL_INTRA_PCIE_ENABLE"), "hand-off"),
    "0.18.0: a batch that is not uniform": (graphs("0.18.0", 1, "FULL_DECODE_ONLY"), "short prompt"),
    "0.18.0: no room for drafts": (graphs("0.18.0", 3, "FULL_DECODE_ONLY"), "tail"),
}


@pytest.mark.parametrize(("facts", "arrival"), STOCK_HANGS.values(), ids=STOCK_HANGS)
def test_stock_alone_hangs(facts: Facts, arrival: str) -> None:
    alone = node(facts, without=range(2))
    with pytest.raises(Violation):
        serve(alone, start(alone), [(arrival, "nothing")])


@pytest.mark.parametrize("drafts", [0, 2])
def test_stock_that_always_synchronises_does_not_hang(drafts: int) -> None:
    run_all(node(small("0.11.0", drafts), without=range(2)), exhaustive(2, 1))


# Ranks that were started in different ways.
DIFFERENT = {
    "0.11.0: another max_num_seqs": node(small("0.11.0"), {1: small("0.11.0", max_num_seqs=3)}),
    "0.18.0: another max_num_seqs": node(small("0.18.0"), {1: small("0.18.0", max_num_seqs=3)}),
    "0.11.0: a rank without the overlay": node(small("0.11.0"), without=[1]),
    "0.11.0: a rank that is switched off": node(small("0.11.0"), off=[1]),
    "0.18.0: a rank that is switched off": node(small("0.18.0"), off=[1]),
}


@pytest.mark.parametrize("deployment", DIFFERENT.values(), ids=DIFFERENT)
def test_ranks_that_differ_do_not_skip(deployment: Node) -> None:
    decisions, outcome = run_all(deployment, exhaustive(2, 1))
    assert outcome.all_reduces == outcome.steps
    assert State.SKIP not in {decision.state for decision in decisions if decision}


UNBOUND = {**{name: node(facts) for name, facts in SYNCHRONISED.items()}, **DIFFERENT}


@pytest.mark.parametrize("deployment", UNBOUND.values(), ids=UNBOUND)
def test_a_scheduler_is_left_to_stock_where_the_ranks_do_not_skip(deployment: Node) -> None:
    """Even where this rank alone would: its own plan binds nobody, the verdict does."""
    for rank, (facts, decision) in enumerate(zip(deployment.facts, start(deployment), strict=True)):
        one = Rank(deployment.behaviour, facts, decision, rank)
        one.bind()
        assert one.scheduler.max_num_scheduled_tokens == facts.max_num_batched_tokens
        assert one.scheduler.scheduler_config.long_prefill_token_threshold == 0


def test_a_scheduler_is_bound_where_the_ranks_skip() -> None:
    facts = small("0.11.0")
    for rank, decision in enumerate(start(node(facts))):
        assert decision is not None
        one = Rank(STOCK["0.11.0"], facts, decision, rank)
        one.bind()
        assert one.scheduler.max_num_scheduled_tokens == decision.plan.sizes.token_budget == REQUESTS


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_without_the_overlay_stops_the_others_where_stock_skips_alone(missing: int) -> None:
    with pytest.raises(AgreementError, match=r"DSP20[23]"):
        start(node(small("0.18.0"), without=[missing]))


# One configuration for each condition that the simulation knows the reason of.
BREAKS: dict[str, Facts] = {
    "DSP101": small("0.11.0", enable_expert_parallel=False),
    "DSP103": small("0.11.0", soc="A5"),
    "DSP105": small("0.11.0", max_num_seqs=600, mc2_tokens_capacity=600, max_num_batched_tokens=600,
                    hccl_buffsize_mb=10**6),
    "DSP107": small("0.11.0", soc="A2"),
    "DSP110": small("0.18.0", hierarchy="enable_mc2_hierarchy_comm"),
    "DSP111": small("0.11.0", model_without_mc2=True),
    "DSP112": small("0.11.0", compile_sizes=(8,)),
    "DSP113": small("0.18.0", soc="A2", data_parallel_size=16, num_experts=512, a2_max_local_experts=24,
                    hccl_buffsize_mb=1000),
    "DSP120": small("0.11.0", scheduler_known=False),
    "DSP121": small("0.11.0", splits_prompts=False),
    "DSP122": graphs("0.11.0", 0, "FULL_DECODE_ONLY"),
    "DSP123": graphs("0.11.0", capture_sizes=(1, 2)),
    "DSP131": small("0.11.0", shared_expert_dp="enable_shared_expert_dp"),
    "DSP132": small("0.11.0", sequence_parallel="enable_sequence_parallelism"),
    "DSP133": small("0.11.0", lmhead_tensor_parallel_size=2),
    "DSP134": small("0.11.0", oproj_tensor_parallel_size=2),
    "DSP135": small("0.11.0", mlp_tensor_parallel="VLLM_ASCEND_ENABLE_MLP_OPTIMIZE"),
    "DSP136": small("0.11.0", dbo="enable_dbo"),
    "DSP142": small("0.13.0", 2),
    "DSP143": small("0.18.0", embedding_tensor_parallel="finegrained_tp_config"),
    "DSP144": small("0.18.0", flashcomm2="VLLM_ASCEND_FLASHCOMM2_PARALLEL_SIZE"),
}  # fmt: skip
# The others, and why no schedule of the simulation could tell whether they are there.
NOT_SIMULATED = {
    **dict.fromkeys(("DSP001", "DSP002", "DSP003", "DSP004"), "there is nothing to agree about"),
    "DSP102": "the clamped budget keeps every step in MC2 as well; see the mutant without both",
    "DSP104": "the selector follows the agreed bound; the buffers that stock sizes by its capacity are not modelled",
    **dict.fromkeys(("DSP106", "DSP108", "DSP109"), "sizes of buffers and of experts are the virtual NPU's matter"),
    **dict.fromkeys(("DSP114", "DSP125", "DSP130", "DSP141", "DSP146"), "code that the overlay has not been fitted to"),
    **dict.fromkeys(("DSP137", "DSP138", "DSP139", "DSP140", "DSP145"), "not tested with the skip"),
    "DSP124": "the store is that of all ranks here",
}


def few(facts: Facts) -> Iterator[Sequence[Sequence[str]]]:
    """On each rank alone, and on all of them, each arrival once; then some drawn ones."""
    ranks = facts.data_parallel_size
    for kind in ARRIVALS:
        yield [[kind, *["nothing"] * (ranks - 1)]]
        yield [[*["nothing"] * (ranks - 1), kind]]
        yield [["full house"] * ranks, [kind, *["nothing"] * (ranks - 1)]]
    yield from drawn(ranks, 3, 50)


def test_every_condition_is_either_simulated_or_explained() -> None:
    codes = [rule.code for rule in plan.RULES]
    assert sorted(codes) == sorted([*BREAKS, *NOT_SIMULATED])


@pytest.mark.parametrize("code", BREAKS)
def test_the_plan_without_a_condition_is_caught(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    facts = BREAKS[code]
    assert [reason.code for reason in plan.make_plan(facts, graph_mode="refuse").reasons] == [code]
    assert start(node(facts))[0].state is State.SYNC  # type: ignore[union-attr]
    monkeypatch.setattr(plan, "RULES", tuple(rule for rule in plan.RULES if rule.code != code))
    decisions = start(node(facts))
    assert {decision.state for decision in decisions if decision} == {State.SKIP}
    with pytest.raises(Violation):
        run_all(node(facts), few(facts))


def _decoding_in_graphs(drafts: int, stock: str = "0.11.0") -> Node:
    return node(graphs(stock, drafts, "FULL_DECODE_ONLY"), graph_mode="sync")


def _uniform(facts: Facts) -> Node:
    return node(facts, graph_mode="uniform")


def _highest(mode: int) -> Any:
    posted = simulated_ranks.post(mode)
    posted.lowest = max(simulated_ranks._acting.modes)
    return posted


def _always_full(*_: Any) -> CUDAGraphMode:
    return CUDAGraphMode.FULL


def _by_counts_alone(runner: Any, scheduler_output: Any) -> Any:
    return _real_look_ahead(SimpleNamespace(**{**vars(runner), "speculative_config": None}), scheduler_output)


def _agreeing_in_drafts(*call: Any) -> Any:
    runtime.in_draft_passes = False
    return _real_agreement(*call)


def _nothing(*_: Any) -> Any:
    return ()


def _never(*_: Any, **__: Any) -> Any:
    return False


def _unwrapped(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return wrapped(*args, **kwargs)


def _no_grid(runner: Any, num_tokens: int, with_prefill: bool, enable_dbo: bool) -> Any:
    return num_tokens, metadata_sync.torch.full((runner.dp_size,), num_tokens), with_prefill, enable_dbo


def _by_step(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Synchronises the steps that look dangerous, which only one rank can see."""
    return wrapped(*args, **kwargs) if args[1] else metadata_sync.local_result(instance, *args)


def _keeping(name: str) -> Callable[..., Any]:
    real = mc2_arguments.fix_dispatch_arguments

    def mutant(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stock = wrapped(*args, **kwargs)
        return {**real(wrapped, instance, args, kwargs), **({name: stock[name]} if name in stock else {})}

    return mutant


_real_sizes = plan.compute_sizes
_real_agreement = graph_mode.agree_on_graph_mode
_real_look_ahead = live.graph_mode_of_step


def _without_padding(facts: Facts) -> plan.Sizes:
    sizes = _real_sizes(facts)
    rows = sizes.token_budget
    return replace(sizes, bound=rows, tokens_per_rank=rows, global_bs=rows * facts.ep_world_size)


def _always_agreed(*_: Any) -> agreement.Verdict:
    return agreement.Verdict(True)


def _as_planned(planned: State, verdict: agreement.Verdict, *, own_skip: bool) -> State:
    return planned


def _at_most_sync(planned: State, verdict: agreement.Verdict, *, own_skip: bool) -> State:
    return min(planned, State.SYNC)


# Object, attribute, what stands there instead, and a deployment in which it shows.
MUTANTS: dict[str, tuple[Any, str, Any, Node]] = {
    "no clamp": (scheduler_bound, "keep_to", _nothing, node(small("0.11.0"))),
    "drafts not levelled": (draft_passes, "level_draft_passes", _unwrapped, node(small("0.11.0", 2))),
    "no padding to graphs": (metadata_sync, "local_result", _no_grid, node(graphs("0.11.0", capture_sizes=(2, 4)))),
    "a decision by step": (metadata_sync, "skip_all_reduce", _by_step, node(small("0.11.0"))),
    "stock's own decision": (metadata_sync, "decide_skip", _unwrapped, node(SYNCHRONISED["0.13.0, kv_both"])),
    "stock's global_bs": (mc2_arguments, "fix_dispatch_arguments", _keeping("global_bs"), node(small("0.11.0"))),
    "stock's mask": (mc2_arguments, "fix_dispatch_arguments", _keeping("x_active_mask"), node(small("0.11.0"))),
    "hierarchy with stock's arguments":
        (mc2_arguments, "_needs_uniform_arguments", _never, node(SYNCHRONISED["0.13.0, hierarchy"])),
    "a bound without the padding to graphs":
        (plan, "compute_sizes", _without_padding, node(graphs("0.11.0", capture_sizes=(1, 8), mc2_tokens_capacity=8))),
    "ranks are not compared": (agreement, "_judge", _always_agreed, DIFFERENT["0.11.0: another max_num_seqs"]),
    "the graph mode is not agreed on":
        (graph_mode, "agree_on_graph_mode", _unwrapped, _decoding_in_graphs(2)),
    "the highest graph mode": (graph_mode, "_post", _highest, _decoding_in_graphs(0)),
    "a graph is promised for every batch": (live, "graph_mode_of_step", _always_full, _decoding_in_graphs(0)),
    "a graph is promised for the first piece of a prompt":
        (live, "graph_mode_of_step", _by_counts_alone, _decoding_in_graphs(2, "0.18.0")),
    "drafts agree on the graph mode too":
        (graph_mode, "agree_on_graph_mode", _agreeing_in_drafts, _decoding_in_graphs(2)),
    "drafts in two kinds of graphs":
        (plan, "_mode_sync_lacks", _nothing, node(graphs("0.11.0", 2, "FULL_AND_PIECEWISE"), graph_mode="sync")),
    "the graph mode is not agreed on in the metadata":
        (graph_mode, "agree_in_metadata", _unwrapped, _decoding_in_graphs(2, "0.18.0")),
    "drafts that look at their own batch for a graph":
        (plan, "_mode_sync_lacks", _nothing, _decoding_in_graphs(1, "0.13.0")),
    "prompts in large pieces beside graphs of decode batches":
        (scheduler_bound, "make_uniform", _nothing, _uniform(graphs("0.11.0", 0, "FULL_DECODE_ONLY"))),
    "uniform batches with drafts":
        (plan, "_uniform_lacks", _nothing, _uniform(graphs("0.11.0", 2, "FULL_DECODE_ONLY"))),
    "uniform batches with drafts that are not filled up":
        (scheduler_bound, "_keep_uniform", _nothing, _uniform(graphs("0.23.0", 2, "FULL_DECODE_ONLY"))),
    "the first piece of a prompt is no decode":
        (runtime, "step_is_uniform", _never, _uniform(graphs("0.23.0", 2, "FULL_DECODE_ONLY"))),
    "uniform batches that are larger than stock's graphs of them":
        (plan, "_uniform_lacks", _nothing,
         _uniform(graphs("0.11.0", 0, "FULL_DECODE_ONLY", capture_sizes=(1, 2, 8), mc2_tokens_capacity=8))),
    "the verdict is not heeded": (runtime, "settle", _as_planned, DIFFERENT["0.18.0: another max_num_seqs"]),
    "a missing rank is no error": (runtime, "settle", _at_most_sync, node(small("0.18.0"), without=[1])),
    "a rank that is switched off follows stock":
        (runtime, "settle", _at_most_sync, DIFFERENT["0.18.0: a rank that is switched off"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    where, attribute, mutant, deployment = MUTANTS[name]
    monkeypatch.setattr(where, attribute, mutant)
    with pytest.raises(Violation):
        run_all(deployment, few(deployment.facts[0]))


def test_a_mutant_that_never_skips_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_sync, "decide_skip", _never)
    with pytest.raises(AssertionError):
        assert_state(small("0.18.0"), State.SKIP, few(small("0.18.0")))


def test_kv_both_is_refused_and_bounded_and_one_of_the_two_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = small("0.13.0", kv_role="kv_both")
    without_rule = tuple(rule for rule in plan.RULES if rule.code != "DSP102")
    monkeypatch.setattr(plan, "RULES", without_rule)
    decisions, _ = run_all(node(facts), few(facts))
    assert {decision.state for decision in decisions if decision} == {State.SKIP}
    monkeypatch.setattr(scheduler_bound, "keep_to", _nothing)
    with pytest.raises(Violation):
        run_all(node(facts), few(facts))


def test_the_assertion_turns_a_hang_into_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the last line: without the clamp a long prompt ends its rank, without both the ranks wait for ever."""
    facts = small("0.11.0")
    monkeypatch.setattr(scheduler_bound, "keep_to", _nothing)
    with pytest.raises(Violation, match="a rank ends: DSP301"):
        run_all(node(facts), few(facts))
    monkeypatch.setattr(comm_selector, "assert_mc2", _unwrapped)
    with pytest.raises(Violation, match="ranks wait for each other in different operators"):
        run_all(node(facts), few(facts))


def test_a_scheduler_out_of_control_ends_its_rank_instead_of_mixing_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the engine's process is not patched."""
    deployment = _uniform(UNIFORM["0.11.0, graphs of decode batches"])
    monkeypatch.setattr(scheduler_bound, "make_uniform", _nothing)
    with pytest.raises(Violation, match=r"a rank ends: DSP304 DP rank \d: a batch of \d+ tokens is no decode batch"):
        run_all(deployment, few(deployment.facts[0]))
    monkeypatch.setattr(graph_mode, "agree_on_graph_mode", _unwrapped)
    with pytest.raises(Violation, match="graph and eager in one call"):
        run_all(deployment, few(deployment.facts[0]))


def test_a_rank_without_a_graph_of_the_common_mode_ends() -> None:
    """The dispatcher makes no such keys, so they are taken away here."""
    facts = AGREEING["0.11.0, two kinds of graphs"]
    decision = start(node(facts, graph_mode="sync"))[0]
    rank = Rank(STOCK["0.11.0"], facts, decision, 0, modes=[CUDAGraphMode.FULL.value, CUDAGraphMode.PIECEWISE.value])
    assert rank.dispatch(BatchDescriptor(2, True)) == (CUDAGraphMode.PIECEWISE, BatchDescriptor(2, False))
    rank.graphs.cudagraph_keys[CUDAGraphMode.PIECEWISE].clear()
    with pytest.raises(MC2OnlyError, match="DSP303 DP rank 0: a batch of 2 tokens has no PIECEWISE graph"):
        rank.dispatch(BatchDescriptor(2, True))


def test_the_vote_is_the_only_thing_that_ends_a_run() -> None:
    facts = small("0.11.0")
    outcome = serve(node(facts), start(node(facts)), [("hand-off", "nothing")])
    assert outcome.steps % simulated_ranks.VOTE_EVERY == 0

# SPDX-License-Identifier: Apache-2.0
"""The decision: every rule by itself, the field cases, and what must hold for any configuration."""

from __future__ import annotations

import inspect
import json
from bisect import bisect_left
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
from decode_node import any_facts, decode_node, graph_node, stock_selects_mc2
from hypothesis import given
from hypothesis import strategies as st

from dp_sync_patch.facts import Facts, read
from dp_sync_patch.plan import OPERATOR_LIMIT, RULES, Refusal, State, compute_sizes, concerns, make_plan

# One change per rule that breaks this rule and no other one.
BREAKS: dict[str, Facts] = {
    "DSP001": decode_node(data_parallel_size=1),
    "DSP002": decode_node(is_moe=False),
    "DSP003": decode_node(executor_backend="external_launcher"),
    "DSP004": decode_node(elastic_ep="VLLM_ELASTIC_EP_SCALE_UP_LAUNCH"),
    "DSP101": decode_node(enable_expert_parallel=False),
    "DSP102": decode_node(kv_role="kv_both"),
    "DSP103": decode_node(soc="UNDEFINED"),
    "DSP104": decode_node(mc2_tokens_capacity=31),
    "DSP105": decode_node(max_num_seqs=513, mc2_tokens_capacity=513, hccl_buffsize_mb=4096),
    "DSP106": decode_node(hccl_buffsize_mb=4),
    "DSP107": decode_node(soc="A2"),
    "DSP108": decode_node(experts_per_token=0),
    "DSP109": decode_node(num_experts=62),
    "DSP110": decode_node(hierarchy="HCCL_INTRA_PCIE_ENABLE=1"),
    "DSP111": decode_node(model_without_mc2=True),
    "DSP112": decode_node(compile_sizes=(8, 33)),
    "DSP113": decode_node(soc="A2", data_parallel_size=16, num_experts=400, a2_max_local_experts=24,
                          hccl_buffsize_mb=4096),
    "DSP114": decode_node(fused_mc2="VLLM_ASCEND_ENABLE_FUSED_MC2"),
    "DSP120": decode_node(scheduler_known=False),
    "DSP121": decode_node(splits_prompts=False),
    "DSP122": graph_node([32, 96], separate_routines=True, graph_mode="FULL_AND_PIECEWISE", num_speculative_tokens=2,
                         drafts_follow_graph_mode=False),
    "DSP123": graph_node([10], tensor_parallel_size=4, max_num_seqs=11),
    "DSP124": decode_node(process_group_size=2),
    "DSP125": graph_node([16, 32], graph_mode_known=False),
    "DSP130": decode_node(worker_cls_known=False),
    "DSP131": decode_node(shared_expert_dp="enable_shared_expert_dp"),
    "DSP132": decode_node(sequence_parallel="VLLM_ASCEND_ENABLE_FLASHCOMM1"),
    "DSP133": decode_node(lmhead_tensor_parallel_size=2),
    "DSP134": decode_node(oproj_tensor_parallel_size=2),
    "DSP135": decode_node(mlp_tensor_parallel="VLLM_ASCEND_ENABLE_MLP_OPTIMIZE"),
    "DSP136": decode_node(dbo="VLLM_ASCEND_ENABLE_DBO"),
    "DSP137": decode_node(eplb="additional_config.dynamic_eplb"),
    "DSP138": decode_node(lora="--enable-lora"),
    "DSP139": decode_node(pipeline_parallel_size=2),
    "DSP140": decode_node(decode_context_parallel_size=2),
    "DSP141": decode_node(speculative_method="eagle3", num_speculative_tokens=1, speculative_method_known=False,
                          max_num_seqs=16),
    "DSP142": decode_node(speculative_method="mtp", num_speculative_tokens=3, max_draft_passes=1, max_num_seqs=8),
    "DSP143": decode_node(embedding_tensor_parallel="finegrained_tp_config.embedding_tensor_parallel_size"),
    "DSP144": decode_node(flashcomm2="VLLM_ASCEND_FLASHCOMM2_PARALLEL_SIZE"),
    "DSP145": decode_node(balance_scheduling="VLLM_ASCEND_BALANCE_SCHEDULING"),
    "DSP146": decode_node(model_runner_v2="VLLM_USE_V2_MODEL_RUNNER"),
}  # fmt: skip


def codes(facts: Facts, **kwargs: Any) -> list[str]:
    return [reason.code for reason in make_plan(facts, **kwargs).reasons]


def test_the_base_case_skips() -> None:
    plan = make_plan(decode_node())
    assert plan.state is State.SKIP
    assert plan.reasons == ()
    assert (plan.sizes.token_budget, plan.sizes.bound, plan.sizes.global_bs) == (32, 32, 128)


def test_every_rule_has_a_case() -> None:
    assert sorted(BREAKS) == sorted(rule.code for rule in RULES)


@pytest.mark.parametrize("code", sorted(BREAKS))
def test_each_refusal_comes_from_exactly_one_condition(code: str) -> None:
    plan = make_plan(BREAKS[code])
    assert [reason.code for reason in plan.reasons] == [code]
    assert plan.state is (State.OFF if code in ("DSP001", "DSP002", "DSP003", "DSP004") else State.SYNC)
    (reason,) = plan.reasons
    assert reason.sentence
    assert reason.found
    assert reason.needed
    assert str(reason).startswith(f"{code} ")


def test_codes_are_unique() -> None:
    assert len({rule.code for rule in RULES}) == len(RULES)


def test_nothing_to_agree_about_outside_our_business() -> None:
    assert concerns(decode_node())
    assert concerns(decode_node(lora="--enable-lora"))
    assert not concerns(decode_node(data_parallel_size=1))
    assert not concerns(decode_node(is_moe=False))


def test_switched_off() -> None:
    plan = make_plan(decode_node(), mode="off")
    assert plan.state is State.OFF
    assert [reason.code for reason in plan.reasons] == ["DSP005"]


def separate(mode: str = "FULL_DECODE_ONLY", drafts: int = 0, **changes: Any) -> Facts:
    return graph_node(
        changes.pop("captures", [16, 32, 96] if drafts else [8, 16, 32]),
        **{"graph_mode": mode, "separate_routines": True, "num_speculative_tokens": drafts, **changes},
    )


@pytest.mark.parametrize(
    ("facts", "levels"),
    [
        (separate(), ["uniform", "sync"]),
        (separate("FULL_AND_PIECEWISE"), ["uniform", "sync"]),
        (separate(drafts=2), ["sync"]),
        (separate(drafts=2, uniform_with_drafts=True), ["uniform", "sync"]),
        (separate(graph_mode_known=False), []),
        (separate(drafts_follow_graph_mode=False), ["uniform", "sync"]),
        (separate(drafts_follow_graph_mode=False, drafts=1), []),
        (separate(recompute_in_effect=False, max_num_batched_tokens=32), ["sync"]),
        (separate(captures=[8, 48], mc2_tokens_capacity=48), ["sync"]),  # no FULL graph above max_num_seqs
    ],
)
def test_how_ranks_with_separate_routines_come_to_one_graph_mode(facts: Facts, levels: list[str]) -> None:
    assert make_plan(facts, graph_mode="refuse").state is State.SYNC
    plans = {setting: make_plan(facts, graph_mode=setting) for setting in ("uniform", "sync", "auto")}
    found = {setting: plan.graph_level for setting, plan in plans.items() if plan.state is State.SKIP}
    assert found == {level: level for level in levels} | ({"auto": levels[0]} if levels else {})


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        (separate(), ["DP_SYNC_PATCH_GRAPH_MODE=uniform", "DP_SYNC_PATCH_GRAPH_MODE=sync"]),
        (separate(drafts=2), ["DP_SYNC_PATCH_GRAPH_MODE=sync"]),
        (
            separate(captures=[8, 48], mc2_tokens_capacity=48),
            [
                "DP_SYNC_PATCH_GRAPH_MODE=uniform with --compilation-config '{\"cudagraph_capture_sizes\": [8, 32]}'",
                "DP_SYNC_PATCH_GRAPH_MODE=sync",
            ],
        ),
    ],
)
def test_the_advice_for_separate_routines_names_each_level_that_flags_lead_to(facts: Facts, advice: list[str]) -> None:
    (reason,) = make_plan(facts, graph_mode="refuse").reasons
    assert reason.flag.split(" or ")[2:] == advice


def test_one_routine_for_all_batches_needs_no_level() -> None:
    for setting in ("auto", "uniform", "sync", "refuse"):
        plan = make_plan(graph_node([32]), graph_mode=setting)
        assert (plan.state, plan.graph_level) == (State.SKIP, "one")


def test_a_refusal_from_outside_the_configuration_prevents_the_skip() -> None:
    plan = make_plan(decode_node(), extra=[Refusal("DSP009", "replaced", "other", "ours", "")])
    assert plan.state is State.SYNC
    assert [reason.code for reason in plan.reasons] == ["DSP009"]


# The numbers of public reports.


def test_field_case_01_largest_graph_below_largest_batch() -> None:
    recipe = {"num_speculative_tokens": 3, "speculative_method": "deepseek_mtp", "hccl_buffsize_mb": 1024}
    refused = make_plan(graph_node([1, 2, 4, 8, 16, 32], **recipe))
    (reason,) = refused.reasons
    assert reason.code == "DSP104"
    assert "128" in reason.found
    assert "32" in reason.needed
    allowed = make_plan(graph_node([1, 2, 4, 8, 16, 32, 64, 128], **recipe))
    assert allowed.state is State.SKIP
    assert allowed.sizes.global_bs == 512


@pytest.mark.parametrize(
    ("max_num_seqs", "captures", "state"),
    [(12, [1, 2, 4, 8], State.SYNC), (20, [1, 2, 4, 8, 16], State.SYNC), (16, [1, 2, 4, 8, 16], State.SKIP)],
)
def test_field_case_02_max_num_seqs_off_the_capture_grid(max_num_seqs: int, captures: list[int], state: State) -> None:
    plan = make_plan(graph_node(captures, max_num_seqs=max_num_seqs))
    assert plan.state is state
    if state is State.SYNC:
        assert f"{[*captures, max_num_seqs]}" in plan.reasons[0].flag


def test_field_case_03_the_list_in_force_decides_not_the_requested_ceiling() -> None:
    node = graph_node([8, 16, 24, 32, 40], max_num_seqs=6, num_speculative_tokens=6, speculative_method="deepseek_mtp")
    assert codes(node) == ["DSP104"]


@pytest.mark.parametrize(("tokens", "state"), [(255, State.SKIP), (256, State.SKIP), (257, State.SYNC)])
def test_field_case_04_boundary_without_the_recompute_scheduler(tokens: int, state: State) -> None:
    changes = {
        "recompute_in_effect": False,
        "recompute_requested": False,
        "scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler",
        "max_num_batched_tokens": tokens,
        "hccl_buffsize_mb": 1024,
    }
    assert make_plan(graph_node([64, 128, 256], **changes)).state is state
    assert make_plan(decode_node(mc2_tokens_capacity=256, **changes)).state is state


def test_field_case_06_a_producer_gets_one_line() -> None:
    node = decode_node(kv_role="kv_producer", mc2_tokens_capacity=1, lora="--enable-lora")
    assert codes(node) == ["DSP102"]


@pytest.mark.parametrize(
    ("soc", "tp", "per_dp_rank", "state"),
    [
        ("A2", 1, 256, State.SKIP),
        ("A2", 1, 512, State.SYNC),
        ("A2", 2, 512, State.SKIP),
        ("A3", 1, 512, State.SKIP),
        ("A3", 1, 520, State.SYNC),
    ],
)
def test_field_case_09_operator_limit_per_card(soc: str, tp: int, per_dp_rank: int, state: State) -> None:
    node = graph_node([per_dp_rank], soc=soc, tensor_parallel_size=tp, data_parallel_size=16, max_num_seqs=per_dp_rank,
                      hccl_buffsize_mb=1 << 20)  # fmt: skip
    plan = make_plan(node)
    assert plan.state is state
    if state is State.SYNC:
        (reason,) = plan.reasons
        assert reason.code == "DSP105"
        assert str(per_dp_rank) in reason.found
        assert str(OPERATOR_LIMIT[soc]) in reason.needed


@pytest.mark.parametrize(
    ("largest", "buffer_mb", "starts"),
    [(16, 200, True), (26, 200, True), (27, 200, False), (128, 200, False), (27, 1024, True), (128, 1024, True)],
)
def test_field_case_29_hccl_window(largest: int, buffer_mb: int, starts: bool) -> None:
    node = decode_node(
        data_parallel_size=32,
        hidden_size=7168,
        num_experts=256,
        experts_per_token=8,
        max_num_seqs=largest,
        mc2_tokens_capacity=largest,
        hccl_buffsize_mb=buffer_mb,
    )
    assert codes(node) == ([] if starts else ["DSP106"])


def test_hccl_window_of_the_worked_example() -> None:
    node = decode_node(data_parallel_size=32, hidden_size=7168, num_experts=256, max_num_seqs=128)
    assert compute_sizes(node).window_mb == 960


def test_field_case_31_odd_sizes_under_tp() -> None:
    node = graph_node([1, 2, 4, 10], tensor_parallel_size=4, data_parallel_size=2, max_num_seqs=10,
                      max_num_batched_tokens=10)  # fmt: skip
    plan = make_plan(node)
    assert plan.state is State.SKIP
    assert (plan.sizes.bound, plan.sizes.tokens_per_rank, plan.sizes.global_bs) == (12, 3, 24)
    # The scheduler counts unpadded tokens: 12 of them would be padded beyond every graph.
    assert plan.sizes.token_budget == 10


@pytest.mark.parametrize(("captures", "max_num_seqs", "code"), [([2, 4, 8, 16], 8, "DSP122"), ([1, 2, 4], 7, "DSP104")])
def test_field_case_17_graph_and_eager_may_not_meet(captures: list[int], max_num_seqs: int, code: str) -> None:
    """Separate routines: a rank with a 1-token step runs eager beside graphs. A list too short: so do large steps.

    With graph_mode=auto the first one is agreed on in each step instead.
    """
    node = graph_node(
        captures,
        max_num_seqs=max_num_seqs,
        num_speculative_tokens=1 if code == "DSP122" else 0,
        graph_mode="FULL_DECODE_ONLY",
        separate_routines=True,
    )
    plan = make_plan(node, graph_mode="refuse")
    assert plan.state is State.SYNC
    assert code in [reason.code for reason in plan.reasons]
    assert make_plan(node).graph_level == ("sync" if code == "DSP122" else "one")


def test_field_case_24_a_proposer_that_is_not_known_keeps_the_all_reduce() -> None:
    node = decode_node(speculative_method="extract_hidden_states", speculative_method_known=False)
    (reason,) = make_plan(node).reasons
    assert (reason.code, reason.found) == ("DSP141", "extract_hidden_states")


def test_graphs_above_the_bound_are_not_captured() -> None:
    sizes = compute_sizes(graph_node([1, 8, 16, 24, 64, 256], max_num_seqs=20))
    assert sizes.bound == 24
    assert sizes.capture_sizes == (1, 8, 16, 24)


def test_decode_max_num_seqs_counts() -> None:
    assert compute_sizes(decode_node(decode_max_num_seqs=40)).token_budget == 40


def test_recompute_flag_without_effect_names_the_cause() -> None:
    node = decode_node(recompute_in_effect=False, mc2_tokens_capacity=32)
    (reason,) = make_plan(node).reasons
    assert reason.code == "DSP104"
    assert "hides recompute_scheduler_enable" in reason.flag


# For any configuration.


def _padded(facts: Facts, captures: tuple[int, ...], num_tokens: int) -> int:
    """What stock makes of a local count: the next graph, or the count itself; then the TP multiple in MC2 prepare."""
    index = bisect_left(captures, num_tokens)
    size = captures[index] if index < len(captures) else num_tokens
    return -(-size // facts.tensor_parallel_size) * facts.tensor_parallel_size


@given(any_facts(), st.data())
def test_no_step_can_leave_mc2_or_exceed_global_bs(facts: Facts, data: st.DataObject) -> None:
    plan = make_plan(facts)
    if plan.state is not State.SKIP:
        return
    sizes = plan.sizes
    num_tokens = data.draw(st.integers(1, sizes.token_budget))
    captures = sizes.capture_sizes if facts.graph_mode != "NONE" else ()
    padded = _padded(facts, captures, num_tokens)
    assert padded <= sizes.bound
    assert stock_selects_mc2(facts, padded, sizes.bound)
    rows = padded // facts.tensor_parallel_size
    assert 1 <= rows <= sizes.tokens_per_rank <= OPERATOR_LIMIT[str(facts.soc)]
    assert sizes.global_bs % facts.ep_world_size == 0
    assert sizes.global_bs >= rows * facts.ep_world_size
    if facts.graph_mode != "NONE":
        assert padded <= _padded(facts, captures, max(captures)), "a step beyond every graph would run eager"


@given(any_facts())
def test_the_second_round_sees_the_same_sizes_after_captures_were_dropped(facts: Facts) -> None:
    sizes = compute_sizes(facts)
    if facts.graph_mode != "NONE" and sizes.capture_sizes:
        assert compute_sizes(replace(facts, capture_sizes=sizes.capture_sizes)) == sizes


@given(any_facts(), st.data())
def test_tightening_a_limit_never_turns_a_refusal_into_a_skip(facts: Facts, data: st.DataObject) -> None:
    tighter = {
        "mc2_tokens_capacity": data.draw(st.integers(0, facts.mc2_tokens_capacity or 0)),
        "hccl_buffsize_mb": data.draw(st.integers(0, facts.hccl_buffsize_mb)),
        "max_num_seqs": data.draw(st.integers(facts.max_num_seqs, facts.max_num_seqs + 300)),
        "max_num_batched_tokens": data.draw(st.integers(facts.max_num_batched_tokens, 8192)),
        "lora": "--enable-lora",
        "kv_role": "kv_both",
    }
    name = data.draw(st.sampled_from(sorted(tighter)))
    if make_plan(facts).state is not State.SKIP:
        assert make_plan(replace(facts, **{name: tighter[name]})).state is not State.SKIP


def test_nobody_plans_without_what_only_a_worker_knows() -> None:
    """An engine has its plan from its workers, see test_engine_startup.py."""
    unknown = {name for name, hint in get_type_hints(Facts).items() if type(None) in get_args(hint)}
    assert unknown == {"kv_role", "speculative_method"}
    asked = inspect.signature(read).parameters
    for name in ("soc", "mc2_tokens_capacity", "process_group_size"):
        assert asked[name].default is inspect.Parameter.empty


@st.composite
def too_many_sequences(draw: st.DrawFn) -> Facts:
    """Decode nodes whose only fault is max_num_seqs * q above a capacity that stock derived for their graphs."""
    tp = draw(st.sampled_from([1, 2, 4]))
    captures = sorted(draw(st.sets(st.integers(4, 200), min_size=1, max_size=5)))
    node = graph_node(captures, tensor_parallel_size=tp, num_speculative_tokens=draw(st.integers(0, 3)),
                      hccl_buffsize_mb=1 << 20)  # fmt: skip
    too_many = node.mc2_tokens_capacity // node.query_len + 1
    return replace(node, max_num_seqs=draw(st.integers(too_many, 2 * too_many)))


@given(too_many_sequences())
def test_the_advised_max_num_seqs_turns_the_refusal_into_a_skip(facts: Facts) -> None:
    (reason,) = make_plan(facts).reasons
    assert reason.code in ("DSP104", "DSP123")
    if reason.code == "DSP104":
        name, value = reason.flag.split(" or ")[0].split()
        assert name == "--max-num-seqs"
        advised = replace(facts, max_num_seqs=int(value))
        assert codes(advised) == []


@given(too_many_sequences())
def test_the_advised_capture_list_turns_the_refusal_into_a_skip(facts: Facts) -> None:
    (reason,) = make_plan(facts).reasons
    compilation = json.loads(reason.flag.split("--compilation-config '")[1].split("'")[0])
    captures = compilation["cudagraph_capture_sizes"]
    capacity = -(-captures[-1] // facts.tensor_parallel_size) * facts.tensor_parallel_size
    assert codes(replace(facts, capture_sizes=tuple(captures), mc2_tokens_capacity=capacity)) == []

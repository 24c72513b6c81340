# SPDX-License-Identifier: Apache-2.0
"""Facts of a decode node that may skip; tests change one thing at a time, or draw what they can."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from dp_sync_patch.facts import Facts

_DECODE_NODE = Facts(
    stock_version="0.11.0",
    is_moe=True,
    model_type="qwen3_moe",
    model_without_mc2=False,
    data_parallel_size=4,
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    prefill_context_parallel_size=1,
    decode_context_parallel_size=1,
    process_group_size=4,
    executor_backend="mp",
    elastic_ep="",
    enable_expert_parallel=True,
    worker_cls="vllm_ascend.worker.worker_v1.NPUWorker",
    worker_cls_known=True,
    model_runner_v2="",
    soc="A3",
    a2_max_local_experts=0,
    mc2_tokens_capacity=32,
    hidden_size=1024,
    num_experts=64,
    experts_per_token=8,
    hccl_buffsize_mb=200,
    hierarchy="",
    fused_mc2="",
    kv_role="kv_consumer",
    scheduler_cls="vllm_ascend.core.recompute_scheduler.RecomputeScheduler",
    scheduler_known=True,
    recompute_requested=True,
    recompute_in_effect=True,
    splits_prompts=True,
    max_num_batched_tokens=4096,
    max_num_seqs=32,
    decode_max_num_seqs=0,
    num_speculative_tokens=0,
    speculative_method=None,
    speculative_method_known=True,
    max_draft_passes=2**31,
    graph_mode="NONE",
    graph_mode_known=True,
    drafts_follow_graph_mode=True,
    uniform_with_drafts=False,
    separate_routines=False,
    capture_sizes=(),
    compile_sizes=(),
    lmhead_tensor_parallel_size=1,
    oproj_tensor_parallel_size=1,
    mlp_tensor_parallel="",
    embedding_tensor_parallel="",
    sequence_parallel="",
    flashcomm2="",
    balance_scheduling="",
    shared_expert_dp="",
    dbo="",
    eplb="",
    lora="",
)


def decode_node(**changes: Any) -> Facts:
    """The base case with changes. The process group follows the parallel sizes unless it is given."""
    facts = replace(_DECODE_NODE, **changes)
    if "process_group_size" not in changes:
        facts = replace(facts, process_group_size=facts.ep_world_size * facts.pipeline_parallel_size)
    return facts


def graph_node(captures: list[int], **changes: Any) -> Facts:
    """A decode node with PIECEWISE graphs, and the capacity that stock derives from them."""
    tp = changes.get("tensor_parallel_size", 1)
    capacity = -(-max(captures) // tp) * tp
    defaults = {"graph_mode": "PIECEWISE", "capture_sizes": tuple(sorted(captures)), "mc2_tokens_capacity": capacity}
    return decode_node(**{**defaults, **changes})


def stock_selects_mc2(facts: Facts, num_tokens: int, capacity: int) -> bool:
    """Stock's choice for one step, written down from its rules: MC2 or anything else."""
    if not facts.enable_expert_parallel or facts.model_without_mc2 or num_tokens > capacity:
        return False
    return facts.soc == "A3" or (facts.soc == "A2" and facts.ep_world_size * facts.pipeline_parallel_size >= 16)


@st.composite
def any_facts(draw: st.DrawFn) -> Facts:
    """Those that may skip and those that may not."""
    sizes = st.integers(1, 600)
    tp = draw(st.sampled_from([1, 2, 4, 3]))
    captures = tuple(sorted(draw(st.sets(sizes, max_size=6))))
    uses_graphs = bool(captures) and draw(st.booleans())
    max_num_seqs = draw(st.integers(1, 300))
    changes: dict[str, Any] = {
        "data_parallel_size": draw(st.sampled_from([1, 2, 4, 8, 16, 32])),
        "tensor_parallel_size": tp,
        "soc": draw(st.sampled_from(["A2", "A3", "UNDEFINED"])),
        "mc2_tokens_capacity": draw(st.one_of(sizes, st.just(10_000))),
        "hccl_buffsize_mb": draw(st.sampled_from([0, 20, 200, 4096])),
        "num_experts": draw(st.sampled_from([0, 64, 192, 384])),
        "kv_role": draw(st.sampled_from(["kv_consumer", "kv_consumer", "kv_consumer", "kv_both", None])),
        "recompute_in_effect": draw(st.booleans()),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(st.integers(max_num_seqs, 4096)),
        "num_speculative_tokens": draw(st.integers(0, 3)),
        "graph_mode": "PIECEWISE" if uses_graphs else "NONE",
        "capture_sizes": captures,
        "splits_prompts": draw(st.booleans()),
        "lora": draw(st.sampled_from(["", "", "", "--enable-lora"])),
    }
    return decode_node(**changes)

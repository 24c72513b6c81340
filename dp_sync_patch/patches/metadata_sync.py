# SPDX-License-Identifier: Apache-2.0
"""The DP metadata all_reduce of target and draft passes."""

from collections.abc import Callable
from typing import Any

import torch

from dp_sync_patch import metrics, runtime
from dp_sync_patch.patches import PatchPoint, Place, points_at
from dp_sync_patch.plan import State

SyncResult = tuple[int, torch.Tensor, bool, bool]


def skip_all_reduce(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """0.11.0, in `skip`: the local count, no communication. Profile runs stay with stock."""
    if runtime.in_profile_run:
        return wrapped(*args, **kwargs)
    result = local_result(instance, *args, **kwargs) if runtime.skip_sizes is not None else wrapped(*args, **kwargs)
    _count(args[0] if args else kwargs["num_tokens"], result[0])
    return result


def count_pass(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """From 0.12.0rc1 on stock has the branch that skips, and asks `decide_skip`; here passes are only counted."""
    result = wrapped(*args, **kwargs)
    if not runtime.in_profile_run:
        own = args[0] if args else kwargs["num_tokens" if "num_tokens" in kwargs else "num_tokens_padded"]
        # num_tokens_across_dp; result[0] is not the same number in all versions.
        _count(own, own if result[1] is None else max(result[1].tolist()))
    return result


def _count(own: int, final: int) -> None:
    """`own`: tokens of this rank; `final`: what its MoE layers are padded to, the largest count of all ranks."""
    counts = metrics.counts
    sizes = runtime.skip_sizes
    if sizes is None:
        counts.passes_synced += 1
        counts.passes_ragged += final > own
    else:
        counts.passes_skipped += 1
        if final < sizes.bound:
            counts.passes_ragged += 1
            counts.padding_avoided_tokens += sizes.bound - final
    counts.padding_tokens += final - own


def decide_skip(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The agreed verdict in place of stock's own decision, in both directions.

    Profile runs synchronise in any case. Only a dense drafter keeps stock's answer in `sync`: a busy rank may leave its
    draft passes out, and an all_reduce in them that stock does not have would make its peers wait.
    """
    state = runtime.state()
    if state is State.SKIP:
        return not runtime.in_profile_run
    if state is State.SYNC:
        target = args if instance is None else (instance.vllm_config, *args)
        return _drafter_is_dense(*target, **kwargs) and wrapped(*args, **kwargs)
    if state is None:
        runtime.warn_once("DSP011 no verdict in this process: stock decides by itself about its skip")
    decision: bool = wrapped(*args, **kwargs)
    return decision


def _drafter_is_dense(vllm_config: Any, is_draft_model: bool = False) -> bool:
    if not is_draft_model:
        return False
    from vllm_ascend.utils import is_drafter_moe_model

    return not is_drafter_moe_model(vllm_config)


def local_result(runner: Any, num_tokens: int, with_prefill: bool, enable_dbo: bool) -> SyncResult:
    """What stock would return if every rank had this rank's count.

    Returns:
        num_tokens: the final local count. Stock pads a dummy batch to the busiest rank, which is on the capture grid;
            without that the idle ranks would run eager beside graphs, so the grid is applied here.
        num_tokens_across_dp: CPU int32 [dp_size], new for every call since stock code writes into it; vLLM asserts
            that the own entry is the final local count, the other entries are read by nobody who uses MC2.
        with_prefill: the local flag. On the MC2 path it steers only local work, and the number of draft passes,
            which `draft_passes.level_draft_passes` makes equal again.
        enable_dbo: as given; the plan refuses DBO.
    """
    if runner.use_aclgraph and num_tokens <= runner.aclgraph_batch_sizes[-1]:
        num_tokens = runner.vllm_config.pad_for_cudagraph(num_tokens)
    counts = torch.full((runner.dp_size,), num_tokens, dtype=torch.int32, device="cpu")
    return num_tokens, counts, with_prefill, enable_dbo


_RUNNER = "vllm_ascend.worker.model_runner_v1"
_SHOULD_SKIP = ("should_skip_allreduce_across_dp_group", "(vllm_config, is_draft_model=False)")

POINTS = (
    PatchPoint(
        unit="worker",
        module=_RUNNER,
        name="NPUModelRunner._sync_metadata_across_dp",
        wrapper=skip_all_reduce,
        signature="(self, num_tokens, with_prefill, enable_dbo)",
        why="An all_reduce on the device group, and a host wait for it, in every target and MTP draft step.",
        how="In skip: the local count, padded to the capture grid. In sync, and in profile runs: stock.",
        upstream="vllm-ascend#1857, vllm-ascend#4983",
        remove_when="Stock skips the all_reduce under conditions that hold on every rank.",
        versions="==0.11.0",
    ),
    *points_at(
        # The typing error is stock's, and was corrected one version later.
        Place("==0.12.0rc1", _RUNNER, "NPUModelRunner._skip_all_reduce_acorss_dp_group", "(self)"),
        Place("==0.13.0", _RUNNER, "NPUModelRunner._skip_all_reduce_across_dp_group", "(self, is_draft_model=False)"),
        # One function, and the modules that import it by name; the dispatcher latches its answer.
        Place(">=0.18.0", "vllm_ascend.utils", *_SHOULD_SKIP),
        Place(">=0.18.0", _RUNNER, *_SHOULD_SKIP),
        Place(">=0.18.0", "vllm_ascend.ops.fused_moe.token_dispatcher", *_SHOULD_SKIP),
        unit="worker",
        wrapper=decide_skip,
        why="Stock skips on a bound that batches can exceed, for kv_both, with hierarchy, and blind to the graph mode.",
        how="In skip: yes, but for profile runs. In sync: no, but for a dense drafter. Before a verdict: stock.",
        upstream="vllm-ascend#8240, vllm-ascend#13826",
        remove_when="Stock skips the all_reduce under conditions that hold on every rank.",
    ),
    *points_at(
        Place("==0.12.0rc1", _RUNNER, "NPUModelRunner._sync_metadata_across_dp", "(self, num_tokens, with_prefill)"),
        Place(
            "==0.18.0",
            _RUNNER,
            "NPUModelRunner._sync_metadata_across_dp",
            "(self, num_tokens, with_prefill=False, is_draft_model=False)",
        ),
        unit="worker",
        wrapper=count_pass,
        why="What the skip saves, or what the all_reduce costs, is worth a number.",
        how="Stock's method, then the counters.",
        upstream="vllm-ascend#4983",
        remove_when="With decide_skip.",
    ),
)

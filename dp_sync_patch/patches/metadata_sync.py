# SPDX-License-Identifier: Apache-2.0
"""The DP metadata all_reduce of target and draft passes, and the number of draft passes that depended on it."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.forward_context import BatchDescriptor

from dp_sync_patch import metrics, runtime
from dp_sync_patch.patches import PatchPoint

SyncResult = tuple[int, torch.Tensor, bool, bool]


def skip_all_reduce(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In `skip`: the local count, no communication. Profile runs stay with stock (all ranks run them together)."""
    if instance.in_profile_run:
        return wrapped(*args, **kwargs)
    counts = metrics.counts
    own = args[0] if args else kwargs["num_tokens"]
    sizes = runtime.skip_sizes
    if sizes is None:
        result = wrapped(*args, **kwargs)
        counts.passes_synced += 1
        counts.passes_ragged += result[0] > own
    else:
        result = _local_result(instance, *args, **kwargs)
        counts.passes_skipped += 1
        if result[0] < sizes.bound:
            counts.passes_ragged += 1
            counts.padding_avoided_tokens += sizes.bound - result[0]
    counts.padding_tokens += result[0] - own
    return result


def _local_result(runner: Any, num_tokens: int, with_prefill: bool, enable_dbo: bool) -> SyncResult:
    """What stock would return if every rank had this rank's count.

    Returns:
        num_tokens: the final local count. Stock pads a dummy batch to the busiest rank, which is on the capture grid;
            without that the idle ranks would run eager beside graphs, so the grid is applied here.
        num_tokens_across_dp: CPU int32 [dp_size], new for every call since stock code writes into it; vLLM asserts
            that the own entry is the final local count, the other entries are read by nobody who uses MC2.
        with_prefill: the local flag. On the MC2 path it steers only local work, and the number of draft passes,
            which `level_draft_passes` makes equal again.
        enable_dbo: as given; the plan refuses DBO.
    """
    if runner.use_aclgraph and num_tokens <= runner.aclgraph_batch_sizes[-1]:
        num_tokens = runner.vllm_config.pad_for_cudagraph(num_tokens)
    counts = torch.full((runner.dp_size,), num_tokens, dtype=torch.int32, device="cpu")
    return num_tokens, counts, with_prefill, enable_dbo


def level_draft_passes(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """In `skip`: make a batch with prefill run as many draft passes as the other ranks do.

    Stock's proposer stops after the first of k passes when with_prefill is set, on all ranks because the all_reduce
    spread the flag. With a local flag that rank would issue fewer MC2 operators than its peers, and they would hang.
    The missing passes are run as dummies, the way an idle rank runs them: no attention, no KV writes, result dropped.
    """
    drafts = wrapped(*args, **kwargs)
    runner = instance.runner
    passes = instance.num_speculative_tokens
    if runtime.skip_sizes is None or passes == 1 or not runner.with_prefill:
        return drafts
    metrics.counts.draft_passes_added += passes - 1
    num_tokens = _local_result(runner, runner.decode_token_per_req, False, False)[0]
    mode, descriptor = runner.aclgraph_dispatcher.dispatch(BatchDescriptor(num_tokens=num_tokens, uniform_decode=False))
    instance.num_speculative_tokens = passes - 1  # dummy_run makes this many passes
    try:
        instance.dummy_run(
            num_tokens=num_tokens,
            with_prefill=False,
            skip_attn=True,
            aclgraph_runtime_mode=mode,
            batch_descriptor=descriptor,
        )
    finally:
        instance.num_speculative_tokens = passes
    return drafts


POINTS = (
    PatchPoint(
        unit="worker",
        module="vllm_ascend.worker.model_runner_v1",
        name="NPUModelRunner._sync_metadata_across_dp",
        wrapper=skip_all_reduce,
        signature="(self, num_tokens, with_prefill, enable_dbo)",
        why="An all_reduce on the device group, and a host wait for it, in every target and MTP draft step.",
        how="In skip: the local count, padded to the capture grid. In sync, and in profile runs: stock.",
        upstream="vllm-ascend#1857, vllm-ascend#4983",
        remove_when="Stock skips the all_reduce under conditions that hold on every rank.",
        versions="==0.11.0",
    ),
    PatchPoint(
        unit="worker",
        module="vllm_ascend.spec_decode.mtp_proposer",
        name="MtpProposer._propose",
        wrapper=level_draft_passes,
        signature=(
            "(self, target_token_ids, target_positions, target_hidden_states, target_slot_mapping, next_token_ids, "
            "cu_num_tokens, block_table, sampling_metadata, token_indices=None)"
        ),
        why="The number of draft passes depends on with_prefill, which is local once the all_reduce is gone.",
        how="In skip, after a batch with prefill: k - 1 dummy draft passes.",
        upstream="vllm#26086, vllm-ascend#2454",
        remove_when="Stock runs the same number of draft passes whatever is in the batch.",
        versions="==0.11.0",
    ),
)

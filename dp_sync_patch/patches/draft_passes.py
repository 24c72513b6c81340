# SPDX-License-Identifier: Apache-2.0
"""Draft passes: as many on every rank, and dummies that sample within their rows."""

from collections.abc import Callable
from typing import Any

from vllm.forward_context import BatchDescriptor

from dp_sync_patch import metrics, runtime
from dp_sync_patch.patches import PatchPoint
from dp_sync_patch.patches.metadata_sync import local_result


def level_draft_passes(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """In `skip`: make a batch with prefill run as many draft passes as the other ranks do.

    Stock's proposer stops after the first of k passes when with_prefill is set, on all ranks because the all_reduce
    spread the flag. With a local flag that rank would issue fewer MC2 operators than its peers, and they would hang.
    """
    runtime.in_draft_passes = True
    try:
        drafts = wrapped(*args, **kwargs)
        if runtime.skip_sizes is not None and instance.num_speculative_tokens > 1 and instance.runner.with_prefill:
            _run_missing_passes(instance)
        return drafts
    finally:
        runtime.in_draft_passes = False


def _run_missing_passes(proposer: Any) -> None:
    """As dummies, the way an idle rank runs them: no attention, no KV writes, result dropped."""
    runner = proposer.runner
    passes = proposer.num_speculative_tokens
    metrics.counts.draft_passes_added += passes - 1
    num_tokens = local_result(runner, runner.decode_token_per_req, False, False)[0]
    mode, descriptor = runner.aclgraph_dispatcher.dispatch(BatchDescriptor(num_tokens=num_tokens, uniform_decode=False))
    proposer.num_speculative_tokens = passes - 1  # dummy_run makes this many passes
    try:
        proposer.dummy_run(
            num_tokens=num_tokens,
            with_prefill=False,
            skip_attn=True,
            aclgraph_runtime_mode=mode,
            batch_descriptor=descriptor,
        )
    finally:
        proposer.num_speculative_tokens = passes


def sample_dummy_at_row_0(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """0.18.0, in every state: a drafter's dummy samples at its first row, as later versions do it.

    Stock leaves in `token_indices_to_sample` (int32, on the device) where this rank's last step sampled, and the dummy
    takes its hidden states there. After the last piece of a prompt that is behind the dummy's rows; the more so in
    `skip`, where it is not padded to the busiest rank. What is sampled is thrown away, so any row will do.
    """
    instance.token_indices_to_sample.fill_(0)
    return wrapped(*args, **kwargs)


POINTS = (
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
    PatchPoint(
        unit="worker",
        module="vllm_ascend.spec_decode.eagle_proposer",
        name="SpecDecodeBaseProposer.dummy_run",
        wrapper=sample_dummy_at_row_0,
        signature=(
            "(self, num_tokens, with_prefill=False, in_graph_capturing=False, num_reqs=0, num_tokens_across_dp=None, "
            "aclgraph_runtime_mode=<CUDAGraphMode.NONE: 0>, batch_descriptor=None, dummy_compute_logits=<function>, "
            "is_profile=False)"
        ),
        why="An idle rank's dummy samples where its last step did, which is out of bounds for the few rows it has.",
        how="The indices are set to 0, then stock.",
        upstream="vllm-ascend#9867, vllm-ascend#10080",
        remove_when="Support for 0.18.0 ends.",
        versions="==0.18.0",
    ),
)

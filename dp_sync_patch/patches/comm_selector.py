# SPDX-License-Identifier: Apache-2.0
"""The MC2-only assertion at the place where stock chooses how MoE layers communicate."""

from collections.abc import Callable
from typing import Any

from dp_sync_patch import metrics, runtime
from dp_sync_patch.errors import MC2OnlyError
from dp_sync_patch.patches import PatchPoint


def assert_mc2(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stock's choice, unchanged; in `skip` anything but MC2 outside a profile run raises before the forward pass.

    The bound is enforced on the scheduler, so this is the last line: peers that stay on MC2 would wait for this rank
    for ever, and falling back alone to the all_reduce would hang as well.
    """
    chosen = wrapped(*args, **kwargs)
    sizes = runtime.skip_sizes
    if sizes is not None and chosen.name != "MC2" and not instance.in_profile_run:
        num_tokens = args[0] if args else kwargs["num_tokens"]
        metrics.refused()
        raise MC2OnlyError(
            "DSP301",
            f"DP rank {instance.dp_rank}: a step of {num_tokens} tokens would use {chosen.name}, but the ranks agreed "
            f"on MC2 only, with at most {sizes.bound} tokens per DP rank",
        )
    return chosen


POINTS = (
    PatchPoint(
        unit="worker",
        module="vllm_ascend.worker.model_runner_v1",
        name="NPUModelRunner._select_moe_comm_method",
        wrapper=assert_mc2,
        signature="(self, num_tokens, with_prefill)",
        why="Without the all_reduce a rank that leaves MC2 alone hangs the whole EP group.",
        how="Stock's choice, then an assertion. The capacity that it reads is set to the agreed bound at start-up.",
        upstream="vllm-ascend#8240",
        remove_when="Stock checks the chosen method in every step while it skips.",
        versions="==0.11.0",
    ),
)

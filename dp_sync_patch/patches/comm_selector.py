# SPDX-License-Identifier: Apache-2.0
"""The MC2-only assertion at the place where stock chooses how MoE layers communicate."""

from collections.abc import Callable
from typing import Any

from dp_sync_patch import metrics, runtime
from dp_sync_patch.errors import MC2OnlyError
from dp_sync_patch.patches import Place, points_at


def assert_mc2(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stock's choice, unchanged; in `skip` anything but MC2 outside a profile run raises before the forward pass.

    The bound is enforced on the scheduler, so this is the last line: peers that stay on MC2 would wait for this rank
    for ever, and falling back alone to the all_reduce would hang as well.
    """
    chosen = wrapped(*args, **kwargs)
    sizes = runtime.skip_sizes
    if sizes is not None and not runtime.in_profile_run and getattr(chosen, "name", None) != "MC2":
        num_tokens = args[0] if args else kwargs["num_tokens"]
        rank = runtime.dp_rank() if instance is None else instance.dp_rank  # a function has no runner
        metrics.refused()
        raise MC2OnlyError(
            "DSP301",
            f"DP rank {rank}: a step of {num_tokens} tokens would use "
            f"{getattr(chosen, 'name', 'no MoE method')}, but the ranks agreed on MC2 only, with at most "
            f"{sizes.bound} tokens per DP rank",
        )
    return chosen


_RUNNER = "vllm_ascend.worker.model_runner_v1"
_SELECT = "(num_tokens, vllm_config, is_draft_model=False)"

POINTS = points_at(
    Place("==0.11.0", _RUNNER, "NPUModelRunner._select_moe_comm_method", "(self, num_tokens, with_prefill)"),
    Place("==0.12.0rc1", _RUNNER, "NPUModelRunner._select_moe_comm_method", "(self, num_tokens)"),
    Place(">=0.13.0", "vllm_ascend.ascend_forward_context", "select_moe_comm_method", _SELECT),
    Place(">=0.13.0", _RUNNER, "select_moe_comm_method", _SELECT),  # the same function, imported by name
    unit="worker",
    wrapper=assert_mc2,
    why="Without the all_reduce a rank that leaves MC2 alone hangs the whole EP group.",
    how="Stock's choice, then an assertion. The capacity that it reads is set to the agreed bound at start-up.",
    upstream="vllm-ascend#8240",
    remove_when="Stock checks the chosen method in every step while it skips.",
)

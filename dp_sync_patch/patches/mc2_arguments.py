# SPDX-License-Identifier: Apache-2.0
"""Arguments of the MC2 dispatch and combine operators: a fixed global_bs, no mask, distinct experts."""

from collections.abc import Callable
from typing import Any

import torch

from dp_sync_patch import metrics, runtime
from dp_sync_patch.errors import MC2OnlyError
from dp_sync_patch.patches import PatchPoint, Place, points_at
from dp_sync_patch.plan import State

_MODULE = "vllm_ascend.ops.moe.token_dispatcher"
_FUSED_MODULE = "vllm_ascend.ops.fused_moe.token_dispatcher"
_DISPATCH = "TokenDispatcherWithMC2.get_dispatch_mc2_kwargs"
_COMBINE = "TokenDispatcherWithMC2.get_combine_mc_kwargs"  # stock's spelling


def fix_dispatch_arguments(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """In `skip`: global_bs from the agreed bound, since 0 lays out the window by the local count; no x_active_mask,
    which the operator rejects for unequal counts (also right for equal ones, as in profile runs).

    In `sync` counts are equal, and hierarchical MC2 takes no others: it needs global_bs=0 and the mask, as every other
    version passes them. 0.12.0rc1 and 0.13.0 always pass a global_bs, and drop the mask.
    """
    arguments = wrapped(*args, **kwargs)
    sizes = runtime.skip_sizes
    if sizes is not None:
        rows = arguments["x"].shape[0]
        if rows > sizes.tokens_per_rank:
            metrics.refused()
            raise MC2OnlyError(
                "DSP302",
                f"EP rank {instance.ep_rank_id}: {rows} rows for dispatch, but the ranks agreed on at most "
                f"{sizes.tokens_per_rank}",
            )
        arguments["global_bs"] = sizes.global_bs
        arguments.pop("x_active_mask", None)
    elif _needs_uniform_arguments(instance, arguments):
        # Its combine has to be given the same one, and stock does not hand it on.
        instance.dp_sync_patch_mask = _mask(*args, **kwargs)
        arguments |= {"global_bs": 0, "x_active_mask": instance.dp_sync_patch_mask}
    return arguments


def _needs_uniform_arguments(instance: Any, arguments: dict[str, Any]) -> bool:
    # `need_expert_scale` is stock's word for hierarchical communication.
    return bool(arguments["global_bs"] and instance.need_expert_scale and runtime.state() is State.SYNC)


def _mask(hidden_states: Any, topk_weights: Any, topk_ids: Any, expert_map: Any, mc2_mask: Any, *_: Any) -> Any:
    return mc2_mask


def fix_combine_arguments(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The same two arguments as in the dispatch that this combine belongs to."""
    arguments = wrapped(*args, **kwargs)
    sizes = runtime.skip_sizes
    if sizes is not None:
        arguments["global_bs"] = sizes.global_bs
        arguments.pop("x_active_mask", None)
    elif _needs_uniform_arguments(instance, arguments):
        arguments |= {"global_bs": 0, "x_active_mask": instance.dp_sync_patch_mask}
    return arguments


def draw_distinct_experts(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """In `skip`, in a profile run: replace stock's balanced random experts by draws without repetition.

    Stock draws them independently, so a row can name one expert twice. The operator forbids that; with the mask of a
    stock dummy run no row was sent, without it every row is. All quantisation methods come through here.
    """
    if runtime.skip_sizes is None or not runtime.in_profile_run:
        return wrapped(*args, **kwargs)
    return _with_distinct_experts(wrapped, *args, **kwargs)


def _with_distinct_experts(
    wrapped: Callable[..., Any],
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if expert_map is not None:
        topk_ids = distinct_experts(topk_ids, len(expert_map))
    return wrapped(hidden_states, topk_weights, topk_ids, expert_map, *args, **kwargs)


def distinct_experts(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Random experts, distinct within each row, every expert equally likely.

    Args:
        topk_ids: [rows, top_k], only shape, dtype and device are used.
        num_experts: ids are drawn from [0, num_experts).

    Returns:
        a tensor like `topk_ids`.
    """
    rows, top_k = topk_ids.shape
    draws = torch.rand((rows, num_experts), device=topk_ids.device)
    return draws.topk(top_k, dim=-1).indices.to(topk_ids.dtype)


POINTS = (
    *points_at(
        Place(
            "==0.11.0",
            _MODULE,
            _DISPATCH,
            "(self, hidden_states, topk_weights, topk_ids, expert_map, global_redundant_expert_num=0)",
        ),
        Place(
            ">=0.12.0rc1,<=0.13.0",
            _FUSED_MODULE,
            _DISPATCH,
            "(self, hidden_states, topk_weights, topk_ids, expert_map, mc2_mask, global_redundant_expert_num=0)",
        ),
        Place(">=0.18.0", _FUSED_MODULE, _DISPATCH, "(self, token_dispatch_input)"),
        unit="worker",
        wrapper=fix_dispatch_arguments,
        why="global_bs=0 and an active mask are only legal while every rank passes the same number of rows. "
        "Hierarchical MC2 takes nothing else, and 0.12.0rc1 and 0.13.0 never pass them.",
        how="In skip: global_bs of the agreed bound, no mask, an assertion on the rows. In sync, with hierarchical "
        "MC2: global_bs=0 and the mask.",
        upstream="vllm-ascend#2719, vllm-ascend#8039",
        remove_when="Stock passes a global_bs from a bound that holds on every rank.",
    ),
    *points_at(
        Place("==0.11.0", _MODULE, _COMBINE, "(self, hidden_states)"),
        Place(">=0.12.0rc1,<=0.13.0", _FUSED_MODULE, _COMBINE, "(self, hidden_states, context_metadata)"),
        Place(">=0.18.0", _FUSED_MODULE, _COMBINE, "(self, hidden_states, combine_metadata)"),
        unit="worker",
        wrapper=fix_combine_arguments,
        why="Combine has to be given what its dispatch was given.",
        how="The same global_bs and mask.",
        upstream="vllm-ascend#2719, vllm-ascend#8039",
        remove_when="With get_dispatch_mc2_kwargs.",
    ),
    PatchPoint(
        unit="worker",
        module=_MODULE,
        name="TokenDispatcherWithMC2.token_dispatch",
        wrapper=draw_distinct_experts,
        signature=(
            "(self, hidden_states, topk_weights, topk_ids, expert_map=None, log2phy=None, "
            "global_redundant_expert_num=0, shared_experts=None, quantized_x_for_share=None, "
            "dynamic_scale_for_share=None, mc2_mask=None, apply_router_weight_on_input=False, with_quant=False, "
            "dynamic_eplb=False)"
        ),
        why="Profile runs draw experts with repetition, which the dispatch operator forbids.",
        how="In skip, in profile runs: distinct uniform draws of the same shape and dtype.",
        upstream="vllm-ascend#4736",
        remove_when="Stock's profile run draws without repetition (0.12.0rc1).",
        versions="==0.11.0",
    ),
)

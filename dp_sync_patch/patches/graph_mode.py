# SPDX-License-Identifier: Apache-2.0
"""One graph mode for all ranks in each step, where the stock configuration gives different batches different ones."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import get_dp_group

from dp_sync_patch import metrics, runtime
from dp_sync_patch.errors import MC2OnlyError
from dp_sync_patch.patches import PatchPoint, Place, points_at


def agree_on_graph_mode(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """In `skip` with graph level `sync`: the lowest mode that any rank has for the target pass of this step.

    A batch that is not a uniform decode batch has no FULL graph, and no rank can tell whether a peer has one. Every
    rank comes here once for each target pass, dummies and captures included, so every rank takes part. Draft passes
    are not in FULL graphs, and have the same mode everywhere. Profile runs have no graphs yet.

    Raises:
        MC2OnlyError: this rank has no graph of the common mode for its batch. The keys of a dispatcher rule it out: a
            size with a FULL graph has a PIECEWISE graph too wherever another batch can be PIECEWISE. Or as below.
    """
    chosen = expect_full_graph(wrapped, instance, args, kwargs)
    if not runtime.sync_graph_mode or runtime.in_profile_run or runtime.in_draft_passes:
        return chosen
    mode, _ = chosen
    common = CUDAGraphMode(lowest(mode.value))
    if common == mode:
        return chosen
    if common == CUDAGraphMode.NONE:
        return common, None
    descriptor = (args[0] if args else kwargs["batch_descriptor"]).non_uniform
    if descriptor not in instance.cudagraph_keys[common]:
        metrics.refused()
        raise MC2OnlyError(
            "DSP303",
            f"DP rank {runtime.dp_rank()}: a batch of {descriptor.num_tokens} tokens has no {common.name} graph, which "
            "the ranks agreed on for this step",
        )
    return common, descriptor


def expect_full_graph(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In `skip` with graph level `uniform` there is nothing to agree on: every batch of requests has a FULL graph.

    Raises:
        MC2OnlyError: this one has none: the scheduler of this rank is not under control. Nothing has been communicated.
    """
    chosen = wrapped(*args, **kwargs)
    if runtime.uniform_batches and chosen[0] != CUDAGraphMode.FULL and runtime.has_requests():
        batch = args[0] if args else kwargs.get("batch_descriptor", kwargs.get("num_tokens"))
        metrics.refused()
        raise MC2OnlyError(
            "DSP304",
            f"DP rank {runtime.dp_rank()}: a batch of {getattr(batch, 'num_tokens', batch)} tokens is no decode batch "
            "with a FULL graph, which the ranks agreed to have only",
        )
    return chosen


def lowest(mode: int) -> int:
    """The least of this number over the DP ranks, by an all_reduce on the CPU (gloo): the host waits for it."""
    number = torch.tensor(mode, dtype=torch.int32, device="cpu")
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MIN, group=get_dp_group().cpu_group)
    return int(number)


POINTS = (
    PatchPoint(
        unit="worker",
        module="vllm.v1.cudagraph_dispatcher",
        name="CudagraphDispatcher.dispatch",
        wrapper=agree_on_graph_mode,
        signature="(self, batch_descriptor)",
        why="With separate routines (FULL_DECODE_ONLY, FULL_AND_PIECEWISE) one rank may replay a graph for an MC2 call "
        "that another makes eagerly, which hangs on the A2. Stock 0.11.0 does not synchronise the mode at all.",
        how="In skip, graph level sync: stock's choice, then one int over the DP ranks (MIN). Level uniform: stock's "
        "choice, checked. Else stock.",
        upstream="vllm-ascend#13826, vllm-ascend#6011",
        remove_when="Every batch of a decode node has the same mode, or stock agrees on it while it skips.",
        versions="==0.11.0",
    ),
    *points_at(
        Place(
            "==0.13.0",
            "vllm.v1.cudagraph_dispatcher",
            "CudagraphDispatcher.dispatch",
            "(self, num_tokens, uniform_decode, has_lora, disable_full=False)",
        ),
        Place(
            ">=0.18.0",
            "vllm.v1.cudagraph_dispatcher",
            "CudagraphDispatcher.dispatch",
            "(self, num_tokens, uniform_decode=False, has_lora=False, num_active_loras=0, valid_modes=None, "
            "invalid_modes=None)",
        ),
        unit="worker",
        wrapper=expect_full_graph,
        why="Stock's skip is blind to the graph mode: a batch with prefill runs eagerly while an idle rank replays a "
        "graph for the same MC2 call.",
        how="In skip, graph level uniform: stock's choice, checked. Else stock.",
        upstream="vllm-ascend#13826",
        remove_when="Stock agrees on the graph mode while it skips.",
    ),
)

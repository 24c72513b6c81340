# SPDX-License-Identifier: Apache-2.0
"""One graph mode for all ranks in each step, where the stock configuration gives different batches different ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import get_dp_group

from dp_sync_patch import live, metrics, runtime
from dp_sync_patch.errors import MC2OnlyError
from dp_sync_patch.patches import PatchPoint, Place, metadata_sync, points_at


class _Posted(NamedTuple):
    mode: int
    lowest: torch.Tensor  # of all ranks, once the work is done
    work: torch.distributed.Work


_posted: _Posted | None = None
_looking_ahead = False


def post_graph_mode(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In `skip` with graph level `sync`: tell the other ranks this rank's mode before the inputs of the target pass are
    prepared, which the collective then has time for. What is chosen afterwards must not be lower."""
    global _posted, _looking_ahead
    if runtime.sync_graph_mode and not runtime.in_profile_run:
        _looking_ahead = True
        try:
            mode = live.graph_mode_of_step(instance, args[0] if args else kwargs["scheduler_output"])
        finally:
            _looking_ahead = False
        _posted = _post(mode.value)
    return wrapped(*args, **kwargs)


def agree_on_graph_mode(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """0.11.0, in `skip` with graph level `sync`: the lowest mode that any rank has for the target pass of this step.

    A batch that is not a uniform decode batch has no FULL graph, and no rank can tell whether a peer has one. Every
    rank comes here once for each target pass, dummies and captures included, so every rank takes part. Draft passes
    are not in FULL graphs, and have the same mode everywhere. Profile runs have no graphs yet.

    Raises:
        MC2OnlyError: this rank has no graph of the common mode for its batch. The keys of a dispatcher rule it out: a
            size with a FULL graph has a PIECEWISE graph too wherever another batch can be PIECEWISE. Or as below.
    """
    chosen = expect_full_graph(wrapped, instance, args, kwargs)
    if not runtime.sync_graph_mode or runtime.in_profile_run or runtime.in_draft_passes or _looking_ahead:
        return chosen
    mode, _ = chosen
    common = CUDAGraphMode(lowest(mode.value))
    if common == mode:
        return chosen
    if common == CUDAGraphMode.NONE:
        return common, None
    descriptor = (args[0] if args else kwargs["batch_descriptor"]).non_uniform
    if descriptor not in instance.cudagraph_keys[common]:
        raise _refusal(
            "DSP303",
            f"a batch of {descriptor.num_tokens} tokens has no {common.name} graph, which the "
            "ranks agreed on for this step",
        )
    return common, descriptor


def agree_in_metadata(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """From 0.13.0 on stock's metadata sync returns the mode of all ranks, and stock dispatches once more by it. What is
    left of the all_reduce in `skip` with graph level `sync` is that mode, in target passes; drafts follow it.

    Returns:
        Stock's tuple. The mode is its last entry, an int or a CUDAGraphMode.
    """
    *rest, mode = metadata_sync.count_pass(wrapped, instance, args, kwargs)
    if runtime.sync_graph_mode and not runtime.in_profile_run and not kwargs.get("is_draft_model"):
        mode = type(mode)(lowest(int(getattr(mode, "value", mode))))
    return (*rest, mode)


def expect_full_graph(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In `skip` with graph level `uniform` there is nothing to agree on: every batch of requests has a FULL graph.

    Raises:
        MC2OnlyError: this one has none: the scheduler of this rank is not under control. Nothing has been communicated.
    """
    if runtime.uniform_batches and not kwargs.get("uniform_decode", True) and runtime.step_is_uniform():
        # With drafts stock does not take the first piece of a prompt for a decode, whatever its size.
        kwargs = {**kwargs, "uniform_decode": True}
    chosen = wrapped(*args, **kwargs)
    if runtime.uniform_batches and chosen[0] != CUDAGraphMode.FULL and runtime.has_requests():
        batch = args[0] if args else kwargs.get("batch_descriptor", kwargs.get("num_tokens"))
        raise _refusal(
            "DSP304",
            f"a batch of {getattr(batch, 'num_tokens', batch)} tokens is no decode batch with a "
            "FULL graph, which the ranks agreed to have only",
        )
    return chosen


def lowest(mode: int) -> int:
    """The least of this number over the DP ranks, by an all_reduce on the CPU (gloo); the host waits for it.

    Raises:
        MC2OnlyError: another mode than this has been posted for the step, so that the other ranks may expect a graph
            that this one has not.
    """
    global _posted
    posted, _posted = _posted or _post(mode), None
    posted.work.wait()  # in any case: a group cannot be destroyed while one of its collectives is under way
    if mode < posted.mode:
        raise _refusal(
            "DSP305",
            f"told the other ranks of a {CUDAGraphMode(posted.mode).name} graph, and has none "
            f"({CUDAGraphMode(mode).name})",
        )
    return int(posted.lowest)


def _post(mode: int) -> _Posted:
    number = torch.tensor(mode, dtype=torch.int32, device="cpu")
    group = get_dp_group().cpu_group
    work = torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MIN, group=group, async_op=True)
    return _Posted(mode, number, work)


def _refusal(code: str, why: str) -> MC2OnlyError:
    metrics.refused()
    return MC2OnlyError(code, f"DP rank {runtime.dp_rank()}: {why}")


_RUNNER = "vllm_ascend.worker.model_runner_v1"

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
    *points_at(
        Place(
            "==0.13.0",
            _RUNNER,
            "NPUModelRunner._sync_metadata_across_dp",
            "(self, num_tokens, with_prefill=False, cudagraph_mode=0, is_draft_model=False)",
        ),
        Place(
            "==0.18.0",
            _RUNNER,
            "NPUModelRunner._sync_batch_across_dp",
            "(self, num_tokens_padded=None, cudagraph_mode=0, allow_dp_padding=False)",
        ),
        Place(
            "==0.23.0",
            _RUNNER,
            "NPUModelRunner._sync_metadata_across_dp",
            "(self, num_tokens, is_draft_model=False, cudagraph_mode=<CUDAGraphMode.NONE: 0>, allow_dp_padding=False)",
        ),
        unit="worker",
        wrapper=agree_in_metadata,
        why="As above; and what the skip saves, or what the all_reduce costs, is worth a number.",
        how="Stock's method, then the counters. In skip, graph level sync: one int over the DP ranks (MIN) in place of "
        "the mode.",
        upstream="vllm-ascend#13826, vllm-ascend#4983",
        remove_when="Stock agrees on the graph mode while it skips.",
    ),
    *points_at(
        Place(
            "==0.11.0", _RUNNER, "NPUModelRunner._prepare_inputs", "(self, scheduler_output, intermediate_tensors=None)"
        ),
        Place(">=0.18.0", _RUNNER, "NPUModelRunner._prepare_inputs", "(self, scheduler_output, num_scheduled_tokens)"),
        unit="worker",
        wrapper=post_graph_mode,
        why="Waiting for the other ranks' graph mode costs a round trip in each step.",
        how="In skip, graph level sync: the collective begins before the inputs are prepared.",
        upstream="vllm-ascend#13826",
        remove_when="With agree_on_graph_mode and agree_in_metadata.",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""The moments of the start-up protocol in a worker: before the model is built, after the KV cache is, the first step.

Between the last two its engine confirms the bound, see `engine_startup`.
"""

from collections.abc import Callable
from typing import Any

from dp_sync_patch import runtime
from dp_sync_patch.patches import PatchPoint, Place, points_at

_MODULE = "vllm_ascend.worker.model_runner_v1"


def latch_before_load(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The dispatchers and the graphs that are built from here on bake the verdict in."""
    runtime.latch(instance)
    return wrapped(*args, **kwargs)


def mark_profile_run(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All ranks profile together and with equal counts: stock synchronises there, and may leave MC2."""
    runtime.in_profile_run = True
    try:
        return wrapped(*args, **kwargs)
    finally:
        runtime.in_profile_run = False


def confirm_after_kv_cache(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Capture sizes and graph mode can still change up to here; the first warm-up or capture step comes next."""
    result = wrapped(*args, **kwargs)
    runtime.confirm_kv_cache(instance)
    return result


def refuse_unconfirmed(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """In `skip`, no step of a request and no dummy beside one before the engine has confirmed. Warm-up and captures
    come this way in no version."""
    runtime.refuse_unconfirmed()
    return wrapped(*args, **kwargs)


POINTS = (
    PatchPoint(
        unit="worker",
        module=_MODULE,
        name="NPUModelRunner.profile_run",
        wrapper=mark_profile_run,
        signature="(self)",
        why="Stock profiles with more tokens than a step may have, which can choose another method than MC2.",
        how="Marks the profile run, for the other wrappers.",
        upstream="vllm-ascend#8240",
        remove_when="With the all_reduce.",
        versions=">=0.11.0",
    ),
    PatchPoint(
        unit="worker",
        module=_MODULE,
        name="NPUModelRunner.load_model",
        wrapper=latch_before_load,
        signature="(self)",
        why="Stock has no verdict; it has to exist before the MoE dispatchers are built.",
        how="Facts -> Plan -> agreement of all ranks, then stock's load_model.",
        upstream="vllm-ascend#2766",
        remove_when="Stock decides the skip once at start-up and compares it across ranks.",
        versions=">=0.11.0",
    ),
    PatchPoint(
        unit="worker",
        module=_MODULE,
        name="NPUModelRunner.initialize_kv_cache",
        wrapper=confirm_after_kv_cache,
        signature="(self, kv_cache_config)",
        why="Capture sizes and graph mode are final only after KV-cache initialisation.",
        how="Stock's initialize_kv_cache, then a second round: all ranks stop if anything moved on one of them.",
        upstream="vllm-ascend#13826",
        remove_when="Stock compares capture sizes and graph mode across ranks.",
        versions=">=0.11.0",
    ),
    *points_at(
        Place(
            ">=0.11.0", _MODULE, "NPUModelRunner.execute_model", "(self, scheduler_output, intermediate_tensors=None)"
        ),
        Place("<=0.12.0rc1", "vllm_ascend.worker.worker_v1", "NPUWorker.execute_dummy_batch", "(self)"),
        Place(">=0.13.0", "vllm_ascend.worker.worker", "NPUWorker.execute_dummy_batch", "(self)"),
        unit="worker",
        wrapper=refuse_unconfirmed,
        why="An engine process without the overlay keeps to no bound, and its worker cannot see that.",
        how="In skip, before the engine has confirmed: an error. Else stock.",
        upstream="vllm-ascend#3448",
        remove_when="Stock bounds the tokens of a step on decode nodes.",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""The worst case, enforced on a decode node's scheduler: its token budget, and where it helps the shape of batches."""

from collections.abc import Callable
from typing import Any

from dp_sync_patch import metrics, runtime
from dp_sync_patch.errors import logger
from dp_sync_patch.patches import PatchPoint


def clamp_token_budget(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Before the first step: a step never holds more tokens than the plan counts with.

    A prompt without remote KV, or a request whose KV could not be loaded, is then computed here in chunks that fit
    MC2. The engine works the plan out by itself, without what only a worker sees, so it may clamp where the ranks
    decide for `sync` in the end; that costs throughput of such prompts, never correctness.
    """
    plan = runtime.engine_plan(instance.vllm_config)
    scheduler = instance.scheduler
    if plan is not None and plan.sizes.token_budget < scheduler.max_num_scheduled_tokens:
        logger.info(
            "DP rank %d: at most %d tokens per step instead of %d, so that every step fits MC2",
            instance.dp_rank,
            plan.sizes.token_budget,
            scheduler.max_num_scheduled_tokens,
        )
        scheduler.max_num_scheduled_tokens = plan.sizes.token_budget
    if plan is not None and plan.graph_level == "uniform":
        make_uniform(scheduler)
    metrics.start_in_workers(instance)
    return wrapped(*args, **kwargs)


def make_uniform(scheduler: Any) -> None:
    """Graph level `uniform`: one token of each request per step, which is what stock takes for a decode batch.

    Stock's own limit for long prompts does it; every scheduler that hands preempted requests back heeds it, for running
    and for waiting requests. The idle ranks' dummies are decode batches as well, so all ranks replay FULL graphs. In
    the worker `patches.graph_mode` holds every batch to it.
    """
    scheduler.scheduler_config.long_prefill_token_threshold = 1


POINTS = (
    PatchPoint(
        unit="engine",
        module="vllm.v1.engine.core",
        # Every scheduler class exists by then, and no step has run; the class of it does not matter here.
        name="DPEngineCoreProc.run_busy_loop",
        wrapper=clamp_token_budget,
        signature="(self)",
        why="The recompute scheduler bounds decode batches only; a prompt sent straight to a decode node does not.",
        how="Lowers max_num_scheduled_tokens to the plan's budget; with separate graph routines also one token of each "
        "request per step, by stock's own long_prefill_token_threshold. Then stock's loop.",
        upstream="vllm-ascend#3448",
        remove_when="Stock bounds the tokens of a step on decode nodes.",
        versions=">=0.11.0",
    ),
)

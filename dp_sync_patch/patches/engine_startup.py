# SPDX-License-Identifier: Apache-2.0
"""The last moment of the start-up protocol, in the engine: it enforces what its workers agreed on, and nothing else."""

from collections.abc import Callable
from typing import Any

from dp_sync_patch import metrics, runtime, settings
from dp_sync_patch.errors import SkipRequiredError, logger
from dp_sync_patch.patches import Place, points_at
from dp_sync_patch.patches.scheduler_bound import keep_to


def confirm_with_workers(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Once the scheduler exists, and before the engine reports that it is ready: no step has run, all graphs exist.

    Raises:
        AgreementError: on all ranks alike, see `runtime.confirm_engine`.
        SettingsError, SkipRequiredError: see there.
    """
    wrapped(*args, **kwargs)
    if instance.vllm_config.parallel_config.data_parallel_size == 1:
        return  # nothing to skip
    try:
        _confirm(instance)
    except BaseException:
        # From here on stock raises no more, and 0.23.0's engine process would stay, waiting for its workers.
        instance.model_executor.shutdown()
        raise


def _confirm(engine: Any) -> None:
    configured = settings.load(engine.vllm_config)
    dp_rank = engine.vllm_config.parallel_config.data_parallel_rank
    in_force = _ask_workers(engine)
    if in_force:
        scheduler, plan = engine.scheduler, in_force[0]
        if configured.mode != "off":
            keep_to(scheduler, plan, dp_rank)
        kept = (configured, scheduler.max_num_scheduled_tokens, plan.graph_level)
        engine.model_executor.collective_rpc(runtime.confirm_engine, args=kept)
    elif configured.mode == "require":
        what = f"mode=require in the engine of DP rank {dp_rank}, and its workers do not skip"
        raise SkipRequiredError("DSP204", what)
    if configured.mode != "off":
        metrics.start_in_workers(engine)


def _ask_workers(engine: Any) -> list[Any]:
    """The plans of those workers in which the skip is in force: of all, or of none."""
    try:
        answers = engine.model_executor.collective_rpc(runtime.plan_in_force)
    except Exception as error:  # noqa: BLE001  such as workers without the package, which cannot skip
        logger.error(
            "DSP210 the workers do not say whether they skip; if they do, they end at their first step: %s", error
        )
        return []
    return [plan for plan in answers if plan is not None]


_SIGNATURE = "(self, vllm_config, executor_class, log_stats, executor_fail_callback=None"

POINTS = points_at(
    # Ray copies inherited methods of an engine into a class of its own; a constructor is reached through super().
    Place("<=0.13.0", "vllm.v1.engine.core", "EngineCore.__init__", f"{_SIGNATURE})"),
    Place(">=0.18.0", "vllm.v1.engine.core", "EngineCore.__init__", f"{_SIGNATURE}, include_finished_set=False)"),
    unit="engine",
    wrapper=confirm_with_workers,
    why="The recompute scheduler bounds decode batches only; a prompt sent straight to a decode node does not.",
    how="Stock's, then it asks its workers. In skip: lowers max_num_scheduled_tokens to the agreed budget; with "
    "separate graph routines also one token of each request per step, by stock's own long_prefill_token_threshold. "
    "Then a third round of all ranks over that. With mode=off only the round, so that no worker skips.",
    upstream="vllm-ascend#3448",
    remove_when="Stock bounds the tokens of a step on decode nodes.",
)

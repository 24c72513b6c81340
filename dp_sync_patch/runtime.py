# SPDX-License-Identifier: Apache-2.0
"""The state of this process: installs the hooks, latches one verdict, answers `status`.

Wrappers read `skip_sizes`; None means stock behaviour. `sync_graph_mode` or `uniform_batches` can be set beside it.
Stock modules are imported inside functions that only run in processes that have them.
"""

import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dp_sync_patch import agreement, facts, import_hooks, live, settings, stock
from dp_sync_patch.errors import (
    AgreementError,
    DpSyncPatchError,
    SkipRequiredError,
    StandDownError,
    logger,
)
from dp_sync_patch.facts import Facts
from dp_sync_patch.patches import STAND_INS, TRIGGERS, points_of, registry
from dp_sync_patch.plan import Plan, Refusal, Sizes, State, concerns, make_plan
from dp_sync_patch.settings import Settings


@dataclass(frozen=True)
class _Latched:
    settings: Settings
    facts: Facts
    plan: Plan
    state: State
    verdict: agreement.Verdict | None  # None: nothing to agree about
    rank: int
    world_size: int


skip_sizes: Sizes | None = None
sync_graph_mode = False
uniform_batches = False
in_draft_passes = False  # set by `patches.draft_passes`
in_profile_run = False  # set by `patches.startup`; all ranks profile together
unconfirmed = False  # the skip is in force, and the engine of this worker has not said that it keeps to the bound
_latched: _Latched | None = None
_runner: Any = None  # the model runner that the skip is in force for
_starts = 0  # engines of this process that were decided for; their rounds must not see each other
_hooked: set[str] = set()
_armed = False
_stood_down: list[str] = []
_warned: set[str] = set()
# What the log says of the skip beside its numbers.
_GRAPH_LEVELS = {
    "one": "",
    "uniform": "; decode batches only, so that every step is a FULL graph: a prompt without remote KV is computed one "
    "token per step (with k drafts, 1 + k)",
    "sync": "; the ranks agree on the graph mode of every step",
}


def install() -> None:
    """Arm the post-import hooks; a repeated call changes nothing. Never raises: vLLM only logs a plugin that fails to
    import, and goes on without it. Bad settings are raised by the plugin's `register`, which calls this once more."""
    global _armed
    try:
        mode = settings.load().mode
    except DpSyncPatchError as error:
        logger.error("%s; nothing is patched", error)
        return
    _armed = True
    for unit, name in TRIGGERS.items():
        # An engine that is switched off still has to see to it that none of its workers skips.
        if mode == "off" and unit != "engine":
            continue
        if unit not in _hooked:
            _hooked.add(unit)
            for each in (name, *STAND_INS[unit]):
                import_hooks.when_imported(each, partial(_on_import, unit))
        # A second install after uninstall() has no import to wait for.
        elif registry.units.get(unit) is None and name in sys.modules and not import_hooks.is_half_made(name):
            _on_import(unit)


def _on_import(unit: str) -> None:
    """Apply a unit; any misfit leaves this process as stock made it, with one loud line (an error in `require`)."""
    if not _armed or registry.units.get(unit) == "applied":
        return
    try:
        entry = stock.require()
        # A worker relies on the engine's clamp: what does not fit there must not skip here.
        units = ("engine", "worker") if unit == "worker" else (unit,)
        points = {name: points_of(name, entry.vllm_ascend) for name in units}
        for point in (point for name in units for point in points[name]):
            if import_hooks.is_half_made(point.module):
                # A worker imports its model runner, whose hook this may be.
                import_hooks.when_imported(point.module, partial(_on_import, unit))
                return
        for name in units:
            if name == "worker" and live.model_is_built():
                raise StandDownError("DSP008", "loaded too late: the MoE dispatchers of this process exist already")
            if registry.apply(name, points[name]):
                logger.debug("unit %s applied", name)
    except StandDownError as error:
        registry.units.setdefault(unit, str(error))
        if settings.load().mode == "require":
            logger.error("%s; mode=require", error)
            raise
        if str(error) not in _stood_down:
            _stood_down.append(str(error))
        if settings.load().mode != "off":
            warn_once(f"{error}; nothing is patched, this process runs stock vllm-ascend")


def uninstall() -> int:
    """Restore every patched attribute by identity. Returns how many there were.

    Raises:
        ForeignWrapperError: somebody else wrapped one of them since; nothing is undone.
        DpSyncPatchError: the skip is in force; peers rely on it until this process ends.
    """
    global _armed, _latched
    if skip_sizes is not None:
        raise DpSyncPatchError("DSP010", "the skip is in force; undoing it on one rank would hang the others")
    count = registry.undo()
    _armed = False
    _latched = None
    _stood_down.clear()
    return count


def _read_facts(vllm_config: Any, **known: Any) -> Facts:
    from vllm_ascend.utils import is_moe_model

    return facts.read(vllm_config, stock.require(), is_moe=is_moe_model(vllm_config), **known)


def latch(runner: Any) -> None:
    """First round, in NPUModelRunner before load_model: decide for the engine of this runner, together with all ranks.

    Raises:
        SettingsError, SkipRequiredError: see there.
        AgreementError: a second runner in this process needs another decision, and one of them skips; or the store is
            gone.
    """
    global _latched, _starts
    configured = settings.load(runner.vllm_config)
    rank, world_size = _process_group()
    found = _read_worker_facts(runner, live.mc2_tokens_capacity(runner), world_size)
    plan = make_plan(found, configured.mode, _not_intact(), graph_mode=configured.graph_mode)
    if _latched is not None:
        if _comparable(found) == _comparable(_latched.facts):
            if _latched.state is State.SKIP and runner is not _runner:
                _starts += 1
                _put_in_force(runner, _latched.state, _latched.plan)
            return
        if State.SKIP in (_latched.state, plan.state):
            raise AgreementError("DSP205", "another model runner with another configuration in this process")

    _starts += 1
    verdict = None
    if concerns(found):
        verdict = _agree("start", _record(configured, found, plan), configured, rank, world_size)
    state = settle(plan.state, verdict, own_skip=stock.require().own_skip)
    _latched = _Latched(configured, found, plan, state, verdict, rank, world_size)
    _report(_latched)
    if configured.mode == "require" and state is not State.SKIP:
        raise SkipRequiredError("DSP204", f"mode=require, but: {'; '.join(_why(_latched))}")
    _put_in_force(runner, state, plan)


def _agree(
    round_name: str, record: dict[str, Any], configured: Settings, rank: int, world_size: int
) -> agreement.Verdict:
    """`agreement.decide` through torch's store, which lives in the process of rank 0.

    Raises:
        AgreementError: the store is gone. No rank goes on then: nobody knows what rank 0 has decided.
    """
    from torch.distributed import DistError

    try:
        return agreement.decide(
            _store(),
            record,
            round_name=f"{round_name}-{_starts}",
            rank=rank,
            world_size=world_size,
            timeout_s=configured.agreement_timeout_s,
        )
    except DistError as error:
        what = f"rank {rank} lost the key-value store in the process of rank 0: {error}"
        raise AgreementError("DSP207", what) from error


def settle(planned: State, verdict: agreement.Verdict | None, *, own_skip: bool) -> State:
    """What is in force after the first round.

    Args:
        verdict: of all ranks; None where there was nothing to agree about.
        own_skip: as in `stock.Stock`.

    Raises:
        AgreementError: nothing is known of some ranks, and without the overlay they follow stock's own skip while the
            others wait for them in the all_reduce.
    """
    if verdict is None or verdict.agreed:
        return planned
    if not own_skip:
        return min(planned, State.SYNC)
    if verdict.code != "DSP201":  # more than a difference between ranks that have all answered
        raise AgreementError(verdict.code, f"{verdict.why}; without the overlay they would skip alone")
    # Stock skips by itself, on a rank that is switched off as well.
    return State.SYNC


def confirm_kv_cache(runner: Any) -> None:
    """Second round, after KV-cache initialisation: nothing the verdict rests on may have moved, on any rank.

    Raises:
        AgreementError: on all ranks alike, before the first warm-up or capture step.
    """
    if _latched is None or _latched.state is not State.SKIP:
        return
    first = _latched
    found = _read_worker_facts(runner, first.facts.mc2_tokens_capacity, first.world_size)
    plan = make_plan(found, first.settings.mode, _not_intact(), graph_mode=first.settings.graph_mode)
    moved: list[str] = []
    if plan.state is not State.SKIP:
        moved.extend(str(reason) for reason in plan.reasons)
    else:
        for name in ("sizes", "graph_level"):
            now, then = getattr(plan, name), getattr(first.plan, name)
            if now != then:
                moved.append(f"{name} {now} instead of {then}")
    capacity = live.mc2_tokens_capacity(runner)
    if capacity != first.plan.sizes.bound:
        moved.append(f"mc2_tokens_capacity {capacity} instead of {first.plan.sizes.bound}")
    record = {"moved": "; ".join(moved), **_record(first.settings, found, plan)}
    _agree_again(first, "kv-cache", record, moved, "DSP206", "the configuration moved after start-up")


def plan_in_force(worker: Any) -> Plan | None:
    """For the engine, in each of its workers: what it has to keep to; None where the ranks do not skip."""
    return _latched.plan if _latched is not None and _latched.state is State.SKIP else None


def confirm_engine(worker: Any, configured: Settings, token_budget: int, graph_level: str) -> None:
    """Third round, for the engine in each of its workers, once the scheduler exists: what all engines keep to.

    Args:
        configured: the engine's.
        token_budget: tokens that the engine's scheduler may put into one step.
        graph_level: what the scheduler shapes its batches for, see `Plan`.

    Raises:
        AgreementError: on all ranks alike; none of them has made a serving step in `skip`.
    """
    global unconfirmed
    if _latched is None or _latched.state is not State.SKIP:
        return
    first = _latched
    engine, own = configured.values(), first.settings.values()
    differs = [
        f"{name}={configured.describe(name)} in the engine process of DP rank {dp_rank()}, and "
        f"{first.settings.describe(name)} in its worker"
        for name in own
        if engine[name] != own[name]
    ]
    if not differs:  # else these follow
        if token_budget > first.plan.sizes.token_budget:
            differs.append(f"the scheduler of DP rank {dp_rank()} allows {token_budget} tokens per step")
        if graph_level != first.plan.graph_level:
            differs.append(f"the scheduler of DP rank {dp_rank()} keeps to graph level {graph_level}")
    record = {
        "differs": "; ".join(differs),
        "engine": {"settings": engine, "token_budget": token_budget, "graph_level": graph_level},
        **_record(first.settings, first.facts, first.plan),
    }
    _agree_again(first, "engine", record, differs, "DSP208", "engine and workers have to be set alike")
    unconfirmed = False


def _agree_again(
    first: _Latched, round_name: str, record: dict[str, Any], wrong: list[str], code: str, what: str
) -> None:
    """A later round: all ranks go on as agreed, or all of them stop.

    Args:
        wrong: what is, on this rank. It is in the record, so that every rank gets to know it.
    """
    verdict = _agree(round_name, record, first.settings, first.rank, first.world_size)
    if verdict.code in ("DSP202", "DSP203"):  # ranks that did not come may be set like this one
        missed = f"{verdict.why}, in the round {round_name!r} of the start-up"
        raise AgreementError(verdict.code, "; ".join([missed, *wrong]))
    if wrong or not verdict.agreed:
        raise AgreementError(code, f"{what}: {'; '.join([*wrong, verdict.why] if verdict.why else wrong)}")


def refuse_unconfirmed() -> None:
    """Before anything is communicated in a step.

    Raises:
        AgreementError: nothing keeps the scheduler of this worker to the bound that the other ranks rely on.
    """
    if unconfirmed:
        raise AgreementError(
            "DSP209",
            f"DP rank {dp_rank()}: the ranks skip, and the engine process of this rank has not confirmed that it keeps "
            "to their bound; it has to load the overlay as well",
        )


def _put_in_force(runner: Any, state: State, plan: Plan) -> None:
    """In `skip`: selector and captures follow the agreed bound, so that no MC2 call can exceed global_bs."""
    global skip_sizes, sync_graph_mode, uniform_batches, unconfirmed, _runner
    if state is not State.SKIP:
        return
    sizes = plan.sizes
    live.set_mc2_tokens_capacity(runner, sizes.bound)
    if sizes.capture_sizes and tuple(sorted(runner.compilation_config.cudagraph_capture_sizes)) != sizes.capture_sizes:
        # Graphs above the bound can never be replayed, and above the capacity they would be captured with another
        # communication method.
        live.set_capture_sizes(runner, sizes.capture_sizes)
    skip_sizes = sizes
    sync_graph_mode = plan.graph_level == "sync"
    uniform_batches = plan.graph_level == "uniform"
    unconfirmed = True
    _runner = runner


def _read_worker_facts(runner: Any, capacity: int, world_size: int) -> Facts:
    return _read_facts(
        runner.vllm_config,
        soc=live.device_type(),
        mc2_tokens_capacity=capacity,
        process_group_size=world_size,
    )


def _not_intact() -> list[Refusal]:
    """Stock's own worker patches run after ours; whatever they replaced is no longer under our control."""
    return [
        Refusal("DSP009", f"{target} was replaced after it was patched", "another object", "our wrapper", "")
        for target in registry.foreign(wrapped_too=False)
    ]


def _process_group() -> tuple[int, int]:
    import torch.distributed

    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _store() -> agreement.Store:
    from torch.distributed.distributed_c10d import _get_default_store

    store: agreement.Store = _get_default_store()
    return store


def _comparable(found: Facts) -> dict[str, Any]:
    """Facts without what `_put_in_force` changes."""
    changed = ("capture_sizes", "mc2_tokens_capacity")
    return {name: value for name, value in asdict(found).items() if name not in changed}


def _record(configured: Settings, found: Facts, plan: Plan) -> dict[str, Any]:
    """What must be equal on all ranks."""
    from dp_sync_patch import __version__

    return {
        "version": __version__,
        "settings": configured.values(),
        "facts": asdict(found),
        "plan": {
            "state": plan.state.name,
            "reasons": [str(reason) for reason in plan.reasons],
            "sizes": asdict(plan.sizes),
            "graph_level": plan.graph_level,
        },
    }


def _why(latched: _Latched) -> list[str]:
    reasons = [str(reason) for reason in latched.plan.reasons]
    if latched.verdict is not None and not latched.verdict.agreed:
        reasons.append(f"{latched.verdict.code} {latched.verdict.why}")
    return reasons


def state() -> State | None:
    """The state in force; None before the verdict."""
    return _latched.state if _latched is not None else None


def dp_rank() -> int | None:
    """Of this process; None before the verdict."""
    if _latched is None:
        return None
    found = _latched.facts
    return _latched.rank // (found.tensor_parallel_size * found.pipeline_parallel_size)


def has_requests() -> bool:
    """Whether the model runner holds any: warm-up and capture runs, and those of a node without work, have none."""
    return _runner is not None and _runner.input_batch.num_reqs > 0


def step_is_uniform() -> bool:
    """Whether there are requests, with as many tokens each as a decode step has; once their inputs are prepared."""
    return has_requests() and live.is_uniform_step(_runner)


def warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        logger.warning(text)


def reported_state() -> State | None:
    """The state in force; None before the verdict, and on all but the first rank of each DP rank."""
    return _latched.state if _latched is not None and _reports(_latched) else None


def _reports(latched: _Latched) -> bool:
    return latched.rank % (latched.facts.tensor_parallel_size * latched.facts.pipeline_parallel_size) == 0


def _report(latched: _Latched) -> None:
    """One INFO line for the skip, one WARNING per reason against it; from the first rank of each DP rank."""
    if not _reports(latched):
        return
    if any(source == settings.ADDITIONAL for _, source in latched.settings.sources):
        logger.info(
            "DSP404 vllm-ascend 0.27.1rc1 and later refuse additional_config.dp_sync_patch; "
            "kv_transfer_config.kv_connector_extra_config has room for it on every version"
        )
    if latched.state is State.SKIP:
        sizes = latched.plan.sizes
        logger.info(
            "DSP000 skip: no DP metadata all_reduce on rank %d; bound %d tokens per DP rank, global_bs %d, EP size "
            "%d%s",
            latched.rank,
            sizes.bound,
            sizes.global_bs,
            latched.facts.ep_world_size,
            _GRAPH_LEVELS[latched.plan.graph_level],
        )
        return
    for reason in _why(latched):
        logger.warning("%s; in force on rank %d: %s", reason, latched.rank, _in_force(latched.state))


def _in_force(state: State) -> str:
    how = ", its own skip switched off" if state is State.SYNC and stock.require().own_skip else ""
    return f"{state.name.lower()} (stock vllm-ascend{how})"


def status() -> dict[str, Any]:
    """Everything about this process: versions, settings with their source, points, plan, verdict and counters."""
    from dp_sync_patch import metrics

    configured = _latched.settings if _latched is not None else settings.load()
    sources = dict(configured.sources)
    result: dict[str, Any] = {
        "pid": os.getpid(),
        "stock": stock.installed(),
        "supported": stock.supported(),
        "stock_supported": stock.current() is not None,
        "settings": {name: {"value": value, "source": sources[name]} for name, value in configured.values().items()},
        "units": {unit: registry.units.get(unit, "waiting for " + module) for unit, module in TRIGGERS.items()},
        "points": registry.describe(),
        "stood_down": list(_stood_down),
        "state": "undecided",
        "reasons": [],
        "plan": None,
        "verdict": None,
        "counters": metrics.counts.values(),
    }
    if _latched is not None:
        result["state"] = _latched.state.name.lower()
        result["reasons"] = _why(_latched)
        plan = _latched.plan
        result["plan"] = {"state": plan.state.name.lower(), "graph_level": plan.graph_level, **asdict(plan.sizes)}
        result["verdict"] = asdict(_latched.verdict) if _latched.verdict is not None else None
    elif not _armed or configured.mode == "off":
        result["state"] = "off"
    return result

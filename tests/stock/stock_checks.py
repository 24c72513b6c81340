# SPDX-License-Identifier: Apache-2.0
"""Runs inside fresh processes: real stock 0.11.0 objects, with the overlay's wrappers called the way stock calls them.

Each function returns JSON values; the assertions are in test_behaviour.py. Objects whose constructors want a device or
a process group are made with `object.__new__` and given exactly the attributes that the stock code under test reads.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from toy_configs import DENSE, MOE

import dp_sync_patch
import dp_sync_patch.runtime as runtime
from dp_sync_patch.command_line import mc2_tokens_capacity
from dp_sync_patch.errors import DpSyncPatchError
from dp_sync_patch.plan import Sizes, State, make_plan


def engine_config(folder: str, *, dense: bool = False, **changes: Any) -> Any:
    """The VllmConfig that stock makes of a decode node's arguments, on the virtual NPU."""
    from vllm.engine.arg_utils import EngineArgs

    model = Path(folder) / ("dense" if dense else "moe")
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(DENSE if dense else MOE))
    additional = {"recompute_scheduler_enable": True, **changes.pop("additional_config", {})}
    arguments: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "data_parallel_size": 4,
        "enable_expert_parallel": True,
        "enforce_eager": True,
        "max_model_len": 32768,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 4096,
        "enable_prefix_caching": False,
        "kv_transfer_config": {"kv_connector": "SharedStorageConnector", "kv_role": "kv_consumer"},
        # Stock keeps the first AscendConfig of a process unless it is told otherwise.
        "additional_config": {**additional, "refresh": True},
    }
    arguments.update(changes)
    for name, value in list(arguments.items()):
        if value is None:
            del arguments[name]
    if "kv_transfer_config" in arguments:
        from vllm.config import KVTransferConfig

        arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    import vllm_ascend.utils

    # Stock caches these per process as well.
    vllm_ascend.utils._IS_MOE_MODEL = None
    vllm_ascend.utils._ENABLE_SP = None
    return EngineArgs(**arguments).create_engine_config()


def decisions(folder: str) -> dict[str, Any]:
    """What the overlay reads from the configuration of variants, and what it would do with each."""
    from vllm.v1.engine.core import EngineCore

    from dp_sync_patch.patches.engine_startup import confirm_with_workers

    graphs = {"enforce_eager": None}
    variants: dict[str, dict[str, Any]] = {
        "eager": {},
        "decode_max_num_seqs": {"additional_config": {"ascend_scheduler_config": {"decode_max_num_seqs": 20}}},
        "ascend_scheduler": {
            "additional_config": {"ascend_scheduler_config": {"enabled": True}},
            "max_num_batched_tokens": 32768,
        },
        "async_scheduling": {"async_scheduling": True},
        "no_recompute": {"additional_config": {"recompute_scheduler_enable": False}, "max_num_batched_tokens": 16},
        "piecewise": {**graphs, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 40]}},
        "piecewise_default": {**graphs},
        "piecewise_short": {**graphs, "compilation_config": {"cudagraph_capture_sizes": [8, 4, 2, 1]}},
    }
    found: dict[str, Any] = {}

    def engine_of(config: Any, facts: Any, plan: Any, state: State) -> Any:
        """An engine of this configuration with a worker in which that state is in force: the budget that it keeps to,
        and what it confirms."""
        runtime._latched = runtime._Latched(runtime.settings.load(config), facts, plan, state, None, 0, 4)
        engine = object.__new__(EngineCore)
        confirmed: list[Any] = []

        def collective_rpc(method: Any, args: tuple[Any, ...] = ()) -> list[Any]:
            if method is runtime.confirm_engine:
                confirmed.append(args[1:])
                return [None]
            return [method(None, *args)]

        engine.model_executor = SimpleNamespace(collective_rpc=collective_rpc)
        engine.vllm_config, engine.log_stats = config, False
        budget = config.scheduler_config.max_num_batched_tokens
        limits = SimpleNamespace(long_prefill_token_threshold=0)
        engine.scheduler = SimpleNamespace(max_num_scheduled_tokens=budget, num_spec_tokens=0, scheduler_config=limits)
        confirm_with_workers(lambda: None, engine, (), {})
        runtime._latched = None
        return [engine.scheduler.max_num_scheduled_tokens, limits.long_prefill_token_threshold, confirmed]

    def record(name: str, **changes: Any) -> None:
        config = engine_config(folder, **changes)
        facts = runtime._read_facts(
            config,
            soc="A3",
            mc2_tokens_capacity=mc2_tokens_capacity(config),
            process_group_size=config.parallel_config.data_parallel_size,
        )
        plan = make_plan(facts)
        found[name] = {
            "facts": asdict(facts),
            "state": plan.state.name,
            "codes": [reason.code for reason in plan.reasons],
            "bound": plan.sizes.bound,
            "in force": {state.name: engine_of(config, facts, plan, state) for state in State},
        }

    for name, changes in variants.items():
        record(name, **changes)
    return found


def chunking(folder: str) -> dict[str, Any]:
    """A 16000-token prompt through each known scheduler with the clamp in force: tokens of every step."""
    from vllm import SamplingParams
    from vllm.utils import resolve_obj_by_qualname
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    from dp_sync_patch.patches.scheduler_bound import keep_to

    init_none_hash(hash)
    import torch

    found: dict[str, Any] = {}
    for name, changes in {
        "recompute": {},
        "vllm": {"additional_config": {"recompute_scheduler_enable": False}},
        "async": {"additional_config": {"recompute_scheduler_enable": False}, "async_scheduling": True},
        "ascend_chunked": {
            "additional_config": {"ascend_scheduler_config": {"enabled": True, "enable_chunked_prefill": True}}
        },
    }.items():
        config = engine_config(folder, **changes)
        config.cache_config.num_gpu_blocks = 1000
        alone = copy.copy(config)
        alone.kv_transfer_config = None  # the prompt comes without remote KV, so no connector takes part
        layers = KVCacheGroupSpec(["layer"], FullAttentionSpec(128, 1, 64, torch.bfloat16, False))
        scheduler_cls = config.scheduler_config.scheduler_cls
        scheduler = (resolve_obj_by_qualname(scheduler_cls) if isinstance(scheduler_cls, str) else scheduler_cls)(
            alone, KVCacheConfig(1000, [], [layers]), StructuredOutputManager(alone)
        )
        before = scheduler.max_num_scheduled_tokens
        known = {"soc": "A3", "process_group_size": 4, "mc2_tokens_capacity": mc2_tokens_capacity(config)}
        plan = make_plan(runtime._read_facts(config, **known))
        keep_to(scheduler, plan, 0)
        clamped = scheduler.max_num_scheduled_tokens
        # Without recompute the plan's budget is max_num_batched_tokens; the attribute has to work there as well.
        scheduler.max_num_scheduled_tokens = 16
        scheduler.add_request(Request("long", [1] * 16000, SamplingParams(max_tokens=1), None, None))
        steps = []
        while sum(steps) < 16000:
            steps.append(scheduler.schedule().total_num_scheduled_tokens)
            assert steps[-1] > 0, f"{name} does not go on after {sum(steps)} tokens"
        found[name] = {
            "scheduler": type(scheduler).__name__,
            "before": before,
            "clamped": clamped,
            "largest": max(steps),
            "total": sum(steps),
            "state": plan.state.name,
        }
    return found


_SKIP = Sizes(token_budget=16, bound=16, tokens_per_rank=16, global_bs=64, capture_sizes=(), window_mb=0)


def sync(folder: str) -> dict[str, Any]:
    """Stock's sync function through the wrapper, and vLLM's own assertion on what it returns."""
    import torch
    import vllm_ascend.ops  # noqa: F401
    from vllm.forward_context import DPMetadata
    from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

    config = engine_config(folder)
    config.parallel_config.data_parallel_rank = 1
    runner = object.__new__(NPUModelRunner)
    runner.dp_size, runner.dp_rank = 4, 1
    runtime.in_profile_run = False
    runner.use_aclgraph = False
    runner.vllm_config = config

    runtime.skip_sizes = _SKIP
    first = runner._sync_metadata_across_dp(3, False, False)
    second = runner._sync_metadata_across_dp(num_tokens=3, with_prefill=True, enable_dbo=False)
    counts = first[1]
    metadata = DPMetadata.make(config.parallel_config, None, 3, counts)
    # Stock code may write into the tensor; that must not reach a later step.
    counts.fill_(99)
    third = runner._sync_metadata_across_dp(3, False, False)

    graph_config = engine_config(folder, enforce_eager=None, compilation_config={"cudagraph_capture_sizes": [2, 8, 16]})
    runner.vllm_config, runner.use_aclgraph = graph_config, True
    runner.aclgraph_batch_sizes = list(reversed(graph_config.compilation_config.cudagraph_capture_sizes))
    padded = [runner._sync_metadata_across_dp(n, False, False)[0] for n in (1, 2, 3, 16, 17)]

    runtime.skip_sizes = None
    runner.dp_size = 1
    alone = runner._sync_metadata_across_dp(3, True, False)
    runner.dp_size = 4
    reached_stock = _reaches_stock(lambda: runner._sync_metadata_across_dp(3, True, False))
    runtime.skip_sizes = _SKIP
    runtime.in_profile_run = True
    profile_reaches_stock = _reaches_stock(lambda: runner._sync_metadata_across_dp(3, True, False))
    return {
        "first": [first[0], first[2], first[3]],
        "second": [second[0], second[2], second[3]],
        "dtype": str(counts.dtype),
        "device": str(counts.device),
        "shape": list(counts.shape),
        "is_tensor": isinstance(counts, torch.Tensor),
        "max": int(metadata.max_tokens_across_dp_cpu),
        "fresh": third[1].tolist(),
        "padded": padded,
        "alone": list(alone),
        "reached_stock": reached_stock,
        "profile_reaches_stock": profile_reaches_stock,
    }


def _reaches_stock(call: Any) -> bool:
    """Whether stock's own all_reduce is asked for its group, which this process does not have."""
    try:
        call()
    except AssertionError as error:
        return "data parallel group is not initialized" in str(error)
    return False


def selector(folder: str) -> dict[str, Any]:
    """Stock's choice with and without the skip, inside and outside a profile run."""
    import vllm_ascend.ops
    import vllm_ascend.utils
    from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

    vllm_ascend.utils.init_ascend_soc_version()
    runner = object.__new__(NPUModelRunner)
    runner.vllm_config = engine_config(folder)
    runner.parallel_config = runner.vllm_config.parallel_config
    runner.dp_rank = 2
    runtime.in_profile_run = False
    runner.mc2_tokens_capacity = 16
    found: dict[str, Any] = {"stock": [runner._select_moe_comm_method(n, False).name for n in (16, 17)]}
    runtime.skip_sizes = _SKIP
    found["skip"] = runner._select_moe_comm_method(16, True).name
    for name, call in {
        "positional": lambda: runner._select_moe_comm_method(17, False),
        "keyword": lambda: runner._select_moe_comm_method(num_tokens=17, with_prefill=False),
    }.items():
        try:
            call()
        except DpSyncPatchError as error:
            found[name] = [type(error).__name__, str(error)]
    runtime.in_profile_run = True
    found["profile"] = runner._select_moe_comm_method(17, True).name
    return found


def mc2_dispatcher(rows: int, **more: Any) -> Any:
    """0.11.0's, without the device that its constructor wants: the attributes that its arguments are made of."""
    import torch
    from vllm_ascend.ops.moe.token_dispatcher import TokenDispatcherWithMC2

    dispatcher = object.__new__(TokenDispatcherWithMC2)
    dispatcher.__dict__.update(
        with_quant=False,
        moe_all_to_all_group_name="group",
        ep_world_size=4,
        ep_rank_id=1,
        need_extra_args=True,
        a3_need_extra_args=True,
        enable_dispatch_v2=True,
        need_expert_scale=False,
        mc2_mask=torch.ones(rows, dtype=torch.bool),
        **more,
    )
    return dispatcher


def operator_arguments(folder: str) -> dict[str, Any]:
    """Arguments of dispatch and combine as stock builds them, with and without the skip."""
    import torch
    import vllm_ascend.ops
    import vllm_ascend.worker.model_runner_v1  # noqa: F401

    def arguments(rows: int) -> dict[str, Any]:
        dispatcher = mc2_dispatcher(
            rows,
            assist_info_for_combine=None,
            ep_recv_counts=None,
            expand_scales=None,
            expert_map=torch.arange(16),
            topk_ids=torch.zeros(rows, 8, dtype=torch.int32),
            topk_weights=torch.ones(rows, 8),
            output=[None] * 7,
        )
        hidden = torch.zeros(rows, 4)
        both = {
            "dispatch": dispatcher.get_dispatch_mc2_kwargs(
                hidden, dispatcher.topk_weights, dispatcher.topk_ids, dispatcher.expert_map
            ),
            "combine": dispatcher.get_combine_mc_kwargs(hidden),
        }
        return {
            kind: {"global_bs": given["global_bs"], "mask": "x_active_mask" in given, "names": sorted(given)}
            for kind, given in both.items()
        }

    found: dict[str, Any] = {"stock": arguments(3)}
    runtime.skip_sizes = _SKIP
    found["skip"] = arguments(3)
    found["largest"] = arguments(16)
    try:
        arguments(17)
    except DpSyncPatchError as error:
        found["too_many"] = [type(error).__name__, str(error)]
    return found


def forced_load_balance(folder: str) -> dict[str, Any]:
    """What reaches the dispatch operator in a profile run: stock's draws, and the overlay's."""
    import torch
    import vllm_ascend.ops
    import vllm_ascend.worker.model_runner_v1  # noqa: F401
    from vllm.forward_context import ForwardContext, override_forward_context
    from vllm_ascend.ops.common_fused_moe import AscendUnquantizedFusedMoEMethod
    from vllm_ascend.ops.moe.token_dispatcher import TokenDispatcherWithMC2

    engine_config(folder)  # stock's layers read the AscendConfig of the process
    rows, top_k, experts = 64, 8, 16

    class Recorded(Exception):
        """Carries the ids that the dispatch operator would get."""

    class Dispatcher(TokenDispatcherWithMC2):
        def __init__(self) -> None:
            """No process group here: nothing is sent."""

        def get_dispatch_mc2_kwargs(self, hidden_states: Any, weights: Any, ids: Any, *args: Any) -> Any:
            raise Recorded(ids)

    class Method:
        """The forward context's communication method, reduced to what stock's fused_experts hands on."""

        def fused_experts(self, **given: Any) -> Any:
            return Dispatcher().token_dispatch(
                hidden_states=given["hidden_states"],
                topk_weights=given["topk_weights"],
                topk_ids=given["topk_ids"],
                expert_map=given["expert_map"],
            )

    def draw(seed: int, in_profile_run: bool) -> Any:
        torch.manual_seed(seed)
        moe = object.__new__(AscendUnquantizedFusedMoEMethod)
        moe.__dict__["dynamic_eplb"] = False
        context = ForwardContext({}, {}, 0)
        context.moe_comm_method = Method()
        context.in_profile_run = runtime.in_profile_run = in_profile_run
        context.weight_prefetch_method = None
        with override_forward_context(context):
            try:
                moe.apply(
                    layer=SimpleNamespace(w13_weight=None, w2_weight=None),
                    x=torch.zeros(rows, 4),
                    use_grouped_topk=False,
                    top_k=top_k,
                    router_logits=torch.arange(experts, 0, -1.0).repeat(rows, 1),
                    renormalize=True,
                    # The plain routing of the native path; the fused one is an NPU operator.
                    custom_routing_function=_top_k_routing,
                    global_num_experts=experts,
                    expert_map=torch.arange(experts),
                    enable_force_load_balance=in_profile_run,
                )
            except Recorded as recorded:
                return recorded.args[0]
        raise AssertionError("nothing was dispatched")

    def figures(in_profile_run: bool) -> dict[str, Any]:
        draws = [draw(seed, in_profile_run) for seed in range(10)]
        distinct = [len(set(row)) for ids in draws for row in ids.tolist()]
        values = torch.cat(draws)
        return {
            "rows_with_repeats": sum(count < top_k for count in distinct),
            "shape": list(draws[0].shape),
            "dtype": str(draws[0].dtype),
            "range": [int(values.min()), int(values.max())],
            "per_expert": torch.bincount(values.flatten().long(), minlength=experts).tolist(),
            "first_row": draws[0][0].tolist(),
        }

    found: dict[str, Any] = {"stock": figures(True)}
    runtime.skip_sizes = _SKIP
    found["skip"] = figures(True)
    found["outside_profile"] = figures(False)
    return found


def _top_k_routing(hidden_states: Any, gating_output: Any, topk: int, renormalize: bool, **_: Any) -> Any:
    import torch

    weights, ids = torch.topk(gating_output.softmax(-1), topk, dim=-1)
    return weights, ids.to(torch.int32)


class Node:
    """A node of one process that counts as four ranks, with torch's own store: this process is rank 0, and a test
    writes the records of the others, as an equal rank would write them."""

    def __init__(self) -> None:
        import vllm_ascend.ops
        import vllm_ascend.utils
        from torch.distributed import HashStore

        vllm_ascend.utils.init_ascend_soc_version()
        self.store = HashStore()
        runtime._store = lambda: self.store
        runtime._process_group = lambda: (0, 4)
        self.rounds: list[str] = []
        self._published: dict[str, Any] | None = {}
        self._verdict: dict[str, Any] | None = None
        self._agree, runtime._agree = runtime._agree, self._observed

    def _observed(self, name: str, record: dict[str, Any], *rest: Any) -> Any:
        """`_agree` of an equal rank beside the others, in the round that it is in."""
        name_in_store = f"{name}-{runtime._starts}"
        self.rounds.append(name_in_store)
        if self._verdict is not None:
            self.store.set(f"dp_sync_patch/{name_in_store}/verdict", json.dumps(self._verdict))
        if self._published is not None:
            for rank in (1, 2, 3):
                self.publish(name_in_store, rank, {**record, **self._published})
        return self._agree(name, record, *rest)

    def publish(self, round_name: str, rank: int, record: dict[str, Any]) -> None:
        self.store.set(f"dp_sync_patch/{round_name}/rank/{rank}", json.dumps(record, sort_keys=True))

    def peers(self, changes: dict[str, Any] | None = None, *, verdict: dict[str, Any] | None = None) -> None:
        """What the other ranks answer from now on: the same but for `changes`; `verdict` is written beforehand."""
        self._published, self._verdict = changes or {}, verdict

    def no_peers(self) -> None:
        self._published = self._verdict = None

    def again(self, name: str) -> None:
        """The same round has not been yet."""
        for what in ("verdict", *(f"rank/{rank}" for rank in range(4))):
            self.store.delete_key(f"dp_sync_patch/{name}/{what}")

    def runner(self, config: Any) -> Any:
        from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

        runner = object.__new__(NPUModelRunner)
        runner.vllm_config = config
        runner.compilation_config = config.compilation_config
        runner.mc2_tokens_capacity = mc2_tokens_capacity(config)
        runner.aclgraph_batch_sizes = list(reversed(config.compilation_config.cudagraph_capture_sizes))
        return runner


def steps_of(runner: Any) -> list[str]:
    """What a step of a request and a dummy beside one end with, on objects that cannot make one."""
    from vllm_ascend.worker.worker_v1 import NPUWorker

    found = []
    for call in (lambda: runner.execute_model(None), lambda: object.__new__(NPUWorker).execute_dummy_batch()):
        try:
            call()
        except DpSyncPatchError as error:
            found.append(f"{type(error).__name__}: {error}")
        except AttributeError:
            found.append("stock")
    return found


def latching(folder: str) -> dict[str, Any]:
    """All three rounds with a real one-process store, capture sizes above the bound, and what is refused afterwards."""
    from vllm.config import CUDAGraphMode

    node = Node()
    config = engine_config(
        folder,
        enforce_eager=None,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 40]},
        additional_config={"dp_sync_patch": {"agreement_timeout_s": 5, "graph_mode": "sync"}},
    )
    runner = node.runner(config)
    stock_capacity = runner.mc2_tokens_capacity
    configured = runtime.settings.load(config)

    def publish_peers(round_name: str, **more: Any) -> None:
        """What equal ranks make of this configuration by themselves."""
        facts = runtime._read_worker_facts(runner, stock_capacity, 4)
        for rank in (1, 2, 3):
            node.publish(round_name, rank, {**more, **runtime._record(configured, facts, make_plan(facts))})

    node.no_peers()  # but for those
    found: dict[str, Any] = {"undecided": [runtime.plan_in_force(None), steps_of(runner)]}
    publish_peers("start-1")
    runtime.latch(runner)
    found |= {
        "status": dp_sync_patch.status(),
        "stock_capacity": stock_capacity,
        "capacity": runner.mc2_tokens_capacity,
        "captures": list(config.compilation_config.cudagraph_capture_sizes),
        "batch_sizes": list(runner.aclgraph_batch_sizes),
        "padded": [config.pad_for_cudagraph(n) for n in (1, 3, 16)],
    }
    publish_peers("kv-cache-1", moved="")
    runtime.confirm_kv_cache(runner)
    found["unconfirmed"] = [runtime.unconfirmed, steps_of(runner)]
    plan = runtime.plan_in_force(None)
    assert plan is not None
    engine = {"settings": configured.values(), "token_budget": plan.sizes.token_budget, "graph_level": plan.graph_level}
    first = runtime._latched
    assert first is not None
    for rank in (1, 2, 3):  # the facts as of the first round, before captures and capacity followed the bound
        record = runtime._record(configured, first.facts, make_plan(first.facts))
        node.publish("engine-1", rank, {"differs": "", "engine": engine, **record})
    runtime.confirm_engine(None, configured, plan.sizes.token_budget, plan.graph_level)
    found["confirmed"] = [runtime.unconfirmed, steps_of(runner), plan.sizes.token_budget, plan.graph_level]
    runtime.latch(runner)  # a second load_model of the same runner keeps the verdict
    found["latched again"] = [runtime.unconfirmed, steps_of(runner)]
    found["rounds"] = list(node.rounds)
    found["undo"] = _error_of(dp_sync_patch.uninstall)
    other = engine_config(folder, max_num_seqs=8)
    found["another_runner"] = _error_of(lambda: runtime.latch(node.runner(other)))

    # The same round again, after something moved on this rank; the others say that nothing has moved on them.
    node.again("kv-cache-1")
    node.peers({"moved": ""})
    runner.mc2_tokens_capacity = stock_capacity
    found["moved"] = _error_of(lambda: runtime.confirm_kv_cache(runner))

    # As when an attention backend does not support one FULL graph for all batches.
    node.again("kv-cache-1")
    runner.mc2_tokens_capacity = found["capacity"]
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    found["other_mode"] = _error_of(lambda: runtime.confirm_kv_cache(runner))
    return found


_SILENT = {"agreed": False, "code": "DSP203", "why": "no verdict from rank 0 within 120 s"}


def later_rounds(folder: str) -> dict[str, Any]:
    """The second and the third round where ranks are missing, where rank 0 was late, and where something differs."""
    from dataclasses import replace

    node = Node()
    config = engine_config(folder, additional_config={"dp_sync_patch": {"agreement_timeout_s": 0.3}})
    runner = node.runner(config)
    runtime.latch(runner)
    assert runtime.skip_sizes is not None
    own = runtime.settings.load(config)
    budget = runtime.skip_sizes.token_budget

    def confirm(configured: Any = own, tokens: int = budget, graph_level: str = "one") -> None:
        runtime.confirm_engine(None, configured, tokens, graph_level)

    found: dict[str, Any] = {}

    def attempt(name: str, round_name: str, call: Any) -> None:
        error = _error_of(call)
        found[name] = [error, runtime.unconfirmed, _error_of(runtime.refuse_unconfirmed)]
        node.again(round_name)
        node.peers()
        runtime.unconfirmed = True  # as before

    second, third = lambda: runtime.confirm_kv_cache(runner), confirm
    for name, round_name, call in (("kv-cache", "kv-cache-1", second), ("engine", "engine-1", third)):
        node.no_peers()
        attempt(f"{name}: missing ranks", round_name, call)
        node.peers(verdict=_SILENT)
        attempt(f"{name}: a silent rank 0", round_name, call)
        node.peers({"version": "0.0.9"})
        attempt(f"{name}: ranks differ", round_name, call)
        attempt(f"{name}: equal", round_name, call)
    # A difference that this rank sees by itself comes first.
    for name, changes in {
        "mode": {"mode": "require"},
        "graph_mode": {"graph_mode": "sync"},
        "mode and graph_mode": {"mode": "off", "graph_mode": "uniform"},
    }.items():
        section = {"agreement_timeout_s": 0.3, **changes}
        other = SimpleNamespace(kv_transfer_config=None, additional_config={"dp_sync_patch": section})
        node.peers({"differs": ""})
        attempt(f"engine: another {name}", "engine-1", lambda other=other: confirm(runtime.settings.load(other)))
    node.peers({"differs": ""})
    attempt("engine: a larger budget", "engine-1", lambda: confirm(tokens=budget + 1))
    attempt("engine: a smaller budget", "engine-1", lambda: confirm(tokens=budget - 1))
    node.peers({"differs": ""})
    attempt("engine: another graph level", "engine-1", lambda: confirm(graph_level="uniform"))
    # The engine of another rank.
    engine = {"settings": {**own.values(), "mode": "off"}, "token_budget": budget, "graph_level": "one"}
    node.peers({"differs": "mode='off' (environment) in the engine process of DP rank 1", "engine": engine})
    attempt("engine: another rank's", "engine-1", third)
    latched = runtime._latched
    assert latched is not None
    runtime._latched = replace(latched, state=State.SYNC)
    before = list(node.rounds)
    attempt("engine: nothing is in force", "engine-1", third)
    found["no round"] = before == node.rounds
    return found


def second_engines(folder: str, *names: str) -> dict[str, Any]:
    """Model runners of several engines in this process, one after another: the state, the error, the rounds."""
    node = Node()
    variants: dict[str, dict[str, Any]] = {
        "skip": {},
        "another skip": {"max_num_seqs": 8},
        "sync": {"enable_lora": True, "max_loras": 1},
        "another sync": {"enable_lora": True, "max_num_seqs": 8, "max_loras": 1},
        "dense": {"dense": True, "enable_expert_parallel": None},
        "another dense": {"dense": True, "enable_expert_parallel": None, "max_num_seqs": 8},
        "one rank": {"data_parallel_size": 1},
        "another of one rank": {"data_parallel_size": 1, "max_num_seqs": 8},
    }
    found: dict[str, Any] = {"steps": []}
    for name in names:
        if name == "sync":
            node.peers({"rank 3": "differs"})  # the first verdict is of ranks that differ
        runner = node.runner(engine_config(folder, **variants[name]))
        error = _error_of(lambda runner=runner: runtime.latch(runner))
        latched = runtime._latched
        assert latched is not None
        found["steps"].append(
            {
                "error": error,
                "state": dp_sync_patch.status()["state"],
                "max_num_seqs": latched.facts.max_num_seqs,
                "agreed": latched.verdict.agreed if latched.verdict else None,
                "rounds": list(node.rounds),
                "unconfirmed": runtime.unconfirmed,
            }
        )
        node.peers()
    return found


def refusing(folder: str) -> dict[str, Any]:
    """A latch that ends in `sync`: log lines, and `require`."""
    import vllm_ascend.ops
    import vllm_ascend.utils
    from torch.distributed import HashStore, TCPStore
    from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

    vllm_ascend.utils.init_ascend_soc_version()
    runtime._store = HashStore
    runtime._process_group = lambda: (0, 4)

    def latch(**changes: Any) -> Any:
        runtime._latched = None
        config = engine_config(folder, **changes)
        runner = object.__new__(NPUModelRunner)
        runner.vllm_config = config
        runner.mc2_tokens_capacity = mc2_tokens_capacity(config)
        error = _error_of(lambda: runtime.latch(runner))
        assert runtime.skip_sizes is None
        return {"error": error, "state": dp_sync_patch.status()["state"], "reasons": dp_sync_patch.status()["reasons"]}

    def latch_without_store() -> Any:
        server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        client = TCPStore("127.0.0.1", server.port, None, False)
        del server
        runtime._store = lambda: client
        return latch()

    short = {"agreement_timeout_s": 0.2}
    return {
        "missing_peers": latch(additional_config={"dp_sync_patch": short}),
        "require": latch(additional_config={"dp_sync_patch": {**short, "mode": "require"}}),
        "off": latch(additional_config={"dp_sync_patch": {**short, "mode": "off"}}),
        "one_rank": latch(data_parallel_size=1),
        "unknown_key": latch(additional_config={"dp_sync_patch": {"modus": "auto"}}),
        "no_store": latch_without_store(),
        "state": State.SYNC.name,
    }


def _error_of(call: Any) -> str:
    try:
        call()
    except DpSyncPatchError as error:
        return f"{type(error).__name__}: {error}"
    return ""

# SPDX-License-Identifier: Apache-2.0
"""Stock configuration -> Facts. The only module that reads the configuration objects of vLLM and vllm-ascend.

Nothing here depends on requests or steps. `additional_config` is read as given instead of through `AscendConfig`, of
which stock keeps the first one of a process.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dp_sync_patch.stock import Stock

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_EPLB = (
    *("dynamic_eplb", "expert_map_path", "expert_map_record_path"),
    *("init_redundancy_expert", "num_redundant_experts"),
)
_DEFAULT_BUFFSIZE_MB = 200  # HCCL's own default


@dataclass(frozen=True)
class Facts:
    """What a decision may rest on; equal on all ranks of a sound deployment.

    A feature that is either on or off is a text: the names of what switched it on, empty when it is off.
    """

    stock_version: str
    is_moe: bool
    model_type: str
    model_without_mc2: bool
    data_parallel_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    prefill_context_parallel_size: int
    decode_context_parallel_size: int
    process_group_size: int
    executor_backend: str
    elastic_ep: str
    enable_expert_parallel: bool
    worker_cls: str
    worker_cls_known: bool
    model_runner_v2: str
    soc: str  # A2, A3 or another name of stock's device type
    a2_max_local_experts: int  # 0 = stock has no such limit
    mc2_tokens_capacity: int  # tokens per DP rank, as stock latched it
    hidden_size: int
    num_experts: int  # 0 = not found in the model's configuration
    experts_per_token: int  # 0 = not found
    hccl_buffsize_mb: int  # 0 = not a positive number
    hierarchy: str
    fused_mc2: str
    kv_role: str | None
    scheduler_cls: str
    scheduler_known: bool
    recompute_requested: bool
    recompute_in_effect: bool
    splits_prompts: bool
    max_num_batched_tokens: int
    max_num_seqs: int
    decode_max_num_seqs: int
    num_speculative_tokens: int
    speculative_method: str | None
    speculative_method_known: bool
    max_draft_passes: int  # see stock.Stock
    graph_mode: str  # name of CUDAGraphMode, NONE when the runner does not use graphs
    graph_mode_known: bool
    drafts_follow_graph_mode: bool  # in this graph mode, see stock.Stock
    uniform_with_drafts: bool  # see stock.Stock; and nothing in the model wants prompts cut at places of its own
    separate_routines: bool
    capture_sizes: tuple[int, ...]  # ascending
    compile_sizes: tuple[int, ...]  # ascending
    lmhead_tensor_parallel_size: int
    oproj_tensor_parallel_size: int
    mlp_tensor_parallel: str
    embedding_tensor_parallel: str
    sequence_parallel: str
    flashcomm2: str
    balance_scheduling: str
    shared_expert_dp: str
    dbo: str
    eplb: str
    lora: str

    @property
    def query_len(self) -> int:
        """Tokens of one request in a uniform decode step."""
        return 1 + self.num_speculative_tokens

    @property
    def ep_world_size(self) -> int:
        """Ranks of the MC2 group (one per TP rank of each DP rank)."""
        return self.data_parallel_size * self.tensor_parallel_size


def read(
    vllm_config: Any,
    stock: Stock,
    *,
    is_moe: bool,
    soc: str,
    mc2_tokens_capacity: int,
    process_group_size: int,
    environ: Mapping[str, str] | None = None,
) -> Facts:
    """Read one VllmConfig. Options that a version does not have are off there; stock ignores them as well.

    Args:
        is_moe: result of vllm-ascend's own `is_moe_model`.
        soc, mc2_tokens_capacity, process_group_size: see there; no configuration has them.
        environ: the environment; the one of this process by default.
    """
    environ = os.environ if environ is None else environ
    parallel = vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    compilation = vllm_config.compilation_config
    model = vllm_config.model_config
    speculative = vllm_config.speculative_config
    kv_transfer = vllm_config.kv_transfer_config
    additional: Mapping[str, Any] = vllm_config.additional_config or {}

    # From vllm 0.12.0 on the name is only filled in when it is asked for.
    chosen = scheduler.get_scheduler_cls() if hasattr(scheduler, "get_scheduler_cls") else scheduler.scheduler_cls
    scheduler_cls = _qualified(chosen)
    # As NPUModelRunner._use_aclgraph does; 3 is CompilationLevel.PIECEWISE, called CompilationMode.VLLM_COMPILE later.
    level = compilation.mode if hasattr(compilation, "mode") else compilation.level
    uses_graphs = compilation.cudagraph_mode.name != "NONE" and level == 3 and not model.enforce_eager
    graph_mode = compilation.cudagraph_mode.name if uses_graphs else "NONE"
    chunked = "chunked_prefill_enabled" if hasattr(scheduler, "chunked_prefill_enabled") else "enable_chunked_prefill"
    method = speculative.method if speculative else None

    def variables(*names: str) -> list[str]:
        # Stock reads some of these as numbers and some as "true"; everything that is not plainly off counts as on.
        set_ = [name for name in names if environ.get(name, "").strip().lower() not in ("", "0", "false")]
        return list(filter(stock.reads, set_))

    def options(*names: str, group: str = "") -> list[str]:
        values = (additional.get(group) or {}) if group else additional
        set_ = [name for name in names if values.get(name) and stock.reads(name) and stock.reads(group)]
        return [".".join(filter(None, ("additional_config", group, name))) for name in set_]

    def tensor_parallel(name: str) -> int:
        # Flat keys on 0.11.0, one group of them later.
        fine = "finegrained_tp_config"
        return ((additional.get(fine) or {}) if stock.reads(fine) else additional).get(name) or 1

    def when(condition: Any, name: str) -> list[str]:
        return [name] if condition else []

    return Facts(
        stock_version=stock.vllm_ascend,
        is_moe=is_moe,
        model_type=str(model.hf_config.model_type),
        model_without_mc2=model.hf_config.model_type in stock.models_without_mc2,
        data_parallel_size=parallel.data_parallel_size,
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        prefill_context_parallel_size=getattr(parallel, "prefill_context_parallel_size", 1),
        decode_context_parallel_size=parallel.decode_context_parallel_size,
        process_group_size=process_group_size,
        executor_backend=_qualified(parallel.distributed_executor_backend),
        elastic_ep=", ".join(
            variables("VLLM_ELASTIC_EP_SCALE_UP_LAUNCH")
            + when(getattr(parallel, "enable_elastic_ep", False), "--enable-elastic-ep")
        ),
        enable_expert_parallel=parallel.enable_expert_parallel,
        worker_cls=_qualified(parallel.worker_cls),
        worker_cls_known=_qualified(parallel.worker_cls) == stock.worker_cls,
        model_runner_v2=", ".join(variables("VLLM_USE_V2_MODEL_RUNNER")),
        soc=soc,
        a2_max_local_experts=stock.a2_max_local_experts,
        mc2_tokens_capacity=mc2_tokens_capacity,
        hidden_size=model.get_hidden_size(),
        num_experts=_first_number(model.hf_text_config, _EXPERTS),
        experts_per_token=_first_number(model.hf_text_config, _EXPERTS_PER_TOKEN),
        hccl_buffsize_mb=_buffsize_mb(environ.get("HCCL_BUFFSIZE")),
        hierarchy=", ".join(
            when(
                environ.get("HCCL_INTRA_ROCE_ENABLE") == "0" and environ.get("HCCL_INTRA_PCIE_ENABLE") == "1",
                "HCCL_INTRA_PCIE_ENABLE=1 with HCCL_INTRA_ROCE_ENABLE=0",
            )
            + options("enable_mc2_hierarchy_comm")
        ),
        fused_mc2=", ".join(variables("VLLM_ASCEND_ENABLE_FUSED_MC2") + options("enable_fused_mc2")),
        kv_role=kv_transfer.kv_role if kv_transfer is not None and kv_transfer.kv_connector is not None else None,
        scheduler_cls=scheduler_cls,
        scheduler_known=scheduler_cls in stock.schedulers,
        recompute_requested=bool(additional.get("recompute_scheduler_enable", False)),
        recompute_in_effect=scheduler_cls in stock.recompute_schedulers,
        splits_prompts=bool(getattr(scheduler, chunked)) and not scheduler.disable_chunked_mm_input,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_num_seqs=scheduler.max_num_seqs,
        decode_max_num_seqs=getattr(scheduler, "decode_max_num_seqs", 0),
        num_speculative_tokens=speculative.num_speculative_tokens if speculative else 0,
        speculative_method=method,
        speculative_method_known=method is None or method in stock.speculative_methods,
        max_draft_passes=stock.max_draft_passes,
        graph_mode=graph_mode,
        graph_mode_known=graph_mode in stock.graph_modes,
        drafts_follow_graph_mode=graph_mode in stock.drafts_follow_in
        and (bool(scheduler.async_scheduling) or not stock.drafts_follow_with_async_only),
        uniform_with_drafts=stock.uniform_with_drafts and not (model.is_multimodal_model or model.is_hybrid),
        separate_routines=uses_graphs and compilation.cudagraph_mode.separate_routine(),
        # Stock keeps this list in falling order, but reads entry 0 as the largest wherever a user gave it.
        capture_sizes=tuple(sorted(compilation.cudagraph_capture_sizes or ())),
        compile_sizes=tuple(sorted(size for size in compilation.compile_sizes or () if isinstance(size, int))),
        lmhead_tensor_parallel_size=tensor_parallel("lmhead_tensor_parallel_size"),
        oproj_tensor_parallel_size=tensor_parallel("oproj_tensor_parallel_size"),
        mlp_tensor_parallel=", ".join(
            variables("VLLM_ASCEND_ENABLE_MLP_OPTIMIZE")
            + options("mlp_tensor_parallel_size", group="finegrained_tp_config")
        ),
        embedding_tensor_parallel=", ".join(
            options("embedding_tensor_parallel_size", "olora_tensor_parallel_size", group="finegrained_tp_config")
        ),
        sequence_parallel=", ".join(
            variables("VLLM_ASCEND_ENABLE_FLASHCOMM1", "VLLM_ASCEND_ENABLE_FLASHCOMM")
            + options("enable_flashcomm1")
            + [
                f"pass_config.{name}"
                for name in ("enable_sequence_parallelism", "enable_sp")
                if getattr(compilation.pass_config, name, False)
            ]
        ),
        flashcomm2=", ".join(
            variables("VLLM_ASCEND_FLASHCOMM2_PARALLEL_SIZE", "VLLM_ASCEND_ENABLE_FLASHCOMM2_OSHARED")
            + options("enable_flashcomm2_parallel_size", "layer_sharding")
        ),
        balance_scheduling=", ".join(
            variables("VLLM_ASCEND_BALANCE_SCHEDULING") + options("enable_balance_scheduling")
        ),
        shared_expert_dp=", ".join(options("enable_shared_expert_dp")),
        dbo=", ".join(variables("VLLM_ASCEND_ENABLE_DBO") + when(parallel.enable_dbo, "--enable-dbo")),
        eplb=", ".join(
            variables("DYNAMIC_EPLB", "EXPERT_MAP_RECORD")
            + options(
                "dynamic_eplb", "expert_map_path", "expert_map_record_path", "init_redundancy_expert", "mix_placement"
            )
            + options(*_EPLB, group="eplb_config")
            + when(parallel.enable_eplb, "--enable-eplb")
        ),
        lora=", ".join(when(vllm_config.lora_config is not None, "--enable-lora")),
    )


def _qualified(value: Any) -> str:
    """A class, a dotted name or None -> a stable text."""
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def _first_number(config: Any, names: tuple[str, ...]) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _buffsize_mb(text: str | None) -> int:
    if text is None:
        return _DEFAULT_BUFFSIZE_MB
    return int(text) if text.strip().isdecimal() else 0

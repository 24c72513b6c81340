# SPDX-License-Identifier: Apache-2.0
"""What the tests expect of the installed stock version, written down apart from the overlay's own tables.

Field cases 33 and 43: the plugins of each version by name, and the right list of targets.
"""

from __future__ import annotations

from dp_sync_patch import stock

STOCK = stock.require()
VERSION = STOCK.vllm_ascend

_RUNNER = "vllm_ascend.worker.model_runner_v1"
_WORKER_FILE = "worker_v1" if VERSION in ("0.11.0", "0.12.0rc1") else "worker"
_DUMMY = f"vllm_ascend.worker.{_WORKER_FILE}:NPUWorker.execute_dummy_batch"
_STARTUP = ("profile_run", "load_model", "initialize_kv_cache", "execute_model")
_METHODS = (*(f"{_RUNNER}:NPUModelRunner.{name}" for name in _STARTUP), _DUMMY)
_SYNC = f"{_RUNNER}:NPUModelRunner._sync_metadata_across_dp"
_SELECTOR_METHOD = f"{_RUNNER}:NPUModelRunner._select_moe_comm_method"
_SELECTORS = ("vllm_ascend.ascend_forward_context:select_moe_comm_method", f"{_RUNNER}:select_moe_comm_method")
_SKIPS = tuple(
    f"{module}:should_skip_allreduce_across_dp_group"
    for module in ("vllm_ascend.utils", _RUNNER, "vllm_ascend.ops.fused_moe.token_dispatcher")
)


def _dispatcher(module: str, *more: str) -> tuple[str, ...]:
    names = ("get_dispatch_mc2_kwargs", "get_combine_mc_kwargs", *more)
    return tuple(f"{module}.token_dispatcher:TokenDispatcherWithMC2.{name}" for name in names)


_FUSED = _dispatcher("vllm_ascend.ops.fused_moe")
_GRAPH_MODES = (
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch",
    f"{_RUNNER}:NPUModelRunner._prepare_inputs",
)

_WORKER = {
    "0.11.0": (
        *_METHODS,
        _SYNC,
        "vllm_ascend.spec_decode.mtp_proposer:MtpProposer._propose",
        *_GRAPH_MODES,
        _SELECTOR_METHOD,
        *_dispatcher("vllm_ascend.ops.moe", "token_dispatch"),
    ),
    "0.12.0rc1": (
        *_METHODS,
        f"{_RUNNER}:NPUModelRunner._skip_all_reduce_acorss_dp_group",
        _SYNC,
        _SELECTOR_METHOD,
        *_FUSED,
    ),
    "0.13.0": (
        *_METHODS,
        f"{_RUNNER}:NPUModelRunner._skip_all_reduce_across_dp_group",
        _SYNC,
        _GRAPH_MODES[0],
        *_SELECTORS,
        *_FUSED,
    ),
    "0.18.0": (
        *_METHODS,
        *_SKIPS,
        f"{_RUNNER}:NPUModelRunner._sync_batch_across_dp",
        _SYNC,
        "vllm_ascend.spec_decode.eagle_proposer:SpecDecodeBaseProposer.dummy_run",
        *_GRAPH_MODES,
        *_SELECTORS,
        *_FUSED,
    ),
    "0.23.0": (*_METHODS, *_SKIPS, _SYNC, *_GRAPH_MODES, *_SELECTORS, *_FUSED),
}
_PLUGINS = {
    "0.11.0": ("ascend_kv_connector", "ascend_enhanced_model"),
    "0.12.0rc1": ("ascend_kv_connector", "ascend_model_loader", "ascend_service_profiling"),
    "0.13.0": ("ascend_kv_connector", "ascend_model_loader", "ascend_service_profiling"),
    "0.18.0": ("ascend_kv_connector", "ascend_model_loader", "ascend_service_profiling"),
    "0.23.0": ("ascend_kv_connector", "ascend_model", "ascend_model_loader", "ascend_service_profiling"),
}

WORKER = list(_WORKER[VERSION])
ENGINE = ["vllm.v1.engine.core:EngineCore.__init__"]
TARGETS = WORKER + ENGINE
PLUGINS = _PLUGINS[VERSION]
WORKER_MODULE = STOCK.worker_cls.rpartition(".")[0]
# What a process can import before anything else of stock; 0.23.0's model runner alone meets a circular import.
IMPORTABLE_FIRST = ["vllm.v1.engine.core", WORKER_MODULE] + ([_RUNNER] if VERSION != "0.23.0" else [])
IMPORTS = ("vllm.v1.engine.core", WORKER_MODULE)  # as vLLM makes them: an engine, then a worker
# Without the overlay, so that a test decides itself when it is loaded.
STOCK_PLUGINS = {"VLLM_PLUGINS": ",".join(("ascend", *PLUGINS))}
# The method that every version has, and the arguments that it cannot do without.
SYNC = _SYNC
SYNC_ARGUMENTS = (1, False, False) if VERSION == "0.11.0" else (1, False)
MOE_PACKAGE = "vllm_ascend.ops.fused_moe" if STOCK.own_skip else "vllm_ascend.ops.moe"
# A connector of vLLM's own that needs nothing installed.
CONNECTOR = "SharedStorageConnector" if VERSION in ("0.11.0", "0.12.0rc1") else "ExampleConnector"

# For the processes that fresh.run starts. All imports as stock makes them: through the worker.
PRELUDE = f"""
import importlib, json, sys
from probe import answer, current, depth, report_child, resolve
TARGETS, SYNC, SYNC_ARGUMENTS = {TARGETS!r}, {SYNC!r}, {SYNC_ARGUMENTS!r}
def import_stock():
    import vllm.v1.engine.core
    import {WORKER_MODULE}
"""

# SPDX-License-Identifier: Apache-2.0
"""Runs inside fresh processes on versions that skip by themselves; the assertions are in test_own_skip.py.

As in stock_checks.py: real stock objects, called the way stock calls them. Those whose constructors want a device or a
process group are made with `object.__new__` and given the attributes that the stock code under test reads.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from command_lines import serve
from this_stock import CONNECTOR, SYNC_ARGUMENTS, VERSION, WORKER_MODULE
from torch.distributed import HashStore
from toy_configs import MOE
from vllm_ascend import utils
from vllm_ascend.ascend_config import get_ascend_config
from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

import dp_sync_patch
from dp_sync_patch import command_line, live, metrics, runtime
from dp_sync_patch.errors import DpSyncPatchError
from dp_sync_patch.plan import make_plan

# How each version's caller hands a step over, target and draft passes; other arguments have their defaults.
_PASSES = {
    "0.12.0rc1": {"target": ("_sync_metadata_across_dp", (3, True), {})},
    "0.13.0": {
        "target": ("_sync_metadata_across_dp", (3, True, 0), {}),
        "draft": ("_sync_metadata_across_dp", (3,), {"is_draft_model": True}),
    },
    "0.18.0": {
        "target": ("_sync_batch_across_dp", (), {"num_tokens_padded": 3, "cudagraph_mode": 0}),
        "draft": ("_sync_metadata_across_dp", (3,), {"is_draft_model": True}),
    },
    "0.23.0": {
        "target": ("_sync_metadata_across_dp", (3,), {"allow_dp_padding": False}),
        "draft": ("_sync_metadata_across_dp", (3,), {"is_draft_model": True}),
    },
}


def _config(folder: str, *switches: str, **additional: Any) -> Any:
    model = Path(folder) / "moe"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(MOE))
    flags = {
        "--data-parallel-size": 2,
        "--enable-expert-parallel": None,
        "--enforce-eager": None,
        "--max-model-len": 4096,
        "--max-num-seqs": 16,
        "--max-num-batched-tokens": 4096,
        "--skip-tokenizer-init": None,
        "--kv-transfer-config": {"kv_connector": CONNECTOR, "kv_role": "kv_consumer"},
        "--additional-config": {"recompute_scheduler_enable": True, **additional},
        **dict.fromkeys(switches),
    }
    return command_line._vllm_config(*command_line.prepare(serve(model, flags, {})))


def _runner(config: Any) -> Any:
    runner = object.__new__(NPUModelRunner)
    runner.vllm_config, runner.compilation_config = config, config.compilation_config
    runner.parallel_config, runner.ascend_config = config.parallel_config, get_ascend_config()
    runner.dp_size, runner.dp_rank = 2, 0
    return runner


def _latched(folder: str, *switches: str, peer: bool, **additional: Any) -> Any:
    """A runner after the first round, in a process that counts as rank 0 of two; `peer`: rank 1 says the same."""
    store = HashStore()
    runtime._store = lambda: store
    runtime._process_group = lambda: (0, 2)
    config = _config(folder, *switches, **additional)
    runner = _runner(config)
    capacity = command_line.mc2_tokens_capacity(config)
    if peer:
        facts = runtime._read_worker_facts(runner, capacity, 2)
        configured = runtime.settings.load(config)
        record = runtime._record(configured, facts, make_plan(facts))
        for name, extra in (("start-1", {}), ("kv-cache-1", {"moved": ""})):
            store.set(f"dp_sync_patch/{name}/rank/1", json.dumps({**extra, **record}, sort_keys=True))
    runtime.latch(runner)
    return runner


def _one_pass(runner: Any, kind: str) -> Any:
    """The values that stock's caller gets, or the word for the group that stock's all_reduce asks for."""
    method, args, kwargs = _PASSES[VERSION][kind]
    try:
        result = getattr(runner, method)(*args, **kwargs)
    except AssertionError as error:
        return str(error)
    plain = [value if isinstance(value, int | bool) else getattr(value, "name", None) for value in result]
    counts = result[1]
    return {"values": plain, "counts": counts.tolist(), "dtype": str(counts.dtype), "device": str(counts.device)}


def _steps(runner: Any) -> list[str]:
    """What a step of a request and a dummy beside one end with, on objects that cannot make one."""
    worker = importlib.import_module(WORKER_MODULE).NPUWorker
    found = []
    for call in (lambda: runner.execute_model(None), lambda: object.__new__(worker).execute_dummy_batch()):
        try:
            call()
        except DpSyncPatchError as error:
            found.append(error.code)
        except AttributeError:
            found.append("stock")
    return found


def _confirm_engine(runner: Any) -> None:
    """As this rank's engine and that of rank 1 do it."""
    plan, first = runtime.plan_in_force(None), runtime._latched
    assert plan is not None
    assert first is not None
    configured = runtime.settings.load(runner.vllm_config)
    kept = {"token_budget": plan.sizes.token_budget, "graph_level": plan.graph_level}
    record = {
        "differs": "",
        "engine": {"settings": configured.values(), **kept},
        **runtime._record(configured, first.facts, make_plan(first.facts)),
    }
    runtime._store().set("dp_sync_patch/engine-1/rank/1", json.dumps(record, sort_keys=True))
    runtime.confirm_engine(None, configured, **kept)


def passes(folder: str) -> dict[str, Any]:
    """What a pass does in `skip`, in its profile run, and in `sync`."""
    kinds = _PASSES[VERSION]
    runner = _latched(folder, peer=True)
    found: dict[str, Any] = {"state": dp_sync_patch.status()["state"], "capacity": live.mc2_tokens_capacity(runner)}
    runtime.confirm_kv_cache(runner)
    found["unconfirmed"] = _steps(runner)
    _confirm_engine(runner)
    found["confirmed"] = _steps(runner)
    before = metrics.counts.values()
    found["skip"] = {kind: _one_pass(runner, kind) for kind in kinds}
    found["counted"] = {name: value - before[name] for name, value in metrics.counts.values().items() if value}
    runner.dp_size = 1
    alone = runner._sync_metadata_across_dp(*SYNC_ARGUMENTS)
    found["alone"] = [alone[0], alone[1] is None]
    runner.dp_size = 2
    runtime.in_profile_run = True
    found["profile run"] = {kind: _one_pass(runner, kind) for kind in kinds}
    runtime.in_profile_run = False
    try:
        dp_sync_patch.uninstall()
    except DpSyncPatchError as error:
        found["undo"] = str(error)
    return found


def synced(folder: str) -> dict[str, Any]:
    """A pass in `sync`, where stock by itself would skip."""
    return _one_synced(_latched(folder, "--disable-chunked-mm-input", peer=True))


def switched_off_alone(folder: str) -> dict[str, Any]:
    """The same where this rank has mode=off, and rank 1 has not."""
    return _one_synced(_latched(folder, peer=True, dp_sync_patch={"mode": "off"}))


def _one_synced(runner: Any) -> dict[str, Any]:
    return {
        "state": dp_sync_patch.status()["state"],
        "reasons": dp_sync_patch.status()["reasons"],
        "sync": _one_pass(runner, "target"),
    }


def without_a_peer(folder: str) -> str:
    """Rank 1 runs without the overlay: it would follow stock's own skip."""
    try:
        _latched(folder, peer=False, dp_sync_patch={"agreement_timeout_s": 0.2})
    except DpSyncPatchError as error:
        return f"{type(error).__name__}: {error}"
    return dp_sync_patch.status()["state"]


def device_types() -> dict[str, str]:
    """Every device that this version of vllm-ascend knows -> what the overlay makes of it."""
    found = {}
    for member in utils.AscendDeviceType:
        utils._ascend_device_type = member
        found[member.name] = live.device_type()
    return found

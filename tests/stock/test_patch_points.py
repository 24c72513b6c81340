# SPDX-License-Identifier: Apache-2.0
"""Patch points on unmodified stock 0.11.0: importing, patching and undoing in every order."""

from __future__ import annotations

import pytest
from fresh import run

pytestmark = pytest.mark.timeout(300)

WORKER = [
    "vllm_ascend.worker.model_runner_v1:NPUModelRunner.profile_run",
    "vllm_ascend.worker.model_runner_v1:NPUModelRunner.load_model",
    "vllm_ascend.worker.model_runner_v1:NPUModelRunner.initialize_kv_cache",
    "vllm_ascend.worker.model_runner_v1:NPUModelRunner._sync_metadata_across_dp",
    "vllm_ascend.spec_decode.mtp_proposer:MtpProposer._propose",
    "vllm_ascend.worker.model_runner_v1:NPUModelRunner._select_moe_comm_method",
    "vllm_ascend.ops.moe.token_dispatcher:TokenDispatcherWithMC2.get_dispatch_mc2_kwargs",
    "vllm_ascend.ops.moe.token_dispatcher:TokenDispatcherWithMC2.get_combine_mc_kwargs",
    "vllm_ascend.ops.moe.token_dispatcher:TokenDispatcherWithMC2.token_dispatch",
]
ENGINE = ["vllm.v1.engine.core:DPEngineCoreProc.run_busy_loop"]

_PRELUDE = """
import importlib, json, sys
def resolve(target):
    module, name = target.split(":")
    owner = importlib.import_module(module)
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, attribute
def depth(target):
    owner, attribute = resolve(target)
    found, levels = vars(owner)[attribute], 0
    while getattr(found, "_self_dp_sync_patch", False):
        found, levels = found.__wrapped__, levels + 1
    return levels
def import_stock():
    import vllm.v1.engine.core
    import vllm_ascend.ops  # stock's own import order; model_runner_v1 alone meets a circular import
    import vllm_ascend.worker.worker_v1
"""


def _run(body: str, **environ: str) -> tuple[dict[str, object], str]:
    prelude = f"{_PRELUDE}\nTARGETS = {WORKER + ENGINE!r}\n"
    # Where the overlay is installed, vLLM would load it by itself; here the test decides when.
    stock_plugins = {"VLLM_PLUGINS": "ascend,ascend_kv_connector,ascend_enhanced_model"}
    result, log = run(prelude + body, **{**stock_plugins, **environ})
    return result, log


def test_overlay_first_and_then_again_and_again() -> None:
    result, _ = _run("""
import dp_sync_patch
import_stock()
status = dp_sync_patch.status()
first = {t: depth(t) for t in TARGETS}
from dp_sync_patch import plugin, runtime
for _ in range(3):
    importlib.reload(dp_sync_patch)
    plugin.register()
    for unit in runtime.TRIGGERS:
        runtime._on_import(unit)
print(json.dumps({"depth": first, "again": {t: depth(t) for t in TARGETS}, "units": status["units"],
                  "points": [p["target"] for p in status["points"]], "state": status["state"]}))
""")
    assert result["depth"] == dict.fromkeys(WORKER + ENGINE, 1)
    assert result["again"] == result["depth"]
    points = result["points"]
    assert isinstance(points, list)
    assert sorted(points) == sorted(WORKER + ENGINE)
    assert result["units"] == {"worker": "applied", "engine": "applied"}
    assert result["state"] == "undecided"


def test_an_engine_process_is_patched_without_importing_a_worker() -> None:
    result, _ = _run("""
import dp_sync_patch
import vllm.v1.engine.core
print(json.dumps({"units": dp_sync_patch.status()["units"], "depth": depth(TARGETS[-1]),
                  "worker": "vllm_ascend.worker.model_runner_v1" in sys.modules}))
""")
    assert result["units"] == {
        "worker": "waiting for vllm_ascend.worker.model_runner_v1",
        "engine": "applied",
    }
    assert (result["depth"], result["worker"]) == (1, False)


def test_stock_first_then_undo_then_again() -> None:
    result, _ = _run("""
import inspect
import_stock()
signatures = {t: str(inspect.signature(getattr(*resolve(t)))) for t in TARGETS}
before = [vars(owner)[attribute] for owner, attribute in map(resolve, TARGETS)]
import dp_sync_patch
kept = signatures == {t: str(inspect.signature(getattr(*resolve(t)))) for t in TARGETS}
patched = {t: depth(t) for t in TARGETS}
count = dp_sync_patch.uninstall()
after = [vars(owner)[attribute] for owner, attribute in map(resolve, TARGETS)]
same = [a is b for a, b in zip(before, after)]
again = dp_sync_patch.uninstall()
state = dp_sync_patch.status()["state"]
dp_sync_patch.runtime.install()
print(json.dumps({"count": count, "same": same, "again": again, "state": state,
                  "kept": kept, "patched": patched,
                  "depth": {t: depth(t) for t in TARGETS}}))
""")
    assert result["kept"]
    assert result["patched"] == dict.fromkeys(WORKER + ENGINE, 1)
    assert result["count"] == len(WORKER + ENGINE)
    assert result["same"] == [True] * len(WORKER + ENGINE)
    assert (result["again"], result["state"]) == (0, "off")
    assert result["depth"] == dict.fromkeys(WORKER + ENGINE, 1)


def test_field_case_43_what_does_not_fit_leaves_everything_as_it_was() -> None:
    """Each target in turn is missing, one has another signature, and a model exists already."""
    result, log = _run("""
import_stock()
import dp_sync_patch
from dp_sync_patch import runtime
from vllm_ascend.ops.moe import moe_comm_method
found = []
def reinstall(*broken):
    runtime.install()
    found.append([sum(depth(t) for t in TARGETS[:-1] if t not in broken), dp_sync_patch.status()["units"]["worker"]])
for target in TARGETS:
    dp_sync_patch.uninstall()
    owner, attribute = resolve(target)
    original = vars(owner)[attribute]
    delattr(owner, attribute)
    reinstall(target)
    setattr(owner, attribute, original)
dp_sync_patch.uninstall()
changed = next(t for t in TARGETS if "_sync_metadata_across_dp" in t)
owner, attribute = resolve(changed)
original = vars(owner)[attribute]
setattr(owner, attribute, lambda self, num_tokens, with_prefill: (num_tokens, None, with_prefill))
reinstall(changed)
setattr(owner, attribute, original)
dp_sync_patch.uninstall()
moe_comm_method._MoECommMethods[None] = "the dispatcher of a model that exists"
reinstall()
moe_comm_method._MoECommMethods.clear()
dp_sync_patch.uninstall()
reinstall()
print(json.dumps({"found": found}))
""")
    found = result["found"]
    assert isinstance(found, list)
    *misfits, last = found
    assert last == [len(WORKER), "applied"]
    assert [count for count, _ in misfits] == [0] * (len(WORKER + ENGINE) + 2)
    for target, (_, unit) in zip(WORKER + ENGINE, misfits, strict=False):
        assert unit.startswith(f"DSP007 {target} does not exist")
    changed = "takes (self, num_tokens, with_prefill) instead of (self, num_tokens, with_prefill, enable_dbo)"
    assert misfits[-2][1].endswith(changed)
    assert misfits[-1][1].startswith("DSP008 loaded too late")
    assert log.count("nothing is patched, this process runs stock") >= len(misfits)


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_an_unknown_version_patches_nothing_and_says_so_once(mode: str) -> None:
    result, log = _run(
        """
import dp_sync_patch
from dp_sync_patch import stock
stock.installed = lambda: {"vllm": "0.99.0", "vllm-ascend": "0.99.0"}
error = ""
try:
    import vllm.v1.engine.core
except Exception as caught:
    error = str(caught)
module = sys.modules.get("vllm.v1.engine.core")
print(json.dumps({"patched": bool(module) and depth(TARGETS[-1]) > 0, "error": error}))
""",
        DP_SYNC_PATCH_MODE=mode,
    )
    assert result["patched"] is False
    assert log.count("DSP006") == 1
    assert "found vllm 0.99.0, vllm-ascend 0.99.0, supported vllm 0.11.0 + vllm-ascend 0.11.0" in log
    error = result["error"]
    assert isinstance(error, str)
    assert error.startswith("DSP006") is (mode == "require")


def test_off_leaves_stock_alone() -> None:
    result, _ = _run(
        """
import dp_sync_patch
import_stock()
print(json.dumps({"depth": {t: depth(t) for t in TARGETS}}))
""",
        DP_SYNC_PATCH_MODE="off",
    )
    assert result["depth"] == dict.fromkeys(WORKER + ENGINE, 0)


def test_field_case_36_fork_children_inherit_the_patches_once() -> None:
    result, _ = _run("""
import os
import dp_sync_patch
import_stock()
reader, writer = os.pipe()
pid = os.fork()
if pid == 0:
    from dp_sync_patch import plugin
    plugin.register()
    os.write(writer, json.dumps([depth(t) for t in TARGETS]).encode())
    os._exit(0)
os.waitpid(pid, 0)
print(json.dumps({"depth": json.loads(os.read(reader, 4096))}))
""")
    assert result["depth"] == [1] * len(WORKER + ENGINE)

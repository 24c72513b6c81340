# SPDX-License-Identifier: Apache-2.0
"""Patch points on unmodified stock: importing, patching and undoing in every order."""

from __future__ import annotations

import pytest
from fresh import run, run_after_stock
from this_stock import ENGINE, MOE_PACKAGE, PRELUDE, STOCK_PLUGINS, SYNC, TARGETS, WORKER, WORKER_MODULE

from dp_sync_patch import stock

pytestmark = pytest.mark.timeout(1200)


def _run(body: str, **environ: str) -> tuple[dict[str, object], str]:
    result, log = run(PRELUDE + body, **{**STOCK_PLUGINS, **environ})
    return result, log


def _run_after_stock(body: str) -> tuple[dict[str, object], str]:
    result, log = run_after_stock(PRELUDE + body)
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
    assert result["depth"] == dict.fromkeys(TARGETS, 1)
    assert result["again"] == result["depth"]
    points = result["points"]
    assert isinstance(points, list)
    assert sorted(points) == sorted(TARGETS)
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
    result, _ = _run_after_stock("""
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
    assert result["patched"] == dict.fromkeys(TARGETS, 1)
    assert result["count"] == len(TARGETS)
    assert result["same"] == [True] * len(TARGETS)
    assert (result["again"], result["state"]) == (0, "off")
    assert result["depth"] == dict.fromkeys(TARGETS, 1)


def test_field_case_43_what_does_not_fit_leaves_everything_as_it_was() -> None:
    """Each target in turn is missing, one has another signature, and a model exists already."""
    result, log = _run_after_stock(f"""
import_stock()
import dp_sync_patch
from dp_sync_patch import runtime
from {MOE_PACKAGE} import moe_comm_method
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
owner, attribute = resolve(SYNC)
original = vars(owner)[attribute]
setattr(owner, attribute, lambda self, num_tokens: (num_tokens, None))
reinstall(SYNC)
setattr(owner, attribute, original)
dp_sync_patch.uninstall()
moe_comm_method._MoECommMethods[None] = "the dispatcher of a model that exists"
reinstall()
moe_comm_method._MoECommMethods.clear()
dp_sync_patch.uninstall()
reinstall()
print(json.dumps({{"found": found}}))
""")
    found = result["found"]
    assert isinstance(found, list)
    *misfits, last = found
    assert last == [len(WORKER), "applied"]
    assert [count for count, _ in misfits] == [0] * (len(TARGETS) + 2)
    for target, (_, unit) in zip(TARGETS, misfits, strict=False):
        assert unit.startswith(f"DSP007 {target} does not exist")
    assert misfits[-2][1].startswith(f"DSP007 {SYNC} takes (self, num_tokens) instead of (self, num_tokens")
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
    assert f"found vllm 0.99.0, vllm-ascend 0.99.0, supported {stock.supported()}" in log
    error = result["error"]
    assert isinstance(error, str)
    assert error.startswith("DSP006") is (mode == "require")


def test_off_leaves_the_worker_alone() -> None:
    """The engine sees to it that no worker skips, whatever the worker is set to."""
    result, log = _run(
        """
import dp_sync_patch
import_stock()
status = dp_sync_patch.status()
print(json.dumps({"depth": {t: depth(t) for t in TARGETS}, "units": status["units"], "state": status["state"]}))
""",
        DP_SYNC_PATCH_MODE="off",
    )
    assert result["depth"] == {**dict.fromkeys(WORKER, 0), **dict.fromkeys(ENGINE, 1)}
    assert result["units"] == {"worker": "waiting for vllm_ascend.worker.model_runner_v1", "engine": "applied"}
    assert result["state"] == "off"
    assert "DSP" not in log


def test_off_says_nothing_on_an_unknown_version() -> None:
    result, log = _run(
        """
import dp_sync_patch
from dp_sync_patch import stock
stock.installed = lambda: {"vllm": "0.99.0", "vllm-ascend": "0.99.0"}
import_stock()
print(json.dumps({"depth": {t: depth(t) for t in TARGETS}, "state": dp_sync_patch.status()["state"]}))
""",
        DP_SYNC_PATCH_MODE="off",
    )
    assert result["depth"] == dict.fromkeys(TARGETS, 0)
    assert result["state"] == "off"
    assert "DSP" not in log


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_field_case_36_children_are_patched_once(method: str) -> None:
    """A parent that has loaded its plugins and imported all; its child does what an engine and its worker do.

    fork inherits the patches and vLLM's note that plugins were loaded; spawn starts with neither.
    """
    result, _ = _run(
        f"""
import multiprocessing
import torch
from vllm.plugins import load_general_plugins
load_general_plugins()
import_stock()
context = multiprocessing.get_context({method!r})
ours, theirs = context.Pipe()
process = context.Process(target=report_child, args=(theirs, TARGETS, {WORKER_MODULE!r}))
process.start()
assert ours.poll(300)
child = ours.recv()
process.join(60)
answer(parent=[depth(t) for t in TARGETS], device=torch.npu.is_initialized(), **child)
""",
        VLLM_PLUGINS="dp_sync_patch",
    )
    once = [1] * len(TARGETS)
    assert result == {
        "parent": once,
        "device": False,  # an NPU that was initialised is lost after a fork
        "before": once if method == "fork" else [],
        "child": once,
        "foreign": [],
        "units": {"worker": "applied", "engine": "applied"},
    }

# SPDX-License-Identifier: Apache-2.0
"""Loading in unusual moments and environments: half-made modules, several threads, foreign patchers, stale metadata."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import PROJECT, environment, interpreter, run

pytestmark = pytest.mark.timeout(300)

# Where the overlay is installed, vLLM would load it by itself; here the test decides when.
STOCK_PLUGINS = {"VLLM_PLUGINS": "ascend,ascend_kv_connector,ascend_enhanced_model"}


@pytest.mark.parametrize("module", ["vllm_ascend.worker.model_runner_v1", "vllm.v1.engine.core"])
def test_vllm_loads_the_overlay_in_the_middle_of_importing_what_it_patches(module: str) -> None:
    """The platform is resolved inside that import, and with it the overlay's platform entry point is loaded."""
    code = f"""
import {module}
import dp_sync_patch, json
from vllm.plugins import load_general_plugins
load_general_plugins()
import vllm_ascend.worker.model_runner_v1
print(json.dumps(dp_sync_patch.status()["units"]))
"""
    units, log = interpreter(code, VLLM_PLUGINS="dp_sync_patch")
    assert units == {"worker": "applied", "engine": "applied"}
    assert "Failed to load plugin" not in log
    assert "DSP0" not in log


def test_field_case_37_threads_reloads_and_registrations_wrap_once() -> None:
    """And one call of the wrapped method is one call of the original."""
    code = """
import importlib, json, threading
import vllm.v1.engine.core
import vllm_ascend.ops
import vllm_ascend.worker.model_runner_v1 as runner_module
calls = []
original = runner_module.NPUModelRunner._sync_metadata_across_dp
def counting(self, num_tokens: int, with_prefill: bool, enable_dbo: bool):
    calls.append(num_tokens)
    return num_tokens, None, with_prefill, enable_dbo
runner_module.NPUModelRunner._sync_metadata_across_dp = counting
barrier = threading.Barrier(8)
def load():
    barrier.wait()
    import dp_sync_patch
    from dp_sync_patch import plugin
    plugin.register()
    importlib.reload(dp_sync_patch)
threads = [threading.Thread(target=load) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
patched = vars(runner_module.NPUModelRunner)["_sync_metadata_across_dp"]
runner = object.__new__(runner_module.NPUModelRunner)
runner.in_profile_run = False
result = runner._sync_metadata_across_dp(3, enable_dbo=False, with_prefill=True)
import dp_sync_patch
print(json.dumps({"once": patched.__wrapped__ is counting, "calls": calls, "result": result,
                  "units": dp_sync_patch.status()["units"]}))
"""
    found, _ = run(code, **STOCK_PLUGINS)
    assert found == {
        "once": True,
        "calls": [3],
        "result": [3, None, True, False],
        "units": {"worker": "applied", "engine": "applied"},
    }


def test_foreign_patchers_below_stay_and_on_top_are_refused() -> None:
    code = """
import json, wrapt
import vllm.v1.engine.core
import vllm_ascend.ops
import vllm_ascend.worker.model_runner_v1 as module
runner = module.NPUModelRunner
order = []
def named(name):
    def wrapper(wrapped, instance, args, kwargs):
        order.append(name)
        return wrapped(*args, **kwargs)
    return wrapper
wrapt.wrap_function_wrapper(module, "NPUModelRunner._sync_metadata_across_dp", named("below"))
below = vars(runner)["_sync_metadata_across_dp"]
import dp_sync_patch
from dp_sync_patch import runtime
ours = vars(runner)["_sync_metadata_across_dp"]
wrapt.wrap_function_wrapper(module, "NPUModelRunner._sync_metadata_across_dp", named("top"))
top = vars(runner)["_sync_metadata_across_dp"]
instance = object.__new__(runner)
instance.in_profile_run, instance.dp_size = True, 1
instance.vllm_config = None
try:
    instance._sync_metadata_across_dp(1, False, False)
except AttributeError:
    pass
try:
    error = str(dp_sync_patch.uninstall())
except Exception as caught:
    error = str(caught)
refusals = [str(refusal) for refusal in runtime._not_intact()]
untouched = vars(runner)["_sync_metadata_across_dp"] is top
runner._sync_metadata_across_dp = ours
undone = dp_sync_patch.uninstall()
print(json.dumps({"order": order, "error": error, "refusals": refusals, "untouched": untouched, "undone": undone,
                  "below": vars(runner)["_sync_metadata_across_dp"] is below}))
"""
    found, _ = run(code, **STOCK_PLUGINS)
    target = "vllm_ascend.worker.model_runner_v1:NPUModelRunner._sync_metadata_across_dp"
    assert found["order"] == ["top", "below"]
    assert found["error"] == f"DSP009 not undone, changed by somebody else: {target}"
    assert len(found["refusals"]) == 1
    assert found["refusals"][0].startswith(f"DSP009 {target} was replaced after it was patched")
    assert found["untouched"]
    assert found["undone"] == 10
    assert found["below"]


def test_field_case_38_names_bound_before_the_patch_lead_to_the_wrappers() -> None:
    """Targets are methods, so importers of the classes see the patch; nothing of stock keeps a method itself."""
    code = """
import gc, json, types
import vllm.v1.engine.core
import vllm_ascend.ops
import vllm_ascend.worker.worker_v1
from vllm_ascend.worker.model_runner_v1 import NPUModelRunner
from vllm_ascend.ops.moe.token_dispatcher import TokenDispatcherWithMC2 as Early
import dp_sync_patch
from dp_sync_patch.patches import registry
originals = [entry.original for entry in registry._applied]
holders = []
for original in originals:
    for holder in gc.get_referrers(original):
        if isinstance(holder, dict) and holder.get("__name__", "").startswith(("vllm",)):
            holders.append(holder["__name__"])
        if isinstance(holder, type):
            holders.append(holder.__name__)
patched = type(vars(Early)["token_dispatch"]).__name__
print(json.dumps({"patched": patched, "count": len(originals), "holders": holders}))
"""
    found, _ = run(code, **STOCK_PLUGINS)
    assert found == {"patched": "PatchedFunction", "count": 10, "holders": []}


def cli(*words: str, **environ: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "dp_sync_patch", *words],
        capture_output=True, text=True, timeout=120, check=False, env=environment(**environ),
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_field_case_34_stale_metadata_is_found(tmp_path: Path) -> None:
    """An egg-info without entry points, earlier on sys.path, hides the installed distribution from vLLM."""
    egg = tmp_path / "dp_sync_patch.egg-info"
    egg.mkdir()
    (egg / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: dp-sync-patch\nVersion: 0.0.1\n")
    path = os.pathsep.join([str(tmp_path), str(PROJECT)])
    code = """
import json
from importlib.metadata import entry_points
from dp_sync_patch import environment
groups = ("vllm.general_plugins", "vllm.platform_plugins")
print(json.dumps([[e.name for g in groups for e in entry_points(group=g)], [str(f) for f in environment.findings()]]))
"""
    (names, findings), _ = interpreter(code, PYTHONPATH=path)
    assert "dp_sync_patch" not in names
    assert len(findings) == 1
    assert findings[0].startswith("error: DSP421 dp_sync_patch has no entry point in vllm.general_plugins")
    assert f"0.0.1 in {tmp_path}" in findings[0]


@pytest.mark.parametrize("package", ["vllm", "vllm_ascend", "torch_npu"])
def test_field_case_41_a_broken_stack_breaks_nothing_else(tmp_path: Path, package: str) -> None:
    """A package that raises on import, as torch_npu does without its driver libraries."""
    (tmp_path / f"{package}.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    path = os.pathsep.join([str(tmp_path), str(PROJECT)])
    environ = {"PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    code = "import json, sys, dp_sync_patch; print(json.dumps([m for m in ('torch', 'vllm') if m in sys.modules]))"
    assert interpreter(code, **environ)[0] == []
    returncode, out, err = cli("status", "--json", **environ)
    answer = json.loads(out)
    assert returncode == 2
    assert answer["error"].startswith("DSP430 stock cannot be imported: ImportError: libhccl.so")
    assert answer["process"]["state"] == "undecided"
    assert "Traceback" not in out + err

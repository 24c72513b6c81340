# SPDX-License-Identifier: Apache-2.0
"""Loading in unusual moments and environments: half-made modules, several threads, foreign patchers, stale metadata."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import PROJECT, environment, interpreter, run, run_after_stock
from this_stock import IMPORTABLE_FIRST, PRELUDE, STOCK_PLUGINS, SYNC, TARGETS, WORKER_MODULE

pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize("module", IMPORTABLE_FIRST)
def test_vllm_loads_the_overlay_in_the_middle_of_importing_what_it_patches(module: str) -> None:
    """The platform is resolved inside that import, and with it the overlay's platform entry point is loaded."""
    code = f"""
import {module}
import dp_sync_patch, json
from vllm.plugins import load_general_plugins
load_general_plugins()
import {WORKER_MODULE}
print(json.dumps(dp_sync_patch.status()["units"]))
"""
    units, log = interpreter(code, VLLM_PLUGINS="dp_sync_patch")
    assert units == {"worker": "applied", "engine": "applied"}
    assert "Failed to load plugin" not in log
    assert "DSP0" not in log


def test_field_case_37_threads_reloads_and_registrations_wrap_once() -> None:
    """And one call of the wrapped method is one call of the original."""
    code = """
import functools, threading
import_stock()
calls = []
runner, name = resolve(SYNC)
@functools.wraps(current(SYNC))
def counting(self, num_tokens, *args, **kwargs):
    calls.append(num_tokens)
    return num_tokens, None
setattr(runner, name, counting)
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
result = getattr(object.__new__(runner), name)(3)
import dp_sync_patch
answer(once=current(SYNC).__wrapped__ is counting, calls=calls, result=result,
       depth=[depth(target) for target in TARGETS], units=dp_sync_patch.status()["units"])
"""
    found, log = run_after_stock(PRELUDE + code)
    assert found == {
        "once": True,
        "calls": [3],
        "result": [3, None],
        "depth": [1] * len(TARGETS),
        "units": {"worker": "applied", "engine": "applied"},
    }
    assert "DSP0" not in log


@pytest.mark.parametrize("how", ["wrapt", "functools", "replaced"])
def test_foreign_patchers_below_and_on_top(how: str) -> None:
    """Below they stay. On top they are tolerated while calls still come to us; a replacement ends the skip."""
    code = """
import functools, wrapt
import_stock()
runner, name = resolve(SYNC)
order = []
def named(name):
    def wrapper(wrapped, instance, args, kwargs):
        order.append(name)
        return wrapped(*args, **kwargs)
    return wrapper
setattr(runner, name, wrapt.FunctionWrapper(current(SYNC), named("below")))
below = current(SYNC)
import dp_sync_patch
from dp_sync_patch import runtime
ours = current(SYNC)
def around(inner):
    @functools.wraps(inner)
    def wrapper(*args, **kwargs):
        order.append("top")
        return inner(*args, **kwargs)
    return wrapper
def replacement(self, *args, **kwargs):
    order.append("top")
    return below(self, *args, **kwargs)
ON_TOP = {
    "wrapt": lambda: wrapt.FunctionWrapper(ours, named("top")),
    "functools": lambda: around(getattr(runner, name)),
    "replaced": lambda: replacement,
}
setattr(runner, name, ON_TOP[HOW]())
top = current(SYNC)
instance = object.__new__(runner)
instance.dp_size, instance.vllm_config = 1, None
before = dp_sync_patch.metrics.counts.passes_synced
try:
    instance._sync_metadata_across_dp(*SYNC_ARGUMENTS)
except AttributeError as error:
    order.append(str(error))
counted = dp_sync_patch.metrics.counts.passes_synced - before
try:
    error = str(dp_sync_patch.uninstall())
except Exception as caught:
    error = str(caught)
refusals = [str(refusal) for refusal in runtime._not_intact()]
states = {point["target"]: point["state"] for point in dp_sync_patch.status()["points"]}
untouched = current(SYNC) is top
setattr(runner, name, ours)
undone = dp_sync_patch.uninstall()
answer(order=order, counted=counted, error=error, refusals=refusals, state=states.pop(SYNC),
       others=list(states.values()), untouched=untouched, undone=undone, below=current(SYNC) is below)
"""
    found, _ = run_after_stock(PRELUDE + f"HOW = {how!r}\n" + code)
    replaced = how == "replaced"
    assert found["order"] == ["top", "below"]
    assert found["counted"] == (0 if replaced else 1)
    assert found["error"] == f"DSP009 not undone, changed by somebody else: {SYNC}"
    assert found["state"] == ("changed by somebody else" if replaced else "applied, wrapped by somebody else")
    assert set(found["others"]) == {"applied"}
    if replaced:
        assert len(found["refusals"]) == 1
        assert found["refusals"][0].startswith(f"DSP009 {SYNC} was replaced after it was patched")
    else:
        assert found["refusals"] == []
    assert found["untouched"]
    assert found["undone"] == len(TARGETS)
    assert found["below"]


@pytest.mark.parametrize("first", ["stock", "overlay"])
def test_field_case_38_names_bound_by_import_lead_to_the_wrappers(first: str) -> None:
    """By-name importers of functions and classes, whoever is imported first; nothing of stock keeps an original."""
    code = """
import gc
import dp_sync_patch
import_stock()
from dp_sync_patch.patches import registry
originals = {id(entry.original): entry.original for entry in registry._applied}
names = {entry.attribute for entry in registry._applied if not isinstance(entry.parent, type)}
holders = []
for original in originals.values():
    for holder in gc.get_referrers(original):
        if isinstance(holder, dict) and holder.get("__name__", "").startswith("vllm"):
            holders.append(holder["__name__"])
        if isinstance(holder, type):
            holders.append(holder.__name__)
importers = sorted(
    f"{module_name}:{name}" for module_name, module in list(sys.modules.items()) if module_name.startswith("vllm")
    for name in names if name in vars(module)
)
unpatched = [importer for importer in importers if depth(importer) != 1]
answer(count=len(originals), holders=holders, importers=importers, unpatched=unpatched)
"""
    code = PRELUDE + code
    found, _ = run_after_stock(code) if first == "stock" else run(code, **STOCK_PLUGINS)
    functions = sorted(target for target in TARGETS if "." not in target.partition(":")[2])
    assert found == {
        "count": len({target.partition(":")[2] for target in TARGETS}),
        "holders": [],
        "importers": functions,
        "unpatched": [],
    }


def cli(*words: str, **environ: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "dp_sync_patch", *words],
        capture_output=True, text=True, timeout=500, check=False, env=environment(**environ),
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

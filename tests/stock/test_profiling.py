# SPDX-License-Identifier: Apache-2.0
"""Service profiling: msserviceprofiler as published, which wraps stock by the symbols that vllm-ascend's plugin writes.

It is switched on by SERVICE_PROF_CONFIG_PATH. The symbols come from ~/.config/vllm_ascend, where stock's plugin
ascend_service_profiling puts its list (no patch point is in it up to 0.23.0), or from PROFILING_SYMBOLS_PATH.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fresh import PROJECT, run
from this_stock import PRELUDE, SYNC, TARGETS

pytestmark = pytest.mark.timeout(1200)

_UV = PROJECT / "build" / "tools" / "bin" / "uv"
_REQUIREMENTS = PROJECT / "tests" / "stock" / "envs" / "msserviceprofiler.txt"
_CANN = PROJECT / "tests" / "stock" / "cann"

# As on a machine where it is installed: on sys.path with its vLLM entry point, and CANN's module beside it.
_INSTALLED = """
import os
sys.path[:0] = {paths!r}
os.environ["HOME"] = {home!r}
os.environ["SERVICE_PROF_CONFIG_PATH"] = "ms_service_profiler_config.json"
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Apart from the stock wheels: in their environment every other test would load it as well."""
    target = tmp_path_factory.mktemp("msserviceprofiler")
    subprocess.run(
        [_UV, "pip", "install", "-q", "--python", sys.executable, "--no-deps", "--target", target, "-r", _REQUIREMENTS],
        check=True,
        timeout=300,
    )
    return str(target)


def profiled(installed: str, home: Path, code: str, **environ: str) -> tuple[Any, str]:
    head = _INSTALLED.format(paths=[installed, str(_CANN)], home=str(home))
    answer, log = run(PRELUDE + head + code, **environ)
    return answer, log


@pytest.mark.parametrize("plugins", ["dp_sync_patch,msserviceprofiler", "msserviceprofiler,dp_sync_patch"])
def test_stocks_own_symbols_hide_no_module_from_the_overlay(installed: str, tmp_path: Path, plugins: str) -> None:
    """The profiler's import finder comes before wrapt's, and keeps the model runner to itself.

    The symbols of the model runner alone: for the whole list the profiler imports a good part of stock early, and
    0.13.0's own patches of vLLM fail in that order, without the overlay as well.
    """
    code = """
from importlib.metadata import entry_points
import yaml
from vllm.platforms import current_platform
device = current_platform.device_type
from vllm_ascend.profiling_config import SERVICE_PROFILING_SYMBOLS_YAML
chosen = [entry for entry in yaml.safe_load(SERVICE_PROFILING_SYMBOLS_YAML) if "NPUModelRunner" in entry["symbol"]]
with open(os.environ["PROFILING_SYMBOLS_PATH"], "w") as file:
    yaml.safe_dump(chosen, file)
for name in ORDER:
    for entry in entry_points(group="vllm.general_plugins", name=name):
        entry.load()()
import_stock()
import dp_sync_patch, ms_service_profiler
runner = resolve(SYNC)[0]
answer(device=device, depth=[depth(target) for target in TARGETS], units=dp_sync_patch.status()["units"],
       refusals=[str(refusal) for refusal in dp_sync_patch.runtime._not_intact()],
       profiled="module_hook" in vars(runner)["_prepare_inputs"].__code__.co_filename)
"""
    symbols = str(tmp_path / "symbols.yaml")
    head = f"ORDER = {plugins.split(',')!r}\nimport os\nos.environ['PROFILING_SYMBOLS_PATH'] = {symbols!r}\n"
    found, log = profiled(installed, tmp_path, head + code)
    assert found == {
        "device": "npu",
        "depth": [1] * len(TARGETS),
        "units": {"worker": "applied", "engine": "applied"},
        "refusals": [],
        "profiled": True,
    }
    assert "DSP0" not in log
    assert list((tmp_path / ".config" / "vllm_ascend").iterdir()), "stock's plugin has not written its list"


@pytest.fixture
def symbols(tmp_path: Path) -> str:
    """As in later versions of vllm-ascend: patch points of the overlay, functions where they are defined."""
    path = tmp_path / "symbols.yaml"
    defined = {target.partition(":")[2]: target for target in reversed(TARGETS)}
    path.write_text("".join(f"- symbol: {target}\n" for target in defined.values()))
    return str(path)


@pytest.mark.parametrize("order", ["profiler first", "overlay first"])
def test_a_profiled_patch_point_is_one_call_of_everybody(
    installed: str, tmp_path: Path, symbols: str, order: str
) -> None:
    """Wrapping a wrapper, and being wrapped: one span, one call of stock, one decision; nothing to refuse."""
    code = """
from importlib.metadata import entry_points
from vllm.platforms import current_platform
current_platform.device_type
(profiler,) = entry_points(group="vllm.general_plugins", name="msserviceprofiler")
if PROFILER_FIRST:
    profiler.load()()
    import_stock()
    import dp_sync_patch
else:
    import dp_sync_patch
    import_stock()
    profiler.load()()
import ms_service_profiler
from dp_sync_patch import metrics, runtime
runner = object.__new__(resolve(SYNC)[0])
runner.dp_size, runner.vllm_config = 1, None
def of_profiler(found):
    code = getattr(found, "__code__", None)
    return not getattr(found, "_self_dp_sync_patch", False) and "module_hook" in getattr(code, "co_filename", "")
points = [current(target) for target in TARGETS]
before = metrics.counts.passes_synced
runner._sync_metadata_across_dp(*SYNC_ARGUMENTS)
answer(
    on_top=sum(of_profiler(point) for point in points),
    below=sum(of_profiler(getattr(point, "__wrapped__", None)) for point in points),
    spans=ms_service_profiler.spans, decisions=metrics.counts.passes_synced - before,
    refusals=[str(refusal) for refusal in runtime._not_intact()],
    states=sorted({point["state"] for point in dp_sync_patch.status()["points"]}),
    units=dp_sync_patch.status()["units"],
)
"""
    first = order == "profiler first"
    environ = {"VLLM_PLUGINS": "ascend"}  # both are loaded by hand
    head = f"PROFILER_FIRST = {first!r}\nimport os\nos.environ['PROFILING_SYMBOLS_PATH'] = {symbols!r}\n"
    found, log = profiled(installed, tmp_path, head + code, **environ)
    assert found["units"] == {"worker": "applied", "engine": "applied"}
    assert found["spans"] == [SYNC.rpartition(".")[2]]
    assert found["decisions"] == 1
    assert found["refusals"] == []
    if first:
        assert found["states"] == ["applied"]
        assert (found["on_top"], found["below"] > 0) == (0, True)
    else:
        assert "applied, wrapped by somebody else" in found["states"]
        assert "changed by somebody else" not in found["states"]
        assert found["on_top"] > 0
    assert "DSP0" not in log

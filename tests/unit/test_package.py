# SPDX-License-Identifier: Apache-2.0
"""What importing the package does, and what its entry points do, in fresh interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import dp_sync_patch
from dp_sync_patch import stock

PROJECT = Path(__file__).parents[2]


def run(code: str, **environ: str) -> Any:
    """Run `code` in a fresh interpreter; it prints one JSON value as its last line. stderr is shown on a failure."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("DP_SYNC_PATCH_", "VLLM_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        # What is logged goes to stderr in a process that imports vLLM as well.
        env={**clean, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "VLLM_CONFIGURE_LOGGING": "0", **environ},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_import_pulls_in_neither_torch_nor_vllm() -> None:
    heavy = ("torch", "torch_npu", "vllm", "vllm_ascend", "numpy", "setuptools", "pkg_resources")
    code = f"""
import json, sys
import dp_sync_patch, dp_sync_patch.plugin
dp_sync_patch.plugin.platform(); dp_sync_patch.status()
print(json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""
    assert run(code)[0] == []


def test_import_is_cheap() -> None:
    code = """
import json, time
start = time.perf_counter()
import dp_sync_patch
print(json.dumps(time.perf_counter() - start))
"""
    # Some 40 ms on a quiet machine; the bound leaves room for a busy one, not for an import of the stack (seconds).
    assert min(run(code)[0] for _ in range(3)) < 0.5


def test_version_is_the_one_of_the_project() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert dp_sync_patch.__version__ == project["version"]
    for group in ("vllm.general_plugins", "vllm.platform_plugins"):
        assert list(project["entry-points"][group]) == ["dp_sync_patch"]


def test_importing_reloading_and_registering_again_changes_nothing() -> None:
    code = """
import importlib, json, sys, types
import dp_sync_patch
from dp_sync_patch import plugin, runtime
applied = []
runtime.points_of = lambda unit, version: []
runtime.stock.installed = lambda: {"vllm": "0.11.0", "vllm-ascend": "0.11.0"}
runtime.registry.apply = lambda unit, points: applied.append(unit)
for _ in range(3):
    importlib.reload(dp_sync_patch)
    plugin.register()
import wrapt
name = runtime.TRIGGERS["engine"]
wrapt.notify_module_loaded(types.ModuleType(name))
print(json.dumps(applied))
"""
    assert run(code)[0] == ["engine"]


def test_a_unit_is_applied_where_an_import_finder_hides_its_module(tmp_path: Path) -> None:
    """A profiler's finder comes before wrapt's; the module that imports the hidden one is seen all the same."""
    (tmp_path / "hidden.py").touch()
    (tmp_path / "stand_in.py").write_text("import hidden\n")
    code = f"""
import importlib.abc, importlib.machinery, json, sys
from dp_sync_patch import runtime
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.PathFinder.find_spec(name, path) if name == "hidden" else None
applied = []
runtime.TRIGGERS, runtime.STAND_INS = {{"engine": "hidden"}}, {{"engine": ("stand_in",)}}
runtime.points_of = lambda unit, version: []
runtime.stock.installed = lambda: {{"vllm": "0.11.0", "vllm-ascend": "0.11.0"}}
runtime.registry.apply = lambda unit, points: applied.append(unit)
runtime._hooked.clear()
runtime.install()
sys.path.insert(0, {str(tmp_path)!r})
sys.meta_path.insert(0, Finder())
import hidden
before = list(applied)
import stand_in
print(json.dumps([before, applied]))
"""
    assert run(code)[0] == [[], ["engine"]]


@pytest.mark.parametrize("mode", ["off", "auto"])
@pytest.mark.parametrize("version", ["0.11.0", "0.99.0"])
def test_off_arms_the_engine_alone(mode: str, version: str) -> None:
    """It sees to it that no worker skips; where stock is not supported none does, and nothing is said."""
    code = f"""
import json, logging, types
logging.basicConfig(level=logging.INFO)
import dp_sync_patch, wrapt
from dp_sync_patch import runtime
applied = []
runtime.points_of = lambda unit, version: []
runtime.stock.installed = lambda: {{"vllm": {version!r}, "vllm-ascend": {version!r}}}
runtime.registry.apply = lambda unit, points: applied.append(unit)
runtime.live.model_is_built = lambda: False
for name in runtime.TRIGGERS.values():
    wrapt.notify_module_loaded(types.ModuleType(name))
print(json.dumps([sorted(runtime._hooked), applied, dp_sync_patch.status()["state"]]))
"""
    (hooked, applied, state), stderr = run(code, DP_SYNC_PATCH_MODE=mode)
    units = ["engine"] if mode == "off" else ["engine", "worker"]
    assert hooked == units
    assert state == ("off" if mode == "off" else "undecided")
    assert set(applied) == (set(units) if version == "0.11.0" else set())
    assert stderr.count("DSP") == (1 if mode == "auto" and version != "0.11.0" else 0)


def test_field_case_35_a_bad_setting_is_reported_at_import_and_raised_by_the_plugin() -> None:
    code = """
import json
import dp_sync_patch
from dp_sync_patch import plugin, runtime
from dp_sync_patch.errors import SettingsError
try:
    plugin.register()
except SettingsError as error:
    print(json.dumps([str(error), sorted(runtime._hooked)]))
"""
    (message, hooked), stderr = run(code, DP_SYNC_PATCH_MODE="yes")
    assert message.startswith("DSP402 ")
    assert hooked == []
    assert message in stderr


@pytest.mark.parametrize(
    ("vllm", "ascend", "expected"),
    [
        ("0.11.0", "0.11.0", True),
        ("0.11.0+empty", "0.11.0", True),
        ("0.11.0", "0.11.0rc3", False),
        ("0.11.0", "0.11.0.post1", False),
        ("0.11.0", "0.11.1.dev0+g2f1aed98.d20260101", False),
        ("0.11.1", "0.11.0", False),
        ("0.11.0", "0.99.0", False),
        ("0.11.0", None, False),
        ("unknown", "0.11.0", False),
    ],
)
def test_field_case_42_only_versions_in_the_table_are_supported(
    vllm: str | None, ascend: str | None, expected: bool
) -> None:
    assert (stock.find({"vllm": vllm, "vllm-ascend": ascend}) is not None) is expected


# Entry points, against an installed distribution named vllm-ascend that this test writes itself.

_ENTRY_POINTS = """\
[vllm.platform_plugins]
ascend = fake_ascend:platform
[vllm.general_plugins]
ascend_kv_connector = fake_ascend:connector
ascend_enhanced_model = fake_ascend:model
"""
_FAKE_ASCEND = """
calls = []
def platform(): return "fake.Platform"
def connector(): calls.append("connector")
def model(): calls.append("model")
"""
_CALL_PLUGINS = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING)
from dp_sync_patch import plugin
platforms = [plugin.platform(), plugin.platform()]
plugin.register(); plugin.register()
calls = sys.modules["fake_ascend"].calls if "fake_ascend" in sys.modules else []
print(json.dumps([platforms, sorted(calls)]))
"""


@pytest.fixture
def site(tmp_path: Path) -> str:
    info = tmp_path / "vllm_ascend-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-ascend\nVersion: 9.9.9\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    (tmp_path / "fake_ascend.py").write_text(_FAKE_ASCEND)
    return os.pathsep.join([str(tmp_path), str(PROJECT)])


@pytest.mark.parametrize(
    ("plugins", "platform", "calls"),
    [
        (None, None, []),
        ("dp_sync_patch", "fake.Platform", ["connector", "model"]),
        ("ascend,dp_sync_patch", None, ["connector", "model"]),
        ("ascend,ascend_kv_connector,ascend_enhanced_model,dp_sync_patch", None, []),
        ("ascend,ascend_kv_connector,dp_sync_patch", None, ["model"]),
        ("dp_sync_patch, ascend", "fake.Platform", ["connector", "model"]),
    ],
)
def test_plugins_delegate_what_vllm_plugins_leaves_out(
    site: str, plugins: str | None, platform: str | None, calls: list[str]
) -> None:
    environ = {"PYTHONPATH": site} | ({} if plugins is None else {"VLLM_PLUGINS": plugins})
    (platforms, called), stderr = run(_CALL_PLUGINS, **environ)
    assert platforms == [platform, platform]
    assert called == calls
    assert ("DSP412" in stderr) is (plugins is not None and " " in plugins)


def test_delegation_can_be_switched_off(site: str) -> None:
    (platforms, called), stderr = run(
        _CALL_PLUGINS, PYTHONPATH=site, VLLM_PLUGINS="dp_sync_patch", DP_SYNC_PATCH_DELEGATE_PLUGINS="off"
    )
    assert platforms == [None, None]
    assert called == []
    assert "DSP413" in stderr


def test_a_missing_vllm_ascend_is_reported() -> None:
    code = """
import json, logging
from importlib import metadata
logging.basicConfig(level=logging.WARNING)
from dp_sync_patch import plugin
def absent(name):
    raise metadata.PackageNotFoundError(name)
plugin.metadata.distribution = absent
print(json.dumps(plugin.platform()))
"""
    platform, stderr = run(code, VLLM_PLUGINS="dp_sync_patch")
    assert platform is None
    assert "DSP411" in stderr


def test_runtime_dependencies_are_wrapt_and_packaging() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0] for requirement in project["dependencies"]}
    assert names == {"wrapt", "packaging"}
    assert metadata.version("wrapt")

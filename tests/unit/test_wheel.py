# SPDX-License-Identifier: Apache-2.0
"""The wheel holds the overlay and nothing else, and installs where none of the stack is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from importlib import util
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names}
    assert packages == {"dp_sync_patch", "dp_sync_patch-0.1.0.dist-info"}
    assert "dp_sync_patch/py.typed" in names
    code = {name for name in names if name.startswith("dp_sync_patch/") and name.endswith(".py")}
    assert code == {str(path.relative_to(PROJECT)) for path in (PROJECT / "dp_sync_patch").rglob("*.py")}


def test_field_case_39_installs_in_an_environment_without_setuptools(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    inherited = ("PYTHON", "DP_SYNC_", "VLLM_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, env=environ)
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True, env=environ)
    # Its two dependencies, taken from here: nothing is downloaded.
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    for name in ("wrapt", "packaging"):
        spec = util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (dependencies / name).symlink_to(Path(spec.origin).parent)
    code = """
import importlib.util, json
from importlib.metadata import entry_points, version
assert importlib.util.find_spec("setuptools") is None
assert importlib.util.find_spec("pkg_resources") is None
import dp_sync_patch
groups = ("vllm.general_plugins", "vllm.platform_plugins")
names = [[e.name for e in entry_points(group=group)] for group in groups]
loaded = [callable(e.load()) for group in groups for e in entry_points(group=group)]
status = dp_sync_patch.status()
print(json.dumps([version("dp_sync_patch"), names, loaded, status["stock"], status["stock_supported"]]))
"""
    environ["PYTHONPATH"] = str(dependencies)
    command = [str(python), "-c", code]
    done = subprocess.run(command, check=True, env=environ, cwd=tmp_path, capture_output=True, text=True)
    found_version, names, loaded, stock, supported = json.loads(done.stdout)
    assert found_version == "0.1.0"
    assert names == [["dp_sync_patch"], ["dp_sync_patch"]]
    assert loaded == [True, True]
    assert stock == {"vllm": None, "vllm-ascend": None}
    assert supported is False

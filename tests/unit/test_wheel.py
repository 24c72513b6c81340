# SPDX-License-Identifier: Apache-2.0
"""The wheel: the overlay and nothing else, both entry points, and it works in a clean environment."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout


def test_wheel_contents_and_clean_installation(tmp_path: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"dp_sync_patch", f"{wheel.name.split('-py3')[0]}.dist-info"}
    assert "dp_sync_patch/py.typed" in names
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "dp_sync_patch").split()
    assert {name for name in names if name.startswith("dp_sync_patch/")} == set(tracked)

    clean = tmp_path / "clean"
    run(sys.executable, "-m", "venv", str(clean))
    python = str(clean / "bin" / "python")
    run(python, "-m", "pip", "install", "-q", str(wheel))
    code = (
        "import dp_sync_patch, importlib.metadata as m; s = dp_sync_patch.status();"
        "print(s['state'], s['stock']);"
        "print(sorted(e.group for e in m.entry_points(name='dp_sync_patch')))"
    )
    lines = run(python, "-I", "-c", code).splitlines()
    assert lines[0] == "undecided {'vllm': None, 'vllm-ascend': None}"
    assert lines[1] == "['vllm.general_plugins', 'vllm.platform_plugins']"

# SPDX-License-Identifier: Apache-2.0
"""VLLM_PLUGINS in real processes: vLLM's own loader, stock 0.11.0, the overlay's two entry points."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from fresh import PROJECT, run_fresh

pytestmark = pytest.mark.timeout(300)

_LOAD = """
import json, sys
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
print(json.dumps({"platform": type(current_platform).__name__, "device": current_platform.device_type,
                  "connector": "MooncakeConnectorV1" in KVConnectorFactory._registry,
                  "loaded": "dp_sync_patch" in sys.modules}))
"""


@pytest.fixture
def site(tmp_path: Path) -> str:
    """The overlay's metadata as an installed distribution has it, also where the project is not installed."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"dp_sync_patch-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dp_sync_patch\nVersion: {project['version']}\n")
    lines: list[str] = []
    for group, names in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in names.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return os.pathsep.join([str(tmp_path), str(PROJECT)])


@pytest.mark.parametrize(
    ("plugins", "npu", "overlay"),
    [
        (None, True, True),
        ("dp_sync_patch", True, True),
        ("ascend,dp_sync_patch", True, True),
        ("ascend,ascend_kv_connector,ascend_enhanced_model,dp_sync_patch", True, True),
        ("dp_sync_patch, ascend", True, True),
        ("ascend,ascend_kv_connector,ascend_enhanced_model", True, False),
        ("", False, False),
    ],
)
def test_vllm_plugins(site: str, plugins: str | None, npu: bool, overlay: bool) -> None:
    environ = {"PYTHONPATH": site} | ({} if plugins is None else {"VLLM_PLUGINS": plugins})
    found, log = run_fresh(_LOAD, **environ)
    assert found["platform"] == ("NPUPlatform" if npu else "UnspecifiedPlatform")
    assert found["device"] == ("npu" if npu else "")
    assert found["connector"] is npu
    assert found["loaded"] is overlay
    assert ("DSP412" in log) is (plugins == "dp_sync_patch, ascend")
    if overlay and plugins is not None and "ascend_kv_connector" not in plugins:
        assert "loaded the plugins of vllm-ascend that VLLM_PLUGINS left out" in log

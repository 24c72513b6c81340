# SPDX-License-Identifier: Apache-2.0
"""VLLM_PLUGINS in processes of their own: vLLM's own loader and stock, from the first import on.

All values in forked processes; the two that operators use most in real interpreters as well.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from fresh import interpreter, run
from this_stock import PLUGINS, WORKER_MODULE

pytestmark = pytest.mark.timeout(1200)

_LOAD = f"""
import json, sys
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
found = {{"platform": type(current_platform).__name__, "device": current_platform.device_type,
         "connector": "MooncakeConnectorV1" in KVConnectorFactory._registry,
         "loaded": "dp_sync_patch" in sys.modules, "patched": []}}
if current_platform.device_type == "npu":  # vLLM 0.12.0's engine core cannot even be imported without a platform
    from vllm.v1.engine.core import EngineCore
    import {WORKER_MODULE}
    from vllm_ascend.worker.model_runner_v1 import NPUModelRunner
    found["patched"] = [EngineCore.__init__, NPUModelRunner._sync_metadata_across_dp]
found["patched"] = [type(function).__name__ != "function" for function in found["patched"]]
print(json.dumps(found))
"""
_ALL = ",".join(("ascend", *PLUGINS))
_NO_NPU = {"platform": "UnspecifiedPlatform", "device": "", "patched": []}


def _npu(*, overlay: bool, connector: bool = True) -> dict[str, Any]:
    npu = {"platform": "NPUPlatform", "device": "npu", "patched": [overlay] * 2}
    return {**npu, "loaded": overlay, "connector": connector}


@pytest.mark.parametrize(
    ("plugins", "expected"),
    [
        (None, _npu(overlay=True)),
        ("dp_sync_patch", _npu(overlay=True)),
        ("ascend,dp_sync_patch", _npu(overlay=True)),
        (f"{_ALL},dp_sync_patch", _npu(overlay=True)),
        ("dp_sync_patch, ascend", _npu(overlay=True)),
        (_ALL, _npu(overlay=False)),
        ("", {**_NO_NPU, "loaded": False, "connector": False}),
        # vLLM itself says nothing about any of these; `check` does.
        ("ascend, dp_sync_patch", _npu(overlay=False, connector=False)),
        ("ascend,dp_sync_patchh", _npu(overlay=False, connector=False)),
        ("dp_sync_patchh", {**_NO_NPU, "loaded": False, "connector": False}),
    ],
)
def test_field_case_33_34_vllm_plugins(plugins: str | None, expected: dict[str, Any]) -> None:
    found, log = run(_LOAD, **({} if plugins is None else {"VLLM_PLUGINS": plugins}))
    assert found == expected
    assert ("DSP412" in log) is (plugins == "dp_sync_patch, ascend")
    loaded = re.findall(r"loaded the plugins of vllm-ascend that VLLM_PLUGINS left out: ([a-z_, ]+)", log)
    left_out = expected["loaded"] and plugins is not None and PLUGINS[0] not in plugins
    assert [sorted(names.split(", ")) for names in loaded] == ([sorted(PLUGINS)] if left_out else [])


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param(environ, id=str(environ), marks=pytest.mark.ahead(lambda e: interpreter(_LOAD, **e), environ))
        for environ in ({}, {"VLLM_PLUGINS": "dp_sync_patch"})
    ],
)
def test_field_case_33_in_a_real_interpreter(environ: dict[str, str], ahead: Any) -> None:
    found, _ = ahead
    assert found == _npu(overlay=True)


def test_the_variables_that_are_set_reach_ray_actors() -> None:
    """vLLM copies what it knows to them. Nothing else changes in vLLM, and nothing at all without such variables."""
    code = """
import json, os
from vllm import envs
before = dict(envs.environment_variables)
from vllm.plugins import load_general_plugins
load_general_plugins()
from dp_sync_patch import plugin
plugin.register()
from vllm.ray.ray_env import get_env_vars_to_copy
added = sorted(set(envs.environment_variables) - set(before))
values = {name: envs.environment_variables[name]() for name in added}
attributes = {name: getattr(envs, name) for name in added}
kept = all(envs.environment_variables[name] is value for name, value in before.items())
copied = sorted(name for name in get_env_vars_to_copy() if "DP_SYNC_PATCH" in name)
os.environ.pop("DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S", None)
gone = envs.environment_variables[added[0]]() if added else None
print(json.dumps({"added": values, "attributes": attributes, "kept": kept, "copied": copied, "gone": gone}))
"""
    given = {"DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S": "7", "DP_SYNC_PATCH_GRAPH_MODE": "sync"}
    found, _ = run(code, VLLM_PLUGINS="dp_sync_patch", **given)
    expected = {"added": given, "attributes": given, "kept": True, "copied": sorted(given), "gone": None}
    assert found == expected
    without, _ = run(code, VLLM_PLUGINS="dp_sync_patch")
    assert without == {"added": {}, "attributes": {}, "kept": True, "copied": [], "gone": None}

# SPDX-License-Identifier: Apache-2.0
"""VLLM_PLUGINS in real processes: an Ascend platform with the Ascend connectors, never a quiet start without them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fresh import run

CODE = """
import json
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()
load_general_plugins()
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.model_executor.models.registry import ModelRegistry
import sys
overlay = sys.modules.get("dp_sync_patch")
print(json.dumps({
    "platform": f"{type(current_platform).__module__}.{type(current_platform).__name__}",
    "connectors": sorted(name for name in KVConnectorFactory._registry if name.startswith(("Mooncake", "LLMDataDist"))),
    "model": "Qwen3NextForCausalLM" in ModelRegistry.models
    and "vllm_ascend" in ModelRegistry.models["Qwen3NextForCausalLM"].module_name,
    "overlay": overlay is not None and overlay.status()["units"]["worker"],
}))
"""
VALUES = {
    "unset": None,
    "alone": "dp_sync_patch",
    "explicit": "ascend,ascend_kv_connector,ascend_enhanced_model,dp_sync_patch",
    "with the platform only": "ascend,dp_sync_patch",
    "blank after the comma": "dp_sync_patch, ascend",
    "stock alone": "ascend,ascend_kv_connector,ascend_enhanced_model",
    "empty": "",
}


@pytest.fixture(scope="module")
def processes() -> dict[str, tuple[Any, str]]:
    """One fresh process per value, two at a time."""

    def start(value: str | None) -> tuple[Any, str]:
        return run(CODE, **({} if value is None else {"VLLM_PLUGINS": value}))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(VALUES, pool.map(start, VALUES.values()), strict=True))


@pytest.mark.parametrize("name", ["unset", "alone", "explicit", "with the platform only", "blank after the comma"])
def test_an_ascend_node_with_its_connectors(processes: dict[str, tuple[Any, str]], name: str) -> None:
    found, log = processes[name]
    expected, _ = processes["stock alone"]
    assert found["platform"] == "vllm_ascend.platform.NPUPlatform"
    assert found["connectors"] == expected["connectors"]
    assert found["connectors"]
    assert found["model"] is True
    assert found["overlay"] == "waiting for vllm_ascend.worker.model_runner_v1"
    assert ("DSP412" in log) is (name == "blank after the comma")


def test_left_out_means_left_out(processes: dict[str, tuple[Any, str]]) -> None:
    assert processes["stock alone"][0]["overlay"] is False
    found, _ = processes["empty"]
    assert found["overlay"] is False
    assert found["platform"] == "vllm.platforms.interface.UnspecifiedPlatform"

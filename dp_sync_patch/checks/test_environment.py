# SPDX-License-Identifier: Apache-2.0
"""How vLLM would load the overlay here, and the plan for the operator's command line."""

import json
import os
import shlex
import subprocess
import sys
from typing import Any

import pytest

from dp_sync_patch import environment

_LOAD = """
import json, sys
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()
print(json.dumps({"device": current_platform.device_type, "overlay": "dp_sync_patch" in sys.modules}))
"""
COMMAND = os.environ.get("DP_SYNC_CHECK_COMMAND", "")


def _run(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ)
    )
    return done.returncode, done.stdout, done.stderr


def test_nothing_keeps_the_overlay_from_being_loaded() -> None:
    if found := environment.findings():
        pytest.fail("\n".join(map(str, found)), pytrace=False)


def test_vllm_loads_the_overlay_and_the_ascend_platform() -> None:
    code, out, err = _run("-c", _LOAD)
    if code:
        pytest.fail(f"vLLM's plugin loader fails: {err.strip().splitlines()[-1]}", pytrace=False)
    assert json.loads(out.splitlines()[-1]) == {"device": "npu", "overlay": True}


if COMMAND:

    def test_plan_of_the_command_line() -> None:
        soc = os.environ.get("DP_SYNC_CHECK_SOC", "")
        code, out, err = _run("-m", "dp_sync_patch", "explain", "--soc", soc, "--json", "--", *shlex.split(COMMAND))
        if not out:
            pytest.fail(f"explain ended with {code}: {err.strip().splitlines()[-1]}", pytrace=False)
        answer: dict[str, Any] = json.loads(out)
        if "error" in answer:
            pytest.fail(answer["error"], pytrace=False)
        reasons = "; ".join(f"{reason['code']} {reason['sentence']}" for reason in answer["reasons"])
        assert answer["state"] == os.environ.get("DP_SYNC_CHECK_STATE", "skip"), reasons

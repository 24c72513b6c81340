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
from dp_sync_patch.command_line import SOCS
from dp_sync_patch.plan import Refusal

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
        [sys.executable, *arguments], capture_output=True, text=True, timeout=600, check=False, env=dict(os.environ)
    )
    return done.returncode, done.stdout, done.stderr


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["(nothing was printed)"])[-1]


def test_nothing_keeps_the_overlay_from_being_loaded() -> None:
    if found := environment.findings():
        pytest.fail("\n".join(map(str, found)), pytrace=False)


def test_vllm_loads_the_overlay_and_the_ascend_platform() -> None:
    code, out, err = _run("-c", _LOAD)
    if code:
        pytest.fail(f"vLLM's plugin loader ends with {code}: {_last_line(err)}", pytrace=False)
    assert json.loads(out.splitlines()[-1]) == {"device": "npu", "overlay": True}


if COMMAND:

    def test_plan_of_the_command_line() -> None:
        soc = os.environ.get("DP_SYNC_CHECK_SOC", "")
        if soc not in SOCS:
            pytest.fail(f"DP_SYNC_CHECK_SOC={soc}: must be one of {', '.join(SOCS)}", pytrace=False)
        code, out, err = _run("-m", "dp_sync_patch", "explain", "--soc", soc, "--json", "--", *shlex.split(COMMAND))
        if not out:
            pytest.fail(f"explain ended with {code}: {_last_line(err)}", pytrace=False)
        answer: dict[str, Any] = json.loads(out)
        # The environment once more, since the command line can set VLLM_PLUGINS.
        wrong = [str(environment.Finding(**finding)) for finding in answer["findings"]]
        wanted = os.environ.get("DP_SYNC_CHECK_STATE", "skip")
        if "error" in answer:
            wrong.append(answer["error"])
        elif answer["state"] != wanted:
            wrong.append(f"the plan is {answer['state']}, wanted {wanted}")
            wrong += [str(Refusal(**reason)) for reason in answer["reasons"]]
        if wrong:
            pytest.fail("\n".join(wrong), pytrace=False)

# SPDX-License-Identifier: Apache-2.0
"""Runs kv_connector_cases.py in a process of its own: the cases import vLLM, which loads plugins into its process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_kv_connector() -> None:
    examples = HERE.parents[1] / "examples"
    env = os.environ | {
        "VLLM_PLUGINS": "ascend",
        "PYTHONPATH": str(examples),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "120"]
    done = subprocess.run(
        [*command, str(HERE / "kv_connector_cases.py")],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

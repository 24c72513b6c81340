# SPDX-License-Identifier: Apache-2.0
"""Fresh interpreters with the unmodified stock wheels and the virtual NPU below them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
# Stock reads these; what the developer's shell has set must not decide a test.
_STOCK_PREFIXES = ("DP_SYNC_PATCH_", "VLLM_", "VIRTUAL_NPU_", "HCCL_", "ASCEND_")


def environment(**changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_STOCK_PREFIXES)}
    path = os.pathsep.join(filter(None, [str(PROJECT), clean.get("PYTHONPATH")]))
    base = {
        "PYTHONPATH": path,
        "VLLM_NO_USAGE_STATS": "1",
        "TASK_QUEUE_ENABLE": "0",
        "VIRTUAL_NPU_SHAPES": "relaxed",
    }
    return {**clean, **base, **changes}


def run(code: str, timeout: float = 240, **environ: str) -> Any:
    """Run `code`; its last line of stdout is one JSON value. Returns it and everything that was logged."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment(**environ),
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]), "\n".join(lines[:-1]) + done.stderr

# SPDX-License-Identifier: Apache-2.0
"""The Python module ``acl``, as Ray asks it for devices: in processes without torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ASK = "import sys, acl; assert 'torch' not in sys.modules; print(acl.get_soc_name(), *acl.rt.get_device_count())"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({}, "Ascend910_9391 8 0"),
        ({"VIRTUAL_NPU_SOC": "Ascend910B1", "VIRTUAL_NPU_DEVICES": "16"}, "Ascend910B1 16 0"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "2,5"}, "Ascend910_9391 2 0"),
        ({"ASCEND_RT_VISIBLE_DEVICES": ""}, "Ascend910_9391 8 0"),
        ({"VIRTUAL_NPU_DEVICES": "none"}, "None 0 100000"),
    ],
)
def test_soc_name_and_device_count(settings: dict[str, str], answer: str) -> None:
    """A setting that is not valid is an error code, not a device."""
    prefixes = ("VIRTUAL_NPU_", "ASCEND_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)} | settings
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == answer.split(), done.stderr

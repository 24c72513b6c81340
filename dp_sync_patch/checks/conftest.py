# SPDX-License-Identifier: Apache-2.0
"""Says what was not checked, so that nobody takes it for checked."""

import os
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not os.environ.get("DP_SYNC_CHECK_COMMAND"):
        terminalreporter.write_line(
            "dp_sync_patch.checks: no plan was checked; give the command line of the decode node in "
            "DP_SYNC_CHECK_COMMAND and its device in DP_SYNC_CHECK_SOC"
        )

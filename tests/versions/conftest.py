# SPDX-License-Identifier: Apache-2.0
"""What does not apply to the installed stock version is not collected; nothing here is skipped."""

from __future__ import annotations

from dp_sync_patch import stock

# 0.11.0 always synchronises, so it asks nobody; its command lines are in tests/stock.
collect_ignore = [] if stock.require().own_skip else ["test_decisions.py", "test_refusals.py"]

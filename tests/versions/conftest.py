# SPDX-License-Identifier: Apache-2.0
"""What of this folder applies to the installed stock version."""

from dp_sync_patch import stock

# The conditions of 0.11.0, which skips nothing by itself and has other options, are in tests/stock.
collect_ignore = [] if stock.require().own_skip else ["test_refusals.py"]

# SPDX-License-Identifier: Apache-2.0
"""Patch-regression suite for the environment it runs in: `pytest --pyargs dp_sync_patch.checks`.

No NPU and no network, under a minute. With DP_SYNC_CHECK_COMMAND="[NAME=value ...] vllm serve ..." and
DP_SYNC_CHECK_SOC=A2 or A3 it also checks that the node would skip (or be in DP_SYNC_CHECK_STATE=sync or off).
"""

# SPDX-License-Identifier: Apache-2.0
"""The NPU as a Triton backend (entry point ``triton.backends``): kernels run in its interpreter, never compiled."""

# SPDX-License-Identifier: Apache-2.0
"""Overlay for stock vllm-ascend: decode nodes that need no DP metadata all_reduce in their steps.

Importing this package arms import hooks and nothing else; it imports neither torch nor vllm.
"""

from dp_sync_patch.runtime import install, status, uninstall

__version__ = "0.1.0"
__all__ = ["__version__", "status", "uninstall"]

install()

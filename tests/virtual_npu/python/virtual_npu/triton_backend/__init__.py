# SPDX-License-Identifier: Apache-2.0
"""The NPU as a Triton backend (entry point ``triton.backends``): kernels are interpreted, never compiled."""

from __future__ import annotations

import importlib.metadata


def stands_in() -> bool:
    """Whether vllm-ascend counts on triton-ascend, the NPU's Triton, and only the original Triton is installed.

    Everywhere else Triton is left as it is: older releases do without it, and would change their ways if they found it.
    """
    try:
        wanted = importlib.metadata.requires("vllm-ascend") or []
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    try:
        importlib.metadata.version("triton-ascend")
    except importlib.metadata.PackageNotFoundError:
        return any(requirement.startswith("triton-ascend") for requirement in wanted)
    return False

# SPDX-License-Identifier: Apache-2.0
"""The part of CANN's Python module ``acl`` that stock vllm-ascend (``acl.rt.memcpy``) and Ray (the others) call."""

from __future__ import annotations

from acl import rt
from acl._library import libvirtual_cann

__all__ = ["get_soc_name", "rt"]


def get_soc_name() -> str | None:
    """VIRTUAL_NPU_SOC; None when a setting of the virtual NPU is not valid."""
    name: bytes | None = libvirtual_cann().aclrtGetSocName()
    return None if name is None else name.decode()

# SPDX-License-Identifier: Apache-2.0
"""The C interface that ``acl`` is a binding of. It needs no torch: Ray asks from processes that have none."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path


@cache
def libvirtual_cann() -> ctypes.CDLL:
    """The library that torch_npu runs on, where this process has it already, else the same file."""
    library = ctypes.CDLL(str(Path(__file__).parents[1] / "virtual_npu" / "lib" / "libvirtual_cann.so"))
    library.aclrtGetSocName.restype = ctypes.c_char_p
    return library

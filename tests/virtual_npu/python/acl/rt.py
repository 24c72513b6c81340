# SPDX-License-Identifier: Apache-2.0
"""``acl.rt``: memory copies by address (on the virtual NPU device memory is host memory), and the number of devices."""

from __future__ import annotations

import ctypes

from acl._library import libvirtual_cann


def memcpy(dst: int, dest_max: int, src: int, count: int, kind: int) -> int:
    """Copy ``count`` bytes between addresses; 0, or CANN's "invalid parameter" (100000) when it does not fit."""
    del kind  # host and device are the same memory
    if count > dest_max:
        return 100000
    ctypes.memmove(dst, src, count)
    return 0


def get_device_count() -> tuple[int, int]:
    """How many devices this process sees, and 0 or CANN's error code: those of ASCEND_RT_VISIBLE_DEVICES, or all."""
    count = ctypes.c_uint32()
    code: int = libvirtual_cann().aclrtGetDeviceCount(ctypes.byref(count))
    return count.value, code

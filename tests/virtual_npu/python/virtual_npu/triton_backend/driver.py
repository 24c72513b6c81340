# SPDX-License-Identifier: Apache-2.0
"""The driver that makes vLLM find exactly one active Triton backend, with the core numbers that stock asks for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from . import stands_in

BACKEND = "npu"
# As aclGetDeviceCapability says (cann/runtime.cpp).
CORES = {"num_aicore": 24, "num_vectorcore": 48}


class Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(CORES)


class VirtualNpuDriver(DriverBase):
    def __init__(self) -> None:
        self.utils = Utilities()

    @classmethod
    def is_active(cls) -> bool:
        """Only where the virtual NPU was attached: TORCH_DEVICE_BACKEND_AUTOLOAD=0 gives a process without it."""
        return "virtual_npu.kernels" in sys.modules and stands_in()

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("virtual NPU: Triton kernels are not compiled: TRITON_INTERPRET=1 is needed")

    def get_current_target(self) -> GPUTarget:
        # arch: the name that triton-ascend gives the cores of A2 and A3; vector cores have no warps.
        return GPUTarget(BACKEND, "Ascend910B", 0)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("npu", self.get_current_device())

    def get_current_device(self) -> int:
        import torch

        return int(torch.npu.current_device())  # type: ignore[attr-defined]

    def set_current_device(self, device: int) -> None:
        import torch

        torch.npu.set_device(device)  # type: ignore[attr-defined]

    def get_current_stream(self, device: int) -> int:
        import torch

        return int(torch.npu.current_stream(device).npu_stream)  # type: ignore[attr-defined]

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError("virtual NPU: no timing")

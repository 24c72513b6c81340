# SPDX-License-Identifier: Apache-2.0
"""The half of the backend that would compile. Triton wants it to exist; with TRITON_INTERPRET=1 nothing reaches it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget

from .driver import BACKEND


class VirtualNpuBackend(BaseBackend):
    binary_ext = "none"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return bool(target.backend == BACKEND)

    def hash(self) -> str:
        return BACKEND

    def parse_options(self, options: dict[str, Any]) -> object:
        raise NotImplementedError("virtual NPU: Triton kernels are not compiled: TRITON_INTERPRET=1 is needed")

    def add_stages(self, stages: dict[str, Any], options: object) -> None:
        self.parse_options({})

    def load_dialects(self, context: object) -> None:
        self.parse_options({})

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}

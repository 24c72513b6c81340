# SPDX-License-Identifier: Apache-2.0
"""A virtual Ascend NPU. torch calls :func:`attach` (entry point ``torch.backends``) before it loads torch_npu."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import wrapt

LIBRARIES = Path(__file__).parent / "lib"


def attach() -> None:
    """Load the virtual CANN, then torch_npu on top of it, then the CPU kernels behind torch_npu's operators.

    Raises:
        RuntimeError: TASK_QUEUE_ENABLE asks for torch_npu's task queue.
    """
    if importlib.util.find_spec("torch_npu") is None:
        return
    # torch_npu's task queue lets a read of device memory overtake a queued HCCL call.
    if os.environ.setdefault("TASK_QUEUE_ENABLE", "0") != "0":
        raise RuntimeError(
            f"virtual NPU: TASK_QUEUE_ENABLE={os.environ['TASK_QUEUE_ENABLE']!r} is not supported, allowed: 0"
        )
    from virtual_npu import triton_backend

    with_triton = triton_backend.stands_in()
    if with_triton:
        # There is no compiler for NPU kernels, and the interpreter runs them on NPU tensors as they are.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for library in ["libvirtual_cann.so", "libunemulated.so", *sorted(p.name for p in LIBRARIES.glob("lib*.so"))]:
        # torch_npu's libraries name these in DT_NEEDED; once loaded, the loader matches them by soname.
        ctypes.CDLL(str(LIBRARIES / library), mode=ctypes.RTLD_GLOBAL)

    import torch_npu  # noqa: F401  registers its kernels, which the next lines override

    kernels = _load_kernels()
    kernels.install()
    from virtual_npu import operators, stepping

    operators.register(kernels)
    stepping.watch()
    wrapt.register_post_import_hook(_build_for_this_device, "vllm_ascend._build_info")
    if with_triton:
        from virtual_npu import triton_language
        from virtual_npu.triton_backend import interpreter

        wrapt.register_post_import_hook(triton_language.extend, "triton.language.extra")
        wrapt.register_post_import_hook(interpreter.repair, "triton.runtime.interpreter")


def _build_for_this_device(build_info: Any) -> None:
    """vllm-ascend is built for one device and refuses others, and its x86 wheels are built for the A2.

    Gives the one generated constant the value that a source build for the selected device writes.
    """
    if not hasattr(build_info, "__device_type__"):
        return  # 0.11.0 asks the device
    a2, a3 = ("_910B", "_910_93") if build_info.__device_type__.startswith("_") else ("A2", "A3")  # 0.12.0rc1, later
    soc = os.environ.get("VIRTUAL_NPU_SOC", "Ascend910_9391")
    build_info.__device_type__ = a3 if soc.startswith("Ascend910_93") else a2


def _load_kernels():  # type: ignore[no-untyped-def]
    """The C++ extension, imported as ``virtual_npu.kernels``."""
    name = "virtual_npu.kernels"
    spec = importlib.util.spec_from_file_location(name, LIBRARIES / "kernels.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module

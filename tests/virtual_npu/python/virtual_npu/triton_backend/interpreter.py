# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter on the virtual NPU: exact bf16, and kernels work on device memory itself.

Triton 3.6.0's interpreter truncates fp32 to bf16, where hardware rounds to nearest even, and copies the whole storage
of every argument to the host and back, which for a KV cache is the whole cache.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from virtual_npu.operators import graphs

from . import native


def fp32_to_bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """bf16 bits (uint16) of fp32 values, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def bf16_to_fp32(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """fp32 values of bf16 bits, which is exact."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def repair(interpreter: Any) -> None:
    """Post-import hook of ``triton.runtime.interpreter``."""
    tl, rounding = interpreter.tl, interpreter._ir.ROUNDING_MODE
    convert = interpreter._convert_float

    def convert_float(values: np.ndarray[Any, Any], source: Any, target: Any, mode: Any) -> np.ndarray[Any, Any]:
        if source == tl.float32 and target == tl.bfloat16 and mode != rounding.RTZ:
            return fp32_to_bf16(values)
        if source == tl.bfloat16 and target == tl.float32:
            return bf16_to_fp32(values)
        result: np.ndarray[Any, Any] = convert(values, source, target, mode)
        return result

    def to_host(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return interpreter._tuple_create(argument, map(to_host, argument))
        if isinstance(argument, torch.Tensor):
            from virtual_npu import kernels

            return kernels.as_cpu(argument)
        return argument

    copying = interpreter.GridExecutor._init_args_hst

    def init_args_hst(self: Any, args_dev: Any, kwargs: Any) -> tuple[Any, Any]:
        alone = (interpreter.TensorDescriptor, interpreter.triton.runtime.jit.TensorWrapper)
        self.aliased = not any(isinstance(value, alone) for value in (*args_dev, *kwargs.values()))
        if not self.aliased:
            return copying(self, args_dev, kwargs)  # type: ignore[no-any-return]
        return [to_host(value) for value in args_dev], {name: to_host(value) for name, value in kwargs.items()}

    restoring = interpreter.GridExecutor._restore_args_dev

    def restore_args_dev(self: Any, *arguments: Any) -> None:
        if not self.aliased:
            restoring(self, *arguments)

    interpreting = interpreter.GridExecutor.__call__

    def call(self: Any, *args_dev: Any, **kwargs: Any) -> None:
        from virtual_npu import kernels

        if kernels.active() and kernels.turn(self.fn.__name__) != graphs.RUN:
            captured(self, *args_dev, **kwargs)
        else:
            run(self, *args_dev, **kwargs)

    def captured(self: Any, *args_dev: Any, **kwargs: Any) -> None:
        """A kernel may write to all memory that it is given."""
        from virtual_npu import kernels

        if kernels.turn(self.fn.__name__) == graphs.REPLACE:
            raise RuntimeError(f"virtual NPU: Triton kernel {self.fn.__name__} in the update of a task group")
        for tensor in graphs.tensors_in([*args_dev, *kwargs.values()]):
            if tensor.device.type != "cpu":
                kernels.preserve(tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0))
        own_args = [graphs.at_address(value, kernels) for value in args_dev]
        own_kwargs = {name: graphs.at_address(value, kernels) for name, value in kwargs.items()}
        run(self, *own_args, **own_kwargs)
        kernels.record(lambda: run(self, *own_args, **own_kwargs))

    def run(self: Any, *args_dev: Any, **kwargs: Any) -> None:
        function = native.find(self.fn, self.arg_names)
        if function is None:
            interpreting(self, *args_dev, **kwargs)
            return
        known = {name: value for name, value in kwargs.items() if name in self.arg_names}  # not num_warps and the like
        arguments = inspect.getcallargs(self.fn, *args_dev, **known)
        grid = self.grid(arguments) if callable(self.grid) else self.grid
        function(grid, **{name: to_host(value) for name, value in arguments.items()})

    interpreter.GridExecutor.__call__ = call
    interpreter._convert_float = convert_float
    interpreter.GridExecutor._init_args_hst = init_args_hst
    interpreter.GridExecutor._restore_args_dev = restore_args_dev

# SPDX-License-Identifier: Apache-2.0
"""Slices of a block, for Triton's interpreter, where a block is a numpy array in a handle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def _number(value: Any) -> int:
    """A Python integer, a constexpr, or a scalar of the kernel."""
    if isinstance(value, tl.constexpr):
        value = value.value
    return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(value)


def _region(offsets: Sequence[Any], sizes: Sequence[Any], strides: Sequence[Any]) -> tuple[slice, ...]:
    found = []
    for offset, size, stride in zip(offsets, sizes, strides, strict=True):
        start, count, step = _number(offset), _number(size), _number(stride)
        found.append(slice(start, start + count * step, step))
    return tuple(found)


def _block(data: np.ndarray[Any, Any], element: Any) -> tl.tensor:
    return tl.tensor(TensorHandle(data, element), tl.block_type(element, list(data.shape)))


def extract_slice(ful: tl.tensor, offsets: Sequence[Any], sizes: Sequence[Any], strides: Sequence[Any]) -> tl.tensor:
    """ful[offset : offset + size * stride : stride] in each dimension."""
    part = ful.handle.data[_region(offsets, sizes, strides)]
    wanted = tuple(_number(size) for size in sizes)
    if part.shape != wanted:
        shape = ful.handle.data.shape
        raise ValueError(f"virtual NPU: extract_slice: {wanted} at {list(offsets)} is not inside {shape}")
    return _block(part.copy(), ful.dtype)


def insert_slice(
    ful: tl.tensor, sub: tl.tensor, offsets: Sequence[Any], sizes: Sequence[Any], strides: Sequence[Any]
) -> tl.tensor:
    """A copy of ful with sub at that place."""
    data = ful.handle.data.copy()
    data[_region(offsets, sizes, strides)] = sub.handle.data
    return _block(data, ful.dtype)


def get_element(src: tl.tensor, indice: Sequence[Any]) -> tl.tensor:
    """One element of a block, as a scalar."""
    data = src.handle.data[tuple(_number(index) for index in indice)]
    return tl.tensor(TensorHandle(np.array([data], dtype=src.handle.data.dtype), src.dtype), src.dtype)

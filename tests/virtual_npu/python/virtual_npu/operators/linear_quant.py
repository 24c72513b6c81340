# SPDX-License-Identifier: Apache-2.0
"""int8 quantisation and products: w8a8 linear layers and the quantised activations between grouped products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .linear import exact_int_matmul
from .support import expect, poisoned, refuse, rows32, sigmoid32

_STORAGE = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32, torch.int8: torch.int8}


def quantize_int8(values: Tensor) -> Tensor:
    """Round half to even, saturate to int8."""
    return values.round().clamp(-128, 127).to(torch.int8)


def dynamic_quant_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of an fp32 tensor to int8: scale = absmax / 127, round(x / scale); a row of zeros has scale 0."""
    scale = values.abs().amax(-1) / 127.0
    return quantize_int8(torch.where(scale[..., None] > 0, values / scale[..., None], 0.0)), scale


def scale32(scale: Tensor) -> Tensor:
    """A dequantisation scale as fp32; int64 holds the bits of an fp32 in its low half (npu_trans_quant_param)."""
    if scale.dtype == torch.int64:
        return (scale & 0xFFFFFFFF).to(torch.int32).view(torch.float32)
    return scale.float()


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-row int8 of input [..., H] (times smooth_scales [H]). Returns (int8 [..., H], fp32 scale [...])."""
    refuse("npu_dynamic_quant", group_index=group_index)
    expect(dst_type in (None, torch.int8), "npu_dynamic_quant", "dst_type", dst_type, torch.int8)
    values = rows32(input)
    return dynamic_quant_rows(values if smooth_scales is None else values * smooth_scales.float())


def npu_quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: torch.dtype,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    """round(input / scales + zero_points), without div_mode input * scales; saturated; scales lie along axis."""
    expect(dtype in _STORAGE, "npu_quantize", "dtype", dtype, sorted(map(str, _STORAGE)))
    storage = _STORAGE[dtype]
    shape = [1] * input.dim()
    shape[axis] = -1
    scale = scales.float().reshape(shape) if scales.dim() == 1 else scales.float()
    values = input.float() / scale if div_mode else input.float() * scale
    if zero_points is not None:
        values = values + (zero_points.float().reshape(shape) if zero_points.dim() == 1 else zero_points.float())
    limits = torch.iinfo(storage)
    return values.double().round().clamp(limits.min, limits.max).to(storage)


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    group_sizes: list[int] | None = None,
) -> Tensor:
    """int8 [..., K] @ [K, N] * scale [N] or [1] (* pertoken_scale [M]); an int32 bias is added before, others after."""
    operator = "npu_quant_matmul"
    refuse(operator, group_sizes=group_sizes)
    for name, operand in (("x1", x1), ("x2", x2)):
        expect(operand.dtype == torch.int8, operator, name, operand.dtype, torch.int8)
    expect(x2.dim() == 2, operator, "x2", list(x2.shape), "[K, N]")
    total = exact_int_matmul(x1.reshape(-1, x1.shape[-1]), x2)
    if bias is not None and bias.dtype == torch.int32:
        total = total + bias
    wanted = output_dtype or torch.int8
    if wanted == torch.int32:
        return total.reshape(*x1.shape[:-1], -1)
    values = total.float() * scale32(scale)
    if pertoken_scale is not None:
        values = values * pertoken_scale.float().reshape(-1, 1)
    if bias is not None and bias.dtype != torch.int32:
        values = values + bias.float()
    if wanted == torch.int8:
        values = quantize_int8(values if offset is None else values + offset.float())
    else:
        refuse(operator, offset=offset)
    return values.to(wanted).reshape(*x1.shape[:-1], -1)


def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    quant_scale: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    **unsupported: Any,
) -> tuple[Tensor, Tensor]:
    """x int32 [M, 2N] * weight_scale [groups, 2N] * activation_scale [M], swiglu, * quant_scale [groups, N], int8.

    group_index [groups] holds row counts; rows past their sum are poison. Returns (int8 [M, N], fp32 scale [M]).
    """
    operator = "npu_dequant_swiglu_quant"
    refuse(operator, **unsupported)
    expect(quant_mode == 1, operator, "quant_mode", quant_mode, "1 (dynamic)")
    expect(x.dtype != torch.int32 or weight_scale is not None, operator, "weight_scale", None, "given for int32 x")
    rows, half = x.shape[0], x.shape[-1] // 2
    counts = [rows] if group_index is None else group_index.tolist()
    expect(sum(counts) <= rows, operator, "group_index", counts, f"sum <= {rows}")
    values, scales = poisoned((rows, half), torch.int8), poisoned((rows,), torch.float32)
    start = 0
    for group, count in enumerate(counts):
        part = slice(start, start + count)
        start += count
        block = x[part].float()
        if weight_scale is not None:
            block = block * weight_scale.float().reshape(-1, 2 * half)[group]
        if activation_scale is not None:
            block = block * activation_scale.float().reshape(-1, 1)[part]
        left, right = block.chunk(2, -1)
        gate, up = (left, right) if activate_left else (right, left)
        out = gate * sigmoid32(gate) * up
        if quant_scale is not None:
            out = out * quant_scale.float().reshape(-1, half)[group]
        if count:
            values[part], scales[part] = dynamic_quant_rows(out)
    return values, scales

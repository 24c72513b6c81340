# SPDX-License-Identifier: Apache-2.0
"""RMS norms and gated activations: fp32 inside, one rounding to the output dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_quant import quantize_int8
from .support import expect, poisoned, refuse, rows32, sigmoid32


def _rms_norm32(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """fp32 norm over the dimensions of gamma; the second result is 1/rms with those dimensions kept as 1."""
    expect(
        x.shape[-gamma.dim() :] == gamma.shape,
        "npu_rms_norm",
        "gamma",
        list(gamma.shape),
        f"tail of {list(x.shape)}",
    )
    rows = rows32(x).reshape(-1, gamma.numel())
    rstd = torch.rsqrt(rows.square().mean(-1, keepdim=True) + epsilon)
    kept = (*x.shape[: -gamma.dim()], *([1] * gamma.dim()))
    return (rows * rstd * gamma.float().reshape(-1)).reshape(x.shape), rstd.reshape(kept)


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x / rms(x) * gamma over the trailing dimensions of gamma. Returns (y in input's dtype, 1/rms in fp32)."""
    y, rstd = _rms_norm32(input, gamma, epsilon)
    return y.to(input.dtype), rstd


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """The sum is rounded to the dtype, then normalised. Returns (y, 1/rms in fp32, sum)."""
    total = (x1.float() + x2.float()).to(x1.dtype)
    y, rstd = _rms_norm32(total, gamma, epsilon)
    return y.to(x1.dtype), rstd, total


def npu_add_rms_norm_bias(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """npu_add_rms_norm whose y is shifted by beta (shape of gamma) before it is rounded."""
    total = (x1.float() + x2.float()).to(x1.dtype)
    y, rstd = _rms_norm32(total, gamma, epsilon)
    if beta is not None:
        expect(beta.shape == gamma.shape, "npu_add_rms_norm_bias", "beta", list(beta.shape), list(gamma.shape))
        y = y + beta.float()
    return y.to(x1.dtype), rstd, total


def npu_add_rms_norm_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """add_rms_norm, then int8 = round(y / scales1 + zero_points1). Returns (int8, int8 that is never written, sum)."""
    refuse("npu_add_rms_norm_quant", scales2=scales2, zero_points2=zero_points2)
    expect(axis == -1 and div_mode, "npu_add_rms_norm_quant", "axis/div_mode", (axis, div_mode), (-1, True))
    total = (x1.float() + x2.float()).to(x1.dtype)
    y, _ = _rms_norm32(total, gamma, epsilon)
    if beta is not None:
        y = y + beta.float()
    y = y / scales1.float()
    return quantize_int8(y if zero_points1 is None else y + zero_points1.float()), poisoned(x1.shape, torch.int8), total


def swiglu32(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in fp32."""
    gate = gate.float()
    return gate * sigmoid32(gate) * up.float()


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half along dim; all rows are computed, also those past the last group."""
    gate, up = input.chunk(2, dim)
    return swiglu32(gate, up).to(input.dtype).contiguous()

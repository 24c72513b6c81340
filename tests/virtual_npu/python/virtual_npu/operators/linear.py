# SPDX-License-Identifier: Apache-2.0
"""Matrix products whose rows do not depend on the batch they are in.

CPU libraries choose another kernel, and with it another order of summation, for another number of rows; comparing
ragged with padded runs needs the same bits for a row in any batch. So every product here is made of calls of one
constant shape: ``TILE_ROWS`` rows, the last tile padded with zeros. Inside a tile a row's position does not matter
(tested).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .support import expect, refuse, sigmoid32

TILE_ROWS = 16


def batch_invariant_matmul(
    a: Tensor,
    b: Tensor,
    addend: Tensor | None = None,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    """``alpha * a @ b + beta * addend`` for a [M, K], b [K, N], addend broadcastable to [M, N]; dtype of a.

    fp16 and bf16 are summed in fp32 and rounded once. Integer products are exact, so they take the direct way.
    """
    if not a.is_floating_point():
        product = torch.mm(a, b)
        return product if addend is None else torch.add(beta * addend, product, alpha=int(alpha))
    rows, width = a.shape[0], b.shape[1]
    dtype = a.dtype
    if dtype == torch.float16:  # torch has no fast fp16 product on most CPUs; fp32 holds every fp16 product exactly
        a, b = a.float(), b.float()
        addend = None if addend is None else addend.float()
    a = a.contiguous()
    if addend is not None:
        addend = addend.expand(rows, width)
    result = a.new_empty((rows, width))
    for start in range(0, rows, TILE_ROWS):
        tile = _padded(a[start : start + TILE_ROWS])
        if addend is None:
            product = torch.mm(tile, b)
        else:
            product = torch.addmm(_padded(addend[start : start + TILE_ROWS]), tile, b, beta=beta, alpha=alpha)
        result[start : start + TILE_ROWS] = product[: rows - start]
    return result.to(dtype)


def _padded(tile: Tensor) -> Tensor:
    if tile.shape[0] == TILE_ROWS:
        return tile
    padded = tile.new_zeros((TILE_ROWS, tile.shape[1]))
    padded[: tile.shape[0]] = tile
    return padded


def exact_int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, K] @ int8 [K, N] -> int32, exact: every partial sum fits into fp64, so the order does not matter."""
    return torch.mm(a.double(), b.double()).to(torch.int32)


# ---- the aten operators, with aten's own signatures ----------------------------------------------------------------


def mm(self: Tensor, mat2: Tensor) -> Tensor:
    return batch_invariant_matmul(self, mat2)


def addmm(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return batch_invariant_matmul(mat1, mat2, self, beta=beta, alpha=alpha)


def bmm(self: Tensor, mat2: Tensor) -> Tensor:
    result = self.new_empty((self.shape[0], self.shape[1], mat2.shape[2]))
    for index, (a, b) in enumerate(zip(self, mat2, strict=True)):
        result[index] = batch_invariant_matmul(a, b)
    return result


def baddbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    shape = (batch1.shape[0], batch1.shape[1], batch2.shape[2])
    result = batch1.new_empty(shape)
    for index, (addend, a, b) in enumerate(zip(self.expand(shape), batch1, batch2, strict=True)):
        result[index] = batch_invariant_matmul(a, b, addend, beta=beta, alpha=alpha)
    return result


def matmul(self: Tensor, other: Tensor) -> Tensor:
    """numpy's rules: 1-D operands get a dimension that is removed again, leading dimensions broadcast."""
    a = self.unsqueeze(0) if self.dim() == 1 else self
    b = other.unsqueeze(1) if other.dim() == 1 else other
    if b.dim() == 2:
        result = batch_invariant_matmul(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[1])
    else:
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a = a.expand(*lead, *a.shape[-2:])
        b = b.expand(*lead, *b.shape[-2:])
        result = bmm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
        result = result.reshape(*lead, a.shape[-2], b.shape[-1])
    if other.dim() == 1:
        result = result.squeeze(-1)
    return result.squeeze(-2 if other.dim() > 1 else -1) if self.dim() == 1 else result


def sigmoid(self: Tensor) -> Tensor:
    return sigmoid32(self).to(self.dtype if self.is_floating_point() else torch.float32)


def silu(self: Tensor) -> Tensor:
    return (self.float() * sigmoid32(self)).to(self.dtype)


def into(operator: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The out= overload of a function; out must have the right shape already."""

    def run(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        result = function(*args, **kwargs)
        expect(out.shape == result.shape, operator, "out", list(out.shape), f"shape {list(result.shape)}")
        return out.copy_(result)

    return run


def npu_matmul_add_fp32(x: Tensor, weight: Tensor, C: Tensor) -> None:
    """C [M, N] fp32 += x [K, M] transposed @ weight [K, N], summed in fp32, in place."""
    C += batch_invariant_matmul(x.float().t(), weight.float())


def npu_transpose_batchmatmul(
    input: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    perm_x1: list[int] | None = None,
    perm_x2: list[int] | None = None,
    perm_y: list[int] | None = None,
    batch_split_factor: int = 1,
) -> Tensor:
    """Batched product: input (B, M, K) after perm_x1, weight (B, K, N) after perm_x2, the result permuted by perm_y."""
    operator = "npu_transpose_batchmatmul"
    refuse(operator, bias=bias, scale=scale)
    expect(batch_split_factor == 1, operator, "batch_split_factor", batch_split_factor, 1)
    result = bmm(input.permute(perm_x1 or [0, 1, 2]), weight.permute(perm_x2 or [0, 1, 2]))
    return result.permute(perm_y or [1, 0, 2]).contiguous()


def batch_matmul_transpose(
    tensor_a: Tensor,
    tensor_b: Tensor,
    tensor_c: Tensor,
    format_mode: str | None = None,
    quant_mode: str | None = None,
) -> None:
    """tensor_c [tokens, heads, N] = per head tensor_a [tokens, heads, K] @ tensor_b [heads, K, N], in place."""
    refuse("_C_ascend.batch_matmul_transpose", format_mode=format_mode, quant_mode=quant_mode)
    tensor_c.copy_(bmm(tensor_a.transpose(0, 1), tensor_b).transpose(0, 1))

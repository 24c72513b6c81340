# SPDX-License-Identifier: Apache-2.0
"""Stock's Triton kernels that run in every engine step, as plain torch: the interpreter needs 40 ms for a program.

A function here has the kernel's own parameter names and writes what the kernel writes, bit by bit; a kernel whose
parameters differ from it (another version) is interpreted instead. Tensors are CPU tensors over device memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _rows(pointer: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """A view of the memory that a kernel addresses from a pointer."""
    return pointer.as_strided(tuple(shape), tuple(strides), pointer.storage_offset())


def compute_slot_mapping(
    grid: Sequence[int],
    *,
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr: Tensor,
    positions_ptr: Tensor,
    block_table_ptr: Tensor,
    block_table_stride: int,
    block_size: int,
    slot_mapping_ptr: Tensor,
    TOTAL_CP_WORLD_SIZE: int,
    TOTAL_CP_RANK: int,
    CP_KV_CACHE_INTERLEAVE_SIZE: int,
    PAD_ID: int,
    BLOCK_SIZE: int,
) -> None:
    """Token to KV cache slot; a request per program, and one program that pads what is behind num_tokens."""
    requests = grid[0] - 1
    slot_mapping_ptr[num_tokens:max_num_tokens] = PAD_ID
    starts = query_start_loc_ptr[: requests + 1].long()
    first, last = int(starts[0]), int(starts[-1])
    request = torch.repeat_interleave(torch.arange(requests), starts.diff())
    position = positions_ptr[first:last].long()
    virtual_block = block_size * TOTAL_CP_WORLD_SIZE
    table = _rows(block_table_ptr, (requests, block_table_stride), (block_table_stride, 1))
    block, offset = table[request, position // virtual_block].long(), position % virtual_block
    interleave = CP_KV_CACHE_INTERLEAVE_SIZE
    own = offset // interleave % TOTAL_CP_WORLD_SIZE == TOTAL_CP_RANK
    local = offset // (TOTAL_CP_WORLD_SIZE * interleave) * interleave + offset % interleave
    slots = torch.where(own, block * block_size + local, PAD_ID)
    slot_mapping_ptr[first:last] = slots.to(slot_mapping_ptr.dtype)


def rope(
    grid: Sequence[int],
    *,
    q_ptr: Tensor,
    q_row_stride: int,
    k_ptr: Tensor,
    k_row_stride: int,
    cos_ptr: Tensor | None,
    cos_row_stride: int | None,
    sin_ptr: Tensor | None,
    sin_row_stride: int | None,
    cos_sin_ptr: Tensor | None,
    cos_sin_row_stride: int | None,
    pos_ptr: Tensor | None,
    num_tokens: int,
    n_qh: int,
    n_kh: int,
    hd: int,
    rope_dim: int,
    pad_rope_dim: int,
    BLOCK_SIZE_HEAD: int,
    IS_NEOX_STYLE: bool,
    USE_COS_SIN: bool,
) -> None:
    """Rotates the first rope_dim elements of each head of q and k in place, in fp32."""
    half = rope_dim // 2
    if USE_COS_SIN:
        assert cos_sin_ptr is not None
        assert pos_ptr is not None
        rows = cos_sin_ptr[pos_ptr[:num_tokens].long()].float()
        cos, sin = rows[:, :half], rows[:, pad_rope_dim // 2 : pad_rope_dim // 2 + half]
    else:
        assert cos_ptr is not None
        assert sin_ptr is not None
        cos = _rows(cos_ptr, (num_tokens, half), (cos_row_stride or 0, 1)).float()
        sin = _rows(sin_ptr, (num_tokens, half), (sin_row_stride or 0, 1)).float()
    for pointer, stride, heads in ((q_ptr, q_row_stride, n_qh), (k_ptr, k_row_stride, n_kh)):
        tile = _rows(pointer, (num_tokens, heads, rope_dim), (stride, hd, 1))
        parts = tile.chunk(2, -1) if IS_NEOX_STYLE else (tile[..., ::2], tile[..., 1::2])
        first, second = (part.float() for part in parts)
        parts[0].copy_(first * cos[:, None] - second * sin[:, None])
        parts[1].copy_(second * cos[:, None] + first * sin[:, None])


KERNELS: dict[tuple[str, str], Callable[..., None]] = {
    ("vllm.v1.worker.block_table", "_compute_slot_mapping_kernel"): compute_slot_mapping,
    ("vllm_ascend.ops.triton.rope", "_triton_rope"): rope,
}


def find(function: Callable[..., Any], arguments: Sequence[str]) -> Callable[..., None] | None:
    """The native form of a kernel with these parameters, if there is one."""
    native = KERNELS.get((function.__module__, function.__name__))
    if native is None or list(inspect.signature(native).parameters)[1:] != list(arguments):
        return None
    return native

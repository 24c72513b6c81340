# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, and writing keys and values into the paged KV cache (in place, never a copy of it)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .norm import npu_rms_norm
from .support import expect, refuse

NZ_WIDTH = 16  # elements of a 16-bit dtype in one fractal row


def _rotated(x: Tensor, mode: str) -> Tensor:
    """The partner of each element under the rotation: half (i, i + D/2) or interleave (2i, 2i + 1)."""
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    x32 = x.float()
    return (x32 * cos.float() + _rotated(x32, mode) * sin.float()).to(x.dtype)


def _deinterleaved(x: Tensor) -> Tensor:
    return torch.cat((x[..., ::2], x[..., 1::2]), -1)


def _mode(operator: str, rotary_mode: str) -> str:
    expect(rotary_mode in ("half", "interleave"), operator, "rotary_mode", rotary_mode, "half or interleave")
    return rotary_mode


def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    """input * r1 + rotated(input) * r2; r1 (cos) and r2 (sin) broadcast over heads."""
    return _rope(input, r1, r2, _mode("npu_rotary_mul", rotary_mode)).contiguous()


def npu_interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, S, D] with interleaved pairs: bring pairs to halves, then rotate; cos, sin [B, 1, S, D]."""
    return _rope(_deinterleaved(x), cos, sin, "half")


def npu_apply_rotary_pos_emb(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: str = "BSH",
    rotary_mode: str = "half",
) -> tuple[Tensor, Tensor]:
    """Rotates query and key [B, S, N, D] in place by cos, sin [B, S, 1, D] and returns them."""
    operator = "npu_apply_rotary_pos_emb"
    expect(layout in ("BSH", "BSND"), operator, "layout", layout, "BSH or BSND")
    expect(query.dim() == 4 and key.dim() == 4, operator, "query", list(query.shape), "[B, S, N, D]")
    mode = _mode(operator, rotary_mode)
    return query.copy_(_rope(query, cos, sin, mode)), key.copy_(_rope(key, cos, sin, mode))


def _rotate_tokens(positions: Tensor, tensor: Tensor, cos_sin_cache: Tensor, is_neox_style: bool) -> Tensor:
    """tensor [tokens, heads * D] rotated by the cache rows [positions, D] = cos half | sin half; D: rotary width."""
    cos, sin = cos_sin_cache.index_select(0, positions.flatten().long()).float().chunk(2, -1)
    if is_neox_style:
        cos, sin, mode = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), "half"
    else:
        cos, sin, mode = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), "interleave"
    heads = tensor.reshape(positions.numel(), -1, cos_sin_cache.shape[-1])
    return _rope(heads, cos[:, None], sin[:, None], mode).reshape(tensor.shape)


def npu_rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox_style: bool,
) -> None:
    """ATB: rotates query and key [tokens, heads * D] in place. D is the width of cos_sin_cache, as on the device."""
    for tensor in (query, key):
        width = cos_sin_cache.shape[-1]
        fits = tensor.numel() % (positions.numel() * width) == 0 if positions.numel() else True
        expect(fits, "_npu_rotary_embedding", "query/key", list(tensor.shape), f"[tokens, heads * {width}]")
        tensor.copy_(_rotate_tokens(positions, tensor, cos_sin_cache, is_neox_style))


def ascend_rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
) -> tuple[Tensor, Tensor]:
    """vllm-ascend's kernel (neox): query, key [tokens, heads * head_size] to new [tokens, heads, head_size]."""
    operator = "_C_ascend.rotary_embedding"
    expect(is_neox, operator, "is_neox", is_neox, True)
    width = cos_sin_cache.shape[-1]
    expect(head_size == width, operator, "head_size", head_size, f"{width}, all of it rotary")
    rotated = [_rotate_tokens(positions, tensor, cos_sin_cache, True) for tensor in (query, key)]
    q, k = (tensor.reshape(positions.numel(), -1, head_size) for tensor in rotated)
    return q, k


# ---- KV cache ------------------------------------------------------------------------------------------------------


def _write_slots(cache: Tensor, slots: Tensor, values: Tensor) -> None:
    """cache [blocks, block_size, heads, D], slots [tokens]; a negative slot (padding) is skipped."""
    slots = slots.flatten().long()
    kept = slots >= 0
    cache.view(-1, *cache.shape[2:])[slots[kept]] = values[kept].to(cache.dtype)


def _write_slots_nz(cache: Tensor, slots: Tensor, values: Tensor) -> None:
    """The same with each block laid out as [D / 16, block_size, 16]; one head."""
    blocks, block_size, _, width = cache.shape
    slots = slots.flatten().long()
    kept = slots >= 0
    fractal = cache.view(blocks, width // NZ_WIDTH, block_size, NZ_WIDTH)
    rows = values[kept].reshape(-1, width // NZ_WIDTH, NZ_WIDTH).to(cache.dtype)
    fractal[slots[kept] // block_size, :, slots[kept] % block_size] = rows


def npu_reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_indices: Tensor,
) -> None:
    """key, value [tokens, heads, D] into the flat slots of the caches [blocks, block_size, heads, D], in place."""
    tokens = slot_indices.numel()
    expect(key.shape[0] == tokens, "_npu_reshape_and_cache", "slot_indices", tokens, f"{key.shape[0]}, one per token")
    _write_slots(key_cache, slot_indices, key)
    _write_slots(value_cache, slot_indices, value)


def npu_kv_rmsnorm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    **unsupported: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MLA: rms_norm of the first R (gamma [R]) and interleave-rope of the last D of kv [B, 1, S, R + D], both cached.

    k_cache [blocks, block_size, 1, D] and ckv_cache [..., R] are written at index [B * S], in place, and returned,
    with k_rope [B, 1, S, D] and c_kv [B, 1, S, R], which hold values only with is_output_kv (else poison).
    """
    operator = "npu_kv_rmsnorm_rope_cache"
    refuse(operator, **unsupported)
    expect(cache_mode in ("PA", "PA_BNSD", "PA_NZ"), operator, "cache_mode", cache_mode, "PA, PA_BNSD or PA_NZ")
    expect(kv.shape[1] == 1, operator, "kv", list(kv.shape), "[B, 1, S, width]")
    rank = gamma.shape[0]
    c_kv, _ = npu_rms_norm(kv[..., :rank], gamma, epsilon)
    k_rope = npu_interleave_rope(kv[..., rank:], cos, sin)
    write = _write_slots_nz if cache_mode == "PA_NZ" else _write_slots
    write(k_cache, index, k_rope.reshape(-1, 1, k_rope.shape[-1]))
    write(ckv_cache, index, c_kv.reshape(-1, 1, rank))
    if not is_output_kv:
        k_rope, c_kv = torch.full_like(k_rope, torch.nan), torch.full_like(c_kv, torch.nan)
    return k_cache, ckv_cache, k_rope, c_kv


def npu_paged_cache_load_out(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    seq_starts: Tensor | None = None,
    cumsum: bool = False,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gathers context_lens[i] tokens of sequence i from position seq_starts[i] on into key, value [tokens, heads, D].

    cumsum: context_lens holds prefix sums with a leading 0.
    """
    lengths = context_lens.diff().tolist() if cumsum else context_lens.tolist()
    starts = [0] * len(lengths) if seq_starts is None else seq_starts.tolist()
    block_size = key_cache.shape[1]
    slots = []
    for table, start, length in zip(block_table, starts, lengths, strict=False):
        position = torch.arange(start, start + length)
        slots.append(table[position // block_size].long() * block_size + position % block_size)
    flat = torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64)
    for cache, out in ((key_cache, key), (value_cache, value)):
        out[: flat.numel()] = cache.view(-1, *cache.shape[2:])[flat]
    return key, value


def npu_paged_cache_load(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    seq_starts: Tensor | None = None,
    cumsum: bool = False,
) -> tuple[Tensor, Tensor]:
    """As npu_paged_cache_load_out, into new tensors."""
    tokens = int(context_lens[-1]) if cumsum else int(context_lens.sum())
    key, value = (cache.new_empty((tokens, *cache.shape[2:])) for cache in (key_cache, value_cache))
    arguments: dict[str, Any] = {"seq_starts": seq_starts, "cumsum": cumsum, "key": key, "value": value}
    return npu_paged_cache_load_out(key_cache, value_cache, block_table, context_lens, **arguments)


def npu_scatter_nd_update(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """input[indices] = updates, in place; indices [..., d] index the first d dimensions."""
    input[tuple(indices.long().unbind(-1))] = updates.to(input.dtype)
    return input

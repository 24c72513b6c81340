# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts on one rank: gating, sorting rows by expert and back, grouped products.

Names: rows = tokens on this rank, K = top-k, H = hidden. "Slot" is one (token, k) pair, numbered token * K + k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .linear import batch_invariant_matmul, exact_int_matmul
from .linear_quant import dynamic_quant_rows, scale32
from .norm import swiglu32
from .support import expect, first_lowest_top_k, poison, poisoned, refuse, rows32, sigmoid32

# ---- gating --------------------------------------------------------------------------------------------------------


def npu_moe_gating_top_k_softmax(
    x: Tensor,
    finished: Tensor | None = None,
    k: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the experts [rows, E], then top-k without renormalisation.

    Returns (weights in x's dtype, expert ids int32, row ids int32 with row_ids[i, j] = j * rows + i), each [rows, k].
    """
    refuse("npu_moe_gating_top_k_softmax", finished=finished)
    expect(x.dim() == 2 and 0 < k <= x.shape[1], "npu_moe_gating_top_k_softmax", "k", k, f"1..{x.shape[-1]} and 2-D x")
    scores = torch.softmax(rows32(x), -1)
    ids = first_lowest_top_k(scores, k)
    row_ids = torch.arange(x.shape[0] * k, dtype=torch.int32).reshape(k, x.shape[0]).t().contiguous()
    return scores.gather(1, ids).to(x.dtype), ids.to(torch.int32), row_ids


def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped top-k: scores [rows, E] + bias choose k_group of group_count groups, then k experts; weights lack it.

    norm_type 0 softmax, 1 sigmoid (weights normalised by their sum + eps). group_select_mode 0 best expert of a
    group, 1 sum of the best two. Returns (weights in x's dtype, ids int32, fp32 scores if out_flag else poison).
    """
    operator = "npu_moe_gating_top_k"
    refuse(operator, renorm=renorm)
    groups = (k_group, group_count, group_select_mode)
    scaling = (norm_type == 1, routed_scaling_factor, eps)
    return _grouped_top_k(operator, x, k, bias, groups, norm_type, scaling, out_flag)


def moe_gating_top_k(
    x: Tensor,
    k: int,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
    bias_opt: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """npu_moe_gating_top_k that can also normalise the softmax form: renorm 1 divides by the sum + eps before scaling.

    The sigmoid form without renorm does not exist.
    """
    operator = "_C_ascend.moe_gating_top_k"
    expect(renorm in (0, 1), operator, "renorm", renorm, "0 or 1")
    expect(norm_type != 1 or renorm == 1, operator, "renorm", renorm, "1 with norm_type 1 (sigmoid)")
    groups = (k_group, group_count, group_select_mode)
    scaling = (renorm == 1, routed_scaling_factor, eps)
    return _grouped_top_k(operator, x, k, bias_opt, groups, norm_type, scaling, out_flag)


def _grouped_top_k(
    operator: str,
    x: Tensor,
    k: int,
    bias: Tensor | None,
    groups: tuple[int, int, int],
    norm_type: int,
    scaling: tuple[bool, float, float],
    out_flag: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """groups: k_group, group_count, group_select_mode. scaling: whether to normalise, the factor after it, eps."""
    k_group, group_count, group_select_mode = groups
    normalise, routed_scaling_factor, eps = scaling
    rows, experts = x.shape
    expect(norm_type in (0, 1), operator, "norm_type", norm_type, "0 or 1")
    expect(group_select_mode in (0, 1), operator, "group_select_mode", group_select_mode, "0 or 1")
    expect(experts % group_count == 0, operator, "group_count", group_count, f"a divisor of {experts}")
    size = experts // group_count
    expect(1 <= k_group <= group_count, operator, "k_group", k_group, f"1..{group_count}")
    expect(1 <= k <= k_group * size, operator, "k", k, f"1..{k_group * size}")
    scores = sigmoid32(rows32(x)) if norm_type == 1 else torch.softmax(rows32(x), -1)
    choice = scores if bias is None else scores + bias.float()
    if k_group < group_count:
        grouped = choice.reshape(rows, group_count, size)
        if group_select_mode == 0:
            group_scores = grouped.amax(-1)
        else:
            group_scores = grouped.sort(-1, descending=True).values[..., :2].sum(-1)
        kept = torch.zeros(rows, group_count, dtype=torch.bool)
        kept.scatter_(1, first_lowest_top_k(group_scores, k_group), True)
        choice = grouped.masked_fill(~kept[..., None], -torch.inf).reshape(rows, experts)
    ids = first_lowest_top_k(choice, k)
    weights = scores.gather(1, ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = (weights * routed_scaling_factor).to(x.dtype)
    return weights, ids.to(torch.int32), scores if out_flag else poisoned((rows, experts), torch.float32)


# ---- rows to expert order and back ---------------------------------------------------------------------------------


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    return inverse


def npu_moe_init_routing(
    x: Tensor,
    row_idx: Tensor,
    expert_idx: Tensor,
    active_num: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stable sort of the slots by expert. row_idx [rows, K] numbers slots as k * rows + token (gating's third output).

    Returns (x in expert order [min(rows, active_num) * K, H], int32 position of each row id [rows * K], int32 sorted
    experts).
    """
    rows, k = expert_idx.shape
    experts, order = torch.sort(expert_idx.flatten(), stable=True)
    row_ids = row_idx.flatten()[order].long()
    expanded = x[row_ids[: min(rows, active_num) * k] % rows]
    return expanded, _inverse(row_ids).to(torch.int32), experts.to(torch.int32)


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = 0,
    active_expert_range: tuple[int, ...] = (),
    row_idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of the experts in [start, end) in expert order, with a histogram; slots of other experts are left out.

    quant_mode -1 none, 1 int8 per row (times scale [end - start, H]). row_idx_type 0: [slot] -> row or -1, 1: [row]
    -> slot or -1. expert_tokens_num_type 0 prefix sums, 1 counts (int64 [end - start]), 2 (expert, count) pairs
    [expert_num, 2]. expert_capacity has no meaning without drop_pad_mode. Returns (rows [rows * K, H], int32 index,
    histogram, fp32 scale [rows * K]); what is not written (rows past the active slots, a scale nobody asked for) is
    poison.
    """
    operator = "npu_moe_init_routing_v2"
    refuse(operator, offset=offset, drop_pad_mode=drop_pad_mode)
    slots, k = expert_idx.numel(), expert_idx.shape[1]
    expect(len(active_expert_range) == 2, operator, "active_expert_range", active_expert_range, "[start, end]")
    start, end = active_expert_range
    expect(
        0 <= start < end <= expert_num,
        operator,
        "active_expert_range",
        [start, end],
        f"within expert_num {expert_num}",
    )
    expect(active_num in (-1, slots), operator, "active_num", active_num, f"rows * K = {slots}")
    expect(quant_mode in (-1, 1), operator, "quant_mode", quant_mode, "-1 or 1")
    expect(expert_tokens_num_type in (0, 1, 2), operator, "expert_tokens_num_type", expert_tokens_num_type, "0, 1 or 2")
    expect(row_idx_type in (0, 1), operator, "row_idx_type", row_idx_type, "0 or 1")
    flat = expert_idx.flatten()
    active = torch.nonzero((flat >= start) & (flat < end)).flatten()
    experts, order = torch.sort(flat[active], stable=True)
    source = active[order]
    count = source.numel()

    expanded = poisoned((slots, x.shape[1]), torch.int8 if quant_mode == 1 else x.dtype)
    expanded_scale = poisoned((slots,), torch.float32)
    if quant_mode == 1:
        values = rows32(x)[source // k]
        if scale is not None:
            values = values * scale.float()[(experts - start).long()]
        if count:
            expanded[:count], expanded_scale[:count] = dynamic_quant_rows(values)
    else:
        expanded[:count] = x[source // k]
        if scale is not None:
            expanded_scale[:count] = scale.float()[source // k]
    index = torch.full((slots,), -1, dtype=torch.int32)
    if row_idx_type == 0:
        index[source] = torch.arange(count, dtype=torch.int32)
    else:
        index[:count] = source.to(torch.int32)

    counts = torch.bincount((experts - start).long(), minlength=end - start)
    if expert_tokens_num_type == 2:
        histogram = torch.zeros(expert_num, 2, dtype=torch.int64)
        used = torch.nonzero(counts).flatten()
        histogram[: used.numel()] = torch.stack((used + start, counts[used]), 1)
    else:
        histogram = counts if expert_tokens_num_type == 1 else counts.cumsum(0)
        # For this one shape torch_npu takes the older kernel, which counts in int32.
        if (expert_num, start, end, x.shape[1], quant_mode, expert_tokens_num_type) == (128, 0, 128, 2048, -1, 1):
            histogram = histogram.to(torch.int32)
    return expanded, index, histogram if expert_tokens_num_flag else poison(histogram), expanded_scale


def npu_moe_init_routing_custom(
    x: Tensor,
    expert_idx: Tensor,
    *,
    quant_mode: int = 0,
    expert_num: int = -1,
    active_expert_range: tuple[int, ...] = (),
    **arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """npu_moe_init_routing_v2 of vllm-ascend: no range means all experts, counts are always int64."""
    active_expert_range = active_expert_range or (0, expert_num)
    expanded, index, histogram, scale = npu_moe_init_routing_v2(
        x,
        expert_idx,
        quant_mode=quant_mode,
        expert_num=expert_num,
        active_expert_range=active_expert_range,
        **arguments,
    )
    return expanded, index, histogram.to(torch.int64), scale


def npu_moe_token_permute(
    tokens: Tensor,
    indices: Tensor,
    num_out_tokens: int | None = None,
    padded_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """tokens [rows, H] in expert order for indices [rows, K] or [rows]. Returns (rows, int32 [slot] -> row).

    num_out_tokens > 0 keeps that many rows, <= 0 (or None) drops that many.
    """
    refuse("npu_moe_token_permute", padded_mode=padded_mode)
    slots = indices.numel()
    wanted = num_out_tokens or 0
    kept = min(wanted, slots) if wanted > 0 else slots + wanted
    k = indices.shape[1] if indices.dim() == 2 else 1
    order = torch.sort(indices.flatten(), stable=True).indices
    return tokens[order[:kept] // k], _inverse(order).to(torch.int32)


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    """Back to token order: out[token] = sum over its slots, in slot order, fp32, of probs [rows, K] * row[index[slot]].

    restore_shape has a meaning in padded mode only. A row index past the rows that exist counts as a dropped slot.
    """
    refuse("npu_moe_token_unpermute", padded_mode=padded_mode)
    k = 1 if probs is None else probs.shape[1]
    index = sorted_indices.long()
    present = index < permuted_tokens.shape[0]
    picked = torch.zeros(index.numel(), permuted_tokens.shape[1])
    picked[present] = permuted_tokens[index[present]].float()
    picked = picked.reshape(-1, k, permuted_tokens.shape[1])
    weights = None if probs is None else probs.float()
    total = torch.zeros(picked.shape[0], picked.shape[2])
    for slot in range(k):
        total = total + (picked[:, slot] if weights is None else picked[:, slot] * weights[:, slot, None])
    return total.to(permuted_tokens.dtype)


def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
) -> Tensor:
    """out_i = skip1_i + skip2_i + sum over k of scales_ik * (row[src_to_dst of slot] + bias of its expert), in fp32.

    drop_pad_mode 0 numbers the slots k * rows + i, 2 numbers them i * K + k.
    """
    operator = "npu_moe_finalize_routing"
    expect(drop_pad_mode in (0, 2, None), operator, "drop_pad_mode", drop_pad_mode, "0 or 2 (dropless)")
    expect(
        bias is None or export_for_source_row is not None,
        operator,
        "export_for_source_row",
        None,
        "given with a bias",
    )
    slots = expanded_src_to_dst_row.numel()
    rows = slots if scales is None else scales.shape[0]
    index = expanded_src_to_dst_row.long()
    index = index.reshape(rows, -1) if drop_pad_mode == 2 else index.reshape(-1, rows).t()
    total = torch.zeros(rows, expanded_permuted_rows.shape[1])
    for skip in (skip1, skip2):
        if skip is not None:
            total = total + skip.float()
    for slot in range(slots // rows if rows else 0):
        row = expanded_permuted_rows[index[:, slot]].float()
        if bias is not None and export_for_source_row is not None:
            row = row + bias.float()[export_for_source_row[:, slot].long()]
        total = total + (row if scales is None else row * scales.float()[:, slot, None])
    return total.to(expanded_permuted_rows.dtype)


def npu_moe_re_routing(
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    *,
    per_token_scales: Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rank-major rows (counts [ranks, experts]) to expert-major: (tokens, scales, int32 index, rows per expert).

    idx_type 0: index[new row] = old row, 1: index[old row] = new row.
    """
    operator = "npu_moe_re_routing"
    expect(expert_token_num_type == 1, operator, "expert_token_num_type", expert_token_num_type, "1 (counts)")
    expect(idx_type in (0, 1), operator, "idx_type", idx_type, "0 or 1")
    ranks, experts = expert_token_num_per_rank.shape
    owner = torch.arange(experts).repeat(ranks).repeat_interleave(expert_token_num_per_rank.flatten().long())
    total = owner.numel()
    expect(total <= tokens.shape[0], operator, "expert_token_num_per_rank", total, f"sum <= {tokens.shape[0]} tokens")
    order = torch.sort(owner, stable=True).indices
    moved = poisoned(tuple(tokens.shape), tokens.dtype)
    moved[:total] = tokens[order]
    if per_token_scales is None:
        scales = poisoned((tokens.shape[0],), torch.float32)
    else:
        scales = poisoned(tuple(per_token_scales.shape), per_token_scales.dtype)
        scales[:total] = per_token_scales[order]
    index = poisoned((tokens.shape[0],), torch.int32)
    index[:total] = (order if idx_type == 0 else _inverse(order)).to(torch.int32)
    return moved, scales, index, expert_token_num_per_rank.sum(0).to(expert_token_num_per_rank.dtype)


def npu_moe_compute_expert_tokens(sorted_expert_for_source_row: Tensor, num_expert: int) -> Tensor:
    """Inclusive prefix counts int32 [num_expert] of a sorted list of expert ids."""
    experts = torch.arange(num_expert, dtype=sorted_expert_for_source_row.dtype)
    return torch.searchsorted(sorted_expert_for_source_row.contiguous(), experts, right=True).to(torch.int32)


# ---- grouped products ----------------------------------------------------------------------------------------------


def _groups(
    operator: str,
    group_list: list,
    group_list_type: int,
    experts: int,
    rows: int,
) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of each group; 0 prefix sums, 1 counts, 2 (expert, count) pairs."""
    expect(group_list_type in (0, 1, 2), operator, "group_list_type", group_list_type, "0, 1 or 2")
    if group_list_type == 2:
        owners, counts = [pair[0] for pair in group_list], [pair[1] for pair in group_list]
        in_range = all(0 <= owner < experts for owner in owners)
        expect(in_range, operator, "group_list", group_list, f"experts below {experts}")
    else:
        expect(len(group_list) == experts, operator, "group_list", group_list, f"{experts} entries, one per weight")
        owners = list(range(experts))
        counts = list(group_list)
        if group_list_type == 0:
            counts = [end - start for start, end in zip([0, *group_list[:-1]], group_list, strict=True)]
    groups, start = [], 0
    for owner, count in zip(owners, counts, strict=True):
        expect(count >= 0, operator, "group_list", group_list, "no negative group (type 0: non-decreasing)")
        groups.append((owner, start, start + count))
        start += count
    expect(start <= rows, operator, "group_list", group_list, f"at most {rows} rows")
    return groups


def _expert(tensors: list[Tensor] | None, expert: int, dims: int) -> Tensor | None:
    """An expert's part of an argument, a list with one tensor per expert, or one stacked tensor (`dims` dimensions)."""
    if not tensors:
        return None
    if len(tensors) == 1 and tensors[0].dim() == dims:
        return tensors[0][expert]
    return tensors[expert]


def _product(
    operator: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    per_token_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """One group: x [m, K] @ weight [K, N]; int8 is dequantised by scale [N] and per_token_scale [m], or stays int32."""
    expect(x.shape[-1] == weight.shape[-2], operator, "weight", list(weight.shape), f"[..., {x.shape[-1]}, N]")
    if x.dtype != torch.int8:
        expect(scale is None and per_token_scale is None, operator, "scale", "given", f"None for {x.dtype} x")
        if bias is not None and bias.dtype != x.dtype:  # an fp32 bias of a 16-bit product is added before the rounding
            x, weight, bias = x.float(), weight.float(), bias.float()
        return batch_invariant_matmul(x, weight, bias).to(dtype)
    total = exact_int_matmul(x, weight)
    if bias is not None and bias.dtype == torch.int32:
        total = total + bias
    if scale is None:
        expect(dtype == torch.int32, operator, "output_dtype", dtype, "torch.int32 for int8 without a scale")
        return total
    values = total.float() * scale32(scale).reshape(-1)
    if per_token_scale is not None:
        values = values * per_token_scale.float().reshape(-1, 1)
    if bias is not None and bias.dtype != torch.int32:
        values = values + bias.float()
    return values.to(dtype)


def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    scale: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | list[int] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    tuning_config: list[int] | None = None,
    output_dtype: torch.dtype | None = None,
    **unsupported: Any,
) -> list[Tensor]:
    """y_g = x_g @ weight_g for each group of rows (group_type 0), or for each pair of list items (no group_list).

    weight: one [E, K, N] or E tensors [K, N]. x: one [M, K] cut by group_list, or one tensor per group. split_item
    2/3 gives one output tensor whose rows past the last group are not written (poison), 0/1 one tensor per group.
    tuning_config is a hint about speed and has no effect on values. Returns a list of tensors.
    """
    operator = "npu_grouped_matmul"
    refuse(operator, **unsupported)
    expect(group_type in (None, -1, 0), operator, "group_type", group_type, "-1 (none) or 0 (rows)")
    expect(split_item in (None, 0, 1, 2, 3), operator, "split_item", split_item, "0..3")
    for item in weight:
        expect(item.dtype == x[0].dtype, operator, "weight dtype", item.dtype, f"{x[0].dtype} as x")
    experts = weight[0].shape[0] if len(weight) == 1 and weight[0].dim() == 3 else len(weight)
    width = weight[0].shape[-1]
    dtype = output_dtype or x[0].dtype

    if group_list is None:
        expect(len(x) == experts, operator, "x", f"{len(x)} tensors", f"{experts}, or a group_list")
        sizes = [item.shape[0] for item in x]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        groups = [(index, end - size, end) for index, (size, end) in enumerate(zip(sizes, ends, strict=True))]
        parts = list(x)
    else:
        expect(len(x) == 1, operator, "x", f"{len(x)} tensors", "1 with a group_list")
        listed = group_list.tolist() if isinstance(group_list, Tensor) else list(group_list)
        groups = _groups(operator, listed, group_list_type or 0, experts, x[0].shape[0])
        parts = [x[0][start:end] for _, start, end in groups]
    row_scale = torch.cat([item.reshape(-1) for item in per_token_scale]) if per_token_scale else None
    outputs = []
    for part, (expert, start, end) in zip(parts, groups, strict=True):
        own_scale = None if row_scale is None else row_scale[start:end]
        own = _expert(weight, expert, 3), _expert(bias, expert, 2), _expert(scale, expert, 2)
        outputs.append(_product(operator, part, *own, own_scale, dtype))
    if split_item in (None, 0, 1):
        return outputs
    result = poisoned((sum(item.shape[0] for item in x), width), dtype)
    for output, (_, start, end) in zip(outputs, groups, strict=True):
        result[start:end] = output
    return [result]


def npu_grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    *,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """int8 x [M, K] @ weight [E, K, 2N], dequantised, swiglu, int8 per row; group_list holds prefix sums.

    Returns (int8 [M, N], fp32 scale [M], empty offset); rows past the last group are poison.
    """
    operator = "npu_grouped_matmul_swiglu_quant"
    refuse(operator, bias=bias, offset=offset)
    for name, operand in (("x", x), ("weight", weight)):
        expect(operand.dtype == torch.int8, operator, name, operand.dtype, torch.int8)
    values = poisoned((x.shape[0], weight.shape[-1] // 2), torch.int8)
    scales = poisoned((x.shape[0],), torch.float32)
    for expert, start, end in _groups(operator, group_list.tolist(), 0, weight.shape[0], x.shape[0]):
        if end > start:
            part = slice(start, end)
            own = (x[part], weight[expert], None, weight_scale[expert], x_scale[part], torch.float32)
            gate, up = _product(operator, *own).chunk(2, -1)
            values[part], scales[part] = dynamic_quant_rows(swiglu32(gate, up))
    return values, scales, torch.empty(0)

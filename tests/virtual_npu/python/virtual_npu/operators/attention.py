# SPDX-License-Identifier: Apache-2.0
"""Attention: one core in fp32, and the operators that only differ in where queries, keys and masks lie.

A query row's result has the same bits whatever is beside it: queries are computed in tiles of a constant number of
rows, keys in tiles of ``KEY_TILE`` counted from position 0, and what is masked adds an exact zero. So a chunked
prefill equals the one-shot prefill, and a decode step equals the row that a prefill would have computed. Of a cache
only tokens in use are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .support import expect, poisoned, refuse

KEY_TILE = 128
MIN_TILE_ROWS = 8  # query rows times heads that share a key head, in one product
UNITS = 64  # query tiles computed together; bounds the memory for scores
FAR = 2**31 - 1  # "no limit" of pre_tokens and next_tokens
CAUSAL_MASK = 2048  # side of the compressed causal mask of sparse modes 2..4


@dataclass
class Keys:
    """Keys (or values) of several sequences, read tile by tile.

    views: tensors [..., heads, D] that are joined along D; a fractal one is [..., heads, D / 16, 16].
    locate: (sequence [n], position [n]) -> index into the leading dimensions of the views.
    """

    views: list[Tensor]
    leading: int
    lengths: Tensor  # int64 [sequences]
    locate: Callable[[Tensor, Tensor], tuple[Tensor, ...]]

    @property
    def heads(self) -> int:
        return self.views[0].shape[self.leading]

    @property
    def width(self) -> int:
        return sum(view.shape[self.leading + 1 :].numel() for view in self.views)

    def tiles(self, sequences: Tensor, number: int) -> Tensor:
        """Tile `number` of each sequence (ascending, with repetitions), fp32 [n * heads, KEY_TILE, D]."""
        distinct, inverse = torch.unique_consecutive(sequences, return_inverse=True)
        position = torch.arange(number * KEY_TILE, (number + 1) * KEY_TILE)
        # Nothing past a sequence's end is read: cache memory there may be anything, and NaN times a weight of 0 is NaN.
        row, column = torch.nonzero(position < self.lengths[distinct, None], as_tuple=True)
        index = self.locate(distinct[row], position[column])
        tile = torch.zeros(len(distinct), self.heads, KEY_TILE, self.width)
        first = 0
        for view in self.views:
            part = view[index].flatten(2)
            tile[row, :, column, first : first + part.shape[2]] = part.to(torch.float32)
            first += part.shape[2]
        return (tile if len(distinct) == len(inverse) else tile[inverse]).flatten(0, 1)


def packed_keys(tensors: Sequence[Tensor], lengths: Sequence[int]) -> Keys:
    """Sequences one after the other in tensors [tokens, heads, D]."""
    length = torch.tensor(lengths, dtype=torch.int64)
    start = length.cumsum(0) - length
    return Keys(list(tensors), 1, length, lambda sequence, position: (start[sequence] + position,))


def batched_keys(tensors: Sequence[Tensor], lengths: Sequence[int]) -> Keys:
    """One sequence per batch entry of tensors [B, S, heads, D]."""
    length = torch.tensor(lengths, dtype=torch.int64)
    return Keys(list(tensors), 2, length, lambda sequence, position: (sequence, position))


def paged_keys(operator: str, caches: Sequence[Tensor], table: Tensor, lengths: Sequence[int]) -> Keys:
    """caches [blocks, block_size, heads, D]; row s of table lists the blocks of sequence s."""
    size, length, table = caches[0].shape[1], torch.tensor(lengths, dtype=torch.int64), table.long()
    room, longest = table.shape[1] * size, max(lengths, default=0)
    expect(len(lengths) <= table.shape[0], operator, "block_table", list(table.shape), f"{len(lengths)} rows")
    expect(longest <= room, operator, "context length", longest, f"at most {room}, the block table's")
    return Keys(list(caches), 2, length, lambda seq, position: (table[seq, position // size], position % size))


@dataclass
class Hidden:
    """Keys that a query must not see: bool [B or 1, rows, keys]; query i of sequence s reads row first_row[s] + i."""

    mask: Tensor
    first_row: Tensor  # int64 [sequences]

    def tile(self, sequences: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        batch = sequences if self.mask.shape[0] > 1 else torch.zeros_like(sequences)
        rows = (self.first_row[sequences, None] + rows).clamp(max=self.mask.shape[1] - 1)
        return self.mask[batch[:, None, None], rows[:, :, None], columns.clamp(max=self.mask.shape[2] - 1)]


def attend(
    query: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    keys: Keys,
    values: Keys,
    scale: float,
    *,
    band: Sequence[tuple[int, int]] | None = None,
    hidden: Hidden | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax(query key^T * scale) value for several sequences; grouped queries share a key head.

    Args:
        query: [tokens, heads, D]; sequence s has lengths[s] rows from starts[s] on.
        band: per sequence (low, high): query i sees key j if i + low <= j <= i + high.

    Returns:
        fp32 output [tokens, heads, Dv], row maximum and sum of exponentials [tokens, heads]. A row that sees nothing,
        or belongs to no sequence, has output 0, maximum -inf and sum 0.
    """
    tokens, heads, _ = query.shape
    kv_heads, width = values.heads, values.width
    shared = heads // kv_heads
    tile_rows = -(-MIN_TILE_ROWS // shared)
    band = band if band is not None else [(-FAR, FAR)] * len(lengths)
    out, row_sum = torch.zeros(tokens, heads, width), torch.zeros(tokens, heads)
    row_max = torch.full((tokens, heads), -torch.inf)
    units = []  # (sequence, first query, first key tile, end of key tiles)
    for sequence, (length, total, (low, high)) in enumerate(zip(lengths, keys.lengths.tolist(), band, strict=True)):
        for first in range(0, length, tile_rows):
            last = min(first + tile_rows, length) - 1
            end = min(total - 1, last + high) // KEY_TILE + 1
            units.append((sequence, first, max(0, first + low) // KEY_TILE, end))
    edges = torch.tensor(band, dtype=torch.int64).reshape(-1, 2, 1, 1)
    begins, counts = torch.tensor(starts, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)
    for group in (units[at : at + UNITS] for at in range(0, len(units), UNITS)):
        sequence, first = (torch.tensor([unit[i] for unit in group]) for i in (0, 1))
        rows = first[:, None] + torch.arange(tile_rows)  # position of a query in its sequence
        present = rows < counts[sequence, None]
        token = begins[sequence, None] + rows
        packed = query[token * present].to(torch.float32).masked_fill_(~present[:, :, None, None], 0.0)
        packed = packed.reshape(len(group), tile_rows, kv_heads, shared, -1).transpose(1, 2).flatten(2, 3).contiguous()
        maximum = torch.full((*packed.shape[:3], 1), -torch.inf)
        scores: list[tuple[Any, int, Tensor]] = []
        for number in range(min(unit[2] for unit in group), max(unit[3] for unit in group)):
            active = [i for i, unit in enumerate(group) if unit[2] <= number < unit[3]]
            chosen = slice(None) if len(active) == len(group) else torch.tensor(active, dtype=torch.int64)
            own, row = sequence[chosen], rows[chosen][:, :, None]
            columns = torch.arange(number * KEY_TILE, (number + 1) * KEY_TILE)
            low_edge, high_edge = edges[own].unbind(1)
            unseen = (columns < row + low_edge) | (columns > row + high_edge)
            unseen |= columns >= keys.lengths[own][:, None, None]
            if hidden is not None:
                unseen |= hidden.tile(own, row[:, :, 0], columns)
            score = torch.bmm(packed[chosen].flatten(0, 1), keys.tiles(own, number).transpose(1, 2)) * scale
            score = score.reshape(len(active), kv_heads, tile_rows, shared, KEY_TILE)
            score = score.masked_fill_(unseen[:, None, :, None], -torch.inf).flatten(2, 3)
            maximum[chosen] = torch.maximum(maximum[chosen], score.amax(-1, keepdim=True))
            scores.append((chosen, number, score))
        base = maximum.masked_fill(maximum == -torch.inf, 0.0)
        total, weighted = torch.zeros_like(base), torch.zeros(*packed.shape[:3], width)
        for chosen, number, score in scores:
            weight = torch.exp(score - base[chosen])
            total[chosen] += weight.sum(-1, keepdim=True)
            part = torch.bmm(weight.flatten(0, 1), values.tiles(sequence[chosen], number))
            weighted[chosen] += part.reshape(*weight.shape[:3], width)
        weighted = torch.where(total > 0, weighted / total, 0.0)
        for into, result in ((out, weighted), (row_max[..., None], maximum), (row_sum[..., None], total)):
            by_query = result.reshape(len(group), kv_heads, tile_rows, shared, -1).transpose(1, 2).flatten(2, 3)
            into[token[present]] = by_query[present]
    return out, row_max, row_sum


def _starts(lengths: Sequence[int]) -> list[int]:
    """Where each of several packed sequences begins."""
    return [0, *accumulate(lengths)][: len(lengths)]


def _heads(tensor: Tensor, heads: int) -> Tensor:
    """[tokens, heads, D] of [tokens, heads, D] or [tokens, heads * D]."""
    return tensor.view(tensor.shape[0], heads, -1)


# ---- ATB operators: tokens of all sequences one after the other, result written into out ---------------------------


def _atb_mask(operator: str, mask: Tensor, rows: int, keys: int) -> Tensor:
    """An ATB mask as bool [1, rows, keys]: 1 (bf16) or -inf (fp16) hides a key. Other values are a bias (ALiBi)."""
    fits = mask.dim() == 2 and mask.shape[0] >= rows and mask.shape[1] >= keys
    expect(fits, operator, "mask", list(mask.shape), f"2-D, at least {rows} x {keys}")
    hidden = mask[:rows, :keys] != 0
    known = ~hidden | (mask[:rows, :keys] == 1) | (mask[:rows, :keys] <= -10000.0)
    expect(bool(known.all()), operator, "mask", "additive values", "0, and 1 or -inf where hidden")
    return hidden[None]


def _write(operator: str, out: Tensor, query: Tensor, lengths: Sequence[int], result: Tensor) -> None:
    """The rows of the sequences; rows past the last sequence are left as they are."""
    used = sum(lengths)
    expect(used <= query.shape[0], operator, "sequence lengths", lengths, f"sum <= {query.shape[0]} rows of query")
    _heads(out, result.shape[1])[:used] = result[:used]


def npu_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    """Prefill without cache: query, out [tokens, heads, D], key, value [tokens, kv_heads, D], mask [>= longest] * 2."""
    operator, lengths = "_npu_flash_attention", seq_len.tolist()
    longest = max(lengths, default=0)
    hidden = Hidden(_atb_mask(operator, mask, longest, longest), torch.zeros(len(lengths), dtype=torch.int64))
    keys, values = (packed_keys([_heads(tensor, num_kv_heads)], lengths) for tensor in (key, value))
    packed = _heads(query, num_heads)
    result = attend(packed, _starts(lengths), lengths, keys, values, scale_value, hidden=hidden)[0]
    _write(operator, out, query, lengths, result)


def npu_flash_attention_qlens(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    context_lens: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    out: Tensor,
) -> None:
    """Prefill with a cached prefix: seq_len new of context_lens tokens, causal. mask: the compressed one, 128 x 128."""
    operator, lengths, totals = "_npu_flash_attention_qlens", seq_len.tolist(), context_lens.tolist()
    expect(mask.shape[-2:] == (128, 128), operator, "mask", list(mask.shape), "[128, 128], causal")
    band = [(-FAR, total - new) for new, total in zip(lengths, totals, strict=True)]
    keys, values = (paged_keys(operator, [cache], block_table, totals) for cache in (key_cache, value_cache))
    result = attend(_heads(query, num_heads), _starts(lengths), lengths, keys, values, scale_value, band=band)[0]
    _write(operator, out, query, lengths, result)


def npu_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """Decode: one query token per sequence, query, out [tokens, heads, D], caches [blocks, block_size, kv_heads, D]."""
    operator, totals = "_npu_paged_attention", context_lens.tolist()
    expect(key_cache.shape[2] == num_kv_heads, operator, "num_kv_heads", num_kv_heads, key_cache.shape[2])
    expect(len(totals) <= query.shape[0], operator, "context_lens", len(totals), f"at most {query.shape[0]} (queries)")
    keys, values = (paged_keys(operator, [cache], block_table, totals) for cache in (key_cache, value_cache))
    ones = [1] * len(totals)
    result = attend(_heads(query, num_heads), _starts(ones), ones, keys, values, scale_value)[0]
    _write(operator, out, query, ones, result)


def npu_paged_attention_splitfuse(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    out: Tensor,
) -> None:
    """Chunked prefill and decode: seq_len new of context_lens tokens; mask [tokens, max_len], a row per query."""
    operator, lengths, totals = "_npu_paged_attention_splitfuse", seq_len.tolist(), context_lens.tolist()
    starts = _starts(lengths)
    hidden = _atb_mask(operator, mask, sum(lengths), max(totals, default=0))
    keys, values = (paged_keys(operator, [cache], block_table, totals) for cache in (key_cache, value_cache))
    rows = Hidden(hidden, torch.tensor(starts, dtype=torch.int64))
    result = attend(_heads(query, num_heads), starts, lengths, keys, values, scale_value, hidden=rows)[0]
    _write(operator, out, query, lengths, result)


def npu_ring_mla_out(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    mask: Tensor,
    seqlen: Tensor,
    head_num: int,
    kv_head_num: int,
    *,
    pre_out: Tensor | None = None,
    prev_lse: Tensor | None = None,
    qk_scale: float = 1.0,
    kernel_type: str | None = None,
    mask_type: str | None = None,
    input_layout: str | None = None,
    calc_type: str | None = None,
    output: Tensor,
    softmax_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """MLA prefill in rounds: q_nope [tokens, heads, Dn], q_rope [.., Dr], keys likewise, value [keys, heads, Dv].

    seqlen int32 on the host: [B], or [2, B] with query and key lengths. calc_type_first_ring starts, calc_type_default
    merges with pre_out [tokens, heads, Dv] and prev_lse [heads, tokens]. kernel_type is about precision: fp32 anyway.
    """
    operator, calc = "npu_ring_mla", calc_type or "calc_type_first_ring"
    expect(input_layout in (None, "type_bsnd"), operator, "input_layout", input_layout, "type_bsnd")
    masks, calcs = (None, "no_mask", "mask_type_triu"), ("calc_type_first_ring", "calc_type_default")
    expect(mask_type in masks, operator, "mask_type", mask_type, masks)
    expect(calc in calcs, operator, "calc_type", calc, calcs)
    expect(head_num == q_nope.shape[1], operator, "head_num", head_num, q_nope.shape[1])
    expect(kv_head_num == k_nope.shape[1], operator, "kv_head_num", kv_head_num, k_nope.shape[1])
    new = (seqlen[0] if seqlen.dim() == 2 else seqlen).tolist()
    total = (seqlen[1] if seqlen.dim() == 2 else seqlen).tolist()
    band = [(-FAR, t - n if mask_type == "mask_type_triu" else FAR) for n, t in zip(new, total, strict=True)]
    keys, values = packed_keys([k_nope, k_rope], total), packed_keys([value], total)
    query = torch.cat((q_nope, q_rope), -1)
    out, row_max, row_sum = attend(query, _starts(new), new, keys, values, qk_scale, band=band)
    lse = row_max + torch.log(row_sum)  # -inf for a row without keys in this round
    if calc == "calc_type_default":
        if pre_out is None or prev_lse is None:
            raise ValueError(f"virtual NPU: {operator}: pre_out/prev_lse=None, needed: both, to merge with")
        before = prev_lse.t().float()
        joined = torch.logaddexp(before, lse)
        out = pre_out.float() * torch.exp(before - joined)[..., None] + out * torch.exp(lse - joined)[..., None]
        lse = joined
    used = sum(new)
    output[:used], softmax_lse[:, :used] = out[:used].to(output.dtype), lse[:used].t()
    return output, softmax_lse


def npu_ring_mla(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    mask: Tensor,
    seqlen: Tensor,
    head_num: int,
    kv_head_num: int,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """As npu_ring_mla_out, into new tensors."""
    output = poisoned((q_nope.shape[0], head_num, value.shape[2]), q_nope.dtype)
    lse = poisoned((head_num, q_nope.shape[0]), torch.float32)
    inputs = (q_nope, q_rope, k_nope, k_rope, value, mask, seqlen, head_num, kv_head_num)
    return npu_ring_mla_out(*inputs, **arguments, output=output, softmax_lse=lse)


# ---- fused attention of CANN ---------------------------------------------------------------------------------------

LAYOUTS = ("TND", "BSH", "BSND", "BNSD")
# Layouts that name another one for the output: how the output in the layout of the query is permuted.
OUTPUT_LAYOUTS = {"TND_NTD": (1, 0, 2), "BNSD_NBSD": (1, 0, 2, 3), "BSND_NBSD": (2, 0, 1, 3)}


def _check(operator: str, layout: str, sparse_mode: int, mask: Tensor | None, pre: int, following: int) -> None:
    expect(layout in LAYOUTS, operator, "input_layout", layout, LAYOUTS)
    expect(sparse_mode in (0, 2, 3, 4), operator, "sparse_mode", sparse_mode, "0, 2, 3 or 4")
    if sparse_mode != 0:
        side, shape = CAUSAL_MASK, None if mask is None else list(mask.shape)
        compressed = shape is not None and shape[-2:] == [side, side]
        expect(compressed, operator, "atten_mask", shape, f"[{side}, {side}], causal, for sparse_mode {sparse_mode}")
    elif mask is not None:  # without a mask, sparse mode 0 ignores both limits by contract
        expect(min(pre, following) >= FAR, operator, "pre_tokens/next_tokens", (pre, following), "no limit")


def _seen(
    sparse_mode: int,
    mask: Tensor | None,
    pre: int,
    following: int,
    queries: Sequence[int],
    keys: Sequence[int],
) -> dict[str, Any]:
    """band or hidden of `attend`. 2: causal from the top left, 3: from the bottom right, 4: a band around that one."""
    if sparse_mode == 0 and mask is not None:  # [S, T], [B or 1, S, T] or [B or 1, 1, S, T]
        shaped = mask[:, 0] if mask.dim() == 4 else mask
        shaped = shaped[None] if shaped.dim() == 2 else shaped
        return {"hidden": Hidden(shaped != 0, torch.zeros(len(queries), dtype=torch.int64))}
    diagonals = [total - new for new, total in zip(queries, keys, strict=True)]
    bands = {0: (-FAR, FAR), 2: (-FAR, 0)}
    if sparse_mode in bands:
        return {"band": [bands[sparse_mode]] * len(queries)}
    return {"band": [(-FAR, d) if sparse_mode == 3 else (d - pre, d + following) for d in diagonals]}


def _batched(tensor: Tensor, layout: str, heads: int) -> Tensor:
    """[B, S, heads, D] view of BSH, BSND or BNSD."""
    if layout == "BSH":
        return tensor.unflatten(-1, (heads, -1))
    return tensor.transpose(1, 2) if layout == "BNSD" else tensor


def _cache_view(cache: Tensor, heads: int) -> Tensor:
    """[blocks, block_size, heads, D] (fractal: heads, D / 16, 16) of the three layouts that a paged cache may have."""
    if cache.dim() == 3:  # blocks, block_size, heads * D
        return cache.unflatten(-1, (heads, -1))
    if cache.dim() == 4:  # blocks, heads, block_size, D
        return cache.transpose(1, 2)
    return cache.permute(0, 3, 1, 2, 4)  # blocks, heads, D / 16, block_size, 16


def _differences(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _queries(
    tensor: Tensor, layout: str, heads: int, lengths: Sequence[int] | None
) -> tuple[Tensor, list[int], list[int]]:
    """(packed [tokens, heads, D], starts, lengths); given are prefix sums for TND, else valid lengths (None: all)."""
    if layout == "TND":
        own = _differences(lengths or [])
        return tensor, _starts(own), own
    view = _batched(tensor, layout, heads)
    batch, size = view.shape[:2]
    own = [size] * batch if lengths is None else list(lengths)[:batch]
    return view.flatten(0, 1), list(range(0, batch * size, size or 1))[: len(own)], own


def _unpacked(result: Tensor, query: Tensor, layout: str) -> Tensor:
    """Packed [tokens, heads, D] in the layout of query."""
    if layout == "TND":
        return result
    if layout == "BNSD":
        return result.reshape(query.shape[0], query.shape[2], *result.shape[1:]).transpose(1, 2).contiguous()
    rows = result.reshape(*query.shape[:2], *result.shape[1:])
    return rows.flatten(2) if layout == "BSH" else rows


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = FAR,
    next_tokens: int = FAR,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    softmax_lse_flag: bool = False,
    **unsupported: Any,
) -> tuple[Tensor, Tensor]:
    """Decode and prefill over contiguous or paged (block_table) keys. Lengths are host lists.

    TND: actual_seq_lengths are prefix sums that end at the number of query rows; actual_seq_lengths_kv are per-sequence
    lengths with a block_table, prefix sums without. query_rope and key_rope extend the last dimension of query and key
    (MLA). inner_precise chooses a precision on hardware; sums are fp32 here. Rows past a valid length are zero.
    An input_layout of two parts, such as TND_NTD, has heads first in the output.
    Returns (out in the layout of query or that of the second part, fp32 log-sum-exp or an empty tensor).
    """
    operator, kv_heads = "npu_fused_infer_attention_score", num_key_value_heads or num_heads
    permutation = OUTPUT_LAYOUTS.get(input_layout)
    layout = input_layout if permutation is None else input_layout.split("_")[0]
    if permutation is not None:
        refuse(f"{operator} with input_layout={input_layout}", softmax_lse_flag=softmax_lse_flag)
    refuse(operator, **unsupported)
    _check(operator, layout, sparse_mode, atten_mask, pre_tokens, next_tokens)
    expect((query_rope is None) == (key_rope is None), operator, "query_rope/key_rope", "one of them", "both or none")
    ends = list(actual_seq_lengths or []) if layout == "TND" else []
    if layout == "TND":
        covers = ends[-1:] == [query.shape[0]]
        expect(covers, operator, "actual_seq_lengths", ends, f"prefix sums that end at {query.shape[0]}, query's rows")
    packed, starts, lengths = _queries(query, layout, num_heads, actual_seq_lengths)
    if query_rope is not None:
        packed = torch.cat((packed, _queries(query_rope, layout, num_heads, actual_seq_lengths)[0]), -1)
    key_parts = [key] if key_rope is None else [key, key_rope]
    totals = None if actual_seq_lengths_kv is None else list(actual_seq_lengths_kv)
    if block_table is not None or layout == "TND":
        given = len(totals or [])
        expect(given >= len(lengths), operator, "actual_seq_lengths_kv", given, f"{len(lengths)}, one per sequence")
    if totals is not None and layout == "TND" and block_table is None:
        totals = _differences(totals)
    if totals is None:
        totals = [_batched(key, layout, kv_heads).shape[1]] * len(lengths)
    totals = totals[: len(lengths)]
    if block_table is not None:
        views = [_cache_view(cache, kv_heads) for cache in (*key_parts, value)]
        expect(views[0].shape[1] == block_size, operator, "block_size", block_size, f"{views[0].shape[1]}, the cache's")
        keys, values = (paged_keys(operator, part, block_table, totals) for part in (views[:-1], views[-1:]))
    elif layout == "TND":
        keys, values = packed_keys(key_parts, totals), packed_keys([value], totals)
    else:
        batched = [_batched(tensor, layout, kv_heads) for tensor in (*key_parts, value)]
        keys, values = batched_keys(batched[:-1], totals), batched_keys(batched[-1:], totals)
    seen = _seen(sparse_mode, atten_mask, pre_tokens, next_tokens, lengths, totals)
    out, row_max, row_sum = attend(packed, starts, lengths, keys, values, scale, **seen)
    out = _unpacked(out.to(query.dtype), query, layout)
    if permutation is not None:
        out = out.permute(permutation).contiguous()
    if not softmax_lse_flag:
        return out, torch.empty(0)
    lse = torch.where(row_sum > 0, row_max + torch.log(row_sum), torch.inf)
    if layout == "TND":
        return out, lse[..., None]
    rows = query.shape[2] if layout == "BNSD" else query.shape[1]
    return out, lse.reshape(query.shape[0], rows, num_heads, 1).transpose(1, 2).contiguous()


def npu_fused_infer_attention_score_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    workspace: Tensor | None = None,
    out: list[Tensor],
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """As npu_fused_infer_attention_score, into out = [attention_out, softmax_lse]; the latter only if asked for."""
    result, lse = npu_fused_infer_attention_score(query, key, value, **arguments)
    out[0].view(result.shape).copy_(result)
    if lse.numel():
        out[1].view(lse.shape).copy_(lse)
    return out[0], out[1]


def _of_version_1(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of npu_fused_infer_attention_score_v2 under the names that version 1 gives them."""
    names = {
        "actual_seq_qlen": "actual_seq_lengths",
        "actual_seq_kvlen": "actual_seq_lengths_kv",
        "num_query_heads": "num_heads",
        "softmax_scale": "scale",
        "return_softmax_lse": "softmax_lse_flag",
    }
    return {names.get(name, name): value for name, value in arguments.items()}


def npu_fused_infer_attention_score_v2(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Any:
    """npu_fused_infer_attention_score with five arguments renamed; its other new ones are about quantised tensors."""
    return npu_fused_infer_attention_score(query, key, value, **_of_version_1(arguments))


def npu_fused_infer_attention_score_v2_out(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Any:
    """As npu_fused_infer_attention_score_v2, into out = [attention_out, softmax_lse]."""
    return npu_fused_infer_attention_score_out(query, key, value, **_of_version_1(arguments))


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = FAR,
    next_tockens: int = FAR,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Encoder and prefill attention without dropout: gen_mask_parallel and sync, about its random mask, have no effect.

    Returns (out, row maximum, row sum of exponentials, empty, 0, 0, 0); both statistics are fp32, last dimension 8.
    """
    operator, layout = "npu_fusion_attention", input_layout
    refuse(operator, pse=pse, padding_mask=padding_mask, prefix=prefix, softmax_layout=softmax_layout, sink=sink)
    expect(keep_prob == 1.0, operator, "keep_prob", keep_prob, "1.0 (no dropout)")
    _check(operator, layout, sparse_mode, atten_mask, pre_tockens, next_tockens)
    packed, starts, lengths = _queries(query, layout, head_num, actual_seq_qlen)
    if layout == "TND":
        given = actual_seq_qlen is not None and actual_seq_kvlen is not None
        expect(given, operator, "actual_seq_qlen/actual_seq_kvlen", None, "given for TND")
        totals = _differences(actual_seq_kvlen or [])
        keys, values = packed_keys([key], totals), packed_keys([value], totals)
    else:
        kv_heads = key.shape[1 if layout == "BNSD" else 2]
        if layout == "BSH":
            kv_heads = kv_heads * head_num // query.shape[2]
        key_view, value_view = (_batched(tensor, layout, kv_heads) for tensor in (key, value))
        totals = actual_seq_kvlen or [key_view.shape[1]] * len(lengths)
        keys, values = batched_keys([key_view], totals), batched_keys([value_view], totals)
    seen = _seen(sparse_mode, atten_mask, pre_tockens, next_tockens, lengths, totals)
    out, row_max, row_sum = attend(packed, starts, lengths, keys, values, scale, **seen)
    statistics = []
    for item in (row_max, row_sum):
        wide = item[..., None].expand(*item.shape, 8)
        if layout != "TND":
            wide = wide.reshape(query.shape[0], -1, head_num, 8).transpose(1, 2)
        statistics.append(wide.contiguous())
    out = _unpacked(out.to(query.dtype), query, layout)
    return out, statistics[0], statistics[1], torch.empty(0, dtype=query.dtype), 0, 0, 0


def npu_attention_update(lse: list[Tensor], local_out: list[Tensor], update_type: int) -> tuple[Tensor, Tensor]:
    """Joins attention over parts of the keys: lse fp32 [rows] and output [rows, D] of each part.

    A part in which a row sees no key has lse inf, as the fused attention gives it, and does not count. Returns (output
    in the dtype of the parts, fp32 lse of all parts); update_type 0 leaves the latter out (empty).
    """
    operator = "npu_attention_update"
    expect(update_type in (0, 1), operator, "update_type", update_type, "0 or 1")
    expect(len(lse) == len(local_out) and 1 <= len(lse) <= 16, operator, "lse", len(lse), "1..16, one per local_out")
    parts = torch.stack(list(lse))
    parts = torch.where(parts.isinf(), -torch.inf, parts)
    joined = torch.logsumexp(parts, 0)
    weights = torch.where(parts == -torch.inf, 0.0, torch.exp(parts - joined))
    out = torch.zeros(local_out[0].shape)
    for weight, part in zip(weights, local_out, strict=True):
        # A row that saw nothing may hold anything.
        out += torch.where(weight[:, None] > 0, part.float() * weight[:, None], 0.0)
    nothing = joined == -torch.inf
    joined = torch.where(nothing, torch.inf, joined)
    return out.to(local_out[0].dtype), joined if update_type == 1 else torch.empty(0)

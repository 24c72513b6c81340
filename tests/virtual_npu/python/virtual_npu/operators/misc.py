# SPDX-License-Identifier: Apache-2.0
"""Formats, prefetch, sampling filters, vocabulary masks, workspaces."""

from __future__ import annotations

import torch
from torch import Tensor

from .support import expect, refuse, rows32

ND, NZ = 2, 29  # aclFormat


def npu_format_cast(input: Tensor, acl_format: int, customize_dtype: int | None = None) -> Tensor:
    """The same values. The virtual NPU keeps every tensor in ND; NZ changes only where hardware puts an element.

    A new tensor, but for a tensor that has the format already (ND to ND): that one is handed back, as torch_npu does.
    Stock casts its whole KV cache that way.
    """
    refuse("npu_format_cast", customize_dtype=customize_dtype)
    expect(acl_format in (ND, NZ), "npu_format_cast", "acl_format", acl_format, "2 (ND) or 29 (FRACTAL_NZ)")
    return input if acl_format == ND else input.clone(memory_format=torch.contiguous_format)


def npu_format_cast_like(input: Tensor, dst: Tensor, customize_dtype: int | None = None) -> Tensor:
    """Cast to the format of dst: all formats are ND here."""
    refuse("npu_format_cast.Tensor", customize_dtype=customize_dtype)
    return input.clone(memory_format=torch.contiguous_format)


def npu_format_cast_(input: Tensor, acl_format: int, customize_dtype: int | None = None) -> Tensor:
    """In place: nothing to move, the values stay as they are."""
    refuse("npu_format_cast_.acl_format", customize_dtype=customize_dtype)
    expect(acl_format in (ND, NZ), "npu_format_cast_", "acl_format", acl_format, "2 (ND) or 29 (FRACTAL_NZ)")
    return input


def npu_format_cast_like_(input: Tensor, src: Tensor, customize_dtype: int | None = None) -> Tensor:
    """Copies src into input, whose format is kept."""
    refuse("npu_format_cast_", customize_dtype=customize_dtype)
    return input.copy_(src)


def npu_prefetch(input: Tensor, dependency: Tensor | None, max_size: int, offset: int = 0) -> None:
    """A hint to load part of a weight into the L2 cache: by contract without effect on values."""


def npu_top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    """logits [rows, vocabulary] with -inf where top-k (k [rows]), then top-p (p [rows]) filter; the best one stays."""
    values, order = torch.sort(rows32(logits), dim=-1, stable=True)
    if k is not None:
        threshold = values.gather(1, values.shape[1] - k.long()[:, None])
        values = values.masked_fill(values < threshold, -torch.inf)
    if p is not None:
        dropped = torch.softmax(values, -1).cumsum(-1) <= 1.0 - p.float()[:, None]
        dropped[:, -1] = False
        values = values.masked_fill(dropped, -torch.inf)
    return torch.empty_like(values).scatter_(1, order, values).to(logits.dtype)


def embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """weight[indices]; id -1 is no row of the table, hardware does not check it and reads some other memory.

    Stock's recompute scheduler marks the drafts that a new request does not have yet by -1, computes such rows and
    rejects them (0.18.0, TP1). Ones stand for that memory: NaN would spread, as attention weighs a masked value by 0.
    """
    missing = indices == -1
    rows = torch.embedding(weight, indices.masked_fill(missing, 0), padding_idx, scale_grad_by_freq, sparse)
    return rows.masked_fill_(missing.unsqueeze(-1), 1.0) if missing.any() else rows


def get_masked_input_and_mask(
    input: Tensor,
    org_vocab_start_index: int,
    org_vocab_end_index: int,
    num_org_vocab_padding: int,
    added_vocab_start_index: int,
    added_vocab_end_index: int,
) -> tuple[Tensor, Tensor]:
    """Token ids to rows of this rank's vocabulary shard: (ids, 0 if not in the shard; mask, True if not in it)."""
    original = (input >= org_vocab_start_index) & (input < org_vocab_end_index)
    added = (input >= added_vocab_start_index) & (input < added_vocab_end_index)
    rows_before_added = org_vocab_end_index - org_vocab_start_index + num_org_vocab_padding
    shift = org_vocab_start_index * original + (added_vocab_start_index - rows_before_added) * added
    present = original | added
    return ((input - shift) * present).to(input.dtype), ~present


def empty_workspace(*arguments: object, **keywords: object) -> Tensor:
    """Attention needs no scratch memory here; the callers only pass it on."""
    return torch.empty(1, dtype=torch.uint8)

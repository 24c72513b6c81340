# SPDX-License-Identifier: Apache-2.0
"""Operators that vllm-ascend itself defines from 0.13.0 on, against loops in fp64; on the NPU where they exist."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_operators import _call_on_cpu, _call_on_npu, close, is_poison, same
from virtual_npu.operators import is_defined

ROUTING = {"active_num": 12, "expert_num": 8, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# On the NPU only where the installed vllm-ascend has them; `make setup STOCK=...` gives one that does.
@pytest.fixture(
    params=[_call_on_cpu, *([_call_on_npu] if is_defined("_C_ascend::moe_gating_top_k") else [])],
    ids=lambda call: call.__name__,
)
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    chosen: Callable[..., Any] = request.param
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shifted", [True, False])
def test_add_rms_norm_bias(call: Callable[..., Any], dtype: torch.dtype, shifted: bool) -> None:
    x, residual, gamma = torch.randn(3, 16).to(dtype), torch.randn(3, 16).to(dtype), torch.rand(16).to(dtype)
    beta = torch.randn(16).to(dtype) if shifted else None
    y, rstd, total = call("_C_ascend::npu_add_rms_norm_bias", x, residual, gamma, beta, 1e-5)
    same(total, (x.float() + residual.float()).to(dtype))
    assert rstd.dtype == torch.float32
    for i in range(3):
        row = total[i].double()
        inverse = 1 / math.sqrt(float((row * row).mean()) + 1e-5)
        close(rstd[i], torch.tensor([inverse]), torch.float32)
        close(y[i], row * inverse * gamma.double() + (beta.double() if beta is not None else 0), dtype)


@pytest.mark.parametrize(("norm_type", "renorm"), [(0, 0), (0, 1), (1, 1)])
def test_gating(call: Callable[..., Any], norm_type: int, renorm: int) -> None:
    x, bias = torch.randn(9, 32), torch.randn(32)
    weights, ids, scores = call(
        "_C_ascend::moe_gating_top_k", x, 5, 2, 4, 1, renorm, norm_type, False, 2.5, 1e-20, bias
    )
    assert ids.dtype == torch.int32
    assert is_poison(scores)
    for i in range(9):
        row = x[i].double()
        plain = 1 / (1 + torch.exp(-row)) if norm_type else torch.exp(row) / torch.exp(row).sum()
        biased = plain + bias.double()
        groups = biased.view(4, 8).sort(1, descending=True).values
        kept = set((groups[:, 0] + groups[:, 1]).sort(descending=True).indices[:2].tolist())
        best = sorted((e for e in range(32) if e // 8 in kept), key=lambda e, b=biased: -float(b[e]))[:5]
        assert ids[i].tolist() == best
        close(weights[i], (plain[best] / plain[best].sum() if renorm else plain[best]) * 2.5)


def test_gating_refuses_what_does_not_exist(call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"moe_gating_top_k: renorm=0, needed: 1 with norm_type 1"):
        call("_C_ascend::moe_gating_top_k", torch.randn(2, 8), 2, 1, 1, 0, 0, 1, False, 1.0, 1e-20)


@pytest.mark.parametrize("first", [0, 3])
def test_routing(call: Callable[..., Any], first: int) -> None:
    x, ids = torch.randn(6, 8), torch.randint(0, 8, (6, 2), dtype=torch.int32)
    expanded, index, counts, _ = call(
        "_C_ascend::npu_moe_init_routing_custom", x, ids, **ROUTING, active_expert_range=[first, 8], quant_mode=-1
    )
    flat = ids.flatten().tolist()
    slots = [slot for expert in range(first, 8) for slot in range(12) if flat[slot] == expert]
    for row, slot in enumerate(slots):
        same(expanded[row], x[slot // 2])
    assert index.tolist() == [slots.index(slot) if slot in slots else -1 for slot in range(12)]
    assert counts.dtype == torch.int64
    assert counts.tolist() == [flat.count(expert) for expert in range(first, 8)]


def test_routing_without_a_range_is_for_all_experts(call: Callable[..., Any]) -> None:
    x, ids = torch.randn(6, 8), torch.randint(0, 8, (6, 2), dtype=torch.int32)
    name = "_C_ascend::npu_moe_init_routing_custom"
    wanted = call(name, x, ids, **ROUTING, active_expert_range=[0, 8], quant_mode=-1)
    for actual, expected in zip(call(name, x, ids, **ROUTING, quant_mode=-1), wanted, strict=True):
        same(actual, expected)


def test_routing_quantises_rows(call: Callable[..., Any]) -> None:
    x, ids = torch.randn(6, 8).bfloat16(), torch.randint(0, 8, (6, 2), dtype=torch.int32)
    arguments = {**ROUTING, "active_expert_range": [0, 8]}
    name = "_C_ascend::npu_moe_init_routing_custom"
    expanded, index, _, scale = call(name, x, ids, **arguments, quant_mode=1)
    assert expanded.dtype == torch.int8
    for slot in range(12):
        row = int(index[slot])
        close(expanded[row].double() * scale[row], x[slot // 2].double(), torch.bfloat16)
    with pytest.raises(ValueError, match="quant_mode=0"):  # the default, a static scale
        call(name, x, ids, **arguments)

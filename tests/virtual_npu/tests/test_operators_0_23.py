# SPDX-License-Identifier: Apache-2.0
"""Operators that stock 0.23.0 is the first to call, as functions and, where torch_npu has them, on the NPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_operators import FLOATS, _call_on_cpu, _call_on_npu, close
from virtual_npu.operators import is_defined

UPDATE = "npu::npu_attention_update"
WAYS = [
    pytest.param(_call_on_cpu, id="cpu"),
    *([pytest.param(_call_on_npu, id="npu")] if is_defined(UPDATE) else []),
]


@pytest.mark.parametrize("call", WAYS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_update_joins_parts_of_the_keys(call: Callable[..., Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(5, 30, dtype=torch.float64) * 3, torch.randn(30, 8, dtype=torch.float64)
    scores[1, :10] = -math.inf  # this row sees nothing of the first part
    scores[2] = -math.inf  # and this one nothing at all
    lse, outs = [], []
    for part in (slice(0, 10), slice(10, 12), slice(12, 30)):
        total = scores[:, part].exp().sum(1)
        lse.append(torch.where(total > 0, total.log(), math.inf).float())
        outs.append((scores[:, part].exp() @ values[part] / total[:, None]).nan_to_num(7.0).to(dtype))
    out, joined = call(UPDATE, lse, outs, 1)
    wanted = (scores.exp() @ values / scores.exp().sum(1, keepdim=True)).nan_to_num(0.0)
    assert out.dtype == dtype
    close(out, wanted, dtype)
    close(joined, torch.where(scores.exp().sum(1) > 0, scores.exp().sum(1).log(), math.inf))
    assert call(UPDATE, lse, outs, 0)[1].numel() == 0

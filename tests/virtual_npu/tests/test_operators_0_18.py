# SPDX-License-Identifier: Apache-2.0
"""What 0.18.0 calls: output layouts and version 2 of the fused attention, against version 1; small operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_operators import COMPRESSED, Paged, _call_on_cpu, _call_on_npu, same
from virtual_npu.operators import is_defined

V1, V2 = "npu::npu_fused_infer_attention_score", "npu::npu_fused_infer_attention_score_v2"
RENAMED = {
    "num_heads": "num_query_heads",
    "scale": "softmax_scale",
    "actual_seq_lengths": "actual_seq_qlen",
    "actual_seq_lengths_kv": "actual_seq_kvlen",
}
HEADS, RANK, ROPE = 4, 32, 16
# layout -> (the same for query and output, dimensions of the output in the order of the second part)
LAYOUTS = {"TND_NTD": ("TND", (1, 0, 2)), "BNSD_NBSD": ("BNSD", (1, 0, 2, 3)), "BSND_NBSD": ("BSND", (2, 0, 1, 3))}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# On the NPU only where the installed torch_npu has them; `make setup STOCK=...` gives one that does.
@pytest.fixture(params=[_call_on_cpu, *([_call_on_npu] if is_defined(V2) else [])], ids=lambda call: call.__name__)
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    chosen: Callable[..., Any] = request.param
    return chosen


def mla_decode(layout: str) -> tuple[list[Any], dict[str, Any]]:
    """Query and caches, and version 1's options, of an absorbed MLA decode; in TND one sequence has two tokens."""
    lengths = [40, 3]
    latent, rope = Paged(lengths, 1, RANK, torch.bfloat16), Paged(lengths, 1, ROPE, torch.bfloat16)
    rows = 3 if layout == "TND" else 2
    query, query_rope = (torch.randn(rows, HEADS, width).bfloat16() for width in (RANK, ROPE))
    if layout != "TND":
        dimension = 2 if layout == "BNSD" else 1
        query, query_rope = query.unsqueeze(dimension), query_rope.unsqueeze(dimension)
    blocks = latent.key_cache.shape[0]
    rope_cache = torch.zeros(blocks, 16, 1, ROPE).bfloat16()
    for i, length in enumerate(lengths):
        for t in range(length):
            rope_cache[latent.table[i, t // 16], t % 16] = rope.keys[i][t]
    cache = latent.key_cache.view(blocks, 1, 16, RANK)
    options: dict[str, Any] = {
        "query_rope": query_rope,
        "key_rope": rope_cache.view(blocks, 1, 16, ROPE),
        "num_heads": HEADS,
        "num_key_value_heads": 1,
        "scale": 0.2,
        "block_table": latent.table,
        "block_size": 16,
        "actual_seq_lengths_kv": lengths,
        "input_layout": layout,
    }
    if layout == "TND":
        options |= {"actual_seq_lengths": [2, 3], "sparse_mode": 3, "atten_mask": COMPRESSED}
    return [query, cache, cache], options


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_two_parts_has_heads_first_in_the_output(call: Callable[..., Any], layout: str) -> None:
    plain, order = LAYOUTS[layout]
    tensors, options = mla_decode(plain)
    wanted, _ = call(V1, *tensors, **options)
    options["input_layout"] = layout
    out, lse = call(V1, *tensors, **options)
    same(out, wanted.permute(order).contiguous())
    assert out.is_contiguous()
    assert lse.numel() == 0


@pytest.mark.parametrize("layout", ["TND_NTD", "BNSD_NBSD", "BNSD"])
def test_version_2_is_version_1_with_other_names(call: Callable[..., Any], layout: str) -> None:
    tensors, options = mla_decode(layout.split("_")[0])
    options["input_layout"] = layout
    wanted, _ = call(V1, *tensors, **options)
    renamed = {RENAMED.get(name, name): value for name, value in options.items()}
    out, _ = call(V2, *tensors, **renamed)
    same(out, wanted)
    into = [torch.zeros_like(wanted), torch.zeros(2).bfloat16()]
    returned = call(f"{V2}.out", *tensors, **renamed, out=into)
    assert returned[0] is into[0]
    same(into[0], wanted)


def test_version_2_returns_the_log_sum_exp_when_asked(call: Callable[..., Any]) -> None:
    tensors, options = mla_decode("BNSD")
    _, wanted = call(V1, *tensors, **options, softmax_lse_flag=True)
    renamed = {RENAMED.get(name, name): value for name, value in options.items()}
    _, lse = call(V2, *tensors, **renamed, return_softmax_lse=True)
    same(lse, wanted)


def test_what_version_2_does_not_cover_is_refused() -> None:
    tensors, options = mla_decode("BNSD")
    renamed = {RENAMED.get(name, name): value for name, value in options.items()}
    with pytest.raises(NotImplementedError, match="query_quant_mode=3"):
        _call_on_cpu(V2, *tensors, **renamed, query_quant_mode=3)
    options["input_layout"] = "BNSD_NBSD"
    with pytest.raises(NotImplementedError, match="softmax_lse_flag"):
        _call_on_cpu(V1, *tensors, **options, softmax_lse_flag=True)


@pytest.mark.parametrize(
    "apply", [_call_on_cpu, *([_call_on_npu] if is_defined("_C_ascend::npu_apply_top_k_top_p") else [])]
)
def test_top_k_top_p_of_vllm_ascend(apply: Callable[..., Any]) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [9.0, 1.0, 1.5, 2.0]])
    kept = apply("_C_ascend::npu_apply_top_k_top_p", logits, k=torch.tensor([2, 4]), p=torch.tensor([1.0, 0.5]))
    assert (kept > -torch.inf).tolist() == [[False, True, False, True], [True, False, False, False]]


def test_the_embedding_of_a_draft_that_does_not_exist_is_arbitrary_but_finite(call: Callable[..., Any]) -> None:
    weight = torch.randn(5, 8).bfloat16()
    rows = call("aten::embedding", weight, torch.tensor([4, -1, 0]))
    same(rows[[0, 2]], weight[[4, 0]])
    assert rows[1].isfinite().all()
    assert not (rows[1] == weight).all(1).any()
    for token in (5, -2):
        with pytest.raises(IndexError):
            _call_on_cpu("aten::embedding", weight, torch.tensor([token]))

# SPDX-License-Identifier: Apache-2.0
"""The fused operators against straightforward references: as functions on CPU tensors and, once attached, on the NPU.

Each reference is written with loops over rows, slots, heads and keys, in fp64, and shares no code with the operators.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from virtual_npu.operators import OPERATORS, adapted, attention, is_defined, linear, moe

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
NAN = float("nan")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _schema(name: str) -> Any:
    qualified, _, overload = name.partition(".")
    namespace, operator = qualified.split("::")
    return getattr(getattr(torch.ops, namespace), operator), overload or "default"


def _call_on_npu(name: str, *args: Any, host: Sequence[Any] = (), **kwargs: Any) -> Any:
    """Call the dispatcher with NPU copies of the tensors (those in `host` stay), write in-place effects back.

    Returns CPU tensors; a result that is the NPU copy of an argument is returned as that very argument.
    """
    copies: list[tuple[Any, Any]] = []

    def there(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if any(value is kept for kept in host):
                return value
            known = [npu for cpu, npu in copies if cpu is value]
            if not known:
                copies.append((value, value.npu()))
            return known[0] if known else copies[-1][1]
        return [there(item) for item in value] if isinstance(value, list) else value

    def back(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            assert value.device.type == "npu"
            own = [cpu for cpu, npu in copies if npu is value]
            return own[0] if own else value.cpu()
        return type(value)(map(back, value)) if isinstance(value, (list, tuple)) else value

    packet, overload = _schema(name)
    result = getattr(packet, overload)(*map(there, args), **{key: there(value) for key, value in kwargs.items()})
    result = back(result)
    for cpu, npu in copies:
        cpu.copy_(npu.cpu())
    return result


def _call_on_cpu(name: str, *args: Any, host: Sequence[Any] = (), **kwargs: Any) -> Any:
    return OPERATORS[name](*args, **kwargs)


@pytest.fixture(params=["cpu", "npu"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    if request.param == "cpu":
        return _call_on_cpu
    return _call_on_npu


def close(actual: Any, wanted: Any, dtype: Any = None) -> None:
    tolerance = TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def same(actual: Any, wanted: Any) -> None:
    """Bit for bit, dtype and shape included; NaN equals NaN."""
    assert actual.dtype == wanted.dtype
    assert actual.shape == wanted.shape
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def is_poison(tensor: Any) -> bool:
    if tensor.is_floating_point():
        return bool(tensor.isnan().all())
    return bool((tensor.contiguous().view(torch.uint8) == 0x7F).all())


# ---- the table -----------------------------------------------------------------------------------------------------


def test_every_function_takes_the_arguments_of_its_operator() -> None:
    """Names and order of the schema; an argument that only this version has must have a default."""
    for name, function in OPERATORS.items():
        if not is_defined(name):
            continue
        packet, overload = _schema(name)
        arguments = getattr(packet, overload)._schema.arguments
        parameters = inspect.signature(function).parameters
        swallowed = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        for argument in arguments:
            if argument.name not in parameters:
                assert swallowed or argument.has_default_value(), f"{name}: {argument.name} is missing"
        named = [p for p in parameters if parameters[p].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        defined = [a.name for a in arguments if not a.kwarg_only]
        assert named[: len(defined)] == defined[: len(named)], name
        # What only newer versions have comes last and may be left out.
        assert all(parameters[newer].default is None for newer in named[len(defined) :]), name


def test_defaults_are_those_of_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatcher leaves out arguments that equal their default, and defaults differ by version."""
    monkeypatch.setitem(OPERATORS, "npu::npu_swiglu", lambda input, dim=5: dim)
    assert adapted("npu::npu_swiglu")(0) == -1
    assert adapted("npu::npu_swiglu")(0, 1) == 1
    monkeypatch.setitem(OPERATORS, "npu::npu_swiglu", lambda input: input)
    assert adapted("npu::npu_swiglu")(3, dim=-1) == 3
    with pytest.raises(NotImplementedError, match=r"npu::npu_swiglu: dim=0 is not emulated"):
        adapted("npu::npu_swiglu")(3, 0)


def test_integers_of_the_schema_become_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    def acl_format(input: Any, acl_format: torch.dtype) -> Any:  # an integer in every version
        return acl_format

    monkeypatch.setitem(OPERATORS, "npu::npu_format_cast_.acl_format", acl_format)
    assert adapted("npu::npu_format_cast_.acl_format")(0, acl_format=15) == torch.bfloat16
    assert adapted("npu::npu_format_cast_.acl_format")(0, acl_format=torch.int8) == torch.int8


def test_kernels_for_the_autograd_key_reach_ours() -> None:
    """torch_npu has autograd kernels for these; outside inference mode they run first and must hand on."""
    x = torch.randn(4, 8).npu().requires_grad_()
    gamma = torch.ones(8).npu().requires_grad_()
    plain = x.detach().cpu()
    same(
        torch.ops.npu.npu_rms_norm(x, gamma)[0].detach().cpu(),
        _call_on_cpu("npu::npu_rms_norm", plain, torch.ones(8))[0],
    )
    same(torch.ops.npu.npu_swiglu(x).detach().cpu(), _call_on_cpu("npu::npu_swiglu", plain))
    ids = torch.tensor([2, 0, 1, 0])
    rows, index = torch.ops.npu.npu_moe_token_permute(x, ids.npu())
    same(rows.detach().cpu(), plain[[1, 3, 2, 0]])
    same(torch.ops.npu.npu_moe_token_unpermute(rows, index).detach().cpu(), plain)
    q = torch.randn(4, 2, 8).npu().requires_grad_()
    lengths = {"actual_seq_qlen": [4], "actual_seq_kvlen": [4]}
    out = torch.ops.npu.npu_fusion_attention(q, q, q, 2, "TND", **lengths)[0]
    same(out.detach().cpu(), _call_on_cpu("npu::npu_fusion_attention", *[q.detach().cpu()] * 3, 2, "TND", **lengths)[0])
    cos, sin = torch.rand(1, 4, 1, 8), torch.rand(1, 4, 1, 8)
    rotated = torch.ops.npu.npu_rotary_mul(q[None], cos.npu(), sin.npu())
    same(rotated.detach().cpu(), _call_on_cpu("npu::npu_rotary_mul", q.detach().cpu()[None], cos, sin))


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "argument"),
    [
        ("npu_moe_gating_top_k_softmax", [torch.rand(2, 4), torch.zeros(2, dtype=torch.bool), 2], {}, "finished"),
        (
            "npu_grouped_matmul",
            [[torch.rand(2, 4)], [torch.rand(1, 4, 4)]],
            {"group_list": torch.tensor([2]), "act_type": 1},
            "act_type",
        ),
        (
            "npu_grouped_matmul",
            [[torch.rand(2, 4)], [torch.rand(1, 4, 4)]],
            {"antiquant_scale": [torch.rand(1)]},
            "antiquant_scale",
        ),
        ("npu_fused_infer_attention_score", [torch.rand(1, 1, 8)] * 3, {"pse_shift": torch.rand(1)}, "pse_shift"),
        ("npu_fused_infer_attention_score", [torch.rand(1, 1, 8)] * 3, {"antiquant_mode": 1}, "antiquant_mode"),
        (
            "npu_moe_init_routing_v2",
            [torch.rand(2, 4), torch.zeros(2, 1, dtype=torch.int32)],
            {"drop_pad_mode": 1},
            "drop_pad_mode",
        ),
        ("npu_dynamic_quant", [torch.rand(2, 4)], {"group_index": torch.tensor([1])}, "group_index"),
        ("npu_moe_token_permute", [torch.rand(2, 4), torch.zeros(2, 1, dtype=torch.int32), 2, True], {}, "padded_mode"),
        ("npu_fusion_attention", [*[torch.rand(1, 1, 8)] * 3, 1, "BSH"], {"keep_prob": 0.5}, "keep_prob"),
        ("npu_quantize", [torch.rand(2, 4), torch.rand(4), None, torch.quint4x2, -1], {}, "dtype"),
    ],
)
def test_an_argument_that_is_not_emulated_is_refused_by_name(
    call: Callable[..., Any], name: str, args: list[Any], kwargs: dict[str, Any], argument: str
) -> None:
    with pytest.raises((NotImplementedError, ValueError), match=f"{name}: .*{argument}"):
        call(f"npu::{name}", *args, **kwargs)


# ---- batch invariance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("inner", "width"), [(64, 192), (100, 51), (256, 8), (768, 1), (1024, 256), (32, 128)])
def test_a_row_of_a_product_has_the_same_bits_in_any_batch(dtype: Any, inner: int, width: int) -> None:
    weight = torch.randn(width, inner).to(dtype)
    bias = torch.randn(width).to(dtype)
    x = torch.randn(64, inner).to(dtype)
    whole = linear.batch_invariant_matmul(x, weight.t())
    whole_bias = linear.batch_invariant_matmul(x, weight.t(), bias)
    close(whole / math.sqrt(inner), x.double() @ weight.double().t() / math.sqrt(inner))
    close(whole_bias / math.sqrt(inner), (x.double() @ weight.double().t() + bias.double()) / math.sqrt(inner))
    for rows in range(1, 18):
        first = 64 - rows if rows % 2 else rows  # other positions inside a tile as well
        part = x[first : first + rows]
        same(linear.batch_invariant_matmul(part, weight.t()), whole[first : first + rows])
        same(linear.batch_invariant_matmul(part, weight.t(), bias), whole_bias[first : first + rows])


@pytest.mark.parametrize("width", [7, 64, 100, 2048])
def test_a_row_of_a_norm_or_activation_has_the_same_bits_in_any_batch(width: int) -> None:
    x = torch.randn(64, 2 * width)
    gamma = torch.rand(2 * width)
    functions = {
        "rms_norm": lambda rows: OPERATORS["npu::npu_rms_norm"](rows, gamma)[0],
        "swiglu": OPERATORS["npu::npu_swiglu"],
        "sigmoid": OPERATORS["aten::sigmoid"],
        "silu": OPERATORS["aten::silu"],
        "gating": lambda rows: OPERATORS["npu::npu_moe_gating_top_k_softmax"](rows, None, 4)[0],
        "dynamic_quant": lambda rows: OPERATORS["npu::npu_dynamic_quant"](rows)[0],
    }
    for name, function in functions.items():
        whole = function(x)
        for rows in (1, 2, 3, 5, 17, 31):
            assert torch.equal(function(x[rows : 2 * rows]), whole[rows : 2 * rows]), name


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    x, weight = torch.randn(23, 192), torch.randn(96, 192)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            gate = linear.batch_invariant_matmul(x, weight.t())
            heads = x.reshape(23, 6, 32)
            keys = attention.packed_keys([heads], [20, 3])
            attended = attention.attend(heads, [0, 20], [20, 3], keys, keys, 0.2)[0]
            results.append((gate, OPERATORS["npu::npu_swiglu"](gate), attended))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            same(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aten_products_on_the_device_use_the_invariant_ones(call: Callable[..., Any], dtype: Any) -> None:
    a, b = torch.randn(5, 48).to(dtype), torch.randn(48, 24).to(dtype)
    bias = torch.randn(24).to(dtype)
    batch, other = torch.randn(3, 5, 48).to(dtype), torch.randn(3, 48, 24).to(dtype)
    close(call("aten::mm", a, b) / 7, (a.double() @ b.double()) / 7)
    close(call("aten::addmm", bias, a, b) / 7, (bias.double() + a.double() @ b.double()) / 7)
    close(
        call("aten::addmm", bias, a, b, beta=2, alpha=0.5) / 7,
        (2 * bias.double() + 0.5 * (a.double() @ b.double())) / 7,
    )
    close(call("aten::bmm", batch, other) / 7, (batch.double() @ other.double()) / 7)
    close(call("aten::baddbmm", bias, batch, other) / 7, (bias.double() + batch.double() @ other.double()) / 7)
    for left, right in [
        (a, b),
        (a[0], b),
        (a, b[:, 0]),
        (a[0], b[:, 0]),
        (batch, b),
        (batch, other),
        (batch[:, None], other),
        (a, other),
    ]:
        result = call("aten::matmul", left, right)
        wanted = left.double() @ right.double()
        assert result.shape == wanted.shape
        close(result / 7, wanted / 7)
    out = torch.empty(5, 24).to(dtype)
    assert call("aten::mm.out", a, b, out=out) is out
    same(out, call("aten::mm", a, b))
    assert call("aten::mm", a[:0], b).shape == (0, 24)


# ---- norms and activations -----------------------------------------------------------------------------------------


def _rms_reference(x: Any, gamma: Any, epsilon: float) -> tuple[Any, Any]:
    out, inverse = torch.zeros(x.shape).double(), torch.zeros(*x.shape[:-1], 1).double()
    for row, into, scale in zip(
        x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1]), inverse.view(-1, 1), strict=True
    ):
        scale[0] = 1 / math.sqrt(sum(float(v) ** 2 for v in row) / len(row) + epsilon)
        for i in range(len(row)):
            into[i] = float(row[i]) * float(scale[0]) * float(gamma[i])
    return out, inverse


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norms(call: Callable[..., Any], dtype: Any) -> None:
    x, residual, gamma = torch.randn(3, 2, 24).to(dtype), torch.randn(3, 2, 24).to(dtype), torch.rand(24).to(dtype)
    y, rstd = call("npu::npu_rms_norm", x, gamma, 1e-3)
    wanted, wanted_rstd = _rms_reference(x, gamma, 1e-3)
    assert rstd.dtype == torch.float32
    close(y, wanted)
    close(rstd, wanted_rstd)
    y, rstd, total = call("npu::npu_add_rms_norm", x, residual, gamma, 1e-6)
    same(total, (x.float() + residual.float()).to(dtype))
    wanted, wanted_rstd = _rms_reference(total, gamma, 1e-6)
    close(y, wanted)
    close(rstd, wanted_rstd)
    scales, zeros = torch.full((24,), 0.05, dtype=dtype), torch.full((24,), 3, dtype=dtype)
    quantised, _, total_again = call("npu::npu_add_rms_norm_quant", x, residual, gamma, scales, zeros)
    same(total_again, total)
    assert (quantised.double() - (wanted / scales.double() + 3).round().clamp(-128, 127)).abs().max() <= 1


def test_the_norm_of_a_slice_reads_the_slice(call: Callable[..., Any]) -> None:
    qkv, gamma = torch.randn(5, 3, 16), torch.rand(16)
    same(call("npu::npu_rms_norm", qkv[:, 1], gamma)[0], call("npu::npu_rms_norm", qkv[:, 1].contiguous(), gamma)[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_swiglu(call: Callable[..., Any], dtype: Any) -> None:
    x = torch.randn(5, 14).to(dtype)
    x[4] = NAN
    wanted = torch.zeros(5, 7).double()
    for i in range(5):
        for j in range(7):
            gate = float(x[i, j])
            wanted[i, j] = gate / (1 + math.exp(-gate)) * float(x[i, j + 7])
    close(call("npu::npu_swiglu", x), wanted)
    close(call("npu::npu_swiglu", x.t().contiguous(), 0), wanted.t())


# ---- mixture of experts --------------------------------------------------------------------------------------------


def test_gating_softmax(call: Callable[..., Any]) -> None:
    x = torch.randn(6, 8)
    x[2] = 0.0  # all equal: the lowest expert ids win
    weights, ids, rows = call("npu::npu_moe_gating_top_k_softmax", x, None, 3)
    assert ids.dtype == rows.dtype == torch.int32
    for i in range(6):
        scores = [math.exp(float(v)) / sum(math.exp(float(w)) for w in x[i]) for v in x[i]]
        best = sorted(range(8), key=lambda e, s=scores: (-s[e], e))[:3]
        assert ids[i].tolist() == best
        close(weights[i], torch.tensor([scores[e] for e in best]))
        assert rows[i].tolist() == [j * 6 + i for j in range(3)]


@pytest.mark.parametrize("norm_type", [0, 1])
@pytest.mark.parametrize("select", [0, 1])
def test_grouped_gating(call: Callable[..., Any], norm_type: int, select: int) -> None:
    x, bias = torch.randn(9, 32), torch.randn(32)
    options = {"k_group": 2, "group_count": 4, "group_select_mode": select, "norm_type": norm_type}
    weights, ids, scores = call(
        "npu::npu_moe_gating_top_k", x, 5, bias=bias, **options, out_flag=True, routed_scaling_factor=2.5
    )
    for i in range(9):
        row = x[i].double()
        plain = 1 / (1 + torch.exp(-row)) if norm_type else torch.exp(row) / torch.exp(row).sum()
        biased = plain + bias.double()
        groups = biased.view(4, 8).sort(1, descending=True).values
        ranking = groups[:, 0] if select == 0 else groups[:, 0] + groups[:, 1]
        kept = set(ranking.sort(descending=True).indices[:2].tolist())
        allowed = [e for e in range(32) if e // 8 in kept]
        best = sorted(allowed, key=lambda e, b=biased: -float(b[e]))[:5]
        assert ids[i].tolist() == best
        wanted = plain[best] / plain[best].sum() if norm_type else plain[best]
        close(weights[i], wanted * 2.5)
        close(scores[i], plain)


def _sorted_slots(ids: Any) -> list[tuple[int, int, int]]:
    """(expert, token, k) of every slot in expert order, slots of one expert in slot order."""
    slots = [(int(ids[t, j]), t, j) for t in range(ids.shape[0]) for j in range(ids.shape[1])]
    return sorted(slots, key=lambda slot: (slot[0], slot[1] * ids.shape[1] + slot[2]))


def test_init_routing_and_expert_tokens(call: Callable[..., Any]) -> None:
    x, ids = torch.randn(5, 4), torch.randint(0, 6, (5, 3), dtype=torch.int32)
    row_idx = torch.arange(15, dtype=torch.int32).view(3, 5).t().contiguous()
    expanded, index, experts = call("npu::npu_moe_init_routing", x, row_idx, ids, 5)
    slots = _sorted_slots(ids)
    for row, (expert, token, j) in enumerate(slots):
        same(expanded[row], x[token])
        assert int(experts[row]) == expert
        assert int(index[j * 5 + token]) == row
    counts = call("npu::npu_moe_compute_expert_tokens", experts, 6)
    assert counts.tolist() == [sum(1 for slot in slots if slot[0] <= e) for e in range(6)]
    scales, skip = torch.rand(5, 3), torch.randn(5, 4)
    out = call("npu::npu_moe_finalize_routing", expanded, skip, None, None, scales, index, None)
    close(out, skip + scales.sum(1, keepdim=True) * x)
    by_row = index.view(3, 5).t().reshape(-1).contiguous()
    same(call("npu::npu_moe_finalize_routing", expanded, skip, None, None, scales, by_row, None, 2), out)
    bias = torch.randn(6, 4)
    with_bias = call("npu::npu_moe_finalize_routing", expanded, skip, None, bias, scales, index, ids)
    extra = sum(scales[:, j, None] * bias[ids[:, j].long()] for j in range(3))
    close(with_bias, out + extra)


@pytest.mark.parametrize("index_type", [0, 1])
@pytest.mark.parametrize("histogram_type", [0, 1, 2])
def test_init_routing_v2_leaves_out_experts_of_other_ranks(
    call: Callable[..., Any], index_type: int, histogram_type: int
) -> None:
    x, ids = torch.randn(6, 8), torch.randint(0, 8, (6, 2), dtype=torch.int32)
    ids[ids == 4] = 5  # an expert without rows
    expanded, index, histogram, _ = call(
        "npu::npu_moe_init_routing_v2",
        x,
        ids,
        active_num=12,
        expert_num=8,
        expert_tokens_num_type=histogram_type,
        expert_tokens_num_flag=True,
        active_expert_range=[3, 7],
        quant_mode=-1,
        row_idx_type=index_type,
    )
    active = [slot for slot in _sorted_slots(ids) if 3 <= slot[0] < 7]
    assert 0 < len(active) < 12
    wanted_index = [-1] * 12
    for row, (_, token, j) in enumerate(active):
        same(expanded[row], x[token])
        wanted_index[token * 2 + j if index_type == 0 else row] = row if index_type == 0 else token * 2 + j
    assert index.tolist() == wanted_index
    assert is_poison(expanded[len(active) :])
    counts = [sum(1 for slot in active if slot[0] == e) for e in range(3, 7)]
    assert histogram.dtype == torch.int64
    if histogram_type == 2:
        pairs = [[e, c] for e, c in zip(range(3, 7), counts, strict=True) if c]
        assert histogram.tolist() == pairs + [[0, 0]] * (8 - len(pairs))
    else:
        assert histogram.tolist() == (counts if histogram_type else torch.tensor(counts).cumsum(0).tolist())


def test_init_routing_v2_quantises_rows(call: Callable[..., Any]) -> None:
    x, ids = torch.randn(4, 8).bfloat16(), torch.tensor([[0, 2], [1, 0], [2, 3], [3, 1]], dtype=torch.int32)
    options = {"active_num": 8, "expert_num": 4, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    expanded, index, _, scale = call(
        "npu::npu_moe_init_routing_v2", x, ids, **options, active_expert_range=[0, 4], quant_mode=1
    )
    assert expanded.dtype == torch.int8
    for slot in range(8):
        row = int(index[slot])
        close(expanded[row].double() * scale[row], x[slot // 2].float().double(), torch.bfloat16)
        assert int(expanded[row].abs().max()) == 127


def test_permute_and_unpermute(call: Callable[..., Any]) -> None:
    tokens, ids, probs = torch.randn(7, 6), torch.randint(0, 5, (7, 3), dtype=torch.int32), torch.rand(7, 3)
    permuted, index = call("npu::npu_moe_token_permute", tokens, ids, 21)
    for row, (_, token, j) in enumerate(_sorted_slots(ids)):
        same(permuted[row], tokens[token])
        assert int(index[token * 3 + j]) == row
    close(
        call("npu::npu_moe_token_unpermute", permuted, index, probs, restore_shape=[7, 6]),
        probs.sum(1, keepdim=True) * tokens,
    )
    same(
        call("npu::npu_moe_token_unpermute", *call("npu::npu_moe_token_permute", tokens, ids[:, 0].contiguous())),
        tokens,
    )
    short, _ = call("npu::npu_moe_token_permute", tokens, ids, -2)
    assert short.shape[0] == 19
    assert call("npu::npu_moe_token_permute", tokens[:0], ids[:0])[0].shape == (0, 6)


@pytest.mark.parametrize("index_type", [0, 1])
def test_re_routing(call: Callable[..., Any], index_type: int) -> None:
    counts = torch.tensor([[2, 0, 1], [1, 3, 0]])
    tokens, scales = torch.randn(9, 4), torch.rand(9)  # 7 rows, 2 of padding
    moved, moved_scales, index, per_expert = call(
        "npu::npu_moe_re_routing", tokens, counts, per_token_scales=scales, idx_type=index_type
    )
    order = [0, 1, 3, 4, 5, 6, 2]
    same(moved[:7], tokens[order])
    same(moved_scales[:7], scales[order])
    assert per_expert.tolist() == [3, 3, 1]
    assert index[:7].tolist() == (order if index_type == 0 else [0, 1, 6, 2, 3, 4, 5])
    assert is_poison(moved[7:])


GROUPS = {0: [3, 3, 7, 9], 1: [3, 0, 4, 2], 2: [[0, 3], [2, 4], [3, 2]]}
ROWS_OF = [(0, 0, 3), (2, 3, 7), (3, 7, 9)]  # expert, first row, end row


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("list_type", [0, 1, 2])
def test_grouped_matmul_with_empty_group_and_poison(call: Callable[..., Any], dtype: Any, list_type: int) -> None:
    x, weight = torch.randn(12, 20).to(dtype), torch.randn(4, 20, 6).to(dtype)
    group_list = torch.tensor(GROUPS[list_type])
    options = {"split_item": 2, "group_type": 0, "group_list": group_list, "group_list_type": list_type}
    (y,) = call("npu::npu_grouped_matmul", [x], [weight], **options)
    assert (y.dtype, tuple(y.shape)) == (dtype, (12, 6))
    for expert, start, end in ROWS_OF:
        close(y[start:end] / 4, x[start:end].double() @ weight[expert].double() / 4)
    assert is_poison(y[9:])
    if list_type == 1:  # a group's rows have the same bits when it is alone
        alone = torch.tensor([0, 0, 4, 0])
        (part,) = call("npu::npu_grouped_matmul", [x[3:7].contiguous()], [weight], **{**options, "group_list": alone})
        same(part, y[3:7])
        bias = torch.randn(4, 6).to(dtype)
        (with_bias,) = call("npu::npu_grouped_matmul", [x], [weight], bias=[bias], **options)
        close(with_bias[3:7] / 4, (x[3:7].double() @ weight[2].double() + bias[2].double()) / 4)


def test_grouped_matmul_layouts(call: Callable[..., Any]) -> None:
    x, weight = torch.randn(9, 20), torch.randn(3, 20, 6)
    parts, weights = [x[:2], x[2:2], x[2:]], list(weight)
    separate = call("npu::npu_grouped_matmul", parts, weights, split_item=0, group_type=-1)
    (joined,) = call("npu::npu_grouped_matmul", parts, weights, split_item=3, group_type=-1)
    (cut,) = call("npu::npu_grouped_matmul.List", [x], weights, split_item=3, group_type=0, group_list=[2, 2, 9])
    assert [len(part) for part in separate] == [2, 0, 7]
    same(torch.cat(separate), joined)
    same(joined, cut)
    close(joined[2:], x[2:].double() @ weight[2].double())
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)  # as stock passes a [E, N, K] weight
    (strided,) = call(
        "npu::npu_grouped_matmul", [x], [transposed], split_item=2, group_type=0, group_list=torch.tensor([2, 2, 9])
    )
    close(strided, joined)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"group_list": torch.tensor([3, 2, 9, 9])}, "group_list"),
        ({"group_list": torch.tensor([3, 5, 9, 13])}, "at most 12 rows"),
        ({"group_list": torch.tensor([3, 5])}, "4 entries"),
        ({"group_list": torch.tensor([3, 5, 9, 9]), "group_type": 2}, "group_type"),
    ],
)
def test_grouped_matmul_refuses_broken_groups(call: Callable[..., Any], bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(
            "npu::npu_grouped_matmul",
            [torch.randn(12, 20)],
            [torch.randn(4, 20, 6)],
            **{"split_item": 2, "group_type": 0, **bad},
        )


def _int8(*shape: int, low: int = -127) -> Any:
    return torch.randint(low, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("list_type", [0, 1])
def test_grouped_matmul_int8(call: Callable[..., Any], list_type: int) -> None:
    x, weight = _int8(12, 2000, low=100), _int8(4, 2000, 6, low=100)  # sums above 2^24: not exact in fp32
    scale, per_token = torch.rand(4, 6) / 100000, torch.rand(12)
    group_list = torch.tensor(GROUPS[list_type])
    options = {"group_type": 0, "group_list": group_list, "group_list_type": list_type}
    (raw,) = call("npu::npu_grouped_matmul", [x], [weight], split_item=3, output_dtype=torch.int32, **options)
    scaled = {"scale": [scale.bfloat16()], "per_token_scale": [per_token], "output_dtype": torch.bfloat16}
    (y,) = call("npu::npu_grouped_matmul", [x], [weight], split_item=2, **scaled, **options)
    for expert, start, end in ROWS_OF:
        exact = x[start:end].long() @ weight[expert].long()
        assert raw[start:end].tolist() == exact.tolist()
        close(
            y[start:end] / 100,
            exact.double() * scale.bfloat16()[expert].double() * per_token[start:end, None].double() / 100,
        )
    assert is_poison(raw[9:])
    assert is_poison(y[9:])


# ---- int8 ----------------------------------------------------------------------------------------------------------


def _dynamic_quant_reference(values: Any) -> tuple[Any, Any]:
    scale = values.double().abs().amax(-1) / 127
    return torch.where(scale[..., None] > 0, values.double() / scale[..., None], 0).round(), scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dynamic_quant(call: Callable[..., Any], dtype: Any) -> None:
    x, smooth = torch.randn(3, 5, 16).to(dtype), torch.rand(16).to(dtype)
    x[0, 0] = 0
    values, scale = call("npu::npu_dynamic_quant", x)
    wanted, wanted_scale = _dynamic_quant_reference(x)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    close(scale, wanted_scale)
    assert (values.double() - wanted).abs().max() <= 1  # a value on the edge may round the other way
    assert (values.double() != wanted).double().mean() < 0.02
    values, scale = call("npu::npu_dynamic_quant", x, smooth_scales=smooth)
    wanted, wanted_scale = _dynamic_quant_reference(x.float() * smooth.float())
    close(scale, wanted_scale)
    assert (values.double() - wanted).abs().max() <= 1


def test_quantize(call: Callable[..., Any]) -> None:
    x, scales, zeros = torch.randn(4, 6) * 50, torch.full((6,), 0.5), torch.arange(6.0)
    divided = call("npu::npu_quantize", x, scales, zeros, torch.qint8, -1, True)
    multiplied = call("npu::npu_quantize", x, scales[:1], None, torch.qint8, -1, False)
    for i in range(4):
        for j in range(6):
            assert int(divided[i, j]) == max(-128, min(127, round(float(x[i, j] / scales[j] + zeros[j]))))
            assert int(multiplied[i, j]) == max(-128, min(127, round(float(x[i, j] * 0.5))))
    assert divided.dtype == torch.int8


def test_quant_matmul(call: Callable[..., Any]) -> None:
    x, weight, scale, per_token = _int8(5, 2000), _int8(2000, 7), torch.rand(7) / 1000, torch.rand(5)
    exact = (x.long() @ weight.long()).double()
    y = call("npu::npu_quant_matmul", x, weight, scale, pertoken_scale=per_token, output_dtype=torch.bfloat16)
    close(y / 100, exact * scale.double() * per_token[:, None].double() / 100)
    bias = torch.randint(-1000, 1000, (7,), dtype=torch.int32)
    y = call("npu::npu_quant_matmul", x, weight, scale, bias=bias, output_dtype=torch.float16)
    close(y / 100, (exact + bias) * scale.double() / 100)
    encoded = scale.view(torch.int32).to(torch.int64)  # the fp16 form: bits of an fp32 in an int64
    same(call("npu::npu_quant_matmul", x, weight, encoded, bias=bias, output_dtype=torch.float16), y)
    y = call("npu::npu_quant_matmul", x, weight, scale / 100, offset=torch.full((7,), 5.0))
    assert y.dtype == torch.int8
    assert (y.double() - (exact * scale.double() / 100 + 5).round().clamp(-128, 127)).abs().max() <= 1


def test_dequant_swiglu_quant_is_grouped_matmul_swiglu_quant(call: Callable[..., Any]) -> None:
    x, weight = _int8(12, 40), _int8(4, 40, 16)
    scale, x_scale = torch.rand(4, 16) / 100, torch.rand(12) / 100
    options = {"split_item": 3, "group_type": 0, "group_list": torch.tensor(GROUPS[1]), "group_list_type": 1}
    (raw,) = call("npu::npu_grouped_matmul", [x], [weight], output_dtype=torch.int32, **options)
    values, out_scale = call(
        "npu::npu_dequant_swiglu_quant",
        raw,
        weight_scale=scale,
        activation_scale=x_scale,
        group_index=torch.tensor(GROUPS[1]),
        activate_left=True,
        quant_mode=1,
    )
    fused = call("npu::npu_grouped_matmul_swiglu_quant", x, weight, torch.tensor(GROUPS[0]), scale, x_scale)
    for expert, start, end in ROWS_OF:
        full = (
            (x[start:end].long() @ weight[expert].long()).double()
            * scale[expert].double()
            * x_scale[start:end, None].double()
        )
        wanted, wanted_scale = _dynamic_quant_reference(full[:, :8] / (1 + torch.exp(-full[:, :8])) * full[:, 8:])
        for got, got_scale in ((values, out_scale), fused[:2]):
            close(got_scale[start:end], wanted_scale)
            assert (got[start:end].double() - wanted).abs().max() <= 1
    same(fused[0][:9], values[:9])
    for tensor in (values, out_scale, fused[0], fused[1]):
        assert is_poison(tensor[9:])


# ---- rotary embedding and KV cache ---------------------------------------------------------------------------------


def _rotate_reference(vector: Any, angles: Any, neox: bool) -> Any:
    """Pairs (i, i + D/2) for neox, (2i, 2i + 1) else, each turned by its angle."""
    half = len(vector) // 2
    out = vector.double().clone()
    for i in range(half):
        a, b = (i, i + half) if neox else (2 * i, 2 * i + 1)
        c, s = math.cos(float(angles[i])), math.sin(float(angles[i]))
        out[a], out[b] = float(vector[a]) * c - float(vector[b]) * s, float(vector[b]) * c + float(vector[a]) * s
    return out


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("head_size", [8, 16])
def test_rotary_embedding_in_place(call: Callable[..., Any], neox: bool, head_size: int) -> None:
    angles = torch.rand(32, 4) * 3
    cache = torch.cat((angles.cos(), angles.sin()), 1)
    positions, query, key = torch.tensor([3, 0, 31]), torch.randn(3, 2 * 8), torch.randn(3, 8)
    before = query.clone(), key.clone()
    assert call("atb::_npu_rotary_embedding", positions, query, key, head_size, cache, neox) is None
    for new, old in zip((query, key), before, strict=True):
        for t in range(3):
            for got, vector in zip(new[t].view(-1, 8), old[t].view(-1, 8), strict=True):
                close(got, _rotate_reference(vector, angles[positions[t]], neox))


def test_the_other_rotary_operators_agree(call: Callable[..., Any]) -> None:
    angles = torch.rand(5, 8) * 3
    cos, sin = (torch.cat((f, f), 1) for f in (angles.cos(), angles.sin()))
    query, key = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16)
    wanted = torch.stack([torch.stack([_rotate_reference(h, angles[t], True) for h in query[0, t]]) for t in range(5)])
    table = (cos.view(1, 5, 1, 16), sin.view(1, 5, 1, 16))
    close(call("npu::npu_rotary_mul", query, *table)[0], wanted)
    interleaved = torch.stack((query[..., :8], query[..., 8:]), -1).flatten(-2)  # what interleave_rope brings to halves
    x = interleaved[0].unsqueeze(2)  # [B, N, S=1, D]
    close(call("npu::npu_interleave_rope", x, cos.view(5, 1, 1, 16), sin.view(5, 1, 1, 16))[:, :, 0], wanted)
    before = key.clone()
    returned = call("npu::npu_apply_rotary_pos_emb", query, key, *table)
    assert returned[0] is query
    assert returned[1] is key
    close(query[0], wanted)
    assert not torch.equal(key, before)


def test_reshape_and_cache_writes_only_its_slots(call: Callable[..., Any]) -> None:
    key_cache, value_cache = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
    key, value = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    slots = torch.tensor([5, 0, -1, 11], dtype=torch.int32)
    assert call("atb::_npu_reshape_and_cache", key, value, key_cache, value_cache, slots) is None
    for cache, rows in ((key_cache, key), (value_cache, value)):
        wanted = torch.zeros(12, 2, 8)
        wanted[5], wanted[0], wanted[11] = rows[0], rows[1], rows[3]
        same(cache.view(12, 2, 8), wanted)


@pytest.mark.parametrize("mode", ["PA", "PA_NZ"])
def test_kv_rmsnorm_rope_cache(call: Callable[..., Any], mode: str) -> None:
    rank, width, tokens = 64, 32, 3
    kv, gamma = torch.randn(tokens, 1, 1, rank + width).bfloat16(), torch.rand(rank).bfloat16()
    angles = torch.rand(tokens, width // 2)
    cos, sin = (torch.cat((f, f), 1).view(tokens, 1, 1, width).bfloat16() for f in (angles.cos(), angles.sin()))
    k_cache, ckv_cache = torch.zeros(2, 16, 1, width).bfloat16(), torch.zeros(2, 16, 1, rank).bfloat16()
    index = torch.tensor([17, 3, -1])
    arguments = (kv, gamma, cos, sin, index, k_cache, ckv_cache)
    returned = call("npu::npu_kv_rmsnorm_rope_cache", *arguments, cache_mode=mode, is_output_kv=True)
    assert returned[0] is k_cache
    assert returned[1] is ckv_cache
    for t in range(tokens):
        vector = kv[t, 0, 0, rank:]
        pairs = torch.cat((vector[::2], vector[1::2]))
        c, s = cos[t].flatten().double(), sin[t].flatten().double()
        turned = pairs.double() * c + torch.cat((-pairs[width // 2 :], pairs[: width // 2])).double() * s
        close(returned[2][t, 0, 0], turned)
        close(returned[3][t, 0, 0], _rms_reference(kv[t, 0, :, :rank], gamma, 1e-5)[0][0])
    for cache, rows, size in ((k_cache, returned[2], width), (ckv_cache, returned[3], rank)):
        flat = (
            cache.view(2, 16, size)
            if mode == "PA"
            else cache.view(2, size // 16, 16, 16).transpose(1, 2).reshape(2, 16, size)
        )
        wanted = torch.zeros(2, 16, size).bfloat16()
        wanted[1, 1], wanted[0, 3] = rows[0].flatten(), rows[1].flatten()
        same(flat, wanted)
    assert is_poison(call("npu::npu_kv_rmsnorm_rope_cache", *arguments, cache_mode=mode)[2])


def test_paged_cache_load_and_scatter(call: Callable[..., Any]) -> None:
    keys, values = torch.randn(4, 4, 1, 8), torch.randn(4, 4, 1, 6)
    table, lengths, starts = torch.tensor([[2, 0], [3, 1]]), torch.tensor([3, 4]), torch.tensor([2, 0])
    wanted = [keys[2, 2], keys[2, 3], keys[0, 0], *keys[3]]
    got = call("atb::npu_paged_cache_load", keys, values, table, lengths, seq_starts=starts)
    same(got[0], torch.stack(wanted))
    out = torch.zeros(7, 1, 8), torch.zeros(7, 1, 6)
    returned = call(
        "atb::npu_paged_cache_load.out", keys, values, table, lengths, seq_starts=starts, key=out[0], value=out[1]
    )
    assert returned[0] is out[0]
    same(out[1], got[1])
    target = torch.zeros(4, 2)
    assert call("npu::npu_scatter_nd_update_", target, torch.tensor([[2], [0]]), torch.ones(2, 2)) is target
    assert target.sum(1).tolist() == [2, 0, 2, 0]


# ---- attention -----------------------------------------------------------------------------------------------------


def _attention_reference(q: Any, k: Any, v: Any, scale: float, sees: Callable[[int, int], bool]) -> Any:
    """[queries, heads, Dv] in fp64, key by key; a row that sees nothing is 0."""
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2]).double()
    shared = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        seen = [j for j in range(k.shape[0]) if sees(i, j)]
        for head in range(q.shape[1]) if seen else ():
            scores = torch.stack([q[i, head].double() @ k[j, head // shared].double() * scale for j in seen])
            weights = torch.exp(scores - scores.max())
            out[i, head] = (weights / weights.sum()) @ torch.stack([v[j, head // shared].double() for j in seen])
    return out


class Paged:
    """A KV cache with shuffled blocks of several sequences; every slot that no sequence uses is NaN."""

    def __init__(
        self,
        lengths: Sequence[int],
        heads: int,
        width: int,
        dtype: Any,
        block_size: int = 16,
        value_width: int | None = None,
    ) -> None:
        self.lengths, self.block_size = list(lengths), block_size
        self.keys = [torch.randn(n, heads, width).to(dtype) for n in lengths]
        self.values = [torch.randn(n, heads, value_width or width).to(dtype) for n in lengths]
        per_sequence = [-(-n // block_size) for n in lengths]
        order = torch.randperm(sum(per_sequence) + 2).tolist()
        self.table = torch.zeros(len(lengths), max(per_sequence), dtype=torch.int32)
        self.key_cache = torch.full((len(order), block_size, heads, width), NAN).to(dtype)
        self.value_cache = torch.full((len(order), block_size, heads, value_width or width), NAN).to(dtype)
        for row, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            for b in range(per_sequence[row]):
                block = self.table[row, b] = order.pop()
                part = slice(b * block_size, min(len(k), (b + 1) * block_size))
                self.key_cache[block, : part.stop - part.start] = k[part]
                self.value_cache[block, : part.stop - part.start] = v[part]

    @property
    def lens(self) -> Any:
        return torch.tensor(self.lengths, dtype=torch.int32)


def _causal_mask(size: int, dtype: Any) -> Any:
    """As vllm-ascend builds it: 1 (bf16) or -inf (fp16) above the diagonal."""
    hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
    return torch.zeros(size, size).masked_fill(hidden, -torch.inf if dtype == torch.float16 else 1).to(dtype)


COMPRESSED = torch.ones(2048, 2048, dtype=torch.bool).triu(1).to(torch.int8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_paged_attention_equals_dense_attention(
    call: Callable[..., Any], dtype: Any, heads: int, kv_heads: int
) -> None:
    cache = Paged([1, 40, 17, 130], kv_heads, 8, dtype)
    query, out = torch.randn(5, heads, 8).to(dtype), torch.full((5, heads, 8), 7.0).to(dtype)
    lens = cache.lens
    call(
        "atb::_npu_paged_attention",
        query,
        cache.key_cache,
        cache.value_cache,
        kv_heads,
        heads,
        0.3,
        cache.table,
        lens,
        out,
        host=[lens],
    )
    for i in range(4):
        close(
            out[i : i + 1],
            _attention_reference(query[i : i + 1], cache.keys[i], cache.values[i], 0.3, lambda i, j: True),
        )
    same(out[4], torch.full((heads, 8), 7.0).to(dtype))  # a row without a sequence is not written


@pytest.mark.parametrize("dtype", FLOATS)
def test_flash_attention_prefill(call: Callable[..., Any], dtype: Any) -> None:
    lengths = [5, 1, 19]
    q, k, v = torch.randn(27, 4, 8).to(dtype), torch.randn(27, 2, 8).to(dtype), torch.randn(27, 2, 8).to(dtype)
    out = torch.full((27, 4, 8), 7.0).to(dtype)
    seq_len = torch.tensor(lengths, dtype=torch.int32)
    call("atb::_npu_flash_attention", q, k, v, _causal_mask(19, dtype), seq_len, 0.35, 4, 2, out, host=[seq_len])
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        close(out[part], _attention_reference(q[part], k[part], v[part], 0.35, lambda i, j: j <= i))
        start += length
    same(out[start:], torch.full((2, 4, 8), 7.0).to(dtype))
    with pytest.raises(ValueError, match="mask"):
        call("atb::_npu_flash_attention", q, k, v, torch.full((19, 19), 0.5), seq_len, 0.35, 4, 2, out, host=[seq_len])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_decode_steps_have_the_bits_of_the_one_shot_prefill(call: Callable[..., Any], dtype: Any) -> None:
    """One sequence of 150 tokens: at once, in ragged chunks by three operators beside another, and token by token."""
    total, heads, kv_heads = 150, 4, 2
    cache, other = Paged([total], kv_heads, 8, dtype), Paged([33], kv_heads, 8, dtype)
    q = torch.randn(total, heads, 8).to(dtype)
    mask = _causal_mask(total, dtype)
    whole = torch.zeros_like(q)
    call(
        "atb::_npu_flash_attention",
        q,
        cache.keys[0],
        cache.values[0],
        mask,
        torch.tensor([total]),
        0.3,
        heads,
        kv_heads,
        whole,
    )
    close(whole[:40], _attention_reference(q[:40], cache.keys[0], cache.values[0], 0.3, lambda i, j: j <= i))

    shift = cache.key_cache.shape[0]
    keys, values = torch.cat((cache.key_cache, other.key_cache)), torch.cat((cache.value_cache, other.value_cache))
    table = torch.zeros(2, cache.table.shape[1], dtype=torch.int32)
    table[0], table[1, : other.table.shape[1]] = cache.table[0], other.table[0] + shift
    companion = torch.randn(1, heads, 8).to(dtype)
    start = 0
    for chunk in (1, 7, 16, 100, 26):
        end = start + chunk
        rows = torch.cat((q[start:end], companion))
        lens, new = torch.tensor([end, 33]), torch.tensor([chunk, 1])
        splitfuse = torch.zeros_like(rows)
        row_mask = torch.cat((mask[start:end], torch.zeros(1, total).to(dtype)))
        call(
            "atb::_npu_paged_attention_splitfuse",
            rows,
            keys,
            values,
            table,
            lens,
            row_mask,
            new,
            kv_heads,
            heads,
            0.3,
            splitfuse,
        )
        prefix = torch.zeros_like(rows)
        call(
            "atb::_npu_flash_attention_qlens",
            rows,
            keys,
            values,
            table,
            mask[:128, :128].contiguous(),
            new,
            lens,
            kv_heads,
            heads,
            0.3,
            prefix,
        )
        fused, _ = call(
            "npu::npu_fused_infer_attention_score",
            rows,
            keys.flatten(2),
            values.flatten(2),
            atten_mask=COMPRESSED,
            block_table=table,
            input_layout="TND",
            block_size=16,
            actual_seq_lengths=[chunk, chunk + 1],
            actual_seq_lengths_kv=[end, 33],
            num_key_value_heads=kv_heads,
            num_heads=heads,
            scale=0.3,
            sparse_mode=3,
        )
        for result in (splitfuse, prefix, fused):
            same(result[:chunk], whole[start:end])
            close(
                result[chunk:], _attention_reference(companion, other.keys[0], other.values[0], 0.3, lambda i, j: True)
            )
        start = end
    for position in (0, 15, 16, 127, 128, 149):
        step = torch.zeros(1, heads, 8).to(dtype)
        lens = torch.tensor([position + 1])
        call(
            "atb::_npu_paged_attention",
            q[position : position + 1],
            keys,
            values,
            kv_heads,
            heads,
            0.3,
            table,
            lens,
            step,
        )
        same(step[0], whole[position])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_row_has_the_same_bits_in_any_batch(call: Callable[..., Any], dtype: Any) -> None:
    cache = Paged([31, 200, 1, 16, 64, 5], 2, 16, dtype)
    query = torch.randn(6, 8, 16).to(dtype)
    arguments = (cache.key_cache, cache.value_cache, 2, 8, 0.25)
    together = torch.zeros_like(query)
    call("atb::_npu_paged_attention", query, *arguments, cache.table, cache.lens, together)
    for i in range(6):
        alone = torch.zeros(1, 8, 16).to(dtype)
        call(
            "atb::_npu_paged_attention",
            query[i : i + 1],
            *arguments,
            cache.table[i : i + 1],
            cache.lens[i : i + 1],
            alone,
        )
        same(alone[0], together[i])


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
@pytest.mark.parametrize("sparse_mode", [0, 2, 3, 4])
def test_fused_attention_layouts_and_masks(call: Callable[..., Any], layout: str, sparse_mode: int) -> None:
    batch, queries, keys = 2, 5, 9
    q, k, v = torch.randn(batch, queries, 4, 8), torch.randn(batch, keys, 2, 8), torch.randn(batch, keys, 2, 8)
    q_lens, kv_lens = [5, 3], [9, 6]
    dense = torch.rand(batch, 1, queries, keys) < 0.4
    dense[0, 0, 2] = True  # a query that sees nothing
    shape = {"BSH": lambda t: t.flatten(2), "BSND": lambda t: t, "BNSD": lambda t: t.transpose(1, 2).contiguous()}[
        layout
    ]
    options = {"pre_tokens": 2, "next_tokens": 1} if sparse_mode == 4 else {}
    out, lse = call(
        "npu::npu_fused_infer_attention_score",
        shape(q),
        shape(k),
        shape(v),
        num_heads=4,
        num_key_value_heads=2,
        scale=0.4,
        input_layout=layout,
        atten_mask=COMPRESSED if sparse_mode else dense,
        actual_seq_lengths=q_lens,
        actual_seq_lengths_kv=kv_lens,
        sparse_mode=sparse_mode,
        softmax_lse_flag=True,
        **options,
    )
    assert lse.shape == (batch, 4, queries, 1)
    for b in range(batch):
        diagonal = kv_lens[b] - q_lens[b]
        sees = {
            0: lambda i, j, b=b: not dense[b, 0, i, j],
            2: lambda i, j: j <= i,
            3: lambda i, j, d=diagonal: j <= i + d,
            4: lambda i, j, d=diagonal: i + d - 2 <= j <= i + d + 1,
        }[sparse_mode]
        part = q[b, : q_lens[b]], k[b, : kv_lens[b]], v[b, : kv_lens[b]]
        got = out[b].transpose(0, 1) if layout == "BNSD" else out[b].view(queries, 4, 8)
        close(got[: q_lens[b]], _attention_reference(*part, 0.4, sees))
        seen = [j for j in range(kv_lens[b]) if sees(0, j)]
        scores = torch.stack([q[b, 0, 1].double() @ k[b, j, 0].double() * 0.4 for j in seen])
        close(lse[b, 1, 0, 0], scores.exp().sum().log())


def test_fused_attention_packed_without_cache(call: Callable[..., Any]) -> None:
    q, k, v = torch.randn(6, 4, 8), torch.randn(7, 4, 8), torch.randn(7, 4, 8)
    options = {"num_heads": 4, "scale": 0.4, "input_layout": "TND", "softmax_lse_flag": True}
    out, lse = call(
        "npu::npu_fused_infer_attention_score",
        q,
        k,
        v,
        actual_seq_lengths=[2, 6],
        actual_seq_lengths_kv=[3, 7],
        **options,
    )
    assert lse.shape == (6, 4, 1)
    close(out[:2], _attention_reference(q[:2], k[:3], v[:3], 0.4, lambda i, j: True))
    close(out[2:], _attention_reference(q[2:], k[3:], v[3:], 0.4, lambda i, j: True))
    with pytest.raises(ValueError, match="actual_seq_lengths"):  # the rows of query must end with the last sequence
        call(
            "npu::npu_fused_infer_attention_score",
            q,
            k,
            v,
            actual_seq_lengths=[2, 5],
            actual_seq_lengths_kv=[3, 7],
            **options,
        )
    with pytest.raises(ValueError, match="actual_seq_lengths_kv"):
        call(
            "npu::npu_fused_infer_attention_score",
            q,
            k,
            v,
            actual_seq_lengths=[2, 6],
            actual_seq_lengths_kv=[7],
            **options,
        )


@pytest.mark.parametrize("form", ["BNSD", "BSND_NZ", "TND"])
def test_fused_attention_mla_decode(call: Callable[..., Any], form: str) -> None:
    """The absorbed form: keys are latent [.., R] (values too) plus a rope part [.., D]; one KV head for all queries."""
    heads, rank, width, lengths = 16, 32, 16, [40, 3]
    latent, rope = Paged(lengths, 1, rank, torch.bfloat16), Paged(lengths, 1, width, torch.bfloat16)
    rope_cache = torch.full((latent.key_cache.shape[0], 16, 1, width), NAN).bfloat16()
    for i, length in enumerate(lengths):
        for t in range(length):
            rope_cache[latent.table[i, t // 16], t % 16] = rope.keys[i][t]
    # TND: a speculative step of two tokens for the first sequence
    counts = [2, 1] if form == "TND" else [1, 1]
    q, q_rope = torch.randn(sum(counts), heads, rank).bfloat16(), torch.randn(sum(counts), heads, width).bfloat16()
    blocks = latent.key_cache.shape[0]
    options: dict[str, Any] = {
        "num_heads": heads,
        "num_key_value_heads": 1,
        "scale": 0.2,
        "block_table": latent.table,
        "block_size": 16,
    }
    options |= {"actual_seq_lengths_kv": lengths, "antiquant_mode": 0, "antiquant_scale": None}
    if form == "BSND_NZ":
        nz = [
            c.view(blocks, 16, -1, 16).transpose(1, 2).contiguous().unsqueeze(1) for c in (latent.key_cache, rope_cache)
        ]
        caches, query = nz, [t.unsqueeze(1) for t in (q, q_rope)]
        options |= {"input_layout": "BSND"}
    else:
        caches = [latent.key_cache.view(blocks, 1, 16, rank), rope_cache.view(blocks, 1, 16, width)]
        query = [q, q_rope] if form == "TND" else [q.unsqueeze(2), q_rope.unsqueeze(2)]
        extra = {"actual_seq_lengths": [2, 3], "sparse_mode": 3, "atten_mask": COMPRESSED}
        options |= {"input_layout": form} | (extra if form == "TND" else {})
    name = "npu::npu_fused_infer_attention_score"
    out, lse = call(name, query[0], caches[0], caches[0], query_rope=query[1], key_rope=caches[1], **options)
    assert out.shape == query[0].shape
    assert lse.numel() == 0
    start = 0
    for i, count in enumerate(counts):
        part = slice(start, start + count)
        keys = torch.cat((latent.keys[i], rope.keys[i]), -1)
        full = torch.cat((q[part], q_rope[part]), -1)
        last = lengths[i] - count
        close(
            out.view(-1, heads, rank)[part],
            _attention_reference(full, keys, latent.keys[i], 0.2, lambda a, j, d=last: j <= a + d),
        )
        start += count
    into = [torch.zeros_like(query[0]), torch.zeros(2).bfloat16()]
    returned = call(
        f"{name}.out", query[0], caches[0], caches[0], query_rope=query[1], key_rope=caches[1], **options, out=into
    )
    assert returned[0] is into[0]
    same(into[0], out)


def test_ring_mla_rounds_add_up(call: Callable[..., Any]) -> None:
    """Prefill of the new tokens, then two rounds over cached context, equals attention over everything."""
    heads, new, context = 4, [3, 5], [[6, 0], [2, 4]]
    q, q_rope = torch.randn(8, heads, 8), torch.randn(8, heads, 4)
    rounds = [new, *context]
    keys = [torch.randn(sum(r), heads, 8) for r in rounds]
    ropes = [torch.randn(sum(r), heads, 4) for r in rounds]
    values = [torch.randn(sum(r), heads, 6) for r in rounds]
    mask, lens = torch.zeros(512, 512), torch.tensor(new, dtype=torch.int32)
    first = (q, q_rope, keys[0], ropes[0], values[0], mask, lens, heads, heads)
    out, lse = call(
        "atb::npu_ring_mla",
        *first,
        qk_scale=0.3,
        mask_type="mask_type_triu",
        calc_type="calc_type_first_ring",
        host=[lens],
    )
    for i in (1, 2):
        both = torch.tensor([new, rounds[i]], dtype=torch.int32)
        returned = call(
            "atb::npu_ring_mla.out",
            q,
            q_rope,
            keys[i],
            ropes[i],
            values[i],
            mask,
            both,
            heads,
            heads,
            pre_out=out,
            prev_lse=lse,
            qk_scale=0.3,
            mask_type="no_mask",
            calc_type="calc_type_default",
            input_layout="type_bsnd",
            kernel_type="kernel_type_high_precision",
            output=out,
            softmax_lse=lse,
            host=[both],
        )
        assert returned[0] is out
        assert returned[1] is lse
    starts = [[sum(r[:b]) for b in range(2)] for r in rounds]
    first_row = 0
    for b in range(2):
        rows = slice(first_row, first_row + new[b])
        parts = [(r, slice(starts[r][b], starts[r][b] + rounds[r][b])) for r in (1, 2, 0)]
        k = torch.cat([torch.cat((keys[r][s], ropes[r][s]), -1) for r, s in parts])
        v = torch.cat([values[r][s] for r, s in parts])
        cached = len(k) - new[b]
        wanted = _attention_reference(
            torch.cat((q[rows], q_rope[rows]), -1), k, v, 0.3, lambda i, j, c=cached: j <= i + c
        )
        close(out[rows], wanted)
        first_row += new[b]


def test_fusion_attention(call: Callable[..., Any]) -> None:
    q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    options = {"scale": 0.4, "actual_seq_qlen": [3, 7], "actual_seq_kvlen": [3, 7]}
    band = {"atten_mask": COMPRESSED.bool(), "sparse_mode": 4, "pre_tockens": 4, "next_tockens": 4}
    result = call("npu::npu_fusion_attention", q, k, v, 4, "TND", **options, **band)
    plain = call("npu::npu_fusion_attention", q, k, v, 4, "TND", **options)
    for part in (slice(0, 3), slice(3, 7)):
        close(result[0][part], _attention_reference(q[part], k[part], v[part], 0.4, lambda i, j: True))
    same(result[0], plain[0])
    assert result[1].shape == result[2].shape == (7, 4, 8)
    batch = [t[:6].reshape(2, 3, -1) for t in (q, k, v)]
    hidden = torch.ones(3, 3, dtype=torch.bool).triu(1)
    out = call("npu::npu_fusion_attention", *batch, 4, "BSH", scale=0.4, atten_mask=hidden)[0]
    close(out[1].view(3, 4, 8), _attention_reference(q[3:6], k[3:6], v[3:6], 0.4, lambda i, j: j <= i))


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_format_cast_keeps_values_and_workspaces_exist(call: Callable[..., Any]) -> None:
    x = torch.randn(4, 6).bfloat16()
    cast = call("npu::npu_format_cast", x.t(), 29)
    assert cast is not x
    same(cast, x.t())
    before = x.clone()
    assert call("npu::npu_format_cast_.acl_format", x, 29) is x
    same(x, before)
    assert call("npu::npu_prefetch", x, None, 100) is None
    args = (
        x.view(4, 1, 6),
        x.view(1, 4, 1, 6),
        x.view(1, 4, 1, 6),
        1,
        1,
        1.0,
        torch.zeros(4, 1, dtype=torch.int32),
        torch.ones(4),
        x,
    )
    assert call("atb::_npu_paged_attention_get_workspace", *args).dtype == torch.uint8


def test_top_k_top_p(call: Callable[..., Any]) -> None:
    logits = torch.randn(5, 12)
    k, p = torch.tensor([1, 3, 12, 5, 7], dtype=torch.int32), torch.tensor([0.9, 0.5, 0.3, 1.0, 0.0])
    for use_p, use_k in ((True, True), (True, False), (False, True)):
        out = call("npu::npu_top_k_top_p", logits, p if use_p else None, k if use_k else None)
        for row in range(5):
            ranked = sorted(range(12), key=lambda i, r=row: -float(logits[r, i]))
            kept = ranked[: int(k[row])] if use_k else ranked
            weights = [math.exp(float(logits[row, i])) for i in kept]
            if use_p:  # drop from the least likely on while the dropped mass stays <= 1 - p; the best stays
                mass = 0.0
                while len(kept) > 1 and (mass + weights[len(kept) - 1]) / sum(weights) <= 1 - float(p[row]):
                    mass += weights[len(kept) - 1]
                    kept = kept[:-1]
            wanted = torch.full((12,), -torch.inf)
            wanted[kept] = logits[row, kept]
            same(out[row], wanted)


def test_products_of_the_mla_path(call: Callable[..., Any]) -> None:
    a, b = torch.randn(5, 3, 16).bfloat16(), torch.randn(3, 16, 8).bfloat16()
    wanted = torch.stack([a[:, h].double() @ b[h].double() for h in range(3)], 1)
    close(call("npu::npu_transpose_batchmatmul", a, b, perm_x1=[1, 0, 2], perm_y=[1, 0, 2]) / 4, wanted / 4)
    c, x, weight = torch.ones(6, 4), torch.randn(2, 6).half(), torch.randn(2, 4).half()
    call("atb::_npu_matmul_add_fp32", x, weight, c)
    close(c, 1 + x.double().t() @ weight.double())


def test_vllm_ascends_own_operators(call: Callable[..., Any]) -> None:
    if call is _call_on_npu:
        import vllm_ascend.vllm_ascend_C  # noqa: F401  its registrations must not replace ours
    a, b, out = torch.randn(5, 3, 16).bfloat16(), torch.randn(3, 16, 8).bfloat16(), torch.zeros(5, 3, 8).bfloat16()
    assert call("_C_ascend::batch_matmul_transpose", a, b, out) is None
    close(out / 4, torch.stack([a[:, h].double() @ b[h].double() for h in range(3)], 1) / 4)
    if call is _call_on_cpu or is_defined("_C_ascend::rotary_embedding"):  # gone in 0.18.0
        angles = torch.rand(9, 16)
        cache = torch.cat((angles.cos(), angles.sin()), 1).half()
        positions, q, k = torch.tensor([8, 0]), torch.randn(2, 64).half(), torch.randn(2, 32).half()
        rotated, _ = call("_C_ascend::rotary_embedding", positions, q, k, 32, cache, True)
        assert rotated.shape == (2, 2, 32)
        close(rotated[0, 1], _rotate_reference(q[0, 32:], angles[8], True))
    ids = torch.tensor([0, 10, 19, 20, 30, 39, 40])
    local, outside = call("_C_ascend::get_masked_input_and_mask", ids, 10, 20, 6, 30, 40)
    assert outside.tolist() == [True, False, False, True, False, False, True]
    assert local.tolist() == [0, 0, 9, 0, 16, 25, 0]  # original rows, 6 rows of padding, added rows


def test_group_bounds_are_numbers_of_rows() -> None:
    assert moe._groups("op", [2, 2, 5], 0, 3, 5) == [(0, 0, 2), (1, 2, 2), (2, 2, 5)]
    assert moe._groups("op", [], 1, 0, 0) == []

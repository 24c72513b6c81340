# SPDX-License-Identifier: Apache-2.0
"""Triton kernels on NPU tensors: the interpreter as the virtual NPU sets it up, and stock's kernels in plain torch."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cann.extension import extract_slice, get_element, insert_slice
from virtual_npu.triton_backend import interpreter, native


@triton.jit
def _scale(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offset, tl.load(source + offset, mask=offset < count) * 2 + 1, mask=offset < count)


@triton.jit
def _to_bf16(source, target, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offset, tl.load(source + offset).to(tl.bfloat16))


@triton.jit
def _slices(source, target):  # type: ignore[no-untyped-def]
    row = tl.load(source + tl.arange(0, 8))
    part = extract_slice(row, offsets=(4,), sizes=(2,), strides=(2,)) + get_element(row, (1,))
    tl.store(target + tl.arange(0, 8), insert_slice(row, part, (0,), (2,), (1,)))


def test_vllm_sees_one_active_driver() -> None:
    drivers = [backend.driver for backend in triton.backends.backends.values() if backend.driver.is_active()]
    assert len(drivers) == 1
    assert triton.runtime.driver.active.utils.get_device_properties(0) == {"num_aicore": 24, "num_vectorcore": 48}
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_a_kernel_writes_into_a_view() -> None:
    base = torch.zeros(200, dtype=torch.int32).npu()
    _scale[(7,)](torch.arange(100, dtype=torch.int32).npu(), base[90:], 100, BLOCK=16)
    assert base[90:190].tolist() == [2 * value + 1 for value in range(100)]
    assert not base[:90].any()
    assert not base[190:].any()


def test_source_and_target_may_be_one_tensor() -> None:
    values = torch.arange(64).npu()
    _scale[(4,)](values, values, 64, BLOCK=16)
    assert values.tolist() == [2 * value + 1 for value in range(64)]


def test_a_kernel_in_a_graph() -> None:
    source, target = torch.arange(100).npu(), torch.zeros(200, dtype=torch.int64).npu()
    graph = torch.npu.NPUGraph()  # type: ignore[attr-defined]
    with torch.npu.graph(graph):  # type: ignore[attr-defined]
        _scale[(7,)](source, target[90:], 100, BLOCK=16)
    assert not target.any()
    source.fill_(3)
    graph.replay()
    assert target[90:190].eq(7).all()
    assert not target[:90].any()


def test_slices_of_a_block() -> None:
    target = torch.zeros(8).npu()
    _slices[(1,)](torch.arange(8.0).npu(), target)
    assert target.tolist() == [5.0, 7.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def _fp32_patterns() -> torch.Tensor:
    """All signs, exponents and kept mantissas, each with dropped bits below, at and above the middle, and all ones."""
    kept = torch.arange(1 << 16, dtype=torch.int64) << 16
    bits = torch.cat([kept + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    return torch.from_numpy(bits.numpy().astype(np.uint32).view(np.float32).copy())


def test_bf16_is_rounded_to_nearest_even() -> None:
    values = _fp32_patterns()
    bits = interpreter.fp32_to_bf16(values.numpy())
    wanted = values.to(torch.bfloat16)
    number = ~values.isnan()
    assert np.array_equal(bits[number.numpy()], wanted[number].view(torch.int16).numpy().view(np.uint16))
    assert np.isnan(interpreter.bf16_to_fp32(bits[~number.numpy()])).all()


def test_bf16_in_a_kernel() -> None:
    values = torch.randn(4096)
    values[0] = 1.99999  # carries into the exponent
    target = torch.zeros(4096, dtype=torch.bfloat16).npu()
    _to_bf16[(1,)](values.npu(), target, BLOCK=4096)
    assert torch.equal(target.cpu(), values.to(torch.bfloat16))


# ---- stock's kernels: the native form against the interpreter -------------------------------------------------------


def _both_ways(monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[torch.Tensor]]) -> Any:
    """What a launch leaves on the device, natively and interpreted."""
    used = []
    for key, function in list(native.KERNELS.items()):

        def noted(grid: Any, _function: Any = function, **arguments: Any) -> None:
            used.append(_function)
            _function(grid, **arguments)

        noted.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        monkeypatch.setitem(native.KERNELS, key, noted)
    natively = [tensor.cpu() for tensor in run()]
    assert used, "the kernel's parameters are not those of its native form"
    monkeypatch.setattr(native, "KERNELS", {})
    return natively, [tensor.cpu() for tensor in run()]


@pytest.mark.parametrize(("world", "rank", "interleave"), [(1, 0, 1), (2, 1, 1), (2, 0, 4)])
def test_slot_mapping(monkeypatch: pytest.MonkeyPatch, world: int, rank: int, interleave: int) -> None:
    from vllm.v1.worker.block_table import _compute_slot_mapping_kernel as kernel

    starts = torch.tensor([0, 3, 4, 40], dtype=torch.int32)
    positions = torch.cat([torch.arange(20, 23), torch.tensor([7]), torch.arange(36)])
    table = torch.randint(1, 99, (3, 12), dtype=torch.int32)

    def run() -> list[torch.Tensor]:
        slots = torch.full((64,), 12345, dtype=torch.int64).npu()
        kernel[(4,)](
            40, 60, starts.npu(), positions.npu(), table.npu(), 12, 8, slots, TOTAL_CP_WORLD_SIZE=world,
            TOTAL_CP_RANK=rank, CP_KV_CACHE_INTERLEAVE_SIZE=interleave, PAD_ID=-1, BLOCK_SIZE=1024
        )  # fmt: skip
        return [slots]

    natively, interpreted = _both_ways(monkeypatch, run)
    assert torch.equal(natively[0], interpreted[0])
    assert natively[0][40:].tolist() == [-1] * 20 + [12345] * 4


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rope_dim", [64, 32])
@pytest.mark.parametrize("from_cache", [True, False])
def test_rope(monkeypatch: pytest.MonkeyPatch, neox: bool, rope_dim: int, from_cache: bool) -> None:
    from vllm_ascend.ops.triton.rope import _triton_rope as kernel

    q, k = torch.randn(5, 4, 64).bfloat16(), torch.randn(5, 2, 64).bfloat16()
    cache, positions = torch.randn(99, rope_dim).bfloat16(), torch.tensor([3, 98, 0, 17, 4])

    def run() -> list[torch.Tensor]:
        query, key, table, places = q.npu(), k.npu(), cache.npu(), positions.npu()
        cos, sin = table[places].chunk(2, -1)
        pair = (None,) * 4 if from_cache else (cos, cos.stride(0), sin, sin.stride(0))
        cached = (table, table.stride(0), places) if from_cache else (None,) * 3
        kernel[(3,)](
            query, 256, key, 128, *pair, *cached, 5, 4, 2, 64, rope_dim, rope_dim, BLOCK_SIZE_HEAD=8,
            IS_NEOX_STYLE=neox, USE_COS_SIN=from_cache
        )  # fmt: skip
        return [query, key]

    natively, interpreted = _both_ways(monkeypatch, run)
    assert not torch.equal(natively[0], q)
    for one, other in zip(natively, interpreted, strict=True):
        assert torch.equal(one, other)

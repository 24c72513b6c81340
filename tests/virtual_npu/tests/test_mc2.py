# SPDX-License-Identifier: Apache-2.0
"""aclnnMoeDistributeDispatch(V2) and Combine(V2) against a plain numpy reference, and every refusal they make."""

from __future__ import annotations

import ctypes as c
import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import ACL_TYPES, Comm, HcclError, World, from_bf16, to_bf16

pytestmark = pytest.mark.timeout(120)
RELAXED = {"VIRTUAL_NPU_SHAPES": "relaxed", "VIRTUAL_NPU_SOC": "Ascend910_9391"}
REFUSED, FAILED = 161002, 361001  # first phase, second phase
JUNK = 0x55  # what output buffers hold before a call


@dataclasses.dataclass
class Buffer:
    """A tensor for aclnn: numpy storage, and the type when numpy has no name for it."""

    array: np.ndarray
    type: str = ""
    strides: tuple[int, ...] = ()  # elements; default dense
    shape: tuple[int, ...] = ()


def junk(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = JUNK
    return array


class Ep:
    """MC2 calls of one rank. `dtype` "bf16" rows are uint16 arrays, "float16" rows float16 arrays."""

    def __init__(self, comm: Comm, experts: int, dtype: str = "bf16", version: int = 2) -> None:
        self.comm, self.experts, self.dtype, self.version = comm, experts, dtype, version
        self.group = comm.name()
        self.local = experts // comm.size
        self.suffix = "" if version == 1 else "V2"

    def _tensor(self, value: Buffer | np.ndarray | None, dtype: str = "") -> c.c_void_p:
        if value is None:
            return c.c_void_p()
        buffer = value if isinstance(value, Buffer) else Buffer(value, dtype)
        shape = buffer.shape or buffer.array.shape
        strides = buffer.strides or tuple(s // buffer.array.itemsize for s in buffer.array.strides)
        create = self.comm.library.aclCreateTensor
        create.restype = c.c_void_p
        dims = (c.c_int64 * len(shape))(*shape)
        steps = (c.c_int64 * len(shape))(*strides)
        storage = (c.c_int64 * 1)(buffer.array.size)
        kind = ACL_TYPES[buffer.type or buffer.array.dtype.name]
        data = c.c_void_p(buffer.array.ctypes.data)
        return c.c_void_p(
            create(dims, c.c_uint64(len(shape)), kind, steps, c.c_int64(0), 2, storage, c.c_uint64(1), data)
        )

    def _run(self, name: str, args: list[Any]) -> None:
        size, executor = c.c_uint64(99), c.c_void_p()
        code = getattr(self.comm.library, f"{name}GetWorkspaceSize")(*args, c.byref(size), c.byref(executor))
        for tensor in args:
            if isinstance(tensor, c.c_void_p) and tensor.value:
                self.comm.library.aclDestroyTensor(tensor)  # op-plugin may do so too: the executor keeps copies
        if code != 0:
            raise HcclError(f"{name}GetWorkspaceSize", code)
        assert size.value == 0
        code = getattr(self.comm.library, name)(None, c.c_uint64(0), executor, None)
        if code != 0:
            raise HcclError(name, code)

    def _common(self, tp_world_size: int) -> list[Any]:
        return [
            self.group.encode(), c.c_int64(self.comm.size), c.c_int64(self.comm.rank), c.c_int64(self.experts),
            self.group.encode(), c.c_int64(tp_world_size), c.c_int64(0),
        ]  # fmt: skip

    def dispatch(
        self,
        x: np.ndarray | Buffer,
        ids: np.ndarray | Buffer,
        global_bs: int = 0,
        mask: np.ndarray | None = None,
        quant: int = 0,
        scales: np.ndarray | None = None,
        nums_type: int = 0,
        comm_alg: str = "",
        shared_ranks: int = 0,
        tp: int = 1,
    ) -> dict[str, np.ndarray]:
        """Allocates the seven outputs as the binding does (global_bs 0 becomes BS*R) and fills them with junk first."""
        bs, k = (ids.shape or ids.array.shape) if isinstance(ids, Buffer) else ids.shape
        h = (x.shape or x.array.shape)[1] if isinstance(x, Buffer) else x.shape[1]
        global_bs = global_bs or bs * self.comm.size
        a = global_bs * min(self.local, k)
        quantised = quant != 0 or scales is not None
        row_type = "int8" if quantised else self.dtype
        out = {
            "expand_x": junk((a, h), {"bf16": "uint16"}.get(row_type, row_type)),
            "dynamic_scales": junk((a,), "float32"),
            "assist": junk((bs * k if self.version == 1 else max(bs * k, a * 128),), "int32"),
            "token_nums": junk((self.local,), "int64"),
            "recv_counts": junk((self.comm.size * self.local,), "int32"),
            "tp_recv_counts": junk((tp,), "int32"),
            "expand_scales": junk((a,), "float32"),
        }
        args: list[Any] = [
            self._tensor(x, self.dtype), self._tensor(ids), self._tensor(scales), self._tensor(mask), c.c_void_p(),
            *self._common(tp), c.c_int64(0), c.c_int64(1), c.c_int64(shared_ranks), c.c_int64(quant),
            c.c_int64(global_bs), c.c_int64(nums_type),
        ]  # fmt: skip
        if self.version == 2:
            args.append(comm_alg.encode())
        args += [self._tensor(out["expand_x"], row_type), *(self._tensor(v) for k, v in out.items() if k != "expand_x")]
        self._run(f"aclnnMoeDistributeDispatch{self.suffix}", args)
        return out

    def combine(
        self,
        rows: np.ndarray,
        ids: np.ndarray,
        dispatched: dict[str, np.ndarray],
        weights: np.ndarray,
        global_bs: int = 0,
        mask: np.ndarray | None = None,
        shared: np.ndarray | None = None,
        comm_quant: int = 0,
    ) -> np.ndarray:
        bs = ids.shape[0]
        out = junk((bs, rows.shape[1]), rows.dtype.name)
        missing = c.c_void_p()
        args: list[Any] = [
            self._tensor(rows, self.dtype), self._tensor(ids), self._tensor(dispatched["assist"]),
            self._tensor(dispatched["recv_counts"]), self._tensor(weights), self._tensor(dispatched["tp_recv_counts"]),
            self._tensor(mask), missing, missing, missing, self._tensor(dispatched["expand_scales"]),
        ]  # fmt: skip
        if self.version == 2:
            args.append(self._tensor(shared, self.dtype))
        args += [
            *self._common(1), c.c_int64(0), c.c_int64(1), c.c_int64(0), c.c_int64(global_bs or bs * self.comm.size),
            c.c_int64(0), c.c_int64(comm_quant), c.c_int64(0),
        ]  # fmt: skip
        if self.version == 2:
            args.append(b"")
        args.append(self._tensor(out, self.dtype))
        self._run(f"aclnnMoeDistributeCombine{self.suffix}", args)
        return out


# ---- reference


def to_rows(values: np.ndarray, dtype: str) -> np.ndarray:
    return to_bf16(values) if dtype == "bf16" else values.astype(np.float16)


def to_float(rows: np.ndarray) -> np.ndarray:
    return from_bf16(rows) if rows.dtype == np.uint16 else rows.astype(np.float32)


@dataclasses.dataclass
class Batch:
    """One rank's input of one layer."""

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    active: int

    @property
    def mask(self) -> np.ndarray:
        return np.arange(len(self.ids)) < self.active


def make_batch(seed: int, bs: int, active: int, k: int, experts: int, h: int, dtype: str) -> Batch:
    """Rows depend on the seed and their number only: a padded batch starts with the rows of the unpadded one."""
    rng = [np.random.default_rng([seed, row]) for row in range(bs)]
    x = np.stack([r.normal(size=h).astype(np.float32) for r in rng])
    ids = np.stack([r.permutation(experts)[:k] for r in rng]).astype(np.int32)
    weights = np.stack([r.random(k, np.float32) for r in rng])
    return Batch(to_rows(x, dtype), ids, weights, active)


def expert(rows: np.ndarray, number: int, dtype: str) -> np.ndarray:
    """A row-wise stand-in for an expert: scaled, shifted, rounded to the row type."""
    return to_rows(to_float(rows) * np.float32(0.37 * (number + 1)) + np.float32(number), dtype)


def expected_dispatch(batches: list[Batch], rank: int, experts: int, nums_type: int) -> dict[str, Any]:
    """Sources (rank, token, slot) by row, prefix sums [expert][source], and token numbers."""
    local = experts // len(batches)
    sources, counts, nums = [], [], []
    for e in range(rank * local, (rank + 1) * local):
        before = len(sources)
        for source, batch in enumerate(batches):
            hits = [(source, t, s) for t, s in zip(*np.nonzero(batch.ids[: batch.active] == e), strict=True)]
            sources += hits
            counts.append(len(sources))
        nums.append(len(sources) if nums_type == 0 else len(sources) - before)
    return {"sources": sources, "counts": np.array(counts, np.int32), "nums": np.array(nums, np.int64)}


def expected_combine(batch: Batch, dtype: str, shared: np.ndarray | None = None) -> np.ndarray:
    total = np.zeros(batch.x.shape, np.float32)
    for slot in range(batch.ids.shape[1]):
        for t in range(batch.active):
            row = to_float(expert(batch.x[t], int(batch.ids[t, slot]), dtype))
            total[t] = total[t] + row * batch.weights[t, slot]
    if shared is not None:
        total = total + to_float(shared)
    return to_rows(total[: batch.active], dtype)


def quantised(row: np.ndarray, factors: np.ndarray | None) -> tuple[np.ndarray, np.float32]:
    values = to_float(row)
    if factors is not None:
        values = values * factors
    with np.errstate(all="ignore"):
        scale = np.float32(127.0) / np.abs(values).max()
        scaled = np.rint(values * scale)
        return np.nan_to_num(scaled, nan=0).astype(np.float16).astype(np.int8), np.float32(1) / scale


def is_poison(array: np.ndarray, dtype: str = "") -> bool:
    if dtype == "bf16":
        return bool(np.isnan(from_bf16(array)).all())
    if array.dtype.kind == "f":
        return bool(np.isnan(array).all())
    return bool((np.ascontiguousarray(array).view(np.uint8) == 0x7F).all())


# ---- results


def layer(world: World, case: dict[str, Any]) -> dict[str, Any]:
    """One dispatch, experts, combine; the inputs come from the case, so that the test can rebuild them."""
    comm = world.comm()
    dtype, version = case.get("dtype", "bf16"), case.get("version", 2)
    ep = Ep(comm, case["experts"], dtype, version)
    batch = case_batches(case)[world.rank]
    mask = batch.mask if case.get("mask") else None
    quant = case.get("quant", 0)
    scales = smooth_scales(case) if case.get("smooth") else None
    out = ep.dispatch(batch.x, batch.ids, case["global_bs"], mask, quant, scales, case.get("nums_type", 0))
    if quant:
        return out
    rows = out["expand_x"].copy()
    ends = out["token_nums"] if case.get("nums_type", 0) == 0 else np.cumsum(out["token_nums"])
    for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        rows[start:end] = expert(rows[start:end], world.rank * ep.local + number, dtype)
    shared = to_rows(np.full(batch.x.shape, 0.3, np.float32), dtype) if case.get("shared") else None
    out["y"] = ep.combine(rows, batch.ids, out, batch.weights, case["global_bs"], mask, shared)
    return out


def case_batches(case: dict[str, Any]) -> list[Batch]:
    active = case.get("active", case["bs"])
    shape = (case["k"], case["experts"], case.get("h", 64), case.get("dtype", "bf16"))
    return [make_batch(rank, bs, n, *shape) for rank, (bs, n) in enumerate(zip(case["bs"], active, strict=True))]


def smooth_scales(case: dict[str, Any]) -> np.ndarray:
    return np.random.default_rng(5).random((case["experts"], case.get("h", 64)), np.float32) + np.float32(0.5)


def check_layer(case: dict[str, Any], results: list[dict[str, Any]]) -> None:
    batches, dtype = case_batches(case), case.get("dtype", "bf16")
    quant = case.get("quant", 0)
    for rank, out in enumerate(results):
        expected = expected_dispatch(batches, rank, case["experts"], case.get("nums_type", 0))
        total = len(expected["sources"])
        np.testing.assert_array_equal(out["recv_counts"], expected["counts"])
        np.testing.assert_array_equal(out["token_nums"], expected["nums"])
        for row, (source, token, slot) in enumerate(expected["sources"]):
            x = batches[source].x[token]
            if quant:
                factors = smooth_scales(case)[batches[source].ids[token, slot]] if case.get("smooth") else None
                values, scale = quantised(x, factors)
                np.testing.assert_array_equal(out["expand_x"][row], values)
                assert out["dynamic_scales"][row] == scale
            else:
                np.testing.assert_array_equal(out["expand_x"][row], x)
        # What hardware leaves uninitialised must not look like a result.
        assert is_poison(out["expand_x"][total:], "" if quant else dtype)
        assert is_poison(out["dynamic_scales"][total if quant else 0 :])
        assert is_poison(out["expand_scales"])
        assert is_poison(out["tp_recv_counts"])
        if quant:
            continue
        shared = to_rows(np.full(batches[rank].x.shape, 0.3, np.float32), dtype) if case.get("shared") else None
        y, n = out["y"], batches[rank].active
        np.testing.assert_array_equal(y[:n], expected_combine(batches[rank], dtype, shared)[:n])
        assert is_poison(y[n:], dtype)


CASES = {
    "ragged": {"bs": [3, 1, 5, 2], "global_bs": 20, "k": 3, "experts": 8},
    "ragged, loose bound": {"bs": [3, 1, 5, 2], "global_bs": 4 * 64, "k": 3, "experts": 8},
    "ragged, counts, fp16": {
        "bs": [3, 1, 5, 2],
        "global_bs": 20,
        "k": 3,
        "experts": 8,
        "nums_type": 1,
        "dtype": "float16",
    },
    "ragged, version 1": {"bs": [3, 1, 5, 2], "global_bs": 20, "k": 3, "experts": 8, "version": 1},
    "two ranks": {"bs": [4, 4], "global_bs": 0, "k": 2, "experts": 4},
    "three ranks": {"bs": [7, 2, 1], "global_bs": 21, "k": 4, "experts": 6},
    "one expert per rank": {"bs": [2, 6, 3], "global_bs": 18, "k": 2, "experts": 3},
    "all experts chosen": {"bs": [2, 1], "global_bs": 4, "k": 6, "experts": 6},
    "mask": {"bs": [5, 5, 5, 5], "active": [2, 0, 5, 1], "global_bs": 0, "k": 3, "experts": 8, "mask": True},
    "mask, nobody active": {"bs": [2, 2], "active": [0, 0], "global_bs": 0, "k": 2, "experts": 4, "mask": True},
    "shared expert rows": {"bs": [3, 2], "global_bs": 6, "k": 2, "experts": 4, "shared": True},
    "quantised": {"bs": [3, 1, 5, 2], "global_bs": 20, "k": 3, "experts": 8, "quant": 2},
    "quantised, smooth": {"bs": [3, 1, 5], "global_bs": 15, "k": 3, "experts": 6, "quant": 2, "smooth": True},
    "eight ranks": {"bs": [1, 9, 2, 8, 3, 7, 4, 6], "global_bs": 72, "k": 4, "experts": 32},
}


@pytest.mark.parametrize("name", CASES)
def test_layer_against_reference(launch, name: str) -> None:
    case = CASES[name]
    check_layer(case, launch.values(len(case["bs"]), "test_mc2:layer", case, env=RELAXED))


def test_zero_rows_quantise_to_zero(launch) -> None:
    (result,) = launch.values(1, "test_mc2:zero_rows", env=RELAXED)
    assert (result["expand_x"][:2] == 0).all()
    assert (result["dynamic_scales"][:2] == 0).all()


def zero_rows(world: World) -> dict[str, np.ndarray]:
    ep = Ep(world.comm(), 2)
    return ep.dispatch(np.zeros((1, 64), np.uint16), np.array([[1, 0]], np.int32), quant=2)


def test_ragged_equals_padded(launch) -> None:
    """A rank's result has the same bits whether the batches are ragged, padded to the largest, or padded and masked."""
    ragged = {"bs": [3, 1, 5, 2], "global_bs": 4 * 8, "k": 3, "experts": 8, "h": 128}
    padded = {**ragged, "bs": [5, 5, 5, 5], "global_bs": 0}
    masked = {**padded, "active": [3, 1, 5, 2], "mask": True}
    results = [launch.values(4, "test_mc2:layer", case, env=RELAXED) for case in (ragged, padded, masked)]
    for rank, bs in enumerate(ragged["bs"]):
        rows = [result[rank]["y"][:bs].tobytes() for result in results]
        assert rows[0] == rows[1] == rows[2]


def sums(world: World) -> np.ndarray:
    """Tokens whose result tells the order of the additions, and whether a product is rounded before it is added."""
    ep = Ep(world.comm(), 3)
    ids = np.array([[2, 0, 1], [2, 0, 1]], np.int32)
    out = ep.dispatch(np.zeros((2, 64), np.uint16), ids)
    by_expert = {2: [2.0**24, 1.1], 0: [1.0, -1.1], 1: [-(2.0**24), 0.0]}  # [token]
    rows = to_bf16(np.repeat(np.array([by_expert[e][t] for e in range(3) for t in range(2)]), 64).reshape(6, 64))
    weights = np.array([[1, 1, 1], [0.3, 0.3, 1]], np.float32)
    return from_bf16(ep.combine(rows, ids, out, weights))


def test_order_and_rounding_of_sums(launch) -> None:
    """(2^24 + 1) - 2^24 is 0 in fp32 and 1 in another order; a*w - a*w is 0 unless a fused multiply-add is used."""
    (result,) = launch.values(1, "test_mc2:sums", env=RELAXED)
    assert (result == 0).all()


def strict_layer(world: World) -> int:
    ep = Ep(world.comm(), 4)
    batch = make_batch(world.rank, 2 + world.rank, 2, 2, 4, 1024, "bf16")
    out = ep.dispatch(batch.x, batch.ids, 8)
    ep.combine(out["expand_x"], batch.ids, out, batch.weights, 8)
    return int(out["recv_counts"][-1])


def test_strict_shapes_on_a3(launch) -> None:
    assert sum(launch.values(2, "test_mc2:strict_layer", env={"VIRTUAL_NPU_SHAPES": "strict"})) == 10


def strided_input(world: World) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    ep = Ep(world.comm(), 4)
    batch = make_batch(0, 3, 3, 2, 4, 64, "bf16")
    wide, tall = np.zeros((3, 100), np.uint16), np.ascontiguousarray(batch.ids.T)
    wide[:, :64] = batch.x
    got = ep.dispatch(Buffer(wide, "bf16", (100, 1), (3, 64)), Buffer(tall, "", (1, 3), (3, 2)))
    ep.combine(got["expand_x"], batch.ids, got, batch.weights)
    return got, ep.dispatch(batch.x, batch.ids)


def test_inputs_need_not_be_contiguous(launch) -> None:
    ((strided, dense),) = launch.values(1, "test_mc2:strided_input", env=RELAXED)
    for name in ("expand_x", "recv_counts", "token_nums", "assist"):
        assert strided[name].tobytes() == dense[name].tobytes()


def many_layers(world: World, rounds: int) -> int:
    """Every rank changes BS in each round and is late in some; every result is checked on the spot."""
    comm, experts, k, h = world.comm(), 8, 3, 32
    ep = Ep(comm, experts)
    delays = np.random.default_rng(world.rank)
    for number in range(rounds):
        sizes = [int(np.random.default_rng([number, r]).integers(1, 9)) for r in range(world.size)]
        batches = [make_batch(number * 100 + r, bs, bs, k, experts, h, "bf16") for r, bs in enumerate(sizes)]
        mine = batches[world.rank]
        if delays.random() < 0.2:
            time.sleep(float(delays.random()) * 0.01)
        out = ep.dispatch(mine.x, mine.ids, 8 * world.size)
        rows, start = out["expand_x"], 0
        for local, end in enumerate(out["token_nums"]):
            rows[start:end] = expert(rows[start:end], world.rank * ep.local + local, "bf16")
            start = int(end)
        y = ep.combine(rows, mine.ids, out, mine.weights, 8 * world.size)
        np.testing.assert_array_equal(y, expected_combine(mine, "bf16"), err_msg=f"round {number}")
    return rounds


def test_many_layers(launch) -> None:
    assert launch.values(4, "test_mc2:many_layers", 60, env=RELAXED) == [60] * 4


def selfish(world: World) -> float:
    """Rank 0 sends to itself only. Returns the seconds of the combine."""
    ep = Ep(world.comm(), 4)
    ids = np.array([[0, 1]] if world.rank == 0 else [[0, 2]], np.int32)
    x = np.zeros((1, 64), np.uint16)
    out = ep.dispatch(x, ids)
    if world.rank == 1:
        world.get("rank-0-combined")
    begin = time.monotonic()
    ep.combine(out["expand_x"], ids, out, np.ones((1, 2), np.float32))
    if world.rank == 0:
        world.put("rank-0-combined", b"")
    return time.monotonic() - begin


def test_combine_waits_for_its_own_rows_only(launch) -> None:
    """Were it a barrier, rank 0 would wait for rank 1, which waits for rank 0: a timeout."""
    assert all(seconds < 5 for seconds in launch.values(2, "test_mc2:selfish", env=RELAXED))


# ---- refusals on one rank


def one_dispatch(world: World, odd: dict[str, Any]) -> None:
    """A plain dispatch; rank 1 changes it by `odd`."""
    case = {"bs": 2, "k": 2, "experts": 4, "h": 64, "version": 2, "dtype": "bf16", "global_bs": 0, "buffer_mb": 0}
    case.update(odd.pop("everybody", {}))
    if world.rank == 1:
        case.update(odd)
    comm = world.comm(name="ep-group", buffer_mb=case["buffer_mb"])
    ep = Ep(comm, case["experts"], case["dtype"], case["version"])
    bs, k = case["bs"], case["k"]
    ids = np.array(case["ids"], np.int32) if "ids" in case else np.tile(np.arange(k, dtype=np.int32), (bs, 1))
    mask = np.array(case["mask"], bool) if "mask" in case else None
    x = np.zeros((bs, case["h"]), np.uint16)
    scales = np.ones((case["experts"], case["h"]), np.float32) if case.get("smooth") else None
    options = {key: case[key] for key in ("quant", "comm_alg", "shared_ranks", "tp") if key in case}
    if case.get("wrong_group"):
        ep.group = "nobody"
    ep.dispatch(x, ids, case["global_bs"], mask, scales=scales, **options)


LOCAL = {
    "no rows": ({"bs": 0, "ids": np.zeros((0, 2))}, "BS=0 is outside 1..512"),
    "too many rows": ({"bs": 513}, "BS=513 is outside 1..512"),
    "too many rows, fullmesh_v2": ({"bs": 257, "comm_alg": "fullmesh_v2"}, "BS=257 is outside 1..256"),
    "global_bs too small": ({"global_bs": 2}, "global_bs=2 is invalid"),
    "global_bs not a multiple": ({"global_bs": 5}, "global_bs=5 is invalid"),
    "mask and ragged": (
        {"global_bs": 8, "mask": [1, 0]},
        "Different bs on different rank cannot work when isActiveMask=true: global_bs=8 with BS=2",
    ),
    "fullmesh_v2 and ragged": ({"global_bs": 8, "comm_alg": "fullmesh_v2"}, "fullmesh_v2 cannot work when BS differs"),
    "expert twice": ({"ids": [[0, 1], [3, 3]]}, "row 1 names expert 3 twice"),
    "expert too large": ({"ids": [[0, 4], [0, 1]]}, "expert id 4 of row 0 is outside 0..3"),
    "expert negative": ({"ids": [[0, 1], [-1, 1]]}, "expert id -1 of row 1 is outside 0..3"),
    "mask with holes": ({"bs": 3, "mask": [1, 0, 1]}, "not a block of True followed by a block of False"),
    "mask by slot": ({"mask": [[1, 0], [1, 1]]}, "x_active_mask bool [2, 2] is not emulated"),
    "mask in version 1": ({"everybody": {"version": 1}, "mask": [1, 1]}, "x_active_mask is reserved in version 1"),
    "window": (
        {"everybody": {"h": 4096, "experts": 64, "k": 8, "global_bs": 512, "buffer_mb": 50}},
        "HCCL_BUFFSIZE=50 (MB) is too small: global_bs=512 needs at least 308",
    ),
    "experts not a multiple": ({"everybody": {"experts": 5}}, "moe_expert_num=5 is not a multiple of ep_world_size=2"),
    "shared experts": ({"shared_ranks": 1}, "shared_expert_rank_num=1 is not emulated"),
    "tensor parallel": ({"tp": 2}, "tp_world_size=2 is not emulated"),
    "hierarchy": ({"comm_alg": "hierarchy"}, "the hierarchy algorithm is not emulated"),
    "unknown algorithm": ({"comm_alg": "ring"}, "comm_alg 'ring' is unknown"),
    "quant mode": ({"quant": 3}, "quant_mode=3 is not supported"),
    "scales without quantisation": ({"smooth": True}, "scales without quant_mode 2"),
    "unknown group": ({"wrong_group": True}, "'nobody' is not the name of a communicator of this process"),
}


@pytest.mark.parametrize("name", LOCAL)
def test_local_refusal(launch, name: str) -> None:
    """One rank refuses before anything is sent; its peers end in a report that names it, the operator, the ordinal."""
    odd, message = LOCAL[name]
    results = launch(2, "test_mc2:one_dispatch", odd, env={**RELAXED, "VIRTUAL_NPU_TIMEOUT_S": "0.6"})
    results[1].failed_with(REFUSED, message)
    assert results[1].seconds < 5
    if any(key in odd.get("everybody", {}) for key in ("buffer_mb", "experts")):
        results[0].failed_with(REFUSED, message)
    else:
        # Rank 1 may have ended its process by then.
        waiting = results[0].stderr
        assert isinstance(results[0].error, HcclError), results[0].error or results[0].value
        assert results[0].error.code == FAILED
        for text in (
            "MoeDistributeDispatch #1 on communicator 'ep-group', rank 0 of 2",
            "rank 1 (process",
            "no operator yet",
        ):
            assert text in waiting


def refuses_and_stays(world: World) -> None:
    comm = world.comm(name="ep-group")
    ep = Ep(comm, 6)
    x, ids = np.zeros((2, 64), np.uint16), np.array([[0, 1], [2, 3]], np.int32)
    out = ep.dispatch(x, ids)
    ep.combine(out["expand_x"], ids, out, np.ones((2, 2), np.float32))
    try:
        ep.dispatch(x[: 0 if world.rank == 1 else 2], ids[: 0 if world.rank == 1 else 2])
    finally:
        world.put(f"done-{world.rank}", b"")
        for rank in range(world.size):
            world.get(f"done-{rank}")


def test_peers_of_a_refusing_rank_time_out(launch) -> None:
    results = launch(3, "test_mc2:refuses_and_stays", env={**RELAXED, "VIRTUAL_NPU_TIMEOUT_S": "1"})
    results[1].failed_with(REFUSED, "BS=0 is outside")
    for rank in (0, 2):
        results[rank].failed_with(
            FAILED, f"MoeDistributeDispatch #3 on communicator 'ep-group', rank {rank} of 3: timeout, waited 1 s",
            "for rank 1 (process", "last operator MoeDistributeCombine #2, finished",
        )  # fmt: skip


STRICT = {
    "A3, small H": ("Ascend910_9391", {}, "H=64 is outside 1024..8192 on Ascend910_9391"),
    "A3, K": ("Ascend910_9391", {"h": 1024, "k": 17, "experts": 32}, "K=17 is above 16"),
    "A3, many experts": ("Ascend910_9391", {"h": 1024, "experts": 1026}, "moe_expert_num=1026 is not supported"),
    "A3, version 1": ("Ascend910_9391", {"version": 1, "h": 7168}, "ep_world_size=2 is not supported"),
    "A2, few ranks": ("Ascend910B1", {"h": 1024}, "ep_world_size=2 is not supported on Ascend910B1"),
}


@pytest.mark.parametrize("name", STRICT)
def test_strict_shapes(launch, name: str) -> None:
    soc, everybody, message = STRICT[name]
    env = {"VIRTUAL_NPU_SOC": soc, "VIRTUAL_NPU_SHAPES": "strict"}
    for result in launch(2, "test_mc2:one_dispatch", {"everybody": everybody}, env=env):
        result.failed_with(REFUSED, message, "VIRTUAL_NPU_SHAPES=relaxed lifts this")


def test_limit_of_rows_on_a2(launch) -> None:
    env = {**RELAXED, "VIRTUAL_NPU_SOC": "Ascend910B1"}
    for result in launch(2, "test_mc2:one_dispatch", {"everybody": {"bs": 257}}, env=env):
        result.failed_with(REFUSED, "BS=257 is outside 1..256 on Ascend910B1")
    hierarchy = {**env, "HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "0"}
    for result in launch(2, "test_mc2:one_dispatch", {}, env=hierarchy):
        result.failed_with(REFUSED, "hierarchy algorithm is not emulated")


def test_window_of_the_documented_example(launch) -> None:
    """The worked figure of the A3 formula (EP32, 8 local experts, 128 rows, H 7168, K 8: 960 MB), here at EP2."""
    everybody = {"h": 7168, "experts": 16, "k": 8, "global_bs": 256, "bs": 128}
    need = 2 * (8 * 128 * 2 * 14848 + 9 * 128 * 14336)
    megabytes = -(-need // 2**20)
    assert -(-2 * (8 * 128 * 32 * 14848 + 9 * 128 * 14336) // 2**20) == 960
    short = {"everybody": {**everybody, "buffer_mb": megabytes - 1}}
    for result in launch(2, "test_mc2:one_dispatch", short, env=RELAXED):
        result.failed_with(
            REFUSED, f"HCCL_BUFFSIZE={megabytes - 1} (MB) is too small: global_bs=256 needs at least {megabytes}"
        )
    launch.values(2, "test_mc2:one_dispatch", {"everybody": {**everybody, "buffer_mb": megabytes}}, env=RELAXED)
    for result in launch(2, "test_mc2:one_dispatch", {"everybody": everybody}, env={**RELAXED, "HCCL_BUFFSIZE": "60"}):
        result.failed_with(REFUSED, "HCCL_BUFFSIZE=60 (MB) is too small")


def test_window_of_the_emulator(launch) -> None:
    """The virtual window is something else than HCCL_BUFFSIZE: its own error names its own variable."""
    odd = {"everybody": {"h": 7168, "bs": 64, "experts": 16, "k": 8}}
    for result in launch(2, "test_mc2:one_dispatch", odd, env={**RELAXED, "VIRTUAL_NPU_WINDOW_MB": "1"}):
        result.failed_with(FAILED, "needs a window of", "VIRTUAL_NPU_WINDOW_MB=1 is too small")


# ---- disagreement between ranks


CROSS = {
    "ragged without a common global_bs": (
        {"bs": 4}, "global_bs", "BS=2, x_active_mask=no, global_bs=8", "BS=4, x_active_mask=no, global_bs=16"
    ),
    "global_bs": ({"global_bs": 12}, "global_bs", "global_bs=8", "global_bs=12"),
    "experts": ({"experts": 8}, "moe_expert_num", "moe_expert_num=4", "moe_expert_num=8"),
    "top k": ({"k": 3}, "K", "K=2", "K=3"),
    "hidden": ({"h": 128}, "H", "H=64", "H=128"),
    "type": ({"dtype": "float16"}, "dtype", "dtype=bf16", "dtype=fp16"),
    "quantisation": ({"quant": 2}, "quant_mode", "quant_mode=0", "quant_mode=2"),
    "algorithm": ({"comm_alg": "fullmesh_v2"}, "comm_alg", "comm_alg=default", "comm_alg=fullmesh_v2"),
    "version": ({"version": 1}, "version", "version=2", "version=1"),
    "buffer": ({"buffer_mb": 300}, "HCCL_BUFFSIZE", "HCCL_BUFFSIZE=200", "HCCL_BUFFSIZE=300"),
}  # fmt: skip


@pytest.mark.parametrize("name", CROSS)
def test_disagreement_is_reported_on_every_rank(launch, name: str) -> None:
    odd, field, even_text, odd_text = CROSS[name]
    for rank, result in enumerate(launch(4, "test_mc2:one_dispatch", odd, env=RELAXED)):
        other = 1 if rank != 1 else 0
        result.failed_with(
            FAILED, f"MoeDistributeDispatch #1 on communicator 'ep-group', rank {rank} of 4: mismatch, {field} differs",
            f"rank {rank} called", f"rank {other} called", even_text, odd_text,
        )  # fmt: skip
        assert result.seconds < 10


def mask_and_ragged(world: World) -> None:
    """No rank can see it alone: the larger one has a mask and global_bs = BS*R, the smaller one has none."""
    ep = Ep(world.comm(name="ep-group"), 4)
    bs = 4 if world.rank == 1 else 2
    ids = np.tile(np.array([0, 3], np.int32), (bs, 1))
    ep.dispatch(np.zeros((bs, 64), np.uint16), ids, 8, np.ones(4, bool) if world.rank == 1 else None)


def test_mask_against_ragged_batches(launch) -> None:
    for result in launch(2, "test_mc2:mask_and_ragged", env=RELAXED):
        result.failed_with(
            FAILED,
            "BS differs between ranks while x_active_mask is used",
            "BS=2, x_active_mask=no",
            "BS=4, x_active_mask=yes",
        )


def out_of_order(world: World, case: str) -> None:
    ep = Ep(world.comm(name="ep-group"), 4)
    x, ids, weights = np.zeros((2, 64), np.uint16), np.array([[0, 3], [1, 2]], np.int32), np.ones((2, 2), np.float32)
    if case == "combine first":
        empty = {"assist": np.zeros(4 * 2 * 128, np.int32), "recv_counts": np.zeros(4, np.int32),
                 "tp_recv_counts": np.zeros(1, np.int32), "expand_scales": np.zeros(8, np.float32)}  # fmt: skip
        ep.combine(np.zeros((8, 64), np.uint16), ids, empty, weights)
    out = ep.dispatch(x, ids)
    if case == "dispatch twice":
        ep.dispatch(x, ids)
    if case == "other ids":
        ep.combine(out["expand_x"], ids[::-1].copy(), out, weights)
    if case == "other global_bs":
        ep.combine(np.zeros((16, 64), np.uint16), ids, out, weights, 8)
    if case == "other counts":
        out["recv_counts"][1] += 1
        ep.combine(out["expand_x"], ids, out, weights)
    if case == "other assist":
        out["assist"][0] += 1
        ep.combine(out["expand_x"], ids, out, weights)
    if case == "other mask":
        ep.combine(out["expand_x"], ids, out, weights, mask=np.array([True, False]))
    if case == "comm_quant":
        ep.combine(out["expand_x"], ids, out, weights, comm_quant=2)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("combine first", "called without a dispatch before it"),
        ("dispatch twice", "called twice in a row: the combine of dispatch #1 has not run"),
        ("other ids", "expert_ids differ from the paired dispatch"),
        ("other global_bs", "global_bs differs from the paired dispatch"),
        ("other counts", "ep_send_counts is not what the paired dispatch returned"),
        ("other assist", "assist_info_for_combine (expand_idx) is not what the paired dispatch returned"),
        ("other mask", "x_active_mask differs from the paired dispatch"),
        ("comm_quant", "comm_quant_mode=2 is not emulated"),
    ],
)
def test_pairing(launch, case: str, message: str) -> None:
    for result in launch(2, "test_mc2:out_of_order", case, env=RELAXED):
        result.failed_with(REFUSED, message)


def mixed_use(world: World, first: str) -> None:
    comm = world.comm(name="ep-group")
    ep = Ep(comm, 4)
    x, ids = np.zeros((2, 64), np.uint16), np.array([[0, 3], [1, 2]], np.int32)
    if first == "collective":
        comm.barrier()
        ep.dispatch(x, ids)
    if first == "ep":
        ep.dispatch(x, ids)
        comm.all_reduce(np.zeros(4, np.int32))
    if world.rank == 0:  # each rank's first use is another one
        comm.barrier()
    ep.dispatch(x, ids)


def test_the_communicator_is_dedicated(launch) -> None:
    for result in launch(2, "test_mc2:mixed_use", "collective", env=RELAXED):
        result.failed_with(FAILED, "collectives have run on it, and EP operators need a communicator of their own")
    for result in launch(2, "test_mc2:mixed_use", "ep", env=RELAXED):
        result.failed_with(
            5, "AllReduce on communicator 'ep-group'", "EP operators have run on it, so nothing else may"
        )
    results = launch(2, "test_mc2:mixed_use", "neither", env=RELAXED)
    for result in results:
        assert "mismatch, operator differs" in result.stderr
        assert "Barrier #1" in result.stderr
        assert "MoeDistributeDispatch #1" in result.stderr


def one_combine_fewer(world: World) -> None:
    ep = Ep(world.comm(name="ep-group"), 4)
    x, ids, weights = np.zeros((2, 64), np.uint16), np.array([[0, 3], [1, 2]], np.int32), np.ones((2, 2), np.float32)
    out = ep.dispatch(x, ids)
    if world.rank == 1:
        world.get("done")
        return
    try:
        ep.combine(out["expand_x"], ids, out, weights)
    finally:
        world.put("done", b"")


def test_a_rank_that_calls_one_operator_fewer(launch) -> None:
    results = launch(2, "test_mc2:one_combine_fewer", env={**RELAXED, "VIRTUAL_NPU_TIMEOUT_S": "1"})
    assert results[1].ok
    results[0].failed_with(
        FAILED, "MoeDistributeCombine #2 on communicator 'ep-group', rank 0 of 2: timeout, waited 1 s for rank 1",
        "last operator MoeDistributeDispatch #1, finished",
    )  # fmt: skip


def killed_between(world: World) -> None:
    ep = Ep(world.comm(), 4)
    x, ids = np.zeros((1, 64), np.uint16), np.array([[0, 3]], np.int32)
    out = ep.dispatch(x, ids)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ep.combine(out["expand_x"], ids, out, np.ones((1, 2), np.float32))


def test_dead_peer(launch) -> None:
    before = set(os.listdir("/dev/shm"))
    results = launch(2, "test_mc2:killed_between", env=RELAXED)
    results[0].failed_with(FAILED, "MoeDistributeCombine #2", "waits for rank 1", "whose process has died")
    assert results[0].seconds < 5
    assert set(os.listdir("/dev/shm")) == before


# ---- duplicates that are reported instead, ledger


def duplicates(world: World) -> tuple[int, int]:
    world.library.vnpu_ledger_step(c.c_int64(4), b"profile", c.c_int64(2))
    ep = Ep(world.comm(name="ep-group"), 4)
    ids = np.array([[1, 1], [0, 3]] if world.rank == 0 else [[2, 2], [2, 1]], np.int32)
    x = to_bf16(np.arange(128, dtype=np.float32).reshape(2, 64))
    out = ep.dispatch(x, ids, nums_type=1)
    y = ep.combine(out["expand_x"], ids, out, np.full((2, 2), 0.5, np.float32))
    np.testing.assert_array_equal(y, x)
    ep.dispatch(x, ids)
    return int(out["token_nums"][0]), int(out["token_nums"][1])


def test_duplicates_can_be_reported_instead(launch, tmp_path: Path) -> None:
    """Stock 0.11.0 profile runs draw one expert twice: with `report` they run, and every such call is in the ledger."""
    folder = tmp_path / "ledger"
    folder.mkdir()
    env = {**RELAXED, "VIRTUAL_NPU_DUPLICATE_EXPERTS": "report", "VIRTUAL_NPU_LEDGER_DIR": str(folder)}
    results = launch(2, "test_mc2:duplicates", env=env, start="spawn")
    for rank, result in enumerate(results):
        assert result.ok, result.stderr
        assert result.value == [(1, 3), (3, 1)][rank]
        assert result.stderr.count("names expert") == 1
        assert f"row 0 names expert {1 + rank} twice" in result.stderr
    events = [json.loads(line) for path in folder.iterdir() for line in path.read_text().splitlines()]
    assert (
        len([e for e in events if e["ev"] == "violation" and e["rule"] == "duplicate_expert" and e["step"] == 4]) == 4
    )


def overrun(world: World) -> None:
    ep = Ep(world.comm(), 2)
    ids = np.array([[0, 0]], np.int32)
    ep.dispatch(np.zeros((1, 64), np.uint16), ids)


def test_duplicates_that_overrun_are_an_error(launch) -> None:
    """With one expert per rank, A = global_bs rows; four rows arrive where two fit."""
    results = launch(2, "test_mc2:overrun", env={**RELAXED, "VIRTUAL_NPU_DUPLICATE_EXPERTS": "report"})
    results[0].failed_with(FAILED, "4 rows arrive, expand_x holds 2")


def layer_in_a_step(world: World, case: dict[str, Any]) -> None:
    world.library.vnpu_ledger_step(c.c_int64(12), b"execute", c.c_int64(case["bs"][world.rank]))
    layer(world, case)


def test_ledger(launch, tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    folder.mkdir()
    case = {**CASES["mask"], "h": 32}
    launch.values(
        4, "test_mc2:layer_in_a_step", case, env={**RELAXED, "VIRTUAL_NPU_LEDGER_DIR": str(folder)}, start="spawn"
    )
    seen = {}
    for path in folder.iterdir():
        events = [json.loads(line) for line in path.read_text().splitlines()]
        assert [e["ev"] for e in events] == ["step", "comm", "ep", "ep"]
        step, comm, *operators = events
        rank = comm["rank"]
        assert step["scheduled_tokens"] == 5
        for ordinal, (event, op) in enumerate(zip(operators, ("dispatch", "combine"), strict=True), start=1):
            assert event.pop("t") > 0
            assert event.pop("host_us") > 0
            seen[rank, op] = event
            assert event == {
                "ev": "ep", "step": 12, "op": op, "comm": comm["comm"], "ordinal": ordinal, "rank": rank, "size": 4,
                "bs": 5, "global_bs": 20, "mask": True, "active": case["active"][rank], "k": 3, "e": 8, "h": 32,
                "mode": "eager",
            }  # fmt: skip
    assert len(seen) == 8

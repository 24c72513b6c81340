# SPDX-License-Identifier: Apache-2.0
"""MC2 calls of one rank through the C interface, and what they must return, in plain numpy."""

from __future__ import annotations

import ctypes as c
import dataclasses
from typing import Any

import numpy as np
from ranks import ACL_TYPES, Comm, HcclError, from_bf16, to_bf16

RELAXED = {"VIRTUAL_NPU_SHAPES": "relaxed", "VIRTUAL_NPU_SOC": "Ascend910_9391"}
A3 = {"VIRTUAL_NPU_SHAPES": "strict", "VIRTUAL_NPU_SOC": "Ascend910_9391"}
A2 = {"VIRTUAL_NPU_SHAPES": "strict", "VIRTUAL_NPU_SOC": "Ascend910B1"}
HIERARCHY = {"HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "0"}
REFUSED, FAILED = 161002, 361001  # first phase, second phase
JUNK = 0x55  # what output buffers hold before a call
SERVER = 8  # ranks of one A2 machine


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
    """MC2 calls of one rank. `dtype` "bf16" rows are uint16 arrays, "float16" rows float16 arrays.

    The attributes that both operators take may be set before a call.
    """

    def __init__(
        self, comm: Comm, experts: int, dtype: str = "bf16", version: int = 2, comm_alg: str = "", **attributes: Any
    ) -> None:
        self.comm, self.experts, self.dtype, self.version = comm, experts, dtype, version
        self.group, self.ranks, self.rank = comm.name(), comm.size, comm.rank
        self.tp_world_size, self.shard_type, self.shared_num, self.shared_ranks = 1, 0, 1, 0
        self.comm_alg = comm_alg
        self.combine_alg = "" if comm_alg.startswith("fullmesh_v") else comm_alg  # combine does not know those names
        for name, value in attributes.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        self.local = experts // comm.size

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

    def _run(self, name: str, args: list[Any], check_only: bool = False) -> None:
        name = f"aclnnMoeDistribute{name}{'' if self.version == 1 else 'V2'}"
        size, executor = c.c_uint64(99), c.c_void_p()
        code = getattr(self.comm.library, f"{name}GetWorkspaceSize")(*args, c.byref(size), c.byref(executor))
        for tensor in args:
            if isinstance(tensor, c.c_void_p) and tensor.value:
                self.comm.library.aclDestroyTensor(tensor)  # op-plugin may do so too: the executor keeps copies
        if code != 0:
            raise HcclError(f"{name}GetWorkspaceSize", code)
        assert size.value == 0
        if check_only:
            return
        code = getattr(self.comm.library, name)(None, c.c_uint64(0), executor, None)
        if code != 0:
            raise HcclError(name, code)

    def _common(self) -> list[Any]:
        group = self.group.encode()
        return [
            group, c.c_int64(self.ranks), c.c_int64(self.rank), c.c_int64(self.experts),
            group, c.c_int64(self.tp_world_size), c.c_int64(0), c.c_int64(self.shard_type), c.c_int64(self.shared_num),
            c.c_int64(self.shared_ranks),
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
        weights: np.ndarray | None = None,
        check_only: bool = False,
        said_global_bs: int = 0,
    ) -> dict[str, np.ndarray]:
        """Allocates the seven outputs as the binding does (global_bs 0 becomes BS*R) and fills them with junk first.

        `weights`: expert_scales. `check_only`: stops after the first phase, which needs no peers and reads no rows.
        `said_global_bs`: given to the operator instead of the value that the outputs are made for.
        """
        bs, k = (ids.shape or ids.array.shape) if isinstance(ids, Buffer) else ids.shape
        h = (x.shape or x.array.shape)[1] if isinstance(x, Buffer) else x.shape[1]
        global_bs = global_bs or bs * self.comm.size
        a = global_bs * min(self.local, k)
        quantised = quant != 0 or scales is not None
        row_type = "int8" if quantised else self.dtype
        offsets = 0 if weights is None else 2 * global_bs * k * (self.comm.size // SERVER)
        allocate = np.empty if check_only else junk
        out = {
            "expand_x": allocate((a, h), {"bf16": "uint16"}.get(row_type, row_type)),
            "dynamic_scales": allocate((a,), "float32"),
            "assist": allocate((bs * k if self.version == 1 else max(bs * k, a * 128),), "int32"),
            "token_nums": allocate((self.local,), "int64"),
            "recv_counts": allocate((self.comm.size * self.local + offsets,), "int32"),
            "tp_recv_counts": allocate((self.tp_world_size,), "int32"),
            "expand_scales": allocate((a,), "float32"),
        }
        args: list[Any] = [
            self._tensor(x, self.dtype), self._tensor(ids), self._tensor(scales), self._tensor(mask),
            self._tensor(weights), *self._common(), c.c_int64(quant),
            c.c_int64(said_global_bs or global_bs), c.c_int64(nums_type),
        ]  # fmt: skip
        if self.version == 2:
            args.append(self.comm_alg.encode())
        args += [self._tensor(out["expand_x"], row_type), *(self._tensor(v) for k, v in out.items() if k != "expand_x")]
        self._run("Dispatch", args, check_only)
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
            *self._common(), c.c_int64(global_bs or bs * self.comm.size), c.c_int64(0), c.c_int64(comm_quant),
            c.c_int64(0),
        ]  # fmt: skip
        if self.version == 2:
            args.append(self.combine_alg.encode())
        args.append(self._tensor(out, self.dtype))
        self._run("Combine", args)
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


def expected_combine(
    batch: Batch, dtype: str, shared: np.ndarray | None = None, experts_per_server: int = 0
) -> np.ndarray:
    """Slot by slot in fp32; with `experts_per_server` first inside each server, then over the servers."""
    total = np.zeros(batch.x.shape, np.float32)
    for t in range(batch.active):
        parts: dict[int, np.ndarray] = {}
        for slot, number in enumerate(batch.ids[t]):
            row = to_float(expert(batch.x[t], int(number), dtype)) * batch.weights[t, slot]
            server = int(number) // experts_per_server if experts_per_server else 0
            parts[server] = parts.get(server, np.float32(0)) + row
        for server in sorted(parts):
            total[t] = total[t] + parts[server]
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


# ---- what rank processes run


def plain_dispatch(comm: Comm, case: dict[str, Any], check_only: bool = False) -> tuple[Ep, np.ndarray, dict[str, Any]]:
    """A dispatch of zeros as `case` says: bs, k, experts, h, and what else Ep and Ep.dispatch take."""
    case = {"bs": 2, "k": 2, "experts": 2 * comm.size, "h": 64, **case}
    names = (
        "dtype",
        "version",
        "comm_alg",
        "group",
        "ranks",
        "rank",
        "tp_world_size",
        "shard_type",
        "shared_num",
        "shared_ranks",
    )
    ep = Ep(comm, case["experts"], **{name: case[name] for name in names if name in case})
    bs, k, h = case["bs"], case["k"], case["h"]
    ids = np.array(case["ids"], np.int32) if "ids" in case else np.tile(np.arange(k, dtype=np.int32), (bs, 1))
    out = ep.dispatch(
        np.zeros((bs, h), np.float16 if ep.dtype == "float16" else np.uint16),
        ids,
        case.get("global_bs", 0),
        np.array(case["mask"], bool) if "mask" in case else None,
        case.get("quant", 0),
        np.ones((case["experts"], h), np.float32) if case.get("smooth") else None,
        case.get("nums_type", 0),
        np.ones((bs, k), np.float32) if case.get("weights") else None,
        check_only,
        case.get("said_global_bs", 0),
    )
    return ep, ids, out


def plain_layer(comm: Comm, case: dict[str, Any]) -> None:
    """plain_dispatch and its combine."""
    ep, ids, out = plain_dispatch(comm, case)
    mask = np.array(case["mask"], bool) if "mask" in case else None
    ep.combine(out["expand_x"], ids, out, np.ones(ids.shape, np.float32), case.get("global_bs", 0), mask)

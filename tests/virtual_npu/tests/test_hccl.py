# SPDX-License-Identifier: Apache-2.0
"""HCCL between processes: results against numpy, groups, chunks, and what happens when ranks disagree or vanish."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import (
    NOT_SUPPORT,
    PARA,
    REDUCE,
    REMOTE,
    TIMEOUT,
    UNAVAIL,
    HcclError,
    World,
    from_bf16,
    shared_memory_entries,
    to_bf16,
)

pytestmark = pytest.mark.timeout(120)
NUMPY_REDUCE = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}
TYPES = [
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "bf16",
]


def sample(dtype: str, rank: int, count: int = 1000) -> np.ndarray:
    """Deterministic values of one rank; small enough that products of four stay finite, large enough that ints wrap."""
    rng = np.random.default_rng(1000 + rank)
    if dtype == "bf16":
        return to_bf16(rng.normal(size=count).astype(np.float32))
    if dtype.startswith("float"):
        return rng.normal(size=count).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, size=count, dtype=dtype, endpoint=True)


def reduced(dtype: str, op: str, size: int, count: int = 1000) -> np.ndarray:
    """Rank order, fp32 accumulation for the 16-bit floats."""
    parts = [sample(dtype, rank, count) for rank in range(size)]
    if dtype == "bf16":
        parts = [from_bf16(p) for p in parts]
    if dtype == "float16":
        parts = [p.astype(np.float32) for p in parts]
    total = parts[0]
    with np.errstate(all="ignore"):
        for part in parts[1:]:
            total = NUMPY_REDUCE[op](total, part)
        if dtype == "bf16":
            return to_bf16(total)
        return total.astype(dtype)


# ---- a way between nodes


def changing_delays(world: World) -> list[float]:
    """Milliseconds of an all_reduce with each delay, the first one not counted."""
    comm = world.comm()
    spent = []
    for us in (0, 0, 400_000, 0):
        comm.all_reduce(np.zeros(1, np.int32), "sum", "int32")
        if world.rank == 0:  # in one piece: the other rank may be about to read it
            file = Path(os.environ["VIRTUAL_NPU_LINK_DELAY_FILE"])
            file.with_suffix(".new").write_text(str(us))
            file.with_suffix(".new").rename(file)
        comm.all_reduce(np.zeros(1, np.int32), "sum", "int32")
        begin = time.monotonic()
        comm.all_reduce(np.zeros(1, np.int32), "sum", "int32")
        spent.append((time.monotonic() - begin) * 1000)
    return spent[1:]


def test_a_collective_takes_as_much_longer_as_the_file_says(launch, tmp_path: Path) -> None:
    (tmp_path / "delay").write_text("0")
    env = {"VIRTUAL_NPU_LINK_DELAY_FILE": str(tmp_path / "delay")}
    for first, delayed, last in launch.values(2, "test_hccl:changing_delays", env=env):
        assert delayed >= 400
        assert max(first, last) < 400  # also on a busy machine


def one_all_reduce(world: World) -> None:
    world.comm().all_reduce(np.zeros(1, np.int32), "sum", "int32")


@pytest.mark.parametrize("text", ["", "soon", "-1", "1000001"])
def test_a_delay_that_is_none(launch, tmp_path: Path, text: str) -> None:
    (tmp_path / "delay").write_text(text)
    env = {"VIRTUAL_NPU_LINK_DELAY_FILE": str(tmp_path / "delay")}
    for result in launch(2, "test_hccl:one_all_reduce", env=env):
        result.failed_with(PARA, "holds no number from 0 to 1000000")


# ---- results


def every_type_and_operation(world: World) -> dict[tuple[str, str], bytes]:
    comm = world.comm()
    return {
        (dtype, op): comm.all_reduce(sample(dtype, world.rank), op, dtype).tobytes() for dtype in TYPES for op in REDUCE
    }


@pytest.mark.parametrize("size", [2, 4])
def test_all_reduce(launch, size: int) -> None:
    results = launch.values(size, "test_hccl:every_type_and_operation")
    for dtype in TYPES:
        for op in REDUCE:
            expected = reduced(dtype, op, size).tobytes()
            for rank, result in enumerate(results):
                assert result[dtype, op] == expected, f"{dtype} {op} on rank {rank}"


def special_values(world: World) -> tuple[np.ndarray, ...]:
    comm = world.comm()
    nan, inf = np.float32("nan"), np.float32("inf")
    mine = np.array([[nan, 1, inf, 0], [1, nan, inf, 0]][world.rank], np.float32)
    # 65504 + 65504 overflows fp16; 2**-24 is its smallest value; 1 + 2**-11 is a tie that goes to even.
    halves = np.array([65504, 2**-24, 1 if world.rank else 2**-11, -65504], np.float16)
    return comm.all_reduce(mine, "max"), comm.all_reduce(mine, "min"), comm.all_reduce(halves)


def test_all_reduce_special_values(launch) -> None:
    for most, least, halves in launch.values(2, "test_hccl:special_values"):
        np.testing.assert_array_equal(most, np.array([np.nan, np.nan, np.inf, 0], np.float32))
        np.testing.assert_array_equal(least, np.array([np.nan, np.nan, np.inf, 0], np.float32))
        np.testing.assert_array_equal(halves, np.array([np.inf, 2**-23, 1, -np.inf], np.float16))


def every_half(world: World) -> np.ndarray:
    """All 65536 fp16 patterns through the emulator's conversions, there and back (a group of one rank)."""
    return world.comm().all_reduce(np.arange(1 << 16, dtype=np.uint16).view(np.float16)).view(np.uint16)


def test_fp16_conversion_is_exact(launch) -> None:
    (bits,) = launch.values(1, "test_hccl:every_half")
    patterns = np.arange(1 << 16, dtype=np.uint16)
    finite = ~np.isnan(patterns.view(np.float16))
    np.testing.assert_array_equal(bits[finite], patterns[finite])
    assert np.isnan(bits.view(np.float16)[~finite]).all()


def every_collective(world: World, count: int) -> dict[str, Any]:
    comm, rank, size = world.comm(), world.rank, world.size
    base = np.arange(count, dtype=np.int32)
    sizes = [(r * 7) % 5 * (count // 4) + r for r in range(size)]
    matrix = np.array([[(i * 3 + j) % 4 * (count // 3) + i for j in range(size)] for i in range(size)])
    owned = np.concatenate([base[:1] * 0 + 100 * rank + j for j in range(size) for _ in range(matrix[rank, j])])
    got: dict[str, Any] = {}
    got["broadcast"] = comm.broadcast(base + 50 if rank == 1 else np.zeros_like(base), 1)
    got["reduce"] = comm.reduce(base * (rank + 1), 0)
    got["scatter"] = comm.scatter(np.arange(count * size, dtype=np.int32), 1, count)
    got["gather"] = comm.all_gather(base + rank * 1000)
    got["gather_v"] = comm.all_gather_v(np.full(sizes[rank], rank, np.int16), sizes)
    got["reduce_scatter"] = comm.reduce_scatter(np.arange(count * size, dtype=np.int64) * (rank + 1))
    got["reduce_scatter_v"] = comm.reduce_scatter_v(np.arange(sum(sizes), dtype=np.float32) + rank, sizes)
    got["all_to_all"] = comm.all_to_all(np.repeat(np.arange(size, dtype=np.int32) + rank * 10, count))
    got["all_to_all_v"] = comm.all_to_all_v(owned, list(matrix[rank]), list(matrix[:, rank]))
    got["all_to_all_vc"] = comm.all_to_all_vc(owned, matrix)
    comm.barrier()
    return got


def check_every_collective(results: list[dict[str, Any]], count: int) -> None:
    size = len(results)
    base = np.arange(count, dtype=np.int32)
    sizes = [(r * 7) % 5 * (count // 4) + r for r in range(size)]
    starts = np.cumsum([0, *sizes])
    matrix = np.array([[(i * 3 + j) % 4 * (count // 3) + i for j in range(size)] for i in range(size)])
    for rank, got in enumerate(results):
        expected = {
            "broadcast": base + 50,
            "reduce": base * sum(range(1, size + 1)) if rank == 0 else base * 0,
            "scatter": np.arange(count * rank, count * (rank + 1), dtype=np.int32),
            "gather": np.concatenate([base + r * 1000 for r in range(size)]),
            "gather_v": np.repeat(np.arange(size, dtype=np.int16), sizes),
            "reduce_scatter": np.arange(count * rank, count * (rank + 1)) * sum(range(1, size + 1)),
            "reduce_scatter_v": np.arange(starts[rank], starts[rank + 1], dtype=np.float32) * size + sum(range(size)),
            "all_to_all": np.repeat(np.arange(size, dtype=np.int32) * 10 + rank, count),
            "all_to_all_v": np.repeat(np.arange(size, dtype=np.int32) * 100 + rank, matrix[:, rank]),
        }
        expected["all_to_all_vc"] = expected["all_to_all_v"]
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value, err_msg=f"{name} on rank {rank}")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_collective(launch, size: int) -> None:
    check_every_collective(launch.values(size, "test_hccl:every_collective", 100), 100)


def test_data_larger_than_the_window(launch) -> None:
    """Windows of 1 MB: everything below goes through in pieces."""
    results = launch.values(3, "test_hccl:every_collective", 120_000, env={"VIRTUAL_NPU_WINDOW_MB": "1"})
    check_every_collective(results, 120_000)


def big_all_reduce(world: World) -> np.ndarray:
    return world.comm().all_reduce(sample("float16", world.rank, 1_000_003))


def test_chunked_all_reduce_has_the_same_bits(launch) -> None:
    small = launch.values(2, "test_hccl:big_all_reduce", env={"VIRTUAL_NPU_WINDOW_MB": "1"})
    large = launch.values(2, "test_hccl:big_all_reduce")
    expected = reduced("float16", "sum", 2, 1_000_003)
    for result in small + large:
        np.testing.assert_array_equal(result, expected)


def point_to_point(world: World, count: int) -> list[np.ndarray]:
    comm, rank, size = world.comm(), world.rank, world.size
    got: list[np.ndarray] = []
    # Two ranks only; the third does not take part, so this cannot be a group operation.
    if rank == 0:
        comm.send(np.arange(count, dtype=np.float32), 1)
        comm.send(np.zeros(0, np.float32), 1)
        got.append(comm.recv(np.zeros(3, np.int64), 1))
    elif rank == 1:
        got.append(comm.recv(np.zeros(count, np.float32), 0))
        got.append(comm.recv(np.zeros(0, np.float32), 0))
        comm.send(np.array([7, 8, 9]), 0)
    # A ring in which everybody sends first, two messages per neighbour, and one to itself: only a batch can do that.
    after, before = (rank + 1) % size, (rank - 1) % size
    first, second, own = np.zeros(count, np.int32), np.zeros(2, np.int8), np.zeros(4, np.uint8)
    comm.batch(
        [
            ("send", np.full(count, rank, np.int32), after),
            ("send", np.full(2, rank + 10, np.int8), after),
            ("recv", first, before),
            ("recv", second, before),
            ("send", np.full(4, rank + 50, np.uint8), rank),
            ("recv", own, rank),
        ]
    )
    return [*got, first, second, own]


@pytest.mark.parametrize("window", ["1", "64"])
def test_point_to_point(launch, window: str) -> None:
    count = 300_000
    results = launch.values(3, "test_hccl:point_to_point", count, env={"VIRTUAL_NPU_WINDOW_MB": window})
    np.testing.assert_array_equal(results[0][0], [7, 8, 9])
    np.testing.assert_array_equal(results[1][0], np.arange(count, dtype=np.float32))
    assert results[1][1].size == 0
    for rank, got in enumerate(results):
        before = (rank - 1) % 3
        np.testing.assert_array_equal(got[-3], np.full(count, before))
        np.testing.assert_array_equal(got[-2], [before + 10] * 2)
        np.testing.assert_array_equal(got[-1], [rank + 50] * 4)


# ---- groups


def two_groups_in_turn(world: World) -> dict[str, Any]:
    whole = world.comm()
    pair = world.comm(
        f"pair{world.rank // 2}", [world.rank // 2 * 2, world.rank // 2 * 2 + 1], name=f"pair-{world.rank // 2}"
    )
    one = np.ones(4, np.int32) * (world.rank + 1)
    sums = [(int(pair.all_reduce(one)[0]), int(whole.all_reduce(one)[0])) for _ in range(20)]
    return {"sums": sums, "names": (whole.name(), pair.name())}


def test_groups_in_turn_and_names(launch) -> None:
    results = launch.values(4, "test_hccl:two_groups_in_turn")
    for rank, result in enumerate(results):
        assert result["sums"] == [(3 if rank < 2 else 7, 10)] * 20
        assert result["names"] == (results[0]["names"][0], f"pair-{rank // 2}")
    assert results[0]["names"][0].startswith("vnpu-")


def groups_in_two_threads(world: World) -> list[list[int]]:
    comms = [world.comm("a"), world.comm("b")]
    got: list[list[int]] = [[], []]

    def work(which: int) -> None:
        for i in range(50):
            value = comms[which].all_reduce(np.full(1000, i + which, np.int64))
            got[which].append(int(value[-1]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_groups_at_the_same_time(launch) -> None:
    for got in launch.values(2, "test_hccl:groups_in_two_threads"):
        assert got == [[2 * i for i in range(50)], [2 * (i + 1) for i in range(50)]]


def sub_communicators(world: World) -> tuple[Any, ...]:
    parent = world.comm()
    members = {0: [0, 2], 1: [3, 1], 2: [0, 2], 3: [3, 1]}[world.rank]
    sub = parent.sub_comm(members, 5, f"sub-{members[0]}")
    assert sub is not None
    size, rank = ctypes.c_uint32(), ctypes.c_uint32()
    sub.call("HcclGetRankSize", sub.handle, ctypes.byref(size))
    sub.call("HcclGetRankId", sub.handle, ctypes.byref(rank))
    total = int(sub.all_reduce(np.array([10**world.rank]))[0])
    again = parent.sub_comm([1, 2] if world.rank in (1, 2) else None, 6)
    pair = int(again.all_reduce(np.array([world.rank]))[0]) if again is not None else None
    sub.destroy()
    return size.value, rank.value, total, sub.rank, pair, int(parent.all_reduce(np.array([1]))[0])


def test_sub_communicators(launch) -> None:
    assert launch.values(4, "test_hccl:sub_communicators") == [
        (2, 0, 101, 0, None, 4),
        (2, 1, 1010, 1, 3, 4),
        (2, 1, 101, 1, 3, 4),
        (2, 0, 1010, 0, None, 4),
    ]


def one_reduction(world: World) -> int:
    comm = world.comm()
    total = int(comm.all_reduce(np.array([world.rank + 1]))[0])
    comm.destroy()
    return total


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_start_methods(launch, start: str) -> None:
    assert launch.values(3, "test_hccl:one_reduction", start=start) == [6, 6, 6]


def test_many_ranks(launch) -> None:
    assert launch.values(17, "test_hccl:one_reduction", start="fork") == [153] * 17


def configuration(world: World) -> tuple[Any, ...]:
    library = world.library
    library.HcclGetErrorString.restype = ctypes.c_char_p
    value = ctypes.c_int32(1)
    codes = [
        library.HcclSetConfig(0, value),
        library.HcclGetConfig(0, ctypes.byref(value)),
        library.HcclSetConfig(7, value),
    ]
    return codes, value.value, library.HcclGetCommConfigCapability(), library.HcclGetErrorString(9).decode()


def test_configuration(launch) -> None:
    (value,) = launch.values(1, "test_hccl:configuration")
    codes, deterministic, capability, text = value
    assert (codes, deterministic, text) == ([0, 0, NOT_SUPPORT], 1, "timeout")
    assert capability in (4, 7, 12)  # what can be configured per communicator: torch_npu 2.7, 2.8 and 2.9, 2.10


def one_rank_is_slower(world: World) -> float:
    comm = world.comm()
    comm.barrier()
    begin = time.monotonic()
    for number in range(60):
        if number % world.size == world.rank:
            time.sleep(0.005)
        comm.all_reduce(np.zeros(4, np.int32))
        if world.rank < 2:
            pair = [np.zeros(4, np.int32) for _ in range(2)]
            comm.batch([("send", pair[0], 1 - world.rank), ("recv", pair[1], 1 - world.rank)])
    return time.monotonic() - begin


def test_a_rank_that_sleeps_is_woken(launch) -> None:
    """Waiting ranks look around every 0.1 s by themselves; what they wait for must not take as long (here: 6 s)."""
    assert max(launch.values(3, "test_hccl:one_rank_is_slower")) < 3


# ---- what goes wrong


def rank_one_stops(world: World, operation: str) -> None:
    comm = world.comm(name="dp-group")
    comm.all_reduce(np.zeros(4, np.int32))
    comm.barrier()
    if world.rank == 1:
        world.get("others-are-done")
        return
    try:
        if operation == "AllReduce":
            comm.all_reduce(np.zeros(4, np.int32))
        elif operation == "Recv":
            comm.recv(np.zeros(4, np.int32), 1)
        else:
            comm.send(np.zeros(4, np.int32), 1)
    finally:
        assert comm.async_error() == TIMEOUT
        world.put(f"done-{world.rank}", b"")
        if world.rank == 0:
            world.get("done-2")
            world.put("others-are-done", b"")


@pytest.mark.parametrize("operation", ["AllReduce", "Recv", "Send"])
def test_missing_peer_ends_in_a_report(launch, operation: str) -> None:
    """The text names group, this rank, the missing one, the operator, its ordinal, and what the missing one did."""
    results = launch(3, "test_hccl:rank_one_stops", operation, env={"VIRTUAL_NPU_TIMEOUT_S": "1"})
    assert results[1].ok, results[1].error
    for rank in (0, 2):
        what = {
            "AllReduce": "AllReduce #3 on",
            "Recv": "Recv from rank 1, message #1",
            "Send": "Send to rank 1, message #1",
        }
        results[rank].failed_with(
            TIMEOUT, what[operation], f"communicator 'dp-group', rank {rank} of 3", "waited 1 s for rank 1 (process ",
            "last operator Barrier #2, finished",
        )  # fmt: skip
        assert 0.9 < results[rank].seconds < 6


def one_rank_never_joins(world: World) -> None:
    root = ctypes.create_string_buffer(4108)
    if world.rank == 2:
        return
    if world.rank == 0:
        assert world.library.HcclGetRootInfo(root) == 0
        world.put("root", root.raw)
    world.join(world.get("root"), 3, world.rank)


def test_missing_peer_while_joining(launch) -> None:
    results = launch(3, "test_hccl:one_rank_never_joins", env={"VIRTUAL_NPU_TIMEOUT_S": "1"})
    for rank in (0, 1):
        results[rank].failed_with(TIMEOUT, "joining on communicator 'vnpu-", "waited 1 s for rank 2 (has not joined)")


def killed_while_others_wait(world: World) -> None:
    comm = world.comm()
    comm.all_reduce(np.zeros(1 << 20, np.int32))
    world.put(f"pid-{world.rank}", str(os.getpid()).encode())
    if world.rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        comm.all_reduce(np.zeros(4, np.int32))
    finally:
        with pytest.raises(HcclError):
            comm.all_reduce(np.zeros(4, np.int32))  # out of use from now on
        comm.destroy()  # must not wait for the dead


def test_dead_peer_is_reported_soon_and_leaves_nothing(launch, tmp_path: Path) -> None:
    before = shared_memory_entries()
    results = launch(3, "test_hccl:killed_while_others_wait")  # timeout 20 s
    assert results[1].exit_code == -signal.SIGKILL
    for rank in (0, 2):
        results[rank].failed_with(REMOTE, "AllReduce #2", "waits for rank 1 (process ", "whose process has died")
        assert "out of use since" in results[rank].stderr
        assert results[rank].seconds < 5
    assert shared_memory_entries() == before
    for pid in (int((tmp_path / "run1" / f"pid-{r}").read_text()) for r in range(3)):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def killed_in_the_middle(world: World) -> None:
    comm = world.comm()
    world.put(f"pid-{world.rank}", str(os.getpid()).encode())
    if world.rank == 0:
        while not all((world.folder / f"pid-{r}").exists() for r in range(world.size)):
            time.sleep(0.01)
        world.put("started", b"")
    while True:
        comm.all_reduce(np.ones(50_000, np.float32))
        comm.all_gather(np.ones(50_000, np.float32))


@pytest.mark.parametrize("victim", [0, 2])
def test_kill_under_load(launch, tmp_path: Path, victim: int) -> None:
    """SIGKILL from outside, whichever rank made the segment: the others report it and every process is gone."""
    killer = threading.Thread(target=_kill_when_started, args=(tmp_path / "run1", victim))
    killer.start()
    before = shared_memory_entries()
    results = launch(3, "test_hccl:killed_in_the_middle")
    killer.join()
    assert results[victim].exit_code == -signal.SIGKILL
    for rank in {0, 1, 2} - {victim}:
        results[rank].failed_with(REMOTE, f"waits for rank {victim}", "has died")
    assert shared_memory_entries() == before


def _kill_when_started(folder: Path, victim: int) -> None:
    end = time.monotonic() + 60
    while not (folder / "started").exists() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(int((folder / f"pid-{victim}").read_text()), signal.SIGKILL)


def joins_after_the_maker_died(world: World) -> None:
    if world.rank == 0:
        root = ctypes.create_string_buffer(4108)
        assert world.library.HcclGetRootInfo(root) == 0
        world.put("root", root.raw)
        os.kill(os.getpid(), signal.SIGKILL)
    root_info = world.get("root")
    time.sleep(0.3)
    world.join(root_info, 2, 1)


def test_root_info_of_a_dead_process(launch) -> None:
    results = launch(2, "test_hccl:joins_after_the_maker_died")
    results[1].failed_with(10, "as rank 1: process", "has ended or is not visible")


def leaves_early(world: World) -> None:
    comm = world.comm()
    comm.barrier()
    if world.rank == 1:
        comm.destroy()
        world.get("done")
        return
    try:
        comm.barrier()
    finally:
        world.put("done", b"")


def test_peer_that_destroyed_its_communicator(launch) -> None:
    results = launch(2, "test_hccl:leaves_early")
    results[0].failed_with(REMOTE, "Barrier #2", "waits for rank 1", "which has destroyed it")
    assert results[0].seconds < 10


def disagree(world: World, case: str) -> None:
    comm = world.comm(name="tp")
    comm.barrier()
    odd = world.rank == 1
    count = 8 if odd and case == "count" else 4
    dtype = np.float32 if odd and case == "data type" else np.int32
    data = np.zeros(count * world.size, dtype)
    if case == "operator" and odd:
        comm.all_gather(data)
    elif case == "root":
        comm.broadcast(data, 1 if odd else 0)
    elif case == "gather counts":
        sizes = [4, 8 if odd else 4, 4] if world.rank != 1 else [4, 4, 4 + 4]
        comm.all_gather_v(np.zeros(sizes[world.rank], np.int32), sizes)
    elif case == "exchange":
        sends = [1, 1, 5] if world.rank == 0 else [1, 1, 1]
        comm.all_to_all_v(np.zeros(sum(sends), np.int32), sends, [1, 1, 1])
    else:
        comm.all_reduce(data, "max" if odd and case == "reduce op" else "sum")


@pytest.mark.parametrize("case", ["operator", "count", "data type", "reduce op", "root"])
def test_mismatch_is_reported_on_every_rank(launch, case: str) -> None:
    results = launch(3, "test_hccl:disagree", case)
    for rank in range(3):
        other = 1 if rank != 1 else 0
        results[rank].failed_with(
            PARA,
            f"#2 on communicator 'tp', rank {rank} of 3: mismatch, {case} differs: rank {rank} called",
            f"rank {other} called",
        )
        assert results[rank].seconds < 10
    calls = {"operator": ("AllReduce #2 (count=12", "AllGather #2 (count=12"), "count": ("count=12", "count=24"),
             "data type": ("data type=int32", "data type=fp32"), "reduce op": ("reduce op=sum", "reduce op=max"),
             "root": ("root=0", "root=1")}  # fmt: skip
    for text in calls[case]:
        assert text in results[2].stderr


def test_mismatch_of_counts(launch) -> None:
    for result in launch(3, "test_hccl:disagree", "gather counts"):
        result.failed_with(PARA, "AllGatherV #2", "mismatch, counts differ", "[16, 16, 16]", "[16, 16, 32]")
    for result in launch(3, "test_hccl:disagree", "exchange"):
        result.failed_with(PARA, "AlltoAllV #2", "rank 0 sends 20 bytes to rank 2, which expects 4")


def unequal_messages(world: World) -> None:
    comm = world.comm()
    if world.rank == 0:
        comm.send(np.zeros(4, np.int32), 1)
    else:
        comm.recv(np.zeros(4, np.int64), 0)


def test_mismatch_of_a_message(launch) -> None:
    for result in launch(2, "test_hccl:unequal_messages"):
        result.failed_with(PARA, "rank 0 sends 16 bytes of data type 2 and rank 1 receives 32 bytes of data type 5")


def join_differently(world: World, case: str) -> None:
    name = f"group-{world.rank}" if case == "name" else "group"
    root = ctypes.create_string_buffer(4108)
    if world.rank == 0:
        assert world.library.HcclGetRootInfo(root) == 0
        world.put("root", root.raw)
    rank = 0 if case == "rank" else world.rank
    world.join(world.get("root"), 2 + world.rank if case == "size" else 2, rank, name)


@pytest.mark.parametrize(
    ("case", "texts"),
    [
        ("name", ("names it 'group-",)),
        ("rank", ("has already joined as this rank",)),
        ("size", ("another rank said",)),
    ],
)
def test_ranks_that_join_differently(launch, case: str, texts: tuple[str, ...]) -> None:
    results = launch(2, "test_hccl:join_differently", case, env={"VIRTUAL_NPU_TIMEOUT_S": "1"})
    assert not any(r.ok for r in results)
    assert any(all(t in r.stderr for t in texts) for r in results), [r.stderr for r in results]


def test_windows_of_different_size(launch) -> None:
    env = {0: {"VIRTUAL_NPU_WINDOW_MB": "8"}, 1: {"VIRTUAL_NPU_WINDOW_MB": "16"}}
    results = launch(2, "test_hccl:one_reduction", rank_env=env, env={"VIRTUAL_NPU_TIMEOUT_S": "1"})
    assert any("VIRTUAL_NPU_WINDOW_MB=" in r.stderr and "another rank said" in r.stderr for r in results)


def used_by_a_forked_child(world: World) -> tuple[int, int]:
    comm = world.comm()
    comm.barrier()
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            comm.barrier()
        except HcclError as error:
            code = error.code
        with contextlib.suppress(HcclError):
            comm.destroy()
        os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), int(comm.all_reduce(np.array([1]))[0])


def test_forked_child_must_not_use_it(launch) -> None:
    """The child gets an error, and its parent's communicator keeps working."""
    results = launch(2, "test_hccl:used_by_a_forked_child")
    for result in results:
        assert result.value == (UNAVAIL, 2), result.error
        assert "not this forked child" in result.stderr


def bad_arguments(world: World) -> list[int]:
    comm = world.comm()
    data = np.zeros(4, np.int32)
    codes = []
    calls = [
        lambda: comm.broadcast(data, 9),
        lambda: comm.send(data, 9),
        lambda: comm.call("HcclAllReduce", None, None, ctypes.c_uint64(1), 15, 0, comm.handle, None),
        lambda: comm.call("HcclAllReduce", None, None, ctypes.c_uint64(1), 4, 9, comm.handle, None),
        lambda: comm.call("HcclBarrier", ctypes.c_void_p(1234), None),
        lambda: comm.call("HcclCommInitAll", 2, None, None),
        lambda: comm.call("HcclGetRootInfo", None),
    ]
    for call in calls:
        try:
            call()
            codes.append(0)
        except HcclError as error:
            codes.append(error.code)
    return codes


def test_bad_arguments(launch) -> None:
    (codes,) = launch.values(1, "test_hccl:bad_arguments")
    assert codes == [PARA, PARA, NOT_SUPPORT, PARA, PARA, NOT_SUPPORT, 2]


def destroyed_by_another_thread(world: World) -> tuple[int, float]:
    comm = world.comm()
    codes: list[int] = []

    def wait() -> None:
        try:
            comm.barrier()
        except HcclError as error:
            codes.append(error.code)

    if world.rank == 1:
        world.get("done")
        return 0, 0
    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    begin = time.monotonic()
    comm.destroy()
    thread.join()
    world.put("done", b"")
    return codes[0], time.monotonic() - begin


def test_destroy_ends_a_call_that_waits(launch) -> None:
    code, seconds = launch.values(2, "test_hccl:destroyed_by_another_thread")[0]
    assert code == UNAVAIL
    assert seconds < 3


# ---- ledger


def write_ledger(world: World) -> int:
    library = world.library
    library.vnpu_ledger_step.argtypes = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64]
    comm = world.comm(name='odd "name"')
    comm.barrier()
    for step in range(3):
        library.vnpu_ledger_step(step, b"execute", 10 * step)
        comm.all_reduce(np.zeros(6, np.int32))
    library.vnpu_ledger_note(b"note", b'"tokens":[1,2]')
    pid = os.fork()
    if pid == 0:
        library.vnpu_ledger_step(77, b"child", 1)
        os._exit(0)
    os.waitpid(pid, 0)
    assert library.vnpu_ledger_enabled() == 1
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return pid


def read_ledger(path: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ledger(launch, tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    folder.mkdir()
    env = {"VIRTUAL_NPU_LEDGER_DIR": str(folder)}
    results = launch(2, "test_hccl:write_ledger", env=env, start="spawn")  # forked ranks would end by _exit
    assert results[0].ok
    ledgers = {path: read_ledger(path) for path in folder.iterdir()}
    ranks: dict[int, list[dict[str, Any]]] = {}
    for events in ledgers.values():
        if events[0]["ev"] == "comm":
            ranks[events[0]["rank"]] = events
        else:  # a forked child: its own file, without what the parent had buffered
            assert [(e["ev"], e["step"], e["kind"]) for e in events] == [("step", 77, "child")]
    assert len(ledgers) == 4
    whole = [
        ("comm", -1), ("collective", -1), ("step", 0), ("collective", 0), ("step", 1), ("collective", 1), ("step", 2),
        ("collective", 2), ("note", 2),
    ]  # fmt: skip
    assert [(e["ev"], e["step"]) for e in ranks[0]] == whole
    assert [(e["ev"], e["step"]) for e in ranks[1]] == whole[:7]  # SIGKILL: the current step is lost, nothing else
    events = ranks[0]
    assert {k: v for k, v in events[0].items() if k != "t"} == {
        "ev": "comm", "comm": 'odd "name"', "rank": 0, "size": 2, "step": -1,
    }  # fmt: skip
    reduction = events[5]
    assert {k: reduction[k] for k in ("kind", "bytes", "ordinal", "rank", "size", "comm")} == {
        "kind": "AllReduce", "bytes": 24, "ordinal": 3, "rank": 0, "size": 2, "comm": 'odd "name"',
    }  # fmt: skip
    assert reduction["host_us"] > 0
    assert (events[4]["kind"], events[4]["scheduled_tokens"]) == ("execute", 10)
    assert events[-1]["tokens"] == [1, 2]
    times = [e["t"] for e in events]
    assert times == sorted(times)


def test_no_ledger_without_a_directory(library: str) -> None:
    code = f"import ctypes; print(ctypes.CDLL({library!r}).vnpu_ledger_enabled())"
    environment = {k: v for k, v in os.environ.items() if k != "VIRTUAL_NPU_LEDGER_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "0"

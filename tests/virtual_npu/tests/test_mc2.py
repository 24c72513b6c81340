# SPDX-License-Identifier: Apache-2.0
"""aclnnMoeDistributeDispatch(V2) and Combine(V2) against a plain numpy reference, slow and dead ranks, the ledger."""

from __future__ import annotations

import ctypes as c
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mc2 import (
    A2,
    A3,
    FAILED,
    HIERARCHY,
    REFUSED,
    RELAXED,
    SERVER,
    Batch,
    Buffer,
    Ep,
    expected_combine,
    expected_dispatch,
    expert,
    is_poison,
    make_batch,
    plain_dispatch,
    quantised,
    to_rows,
)  # fmt: skip
from ranks import World, from_bf16, shared_memory_entries, to_bf16

pytestmark = pytest.mark.timeout(120)


# ---- results


def layer(world: World, case: dict[str, Any]) -> dict[str, Any]:
    """One dispatch, experts, combine; the inputs come from the case, so that the test can rebuild them."""
    comm = world.comm()
    dtype = case.get("dtype", "bf16")
    ep = Ep(comm, case["experts"], dtype, case.get("version", 2), case.get("comm_alg", ""))
    batch = case_batches(case)[world.rank]
    mask = batch.mask if case.get("mask") else None
    quant = case.get("quant", 0)
    scales = smooth_scales(case) if case.get("smooth") else None
    weights = batch.weights if case.get("hierarchy") else None
    out = ep.dispatch(batch.x, batch.ids, case["global_bs"], mask, quant, scales, case.get("nums_type", 0), weights)
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
    per_server = SERVER * (case["experts"] // len(results)) if case.get("hierarchy") else 0
    for rank, out in enumerate(results):
        expected = expected_dispatch(batches, rank, case["experts"], case.get("nums_type", 0))
        total = len(expected["sources"])
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
        weights = [batches[source].weights[token, slot] for source, token, slot in expected["sources"]]
        if per_server:
            assert out["expand_scales"][:total].tolist() == weights
        # What hardware leaves uninitialised must not look like a result.
        assert is_poison(out["expand_x"][total:], "" if quant else dtype)
        assert is_poison(out["dynamic_scales"][total if quant else 0 :])
        assert is_poison(out["expand_scales"][total if per_server else 0 :])
        assert is_poison(out["tp_recv_counts"])
        if quant:
            continue
        shared = to_rows(np.full(batches[rank].x.shape, 0.3, np.float32), dtype) if case.get("shared") else None
        y, n = out["y"], batches[rank].active
        np.testing.assert_array_equal(y[:n], expected_combine(batches[rank], dtype, shared, per_server)[:n])
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


def ep16(**case: Any) -> dict[str, Any]:
    return {"bs": [7] * 16, "global_bs": 0, "k": 4, "experts": 64, "h": 64, **case}


RAGGED = [1 + (5 * rank) % 9 for rank in range(16)]
A2_CASES = {
    "ragged": (ep16(bs=RAGGED, global_bs=16 * 9), A2),
    "ragged, version 1": (ep16(bs=RAGGED, global_bs=16 * 9, version=1), A2),
    "ragged, loose bound, fp16": (ep16(bs=RAGGED, global_bs=16 * 256, h=32, dtype="float16", comm_alg="fullmesh"), A2),
    "mask": (ep16(active=[rank % 8 for rank in range(16)], mask=True), A2),
    "hierarchy": (ep16(hierarchy=True, comm_alg="hierarchy"), A2),
    "hierarchy by variables, version 1": (ep16(hierarchy=True, version=1), A2 | HIERARCHY),
    "hierarchy by variables, mask": (
        ep16(hierarchy=True, active=[rank % 8 for rank in range(16)], mask=True, dtype="float16"), A2 | HIERARCHY
    ),
    "hierarchy, quantised": (ep16(hierarchy=True, quant=2), A2 | HIERARCHY),
}  # fmt: skip


@pytest.mark.parametrize("name", A2_CASES)
def test_ep16_on_a2_against_reference(launch, name: str) -> None:
    """Sixteen forked ranks, that is two servers, with the documented limits in force."""
    case, env = A2_CASES[name]
    check_layer(case, launch.values(16, "test_mc2:layer", case, env=env))


def sums_over_servers(world: World, comm_alg: str) -> np.ndarray:
    """1, 2^24, 1 and -2^24, of which 2^24 comes from the first server and the others from the second."""
    ep = Ep(world.comm(), 16, comm_alg=comm_alg)
    ids, weights = np.array([[8, 0, 9, 10]], np.int32), np.ones((1, 4), np.float32)
    out = ep.dispatch(np.zeros((1, 32), np.uint16), ids, weights=weights if comm_alg == "hierarchy" else None)
    rows = out["expand_x"].copy()
    rows[: int(out["token_nums"][-1])] = to_bf16(np.float32({0: 2.0**24, 10: -(2.0**24)}.get(world.rank, 1.0)))
    return from_bf16(ep.combine(rows, ids, out, weights))


@pytest.mark.parametrize(("comm_alg", "right"), [("fullmesh", 0), ("hierarchy", 2)])
def test_hierarchy_adds_inside_a_server_first(launch, comm_alg: str, right: float) -> None:
    """In fp32 2^24 + 1 is 2^24, so the order of the additions shows."""
    for y in launch.values(16, "test_mc2:sums_over_servers", comm_alg, env=A2):
        assert (y == right).all()


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


@pytest.mark.parametrize(
    "case",
    [
        {"bs": [2, 3], "global_bs": 8, "k": 2, "experts": 4, "h": 1024},
        {"bs": [1] * 7 + [2], "global_bs": 16, "k": 8, "experts": 16, "h": 7168, "version": 1},
    ],
)
def test_layer_on_a3_with_the_documented_limits(launch, case: dict[str, Any]) -> None:
    check_layer(case, launch.values(len(case["bs"]), "test_mc2:layer", case, env=A3))


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
    for name in ("expand_x", "token_nums"):
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


# ---- dead and slow ranks


def killed_between(world: World) -> None:
    ep = Ep(world.comm(), 4)
    x, ids = np.zeros((1, 64), np.uint16), np.array([[0, 3]], np.int32)
    out = ep.dispatch(x, ids)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ep.combine(out["expand_x"], ids, out, np.ones((1, 2), np.float32))


def test_dead_peer(launch) -> None:
    before = shared_memory_entries()
    results = launch(2, "test_mc2:killed_between", env=RELAXED)
    results[0].failed_with(FAILED, "MoeDistributeCombine #2", "waits for rank 1", "whose process has died")
    assert results[0].seconds < 5
    assert shared_memory_entries() == before


def three_dispatches(world: World) -> list[float]:
    """Milliseconds of each of three dispatches; the results do not depend on who was late."""
    experts = 2 * world.size
    ep = Ep(world.comm(name="ep-group"), experts)
    batch = make_batch(world.rank, 2, 2, 2, experts, 64, "bf16")
    spent = []
    for _ in range(3):
        begin = time.monotonic()
        out = ep.dispatch(batch.x, batch.ids)
        spent.append((time.monotonic() - begin) * 1000)
        y = ep.combine(out["expand_x"], batch.ids, out, np.full((2, 2), 0.5, np.float32))
        np.testing.assert_array_equal(y, batch.x)
    return spent


@pytest.mark.parametrize(("delay", "slow"), [("1:150", [0, 1, 2]), ("0:150@2", [1]), ("0:150@1,1:150@3", [0, 2])])
def test_a_slow_rank_holds_up_everybody(launch, delay: str, slow: list[int]) -> None:
    """A dispatch is a barrier: all ranks see the delay, at the dispatches that are named and at no other."""
    for spent in launch.values(2, "test_mc2:three_dispatches", env={**RELAXED, "VIRTUAL_NPU_DELAY": delay}):
        assert [number for number, ms in enumerate(spent) if ms > 75] == slow, spent


def test_a_rank_that_is_too_slow_is_named(launch) -> None:
    env = {**RELAXED, "VIRTUAL_NPU_DELAY": "1:1500@2", "VIRTUAL_NPU_TIMEOUT_S": "0.5"}
    results = launch(3, "test_mc2:three_dispatches", env=env)
    for rank in (0, 2):
        results[rank].failed_with(
            FAILED, f"MoeDistributeDispatch #3 on communicator 'ep-group', rank {rank} of 3: timeout, waited 0.5 s for",
            "rank 1 (process", "last operator MoeDistributeDispatch #3, still in it",
        )  # fmt: skip
    assert not results[1].ok  # and the late one finds that the others have given up


def one_dispatch(world: World) -> None:
    plain_dispatch(world.comm(), {})


def test_a_delay_for_a_rank_that_does_not_exist(launch) -> None:
    for result in launch(2, "test_mc2:one_dispatch", env={**RELAXED, "VIRTUAL_NPU_DELAY": "2:5"}):
        result.failed_with(REFUSED, "VIRTUAL_NPU_DELAY names rank 2, but there are 2 ranks")


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


@pytest.mark.parametrize(("quant", "calls"), [(0, ["dispatch", "combine"]), (2, ["dispatch"])])
def test_ledger(launch, tmp_path: Path, quant: int, calls: list[str]) -> None:
    folder = tmp_path / "ledger"
    folder.mkdir()
    case = {**CASES["mask"], "h": 32, "quant": quant}
    launch.values(
        4, "test_mc2:layer_in_a_step", case, env={**RELAXED, "VIRTUAL_NPU_LEDGER_DIR": str(folder)}, start="spawn"
    )
    seen = {}
    for path in folder.iterdir():
        events = [json.loads(line) for line in path.read_text().splitlines()]
        assert [e["ev"] for e in events] == ["step", "comm", *(["ep"] * len(calls))]
        step, comm, *operators = events
        rank = comm["rank"]
        assert step["scheduled_tokens"] == 5
        for ordinal, (event, op) in enumerate(zip(operators, calls, strict=True), start=1):
            assert event.pop("t") > 0
            assert event.pop("host_us") > 0
            seen[rank, op] = event
            assert event.pop("quant_mode", None) == (quant if op == "dispatch" else None)
            assert event == {
                "ev": "ep", "step": 12, "op": op, "comm": comm["comm"], "ordinal": ordinal, "rank": rank, "size": 4,
                "bs": 5, "global_bs": 20, "mask": True, "active": case["active"][rank], "k": 3, "e": 8, "h": 32,
                "mode": "eager",
            }  # fmt: skip
    assert len(seen) == 4 * len(calls)

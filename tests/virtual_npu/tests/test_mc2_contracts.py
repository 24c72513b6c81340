# SPDX-License-Identifier: Apache-2.0
"""The contracts of MC2 dispatch and combine, one test or more for each row of the table in the virtual NPU's README.

A refusal on one rank has the shape that operators of a cluster see: that rank raises before it has told its peers
anything, and they time out with a report that names it, the operator and its ordinal.
"""

from __future__ import annotations

from collections.abc import Callable
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
    Ep,
    is_poison,
    junk,
    make_batch,
    plain_dispatch,
    plain_layer,
)
from ranks import NOT_SUPPORT, Comm, RankResult, World, complaint

pytestmark = pytest.mark.timeout(120)
RELAXED_A2 = {**A2, "VIRTUAL_NPU_SHAPES": "relaxed"}
EITHER = pytest.mark.parametrize("env", [RELAXED, RELAXED_A2], ids=["A3", "A2"])


# ---- one rank refuses


def odd_dispatch(world: World, everybody: dict[str, Any], odd: dict[str, Any], first: bool) -> None:
    """One layer in which all is well (if `first`), then a dispatch that rank 1 changes by `odd`."""
    world.meet("start")
    comm = world.comm(name="ep-group", buffer_mb=everybody.get("buffer_mb", 0))
    try:
        if first:
            plain_layer(comm, everybody)
        plain_dispatch(comm, {**everybody, **(odd if world.rank == 1 else {})})
    finally:
        world.meet("end")


def refused(
    launch: Callable[..., list[RankResult]],
    message: str,
    odd: dict[str, Any],
    everybody: dict[str, Any] | None = None,
    env: dict[str, str] = RELAXED,
    first: bool = True,
    size: int = 3,
    seconds: str = "0.3",
) -> None:
    """Rank 1 refuses; the others time out and name it."""
    args = ({"bs": 4, **(everybody or {})}, odd, first)
    env = {**env, "VIRTUAL_NPU_TIMEOUT_S": seconds}
    results = launch(size, "test_mc2_contracts:odd_dispatch", *args, env=env)
    ordinal, before = (3, "last operator MoeDistributeCombine #2, finished") if first else (1, "no operator yet")
    results[1].failed_with(REFUSED, f"MoeDistributeDispatch on communicator 'ep-group', rank 1 of {size}: {message}")
    for rank in {*range(size)} - {1}:
        where = f"MoeDistributeDispatch #{ordinal} on communicator 'ep-group', rank {rank} of {size}: "
        results[rank].failed_with(FAILED, where + f"timeout, waited {seconds} s for rank 1 (process ", before)


@EITHER
def test_row_01_no_rows(launch, env: dict[str, str]) -> None:
    most = 256 if env is RELAXED_A2 else 512
    refused(launch, f"BS=0 is outside 1..{most} on Ascend910", {"bs": 0, "ids": np.zeros((0, 2))}, env=env)


@pytest.mark.parametrize(
    ("env", "everybody", "most"),
    [
        (RELAXED, {}, 512),
        (RELAXED, {"comm_alg": "fullmesh_v2"}, 256),
        (RELAXED, {"version": 1}, 512),
        (RELAXED_A2, {}, 256),
        (RELAXED_A2, {"version": 1}, 256),
        (RELAXED_A2, {"comm_alg": "hierarchy", "weights": True}, 256),
    ],
)
def test_row_02_too_many_rows(launch, env: dict[str, str], everybody: dict[str, Any], most: int) -> None:
    refused(launch, f"BS={most + 1} is outside 1..{most} on Ascend910", {"bs": most + 1}, everybody, env, first=False)


def test_row_02_at_ep16(launch) -> None:
    """Sixteen forked ranks on an A2 with its documented limits, with different numbers of rows and one bound."""
    everybody = {"bs": 200, "global_bs": 16 * 256}
    refused(launch, "BS=257 is outside 1..256", {"bs": 257, "global_bs": 16 * 257}, everybody, A2, size=16, seconds="2")


@pytest.mark.parametrize(
    ("value", "env"),
    [(9, RELAXED), (13, RELAXED_A2), (9, RELAXED_A2), (13, RELAXED), (-12, RELAXED), (3 << 31, RELAXED)],
)
def test_row_03_global_bs_too_small_or_not_a_multiple(launch, value: int, env: dict[str, str]) -> None:
    """Too small for BS=4 on 3 ranks, no multiple of 3, negative, more than 32 bits."""
    # The output buffers of such a call have no size: they are those of global_bs=12.
    refused(launch, f"global_bs={value} is invalid", {"said_global_bs": value}, {"global_bs": 12}, env)


@EITHER
def test_row_04_mask_with_ragged_batches(launch, env: dict[str, str]) -> None:
    """Only the rank with fewer rows can see it."""
    message = "Different bs on different rank cannot work when isActiveMask=true: global_bs=12 with BS=2"
    everybody = {"global_bs": 12, "mask": [1, 1, 1, 1]}
    refused(launch, message, {"bs": 2, "mask": [1, 0]}, everybody, env)


def test_row_05_ragged_batches_with_fullmesh_v2(launch) -> None:
    message = "comm_alg fullmesh_v2 cannot work when BS differs between ranks (global_bs=12, BS=2)"
    refused(launch, message, {"bs": 2}, {"global_bs": 12, "comm_alg": "fullmesh_v2"})


@EITHER
def test_row_07_a_bound_after_0(launch, env: dict[str, str]) -> None:
    message = "global_bs=24 (BS=2) differs from 12 of an earlier layer: it must be the same in all layers, and 0 in all"
    refused(launch, message, {"bs": 2, "global_bs": 24}, env=env)


@pytest.mark.parametrize("value", [0, 15, 30])
def test_row_07_a_bound_changes_in_a_later_layer(launch, value: int) -> None:
    """Back to 0 (which the binding makes BS*3 of), to less, to more."""
    found = value or 12
    refused(
        launch, f"global_bs={found} (BS=4) differs from 24 of an earlier layer", {"global_bs": value}, {"global_bs": 24}
    )


def test_row_08_an_expert_twice_in_a_row(launch) -> None:
    refused(launch, "row 1 names expert 3 twice", {"ids": [[0, 1], [3, 3]], "bs": 2}, {"global_bs": 12})


@pytest.mark.parametrize("number", [6, -1])
def test_row_09_an_expert_that_does_not_exist(launch, number: int) -> None:
    ids = [[0, 1], [number, 1], [2, 3], [4, 5]]
    refused(launch, f"expert id {number} of row 1 is outside 0..5", {"ids": ids})


def test_row_10_a_mask_with_a_hole(launch) -> None:
    message = "x_active_mask is not a block of True followed by a block of False"
    refused(launch, message, {"mask": [1, 0, 1, 0]}, {"mask": [1, 1, 0, 0]})


# What 128 rows per rank need with H 7168, K 8 and 24 experts on 3 ranks, in bytes.
WINDOWS = {
    "A3": (RELAXED, {}, 2 * (8 * 128 * 3 * 14848 + 9 * 128 * 14336)),
    "A3, fullmesh_v2": (RELAXED, {"comm_alg": "fullmesh_v2"}, 2 * (8 * 128 * 3 * 15360 + 9 * 128 * 14336)),
    "A3, version 1": (RELAXED, {"version": 1}, 2 * 128 * 2 * (7168 + 128) * (3 * 8 + 8 + 1) + 2 * 2**20),
    "A2": (RELAXED_A2, {}, 2 * (128 * 3 * 8 * 7168 * 2 + 2 * 2**20)),
    "A2, hierarchy": (RELAXED_A2, {"comm_alg": "hierarchy", "weights": True},
                      (24 + 3 // 4) * 128 * (7168 * 2 + 16 * 8) + 8 * 2**20),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_row_11_window_too_small(launch, name: str) -> None:
    """With global_bs=0 the need grows with a rank's own rows: 4 of them fit, 128 on rank 1 do not."""
    env, algorithm, need = WINDOWS[name]
    megabytes = -(-need // 2**20)
    everybody = {"h": 7168, "k": 8, "experts": 24, "buffer_mb": megabytes - 1, **algorithm}
    message = f"HCCL_BUFFSIZE={megabytes - 1} (MB) is too small: global_bs=384 needs at least {megabytes}"
    refused(launch, message, {"bs": 128}, everybody, env, first=False)


def check_windows(world: World, cases: list[dict[str, Any]]) -> list[str]:
    comm = world.comm(name="ep-group")
    found = [complaint(lambda case=case: plain_dispatch(comm, case, check_only=True)) for case in cases]
    world.meet("end")
    return found


@pytest.mark.parametrize(("buffer", "most"), [("", 26), ("120", 16), ("959", 127), ("960", 128), ("1024", 136)])
def test_row_11_window_of_the_documented_example(launch, buffer: str, most: int) -> None:
    """EP 32 with 8 local experts, H 7168, K 8: which bound the default of 200 MB and other HCCL_BUFFSIZE admit."""
    shape = {"bs": 1, "h": 7168, "k": 8, "experts": 256}
    cases = [{**shape, "global_bs": 32 * rows} for rows in (most, most + 1)]
    env = A3 | ({"HCCL_BUFFSIZE": buffer} if buffer else {})
    need = -(-2 * (most + 1) * (8 * 32 * 14848 + 9 * 14336) // 2**20)
    for fits, does_not in launch.values(32, "test_mc2_contracts:check_windows", cases, env=env):
        assert fits == ""
        assert f"HCCL_BUFFSIZE={buffer or 200} (MB) is too small" in does_not
        assert f"global_bs={32 * (most + 1)} needs at least {need}" in does_not


def test_a_bad_buffer_size_is_refused(launch) -> None:
    (result,) = launch(1, "test_mc2_contracts:check_windows", [], env={**RELAXED, "HCCL_BUFFSIZE": "big"})
    assert not result.ok
    assert "HCCL_BUFFSIZE='big' is not a number of MB" in result.stderr


# ---- a rank calls something else


def calls_less(world: World, case: str) -> None:
    """Rank 1 leaves out one operator, or all ranks but rank 1 do."""
    world.meet("start")
    comm = world.comm(name="ep-group")
    try:
        plain_layer(comm, {})
        if case == "no dispatch" and world.rank == 1:
            return
        if case == "one pass more" and world.rank != 1:
            return
        ep, ids, out = plain_dispatch(comm, {"ids": [[0, 2], [3, 4]]})  # a combine waits for the owners of its rows
        if case == "no combine" and world.rank == 1:
            return
        ep.combine(out["expand_x"], ids, out, np.ones(ids.shape, np.float32))
    finally:
        world.meet("end")


@pytest.mark.parametrize(
    ("case", "waiting", "operator", "missing", "last"),
    [
        ("no dispatch", (0, 2), "MoeDistributeDispatch #3", 1, "MoeDistributeCombine #2, finished)"),
        ("no combine", (0, 2), "MoeDistributeCombine #4", 1, "MoeDistributeDispatch #3, finished)"),
        ("one pass more", (1,), "MoeDistributeDispatch #3", 0, "MoeDistributeCombine #2, finished), rank 2"),
    ],
)
def test_row_12_a_rank_that_does_not_call(
    launch, case: str, waiting: tuple[int, ...], operator: str, missing: int, last: str
) -> None:
    results = launch(3, "test_mc2_contracts:calls_less", case, env={**RELAXED, "VIRTUAL_NPU_TIMEOUT_S": "0.3"})
    for rank, result in enumerate(results):
        if rank not in waiting:
            assert result.ok, result.stderr
            continue
        where = f"{operator} on communicator 'ep-group', rank {rank} of 3: "
        result.failed_with(FAILED, where + f"timeout, waited 0.3 s for rank {missing}", f"last operator {last}")


COLLECTIVES: dict[str, Callable[[Comm], Any]] = {
    "AllReduce": lambda comm: comm.all_reduce(np.zeros(4, np.int32)),
    "AllGather": lambda comm: comm.all_gather(np.zeros(4, np.int32)),
    "AllGatherV": lambda comm: comm.all_gather_v(np.zeros(1, np.int32), [1] * comm.size),
    "ReduceScatter": lambda comm: comm.reduce_scatter(np.zeros(4 * comm.size, np.int32)),
    "ReduceScatterV": lambda comm: comm.reduce_scatter_v(np.zeros(comm.size, np.int32), [1] * comm.size),
    "Broadcast": lambda comm: comm.broadcast(np.zeros(4, np.int32), 0),
    "Reduce": lambda comm: comm.reduce(np.zeros(4, np.int32), 0),
    "Scatter": lambda comm: comm.scatter(np.zeros(4 * comm.size, np.int32), 0, 4),
    "AlltoAll": lambda comm: comm.all_to_all(np.zeros(4 * comm.size, np.int32)),
    "AlltoAllV": lambda comm: comm.all_to_all_v(np.zeros(comm.size, np.int32), [1] * comm.size, [1] * comm.size),
    "AlltoAllVC": lambda comm: comm.all_to_all_vc(np.zeros(comm.size, np.int32), np.ones((comm.size, comm.size), int)),
    "Barrier": lambda comm: comm.barrier(),
    "Send": lambda comm: comm.send(np.zeros(4, np.int32), (comm.rank + 1) % comm.size),
    "Recv": lambda comm: comm.recv(np.zeros(4, np.int32), (comm.rank + 1) % comm.size),
    "BatchSendRecv": lambda comm: comm.batch([("send", np.zeros(4, np.int32), (comm.rank + 1) % comm.size)]),
    "CreateSubComm": lambda comm: comm.sub_comm(list(range(comm.size)), 1),
}


def every_collective_after_a_layer(world: World) -> dict[str, str]:
    comm = world.comm(name="ep-group")
    plain_layer(comm, {})
    found = {name: complaint(lambda call=call: call(comm)) for name, call in COLLECTIVES.items()}
    plain_layer(comm, {})  # a refused call has done no harm
    return found


def test_row_13_no_collective_after_an_ep_operator(launch) -> None:
    for found in launch.values(2, "test_mc2_contracts:every_collective_after_a_layer", env=RELAXED):
        for name, message in found.items():
            assert f"{name} on communicator 'ep-group'" in message
            assert "EP operators have run on it, so nothing else may" in message


def mixed_use(world: World, case: str) -> None:
    world.meet("start")
    comm = world.comm(name="ep-group")
    try:
        if case == "collective first" or (case == "on one rank first" and world.rank == 0):
            comm.barrier()
        plain_layer(comm, {})
        if case == "on one rank later" and world.rank == 1:
            comm.barrier()
        plain_layer(comm, {})
    finally:
        world.meet("end")


def test_row_13_no_ep_operator_after_a_collective(launch) -> None:
    for result in launch(2, "test_mc2_contracts:mixed_use", "collective first", env=RELAXED):
        result.failed_with(FAILED, "collectives have run on it, and EP operators need a communicator of their own")


def test_row_13_a_collective_on_one_rank(launch) -> None:
    """As the first use all ranks see the difference; later that rank refuses, and the others time out."""
    for result in launch(2, "test_mc2_contracts:mixed_use", "on one rank first", env=RELAXED):
        assert not result.ok
        for text in ("mismatch, operator differs", "Barrier #1", "MoeDistributeDispatch #1"):
            assert text in result.stderr
    env = {**RELAXED, "VIRTUAL_NPU_TIMEOUT_S": "0.3"}
    results = launch(3, "test_mc2_contracts:mixed_use", "on one rank later", env=env)
    results[1].failed_with(NOT_SUPPORT, "Barrier on communicator 'ep-group'", "EP operators have run on it")
    for rank in (0, 2):
        results[rank].failed_with(FAILED, "MoeDistributeDispatch #3", "waited 0.3 s for rank 1 (process ")


# ---- what may not be read


def twice_the_same(world: World, version: int) -> list[dict[str, np.ndarray]]:
    comm = world.comm()
    ep = Ep(comm, 4, version=version)
    batch = make_batch(world.rank, 3, 3, 2, 4, 64, "bf16")
    found = []
    for _ in range(2):
        out = ep.dispatch(batch.x, batch.ids, 8)
        out["y"] = ep.combine(out["expand_x"], batch.ids, out, batch.weights, 8)
        found.append(out)
    return found


@pytest.mark.parametrize("version", [1, 2])
def test_row_14_what_is_not_written_is_poison(launch, version: int) -> None:
    """Rows past the received total, scales that nobody asked for, and combine's rows past the active ones."""
    results = launch.values(2, "test_mc2_contracts:twice_the_same", version, env=RELAXED)
    assert sum(int(first["token_nums"][-1]) for first, _ in results) == 2 * 3 * 2
    for first, _ in results:
        total = int(first["token_nums"][-1])
        assert 0 < total < len(first["expand_x"])
        assert not is_poison(first["expand_x"][:total], "bf16")
        assert is_poison(first["expand_x"][total:], "bf16")
        assert is_poison(first["assist"][6 if version == 1 else total * 3 :])
        for name in ("dynamic_scales", "expand_scales", "tp_recv_counts"):
            assert is_poison(first[name])


def masked_combine(world: World) -> np.ndarray:
    ep = Ep(world.comm(), 4)
    batch = make_batch(world.rank, 4, world.rank, 2, 4, 64, "bf16")
    out = ep.dispatch(batch.x, batch.ids, mask=batch.mask)
    return ep.combine(out["expand_x"], batch.ids, out, batch.weights, mask=batch.mask)


def test_row_14_combine_does_not_write_inactive_rows(launch) -> None:
    for rank, y in enumerate(launch.values(2, "test_mc2_contracts:masked_combine", env=RELAXED)):
        assert not np.isnan(to_float32(y[:rank])).any()
        assert is_poison(y[rank:], "bf16")


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("version", [1, 2])
def test_row_15_contents_that_only_combine_may_read(launch, version: int) -> None:
    """assist_info_for_combine (expand_idx) and ep_recv_counts differ by call and by run, results do not."""
    runs = [launch.values(2, "test_mc2_contracts:twice_the_same", version, env=RELAXED) for _ in range(2)]
    for rank in range(2):
        calls = [call for run in runs for call in run[rank]]
        for name in ("expand_x", "token_nums", "y"):
            assert all(call[name].tobytes() == calls[0][name].tobytes() for call in calls)
        for name in ("assist", "recv_counts"):
            assert len({call[name].tobytes() for call in calls}) == len(calls)


# ---- the pair


def out_of_order(world: World, case: str) -> None:
    hierarchy = case.startswith("hierarchy")
    ep = Ep(world.comm(name="ep-group"), 4, comm_alg="hierarchy" if hierarchy else "")
    x, ids, weights = np.zeros((2, 64), np.uint16), np.array([[0, 3], [1, 2]], np.int32), np.ones((2, 2), np.float32)
    if case == "combine first":
        empty = {"assist": junk((4 * 2 * 128,), "int32"), "recv_counts": junk((4,), "int32"),
                 "tp_recv_counts": junk((1,), "int32"), "expand_scales": junk((8,), "float32")}  # fmt: skip
        ep.combine(np.zeros((8, 64), np.uint16), ids, empty, weights)
    out = ep.dispatch(x, ids, weights=weights if hierarchy else None)
    rows, global_bs, mask = out["expand_x"], 0, None
    if case == "dispatch twice":
        ep.dispatch(x, ids)
    if case == "other ids":
        ids = ids[::-1].copy()
    if case == "other global_bs":
        rows, global_bs = np.zeros((16, 64), np.uint16), 8
    if case == "other counts":
        out["recv_counts"][1] += 1
    if case == "other assist":
        out["assist"][0] += 1
    if case == "other mask":
        mask = np.array([True, False])
    if case == "hierarchy, other expand_scales":
        out["expand_scales"][0] += 1
    if case == "hierarchy, other weights":
        weights = weights * 2
    if case == "hierarchy, other algorithm":
        ep.combine_alg = "fullmesh"
    ep.combine(rows, ids, out, weights, global_bs, mask, comm_quant=2 if case == "comm_quant" else 0)


PAIRS = {
    "combine first": "called without a dispatch before it",
    "dispatch twice": "called twice in a row: the combine of dispatch #1 has not run",
    "other ids": "expert_ids differ from the paired dispatch",
    "other counts": "ep_send_counts is not what the paired dispatch returned",
    "other assist": "assist_info_for_combine (expand_idx) is not what the paired dispatch returned",
    "other mask": "x_active_mask differs from the paired dispatch",
    "comm_quant": "comm_quant_mode=2 is not emulated",
    "hierarchy, other expand_scales": "expand_scales is not what the paired dispatch returned",
    "hierarchy, other weights": "expert_scales differ from the paired dispatch",
    "hierarchy, other algorithm": "comm_alg differs from the paired dispatch",
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairing(launch, case: str) -> None:
    env = RELAXED_A2 if case.startswith("hierarchy") else RELAXED
    for result in launch(2, "test_mc2_contracts:out_of_order", case, env=env):
        result.failed_with(REFUSED, PAIRS[case])


def test_row_07_global_bs_of_the_paired_combine(launch) -> None:
    """The pair differs although each call alone is right: BS 2 with 0 (4 of it) and with 8."""
    for result in launch(2, "test_mc2_contracts:out_of_order", "other global_bs", env=RELAXED):
        result.failed_with(REFUSED, "MoeDistributeCombine", "global_bs differs from the paired dispatch", "global_bs=8")


def layers(world: World, calls: list[tuple[int, int]]) -> None:
    comm = world.comm(name="ep-group")
    for bs, global_bs in calls:
        plain_layer(comm, {"bs": bs, "global_bs": global_bs})


@pytest.mark.parametrize("calls", [[(2, 0), (4, 0), (1, 0)], [(2, 12), (1, 12), (6, 12), (6, 0), (2, 12)]])
def test_row_07_layers_that_agree(launch, calls: list[tuple[int, int]]) -> None:
    """0 while BS changes from step to step; and one bound for all, which 0 with BS at the bound is as well."""
    launch.values(2, "test_mc2_contracts:layers", calls, env=RELAXED)


def test_row_07_a_bound_after_several_sizes(launch) -> None:
    for result in launch(2, "test_mc2_contracts:layers", [(2, 0), (4, 0), (2, 8)], env=RELAXED):
        result.failed_with(REFUSED, "global_bs=8 (BS=2) differs from 8 of an earlier layer")


# ---- ranks that differ


def differs(world: World, odd: dict[str, Any]) -> None:
    odd = odd if world.rank == 1 else {}
    plain_dispatch(world.comm(name="ep-group", buffer_mb=odd.get("buffer_mb", 0)), odd)


def reported_by_all(results: list[RankResult], field: str, even_text: str, odd_text: str) -> None:
    """Every rank fails at once, and names itself, one other rank, and what both called."""
    for rank, result in enumerate(results):
        other = 1 if rank != 1 else 0
        result.failed_with(
            FAILED, f"MoeDistributeDispatch #1 on communicator 'ep-group', rank {rank} of 4: mismatch, {field} differs",
            f"rank {rank} called", f"rank {other} called", even_text, odd_text,
        )  # fmt: skip
        assert result.seconds < 10


def test_row_06_bs_differs_with_global_bs_0(launch) -> None:
    texts = "BS=2, x_active_mask=no, global_bs=8", "BS=4, x_active_mask=no, global_bs=16"
    reported_by_all(launch(4, "test_mc2_contracts:differs", {"bs": 4}, env=RELAXED), "global_bs", *texts)


def test_row_07_global_bs_differs_between_ranks(launch) -> None:
    results = launch(4, "test_mc2_contracts:differs", {"global_bs": 12}, env=RELAXED)
    reported_by_all(results, "global_bs", "global_bs=8", "global_bs=12")


@pytest.mark.parametrize(
    ("odd", "field", "even_value", "odd_value"),
    [
        ({"experts": 12}, "moe_expert_num", 8, 12),
        ({"shared_num": 0}, "shared_expert_num", 1, 0),
        ({"comm_alg": "fullmesh_v2"}, "comm_alg", "fullmesh,", "fullmesh_v2,"),
        ({"buffer_mb": 300}, "HCCL_BUFFSIZE", 200, 300),
    ],
)
def test_row_16_attributes_differ(launch, odd: dict[str, Any], field: str, even_value: Any, odd_value: Any) -> None:
    results = launch(4, "test_mc2_contracts:differs", odd, env=RELAXED)
    reported_by_all(results, field, f"{field}={even_value}", f"{field}={odd_value}")


@pytest.mark.parametrize(
    ("odd", "field", "even_value", "odd_value"),
    [
        ({"k": 3}, "K", 2, 3),
        ({"h": 128}, "H", 64, 128),
        ({"dtype": "float16"}, "dtype", "bf16", "fp16"),
        ({"quant": 2}, "quant_mode", 0, 2),
        ({"version": 1}, "version", 2, 1),
    ],
)
def test_other_attributes_differ(launch, odd: dict[str, Any], field: str, even_value: Any, odd_value: Any) -> None:
    results = launch(4, "test_mc2_contracts:differs", odd, env=RELAXED)
    reported_by_all(results, field, f"{field}={even_value}", f"{field}={odd_value}")


def test_row_16_buffer_by_variable(launch) -> None:
    results = launch(4, "test_mc2_contracts:differs", {}, env=RELAXED, rank_env={1: {"HCCL_BUFFSIZE": "300"}})
    reported_by_all(results, "HCCL_BUFFSIZE", "HCCL_BUFFSIZE=200", "HCCL_BUFFSIZE=300")


def test_row_16_hierarchy_by_variables(launch) -> None:
    odd = {"weights": True}
    results = launch(4, "test_mc2_contracts:differs", odd, env=RELAXED_A2, rank_env={1: HIERARCHY})
    reported_by_all(results, "comm_alg", "comm_alg=fullmesh", "comm_alg=hierarchy")


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"ranks": 6}, "ep_rank_id=1 of ep_world_size=6 is not this rank of the communicator"),
        ({"rank": 2}, "ep_rank_id=2 of ep_world_size=3 is not this rank of the communicator"),
        ({"shard_type": 1}, "expert_shard_type=1 is not valid, only 0 is"),
        ({"shared_num": 2}, "shared_expert_num=2 is not valid without shared-expert ranks"),
        ({"shared_ranks": 1}, "shared_expert_rank_num=1 is not emulated"),
    ],
)
def test_row_16_attributes_that_one_rank_sees(launch, odd: dict[str, Any], message: str) -> None:
    refused(launch, message, odd)


def test_row_16_an_unknown_group(launch) -> None:
    results = launch(2, "test_mc2_contracts:other_group", "nobody", env={**RELAXED, "VIRTUAL_NPU_TIMEOUT_S": "0.3"})
    results[1].failed_with(REFUSED, "'nobody' is not the name of a communicator of this process")
    results[0].failed_with(FAILED, "MoeDistributeDispatch #1 on communicator 'ep-group'", "waited 0.3 s for rank 1")


def test_row_16_another_group(launch) -> None:
    """Rank 1 takes another communicator of the same ranks: both wait, and both reports say where."""
    results = launch(2, "test_mc2_contracts:other_group", "ep-group-2", env={**RELAXED, "VIRTUAL_NPU_TIMEOUT_S": "0.3"})
    results[0].failed_with(FAILED, "MoeDistributeDispatch #1 on communicator 'ep-group', rank 0", "no operator yet")
    results[1].failed_with(FAILED, "MoeDistributeDispatch #1 on communicator 'ep-group-2', rank 1", "no operator yet")


def other_group(world: World, name: str) -> None:
    world.meet("start")
    comm = world.comm("first", name="ep-group")
    world.comm("second", name="ep-group-2")
    try:
        plain_dispatch(comm, {"group": name} if world.rank == 1 else {})
    finally:
        world.meet("end")


def mask_and_ragged(world: World) -> None:
    """No rank can see it alone: the larger one has a mask and global_bs = BS*R, the smaller one has none."""
    mask = {"mask": [1] * 4} if world.rank == 1 else {}
    plain_dispatch(world.comm(name="ep-group"), {"bs": 4 if world.rank == 1 else 2, "global_bs": 8, **mask})


def test_row_04_a_mask_on_the_largest_rank(launch) -> None:
    for result in launch(2, "test_mc2_contracts:mask_and_ragged", env=RELAXED):
        result.failed_with(
            FAILED, "BS differs between ranks while x_active_mask is used", "BS=2, x_active_mask=no",
            "BS=4, x_active_mask=yes",
        )  # fmt: skip


# ---- hierarchy


@pytest.mark.parametrize(
    ("env", "everybody"),
    [
        (RELAXED_A2, {"comm_alg": "hierarchy", "weights": True}),
        (RELAXED_A2 | HIERARCHY, {"weights": True}),
        (RELAXED_A2 | HIERARCHY, {"weights": True, "version": 1}),
    ],
    ids=["comm_alg", "variables", "variables, version 1"],
)
def test_row_17_hierarchy_with_global_bs(launch, env: dict[str, str], everybody: dict[str, Any]) -> None:
    message = "comm_alg hierarchy cannot work when BS differs between ranks (global_bs=24, BS=4): it needs global_bs=0"
    refused(launch, message, {"global_bs": 24}, everybody, env)


@pytest.mark.parametrize(
    "variables", [{}, {**HIERARCHY, "HCCL_INTRA_ROCE_ENABLE": "1"}, {"HCCL_INTRA_PCIE_ENABLE": "1"}]
)
def test_row_17_only_both_variables_mean_hierarchy(launch, variables: dict[str, str]) -> None:
    launch.values(2, "test_mc2_contracts:layers", [(2, 12)], env=RELAXED_A2 | variables)


def test_row_17_comm_alg_wins_over_the_variables(launch) -> None:
    env, everybody = RELAXED_A2 | HIERARCHY, {"comm_alg": "fullmesh", "global_bs": 24}
    launch.values(3, "test_mc2_contracts:odd_dispatch", {"bs": 4, **everybody}, {"bs": 1}, True, env=env)


def test_row_17_hierarchy_on_a3(launch) -> None:
    everybody = {"comm_alg": "hierarchy", "weights": True}
    for global_bs, message in ((24, "it needs global_bs=0"), (0, "the hierarchy algorithm is emulated on A2 only")):
        for result in launch(2, "test_mc2_contracts:layer_of", {**everybody, "global_bs": global_bs}, env=RELAXED):
            result.failed_with(REFUSED, message)


def layer_of(world: World, case: dict[str, Any]) -> None:
    plain_layer(world.comm(name="ep-group"), case)


# ---- other arguments


OTHER = {
    "mask by slot": ({"mask": [[1, 0]] * 4}, "x_active_mask bool [4, 2] is not emulated"),
    "tensor parallel": ({"tp_world_size": 2}, "tp_world_size=2 is not emulated"),
    "experts not a multiple": ({"experts": 7}, "moe_expert_num=7 is not a multiple of ep_world_size=3"),
    "unknown algorithm": ({"comm_alg": "ring"}, "comm_alg 'ring' is unknown"),
    "algorithm of another device": ({"comm_alg": "fullmesh"}, "comm_alg 'fullmesh' is unknown on Ascend910_9391"),
    "quant mode": ({"quant": 3}, "quant_mode=3 is not supported"),
    "scales without quantisation": ({"smooth": True}, "scales without quant_mode 2"),
    "token numbers": ({"nums_type": 2}, "expert_token_nums_type=2 is not valid"),
    "weights without hierarchy": ({"weights": True}, "expert_scales is for the hierarchy algorithm only"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_other_refusals(launch, name: str) -> None:
    odd, message = OTHER[name]
    refused(launch, message, odd)


def test_a_mask_is_for_version_2_only(launch) -> None:
    refused(launch, "x_active_mask is reserved in version 1", {"mask": [1, 1, 1, 1]}, {"version": 1})


def test_hierarchy_needs_the_weights(launch) -> None:
    everybody, message = {"comm_alg": "hierarchy", "weights": True}, "expert_scales is missing"
    refused(launch, message, {"weights": False}, everybody, RELAXED_A2)


def test_window_of_the_emulator(launch) -> None:
    """The virtual window is something else than HCCL_BUFFSIZE: its own error names its own variable."""
    case = {"h": 7168, "bs": 64, "experts": 16, "k": 8}
    for result in launch(2, "test_mc2_contracts:layer_of", case, env={**RELAXED, "VIRTUAL_NPU_WINDOW_MB": "1"}):
        result.failed_with(FAILED, "needs a window of", "VIRTUAL_NPU_WINDOW_MB=1 is too small")


# ---- documented limits

# For each device, version and algorithm: a shape that is allowed, the values at the edge that are allowed too, and for
# each of them what is refused in strict mode; "always" those that relaxed mode refuses as well.
LIMITS: dict[str, dict[str, Any]] = {
    "A3": {
        "env": A3, "ranks": 8, "shape": {"h": 1024, "experts": 32},
        "good": {"bs": [1, 512], "k": [1, 16], "h": [1024, 8192], "experts": [16, 1024]},
        "toy": {"h": [1, 1023]},
        "always": {"bs": [0, 513], "k": [0, 17], "h": [0, 8193], "experts": [1032]},
    },
    "A3, fullmesh_v2": {
        "env": A3, "ranks": 8, "shape": {"h": 1024, "experts": 32, "comm_alg": "fullmesh_v2"},
        "good": {"bs": [1, 256], "k": [1, 12], "h": [1024, 8192], "experts": [16, 1024]},
        "toy": {"h": [1023]},
        "always": {"bs": [0, 257], "k": [0, 13], "h": [8193], "experts": [1032]},
    },
    "A3, version 1": {
        "env": A3, "ranks": 8, "shape": {"h": 7168, "experts": 32, "version": 1},
        "good": {"bs": [1, 512], "k": [1, 8], "h": [7168], "experts": [16, 512]},
        "toy": {"h": [64, 7167]},
        "always": {"bs": [0, 513], "k": [0, 9], "h": [7169], "experts": [520]},
    },
    "A2": {
        "env": A2, "ranks": 16, "shape": {"h": 1024, "experts": 32},
        "good": {"bs": [1, 256], "k": [1, 16], "h": [32, 7168], "experts": [16, 400, 512]},
        "toy": {"h": [16, 48]},
        "always": {"bs": [0, 257], "k": [0, 17], "h": [0, 7200], "experts": [528]},
    },
    "A2, hierarchy": {
        "env": A2, "ranks": 16, "shape": {"h": 1024, "experts": 32, "comm_alg": "hierarchy", "weights": True},
        "good": {"bs": [1, 256], "k": [1, 16], "h": [32, 10240], "experts": [16, 512]},
        "toy": {"h": [48]},
        "always": {"bs": [0, 257], "k": [0, 17], "h": [10272], "experts": [528]},
    },
    "A2, version 1": {
        "env": A2, "ranks": 16, "shape": {"h": 1024, "experts": 32, "version": 1},
        "good": {"bs": [1, 256], "k": [1, 16], "h": [32, 7168], "experts": [16, 384]},
        "toy": {"h": [48]},
        "always": {"bs": [0, 257], "k": [0, 17], "h": [7200], "experts": [400, 528]},
    },
    "A2, version 1, hierarchy": {
        "env": A2 | HIERARCHY, "ranks": 16, "shape": {"h": 1024, "experts": 32, "version": 1, "weights": True},
        "good": {"bs": [1, 256], "k": [1, 16], "h": [32, 10240], "experts": [16, 400, 512]},
        "toy": {"h": [48]},
        "always": {"bs": [0, 257], "k": [0, 17], "h": [10272], "experts": [528]},
    },
}  # fmt: skip
NAMES = {"bs": "BS", "k": "K", "h": "H", "experts": "moe_expert_num"}


def check_limits(world: World, shape: dict[str, Any], values: dict[str, list[int]]) -> dict[tuple[str, int], str]:
    """What each value in turn is refused with, in the shape, with the largest HCCL window that there is."""
    comm = world.comm(name="ep-group", buffer_mb=4_000_000)
    found = {}
    for name, ones in values.items():
        for value in ones:
            case = {"bs": 1, "k": 1, **shape, name: value}
            if case["bs"] == 0 or case["k"] == 0:
                case["ids"] = np.zeros((case["bs"], case["k"]))
            found[name, value] = complaint(lambda case=case: plain_dispatch(comm, case, check_only=True))
    world.meet("end")
    return found


@pytest.mark.parametrize("shapes", ["strict", "relaxed"])
@pytest.mark.parametrize("name", LIMITS)
def test_limits(launch, name: str, shapes: str) -> None:
    limits = LIMITS[name]
    groups = {group: limits[group] for group in ("good", "toy", "always")}
    values = {key: [one for group in groups.values() for one in group.get(key, [])] for key in NAMES}
    env = {**limits["env"], "VIRTUAL_NPU_SHAPES": shapes}
    found = launch.values(limits["ranks"], "test_mc2_contracts:check_limits", limits["shape"], values, env=env)
    for rank in found:
        for group, by_name in groups.items():
            for key, ones in by_name.items():
                for value in ones:
                    message = rank[key, value]
                    if group == "good" or (group == "toy" and shapes == "relaxed"):
                        assert message == ""
                        continue
                    assert f"{NAMES[key]}={value} is " in message or f"{NAMES[key]}/ep_world_size" in message
                    assert ("VIRTUAL_NPU_SHAPES=relaxed lifts this" in message) == (group == "toy")


@pytest.mark.parametrize(
    ("env", "shape", "ranks", "message"),
    [
        (A3, {"h": 1024}, 1, "ep_world_size=1 is not in 2..768"),
        (A3, {"h": 1024, "comm_alg": "fullmesh_v2"}, 1, "ep_world_size=1 is not in 2..768"),
        (A3, {"h": 1024}, 2, ""),
        (A3, {"h": 7168, "version": 1}, 2, "ep_world_size=2 is not in 8, 16, 32, 64, 128, 144, 256, 288"),
        (A3, {"h": 7168, "version": 1}, 17, "ep_world_size=17 is not in 8, 16"),
        (A2, {}, 8, "ep_world_size=8 is not in 16, 32, 64, 128, 256"),
        (A2, {}, 24, "ep_world_size=24 is not in 16, 32, 64, 128, 256"),
        (A2, {}, 32, ""),
        (A2, {"version": 1}, 8, "ep_world_size=8 is not in 16, 32, 64"),
        (A2, {"version": 1, "experts": 512}, 32, ""),
        (A2, {"version": 1, "experts": 544}, 32, "moe_expert_num=544 is outside 1..512"),
        (A2, {"comm_alg": "hierarchy", "weights": True}, 8, "ep_world_size=8 is not in 16, 32, 64"),
        (A2 | HIERARCHY, {"version": 1, "weights": True}, 8, "ep_world_size=8 is not in 16, 32, 64"),
        ({**A2, "VIRTUAL_NPU_SHAPES": "relaxed"}, {"version": 1}, 65, "ep_world_size=65 is outside 1..64"),
        ({**A2, "VIRTUAL_NPU_SHAPES": "relaxed"}, {}, 65, ""),
    ],
)
def test_limits_of_the_group(launch, env: dict[str, str], shape: dict[str, Any], ranks: int, message: str) -> None:
    case = {"experts": ranks, "k": 1, **shape}
    for (found,) in launch.values(ranks, "test_mc2_contracts:check_windows", [case], env=env):
        assert message in found
        assert bool(message) == bool(found)
        assert ("relaxed lifts this" in found) == ("is not in" in message)

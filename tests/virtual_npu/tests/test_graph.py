# SPDX-License-Identifier: Apache-2.0
"""ACL graphs through torch_npu: what a capture records, and what a replay computes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch_forks import TorchForks

START = """
import os
import torch, torch_npu
torch.npu.set_device(int(os.environ.get("RANK", 0)))

def capture(body, **options):
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, **options):
        result = body()
    return graph, result

def refused(body, text):
    try:
        body()
    except (RuntimeError, ValueError) as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"not refused: {text}")
"""

OPERATORS = """
x, w = torch.arange(8.).reshape(2, 4).npu(), torch.full((4,), 2.).npu()
total, ids = torch.zeros(2, 4).npu(), torch.tensor([3, 1]).npu()

def body():
    y = (x @ x.T).exp_().clamp(max=50)                     # aten, with an operator in place
    normed, _ = torch_npu.npu_rms_norm(x, w, 1e-6)         # an NPU operator
    values, order = torch.topk(normed, 2)                  # several results
    total.add_(x)                                          # memory from before the capture
    total[1].copy_(x[0])                                   # into a view
    first, second = x.to(torch.bfloat16).chunk(2, 1)       # views of a copy
    picked = x.index_select(1, ids) + 1
    return y, normed, values, order, first * second, torch.cat([picked, x], 1), torch.where(x > 2, x, -x)

graph, results = capture(body)
assert total.cpu().eq(0).all()                             # a capture executes nothing
for _ in range(2):
    x.copy_(torch.randn(2, 4))
    ids.copy_(torch.randperm(4)[:2])
    before = total.clone()
    graph.replay()
    after, got = total.clone(), [result.clone() for result in results]
    total.copy_(before)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, body(), strict=True))
    assert torch.equal(after.cpu(), total.cpu())
    assert not torch.equal(after.cpu(), before.cpu())

# host values are those of the capture, pinned memory is read again
scale, pinned, target = torch.tensor(3.), torch.ones(4).pin_memory(), torch.zeros(4).npu()
def with_host():
    target.copy_(pinned, non_blocking=True)
    return target * scale
graph, result = capture(with_host)
pinned.fill_(5.), scale.fill_(100.)
graph.replay()
assert result.cpu().tolist() == [15.] * 4

# resized results, and a second stream that joins in
out, side = torch.empty(0).npu(), torch.npu.Stream()
def forked():
    torch.mul(x, 2, out=out)
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        other = x + 1
    torch.npu.current_stream().wait_stream(side)
    return other * 2
graph, result = capture(forked)
x.fill_(4.)
graph.replay()
assert out.cpu().eq(8).all() and result.cpu().eq(10).all()
with torch.npu.stream(side):
    assert (x + 1).cpu().eq(5).all()                       # eager again
"""

MEMORY = """
x = torch.ones(1 << 20).npu()                              # 4 MB; torch_npu takes 20 MB at a time
def chain():
    y = x
    for _ in range(16):
        y = y + 1
    return y
torch.npu.empty_cache()
reserved = torch.npu.memory_reserved()
first, a = capture(chain)
taken = torch.npu.memory_reserved() - reserved
assert taken <= 24 << 20, taken                            # a recorded call keeps no memory
pool = first.pool()
address = a.data_ptr()
del a
second, b = capture(lambda: x * 3, pool=pool)
assert b.data_ptr() in range(address - (20 << 20), address + (20 << 20))
first.replay(), second.replay()
assert b.cpu().eq(3).all()
x.fill_(2.)
second.replay()
assert b.cpu().eq(6).all()
del first, second

own = torch.ones(8 << 20).npu()                            # a segment of its own, which goes back to the device
graph, result = capture(lambda: own + 1)
del own
torch.npu.empty_cache()
refused(graph.replay, "has been given back")
"""

ERRORS = """
x = torch.ones(4).npu()

# the shape of a result that depends on values
graph, _ = capture(lambda: torch.bincount(x.int()))
x.fill_(9.)
refused(graph.replay, "depends on values")

# a wait for an external event
event, other = torch.npu.ExternalEvent(), torch.npu.Stream()
def waits():
    event.wait(torch.npu.current_stream())
    event.reset(torch.npu.current_stream())
    return x + 1
graph, y = capture(waits)
for value in (3., 4.):
    x.fill_(value)
    graph.replay()
    refused(lambda: x + 1, "is blocked")
    refused(torch.npu.synchronize, "is blocked")
    with torch.npu.stream(other):
        event.record(other)
    assert y.cpu().tolist() == [value + 1] * 4
event.record(other)                                        # before the replay
graph.replay()
assert y.cpu().tolist() == [5.] * 4

# What waits for the device ends a capture. (Afterwards torch_npu can begin another one, but not by torch.npu.graph.)
x.fill_(1.)
WAYS = {
    "item": lambda: x[0].item(),
    "a copy to the host": lambda: x.cpu(),
    "a copy from the host": lambda: torch.ones(4).npu(),
    "nonzero": lambda: x.nonzero(),
    "aclrtSynchronizeStream": lambda: torch.npu.current_stream().synchronize(),
    "aclrtSynchronizeDevice": lambda: torch.npu.synchronize(),
}
for text, way in WAYS.items():
    graph, stream = torch.npu.NPUGraph(), torch.npu.Stream()
    with torch.npu.stream(stream):
        graph.capture_begin()
        y = x + 1
        refused(way, text)
        refused(lambda: x + 1, "the capture is invalid since: ")
        refused(graph.capture_end, "during the capture")
    assert x.cpu().tolist() == [1.] * 4                    # and eager mode goes on
"""

# As stock does it: the graph waits for the update, which is issued after the replay.
UPDATE = """
heads, width, block = 2, 64, 4
torch.manual_seed(0)
query = torch.randn(2, heads, width).bfloat16().npu()
keys, values = torch.randn(2, 8, block, heads, width).bfloat16().npu().unbind(0)
table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32).npu()
out, stream = torch.empty_like(query), torch.npu.Stream()

def attention(lengths, into):
    torch_npu._npu_paged_attention(
        query=query, key_cache=keys, value_cache=values, num_kv_heads=heads, num_heads=heads, scale_value=0.1,
        block_table=table, context_lens=torch.tensor(lengths, dtype=torch.int32), out=into)

def expected(lengths):
    reference = torch.empty_like(query)
    attention(lengths, reference)
    return (reference * 2).cpu()

event = torch.npu.ExternalEvent()
def body():
    global handle
    now = torch.npu.current_stream()
    event.wait(now), event.reset(now)
    torch.npu.graph_task_group_begin(now)
    attention([1, 1], out)
    handle = torch.npu.graph_task_group_end(now)
    return out * 2

graph, result = capture(body)
for lengths in ([3, 8], [5, 2]):
    query.copy_(torch.randn(2, heads, width))
    wanted = expected(lengths)
    graph.replay()
    with torch.npu.stream(stream):
        torch.npu.graph_task_update_begin(stream, handle)
        attention(lengths, out)
        torch.npu.graph_task_update_end(stream)
        event.record(stream)
    assert torch.equal(result.cpu(), wanted)

with torch.npu.stream(stream):
    torch.npu.graph_task_update_begin(stream, handle)
    refused(lambda: torch_npu.npu_rms_norm(query, torch.ones(width).npu()), "update of a task group")
    refused(lambda: torch.npu.graph_task_update_end(stream), "holds 1 calls, the update 0")
"""


@pytest.mark.parametrize("code", [OPERATORS, MEMORY, ERRORS, UPDATE], ids=["operators", "memory", "errors", "update"])
def test_on_one_device(torch_forks: TorchForks, tmp_path: Path, code: str) -> None:
    status, output = torch_forks.run(START + code, tmp_path / "output")
    assert status == 0, output


RANKS = (
    START
    + """
import torch.distributed as dist
rank = int(os.environ["RANK"])
dist.init_process_group("hccl", init_method=os.environ["STORE"], rank=rank, world_size=2)
group = dist.new_group([0, 1], backend="hccl")
name = group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
common = dict(group_ep=name, ep_world_size=2, ep_rank_id=rank, moe_expert_num=4, global_bs=0)

def layer(x, ids, weights):
    out = torch_npu.npu_moe_distribute_dispatch_v2(x=x, expert_ids=ids, expert_token_nums_type=0, **common)
    return torch_npu.npu_moe_distribute_combine_v2(
        expand_x=out[0] * 2, expert_ids=ids, assist_info_for_combine=out[2], ep_send_counts=out[4],
        expert_scales=weights, **common)

def fill(step):
    torch.manual_seed(2 * step + rank)
    x.copy_(torch.randn(2, 64))
    ids.copy_(torch.stack([torch.randperm(4)[:2] for _ in range(2)]))
    weights.fill_(0.5)

x, ids, weights = torch.zeros(2, 64).bfloat16().npu(), torch.zeros(2, 2).int().npu(), torch.zeros(2, 2).npu()
"""
)

COMMUNICATION = """
value, gathered, swapped = torch.zeros(4).npu(), torch.zeros(8).npu(), torch.zeros(4).npu()
dist.all_reduce(value)                                     # makes the communicator

def body():
    dist.all_reduce(value)
    dist.all_gather_into_tensor(gathered, value + rank)
    dist.all_to_all_single(swapped, value + rank, [1, 3] if rank == 0 else [3, 1], [1, 3] if rank == 0 else [3, 1])
    return layer(x, ids, weights) + 1

if rank == 1:                                              # captures meet nobody, so ranks need not capture together
    graph, y = capture(body)
dist.barrier()
if rank == 0:
    graph, y = capture(body)
for step in range(2):
    fill(step)
    value.fill_(rank + step)
    graph.replay()
    total = 1. + 2 * step
    assert value.cpu().tolist() == [total] * 4
    assert gathered.cpu().tolist() == [total] * 4 + [total + 1] * 4
    assert swapped.cpu().tolist() == ([total] + [total + 1] * 3 if rank == 0 else [total] * 3 + [total + 1])
    assert torch.equal(y.cpu(), x.cpu() * 2 + 1)
print("done")
"""

MIXED = """
import ctypes, pathlib
fill(0)
graph, y = capture(lambda: layer(x, ids, weights))
graph.replay()                                             # both in a graph
layer(x, ids, weights)                                     # both eagerly
if os.environ["VIRTUAL_NPU_MIXED_MODES"] == "report":
    result = graph.replay() or y if rank == 0 else layer(x, ids, weights)
    assert torch.equal(result.cpu(), x.cpu() * 2)
else:
    other = ["rank 0 runs it in a graph, rank 1 eagerly", "rank 1 runs it eagerly, rank 0 in a graph"][rank]
    # Within a step, other events are kept back.
    ctypes.CDLL("libascendcl.so").vnpu_ledger_step(ctypes.c_int64(0), b"execute", ctypes.c_int64(2))
    refused(graph.replay if rank == 0 else lambda: layer(x, ids, weights), f"mixed modes: {other}")
    ledger, = pathlib.Path(os.environ["VIRTUAL_NPU_LEDGER_DIR"]).iterdir()
    assert "mixed_modes" in ledger.read_text(), "lost if this process is killed now"
"""


def run_ranks(forks: TorchForks, code: str, folder: Path, **environment: str) -> list[list[dict[str, Any]]]:
    """The ledgers of two ranks, both of which must succeed."""
    common = {"STORE": f"file://{folder}/store", "VIRTUAL_NPU_SHAPES": "relaxed", "VIRTUAL_NPU_TIMEOUT_S": "20"}
    outputs = [folder / f"rank-{rank}" for rank in range(2)]
    ledgers = [folder / f"ledger-{rank}" for rank in range(2)]
    jobs = []
    for rank, output in enumerate(outputs):
        ledgers[rank].mkdir()
        own = {"RANK": str(rank), "VIRTUAL_NPU_LEDGER_DIR": str(ledgers[rank])}
        jobs.append(forks.start(RANKS + code, output, **common, **own, **environment))
    statuses = [forks.finish(job, 100) for job in jobs]
    assert statuses == [0] * 2, "\n".join(output.read_text() for output in outputs)
    return [
        [json.loads(line) for path in ledger.iterdir() for line in path.read_text().splitlines()] for ledger in ledgers
    ]


@pytest.mark.timeout(120)
def test_communication(torch_forks: TorchForks, tmp_path: Path) -> None:
    for events in run_ranks(torch_forks, COMMUNICATION, tmp_path):
        assert [event["op"] for event in events if event["ev"] == "graph"] == ["capture", "replay", "replay"]
        ep = [(event["op"], event["mode"]) for event in events if event["ev"] == "ep"]
        assert ep == [("dispatch", "graph"), ("combine", "graph")] * 2
        collectives = [event["kind"] for event in events if event["ev"] == "collective" and event["mode"] == "graph"]
        assert collectives == ["AllReduce", "AllGather", "AlltoAllV"] * 2


@pytest.mark.timeout(120)
@pytest.mark.parametrize("choice", ["refuse", "report"])
def test_mixed_modes(torch_forks: TorchForks, tmp_path: Path, choice: str) -> None:
    for rank, events in enumerate(run_ranks(torch_forks, MIXED, tmp_path, VIRTUAL_NPU_MIXED_MODES=choice)):
        found = [event for event in events if event["ev"] == "violation"]
        modes = ["graph", "eager"] if rank == 0 else ["eager", "graph"]
        assert len(found) == (1 if choice == "refuse" else 2)  # a dispatch that is refused has no combine
        for event in found:
            assert event["rule"] == "mixed_modes"
            assert event["rank"] == rank
            assert [event["mode"], event["peer_mode"]] == modes

# SPDX-License-Identifier: Apache-2.0
"""torch.distributed and the MC2 operators through torch_npu's own code: ProcessGroupHCCL, op-plugin, both versions."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch_forks import TorchForks

START = """
import os
import torch, torch_npu
import torch.distributed as dist

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.npu.set_device(rank)
dist.init_process_group("hccl", init_method=os.environ["STORE"], rank=rank, world_size=size)

def ep_group():
    group = dist.new_group(list(range(size)), backend="hccl")
    name = group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    return dict(group_ep=name, ep_world_size=size, ep_rank_id=rank)
"""

RANK = (
    START
    + """

# collectives
total = torch.full((4,), rank + 1, dtype=torch.int32).npu()
dist.all_reduce(total)
assert total.cpu().tolist() == [3] * 4
parts = [torch.zeros(4, dtype=torch.int32).npu() for _ in range(size)]
dist.all_gather(parts, total + rank)
assert [int(p[0]) for p in parts] == [3, 4]
shared = torch.tensor([7.5 if rank == 0 else 0.0]).npu()
dist.broadcast(shared, 0)
assert shared.item() == 7.5
piece = torch.zeros(2).npu()
dist.reduce_scatter_tensor(piece, torch.arange(4.0).npu())
assert piece.cpu().tolist() == ([0, 2] if rank == 0 else [4, 6])
swapped = torch.zeros(4).npu()
dist.all_to_all_single(swapped, torch.arange(4.0).npu() + 10 * rank)
assert swapped.cpu().tolist() == ([0, 1, 10, 11] if rank == 0 else [2, 3, 12, 13])
values, received = torch.arange(6.0).npu() + rank, torch.zeros(6).npu()
dist.send(values, 1) if rank == 0 else dist.recv(received, 0)
assert rank == 0 or received.cpu().tolist() == list(range(6))
pair = [dist.P2POp(dist.isend, values, 1 - rank), dist.P2POp(dist.irecv, received, 1 - rank)]
for work in dist.batch_isend_irecv(pair):
    work.wait()
assert received[0].item() == 1 - rank
dist.barrier()

# MC2 on a group of its own; rank r has r+1 rows, the experts return the rows as they are
bs, h = rank + 1, 1024
torch.manual_seed(rank)
x = torch.randn(bs, h).bfloat16().npu()
ids = torch.stack([torch.randperm(4)[:2] for _ in range(bs)]).int().npu()
weights = torch.rand(bs, 2).npu()
common = dict(ep_group(), moe_expert_num=4)
rows = x.cpu().float()
expected = (rows * weights.cpu()[:, :1] + rows * weights.cpu()[:, 1:]).bfloat16()
for version in ("2", "1"):
    suffix, index = ("_v2", "assist_info_for_combine") if version == "2" else ("", "expand_idx")
    dispatch = getattr(torch_npu, "npu_moe_distribute_dispatch" + suffix)
    combine = getattr(torch_npu, "npu_moe_distribute_combine" + suffix)
    tp = dict(group_tp=common["group_ep"], tp_world_size=1, tp_rank_id=0)
    out = dispatch(x=x, expert_ids=ids, global_bs=8, expert_token_nums_type=0, **common, **tp)
    assert [tuple(o.shape) for o in out] == [
        (16, h), (16,), (2048,) if version == "2" else (bs * 2,), (2,), (4,), (1,), (16,)
    ]
    assert int(out[3][-1]) == int(out[3].cpu().max())
    y = combine(expand_x=out[0], expert_ids=ids, ep_send_counts=out[4], expert_scales=weights, global_bs=8,
                tp_send_counts=out[5], expand_scales=out[6], **{index: out[2]}, **common, **tp)
    assert torch.equal(y.cpu(), expected)

try:
    torch_npu.npu_moe_distribute_dispatch_v2(x, ids[:, :1].repeat(1, 2), global_bs=8, **common)
except RuntimeError as error:
    assert "names expert" in str(error), error
    print("refused")
dist.destroy_process_group()
"""
)


# What the emulation takes for granted about the binding: 0 becomes BS * ep_world_size before CANN sees it, and weights
# for the hierarchy algorithm make ep_recv_counts longer.
BINDING = (
    START
    + """
common = dict(ep_group(), moe_expert_num=2 * size)

def layer(bs, **options):
    x = torch.randn(bs, 64).bfloat16().npu()
    ids = torch.stack([torch.randperm(2 * size)[:2] for _ in range(bs)]).int().npu()
    weights = torch.full((bs, 2), 0.5).npu()
    mine = dict(expert_scales=weights) if os.environ["LAYER"] == "hierarchy" else {}
    out = torch_npu.npu_moe_distribute_dispatch_v2(x=x, expert_ids=ids, expert_token_nums_type=0, **mine, **common,
                                                   **options)
    y = torch_npu.npu_moe_distribute_combine_v2(
        expand_x=out[0], expert_ids=ids, assist_info_for_combine=out[2], ep_send_counts=out[4], expert_scales=weights,
        expand_scales=out[6], **common, **options)
    assert torch.equal(y.cpu(), x.cpu())
    return out[4].numel()

if os.environ["LAYER"] == "hierarchy":
    for bs in (3, 1):
        assert layer(bs) == size * 2 + 2 * (bs * size) * 2 * (size // 8)
else:
    for bs in (3, 1):
        layer(bs)
    for bs, bound in ((2, 3 * size), (1, 0)):  # no bound after two sizes with 0
        try:
            layer(bs, global_bs=bound)
        except RuntimeError as error:
            assert "of an earlier layer: it must be the same in all layers" in str(error), error
            print("refused", bs)
dist.destroy_process_group()
"""
)


def run_ranks(forks: TorchForks, code: str, folder: Path, size: int, **environment: str) -> list[str]:
    """The outputs of `size` ranks, all of which must succeed."""
    common = {"WORLD_SIZE": str(size), "STORE": f"file://{folder}/store", **environment}
    outputs = [folder / f"rank-{rank}" for rank in range(size)]
    jobs = [forks.start(code, output, RANK=str(rank), **common) for rank, output in enumerate(outputs)]
    statuses = [forks.finish(job, 100) for job in jobs]
    texts = [output.read_text() for output in outputs]
    assert statuses == [0] * size, "\n".join(texts)
    return texts


@pytest.mark.timeout(120)
def test_through_torch_npu(torch_forks: TorchForks, tmp_path: Path) -> None:
    """The version-1 operator demands H = 7168 and more ranks on A3, hence relaxed shapes."""
    for output in run_ranks(torch_forks, RANK, tmp_path, 2, VIRTUAL_NPU_SHAPES="relaxed"):
        assert "refused" in output


@pytest.mark.timeout(120)
def test_row_07_through_torch_npu(torch_forks: TorchForks, tmp_path: Path) -> None:
    environment = {"LAYER": "mesh", "VIRTUAL_NPU_SHAPES": "relaxed"}
    for output in run_ranks(torch_forks, BINDING, tmp_path, 2, **environment):
        assert "refused 2" in output
        assert "refused 1" not in output  # 0 goes on as before


@pytest.mark.timeout(120)
def test_hierarchy_through_torch_npu(torch_forks: TorchForks, tmp_path: Path) -> None:
    """As stock 0.11.0 calls it on A2: no comm_alg, both variables, the weights given to dispatch."""
    environment = {
        "LAYER": "hierarchy", "VIRTUAL_NPU_SOC": "Ascend910B1", "VIRTUAL_NPU_DEVICES": "16",
        "HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "0",
    }  # fmt: skip
    run_ranks(torch_forks, BINDING, tmp_path, 16, **environment)

# SPDX-License-Identifier: Apache-2.0
"""The acl runtime and the aten kernels, seen through torch on the ``npu`` device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch_forks import TorchForks


@pytest.fixture
def run(torch_forks: TorchForks, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs code in a process of its own: exit status and output."""
    return partial(torch_forks.run, output=tmp_path / "output")


@pytest.fixture(autouse=True)
def device() -> None:
    torch.npu.set_device(0)


def test_values_travel_to_the_device_and_back() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool):
        host = torch.arange(24).reshape(2, 3, 4).to(dtype)
        on_device = host.npu()
        assert on_device.device == torch.device("npu", 0)
        assert torch.equal(on_device.cpu(), host)
        assert torch.equal(on_device.transpose(0, 2).contiguous().cpu(), host.transpose(0, 2))
        assert torch.equal(on_device.to(torch.float32).cpu(), host.to(torch.float32))


def test_views_share_memory_and_in_place_returns_the_same_tensor() -> None:
    base = torch.zeros(4, 4, device="npu")
    row = base[1]
    assert row.add_(2) is row
    row[2:].fill_(7)
    assert base.cpu()[1].tolist() == [2, 2, 7, 7]
    base.index_copy_(0, torch.tensor([3], device="npu"), torch.ones(1, 4, device="npu"))
    assert base.sum().item() == 2 + 2 + 7 + 7 + 4


def test_out_arguments_are_written_and_resized() -> None:
    values = torch.tensor([3.0, 1.0, 2.0], device="npu")
    out_values, out_indices = torch.empty(0, device="npu"), torch.empty(0, dtype=torch.int64, device="npu")
    torch.topk(values, 2, out=(out_values, out_indices))
    assert out_values.cpu().tolist() == [3.0, 2.0]
    assert out_indices.cpu().tolist() == [0, 2]
    target = torch.empty(3, device="npu")
    assert torch.add(values, 1, out=target) is target
    assert target.cpu().tolist() == [4.0, 2.0, 3.0]


def test_composites_that_torch_npu_replaces_above_the_backend() -> None:
    values = torch.tensor([[0, 2], [3, 0]], device="npu")
    assert [part.tolist() for part in torch.where(values > 0)] == [[0, 1], [1, 0]]
    assert torch.nn.functional.one_hot(torch.tensor([1, 0], device="npu"), 3).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert torch.argsort(torch.tensor([3, 1, 2], device="npu")).tolist() == [1, 2, 0]
    repeats = torch.tensor([1, 2], device="npu")
    assert torch.repeat_interleave(torch.tensor([5, 6], device="npu"), repeats).tolist() == [5, 6, 6]
    assert torch.histc(torch.tensor([0, 1, 1, 3], device="npu", dtype=torch.int32), 4, 0, 3).tolist() == [1, 2, 0, 1]


def test_a_generator_on_the_device_is_reproducible() -> None:
    generator = torch.Generator(device="npu")

    def draw(seed: int) -> list[float]:
        generator.manual_seed(seed)
        return torch.empty(4, device="npu").exponential_(generator=generator).tolist()

    first = draw(1)
    assert draw(2) != first
    assert draw(1) == first


def test_memory_is_accounted_and_bounded(run) -> None:
    code = """
import torch
torch.npu.set_device(0)
before = torch.npu.mem_get_info()
held = torch.empty(64 << 20, device="npu")
after = torch.npu.mem_get_info()
assert before[1] == 512 << 20, before
assert before[0] - after[0] >= 256 << 20, after
torch.empty(128 << 20, device="npu")
"""
    status, output = run(code, VIRTUAL_NPU_DEVICE_MEMORY_MB="512")
    assert status != 0
    assert "out of memory" in output
    assert "AssertionError" not in output


def test_device_numbers_end_where_the_settings_say(run) -> None:
    code = "import torch; print('count', torch.npu.device_count(), flush=True); torch.npu.set_device(3)"
    status, output = run(code, VIRTUAL_NPU_DEVICES="3")
    assert status != 0
    assert "count 3\n" in output
    assert "this process sees 3 (VIRTUAL_NPU_DEVICES)" in output
    visible = run("import torch; print('count', torch.npu.device_count())", ASCEND_RT_VISIBLE_DEVICES="4,5")
    assert visible[0] == 0
    assert "count 2\n" in visible[1]


def test_an_unknown_soc_is_refused_by_name(run) -> None:
    status, output = run("import torch; torch.npu.set_device(0)", VIRTUAL_NPU_SOC="Ascend999")
    assert status != 0
    assert "VIRTUAL_NPU_SOC" in output
    assert "Ascend999" in output


def test_the_task_queue_is_refused_by_name() -> None:
    """While it attaches, so this needs an interpreter that has not."""
    environment = {**os.environ, "TASK_QUEUE_ENABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "TASK_QUEUE_ENABLE='1' is not supported, allowed: 0" in done.stderr


def test_an_operator_that_is_not_emulated_is_an_error_that_names_it() -> None:
    import torch_npu

    boxes = torch.zeros(2, 4, device="npu")
    with pytest.raises(RuntimeError, match="BoundingBoxEncode"):
        torch_npu.npu_bounding_box_encode(boxes, boxes, 0, 0, 0, 0, 1, 1, 1, 1)


def test_a_cann_function_that_is_not_emulated_is_an_error_that_names_it(run) -> None:
    status, output = run("import ctypes; ctypes.CDLL('libascendcl.so').acltdtCreateDataset()")
    assert status != 0
    assert "CANN function acltdtCreateDataset is not emulated" in output

# SPDX-License-Identifier: Apache-2.0
"""Where ACL graphs are not emulated, a capture says so. Collected instead of test_graph.py there."""

from __future__ import annotations

from pathlib import Path

from torch_forks import TorchForks

CODE = """
import torch
import torch_npu
try:
    with torch.npu.graph(torch.npu.NPUGraph()):
        pass
except RuntimeError:
    print("refused")
"""


def test_a_capture_is_refused(torch_forks: TorchForks, tmp_path: Path) -> None:
    status, output = torch_forks.run(CODE, tmp_path / "output")
    assert status == 0, output
    assert "refused" in output
    assert "aclmdlRICaptureBegin: ACL graphs are emulated for torch_npu 2.7 and 2.8 only" in output

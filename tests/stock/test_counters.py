# SPDX-License-Identifier: Apache-2.0
"""What the wrappers count on stock's own objects; tests/serve compares served steps with a ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fresh import run

pytestmark = pytest.mark.timeout(300)

# As in stock_checks.py: objects whose constructors want a device get the attributes that the code under test reads.
CODE = """
import json, sys
import stock_checks
import torch
import vllm_ascend.ops
import vllm_ascend.utils
from vllm_ascend.worker.model_runner_v1 import NPUModelRunner
from dp_sync_patch import metrics, runtime
from dp_sync_patch.errors import MC2OnlyError

folder = {folder!r}
vllm_ascend.utils.init_ascend_soc_version()
found = {{}}

def counted(name, call):
    before = metrics.counts.values()
    try:
        call()
    except MC2OnlyError as error:
        assert str(error).startswith(name)
    found[name] = {{key: value - before[key] for key, value in metrics.counts.values().items() if value != before[key]}}

runner = object.__new__(NPUModelRunner)
runner.vllm_config = stock_checks.engine_config(folder)
runner.parallel_config = runner.vllm_config.parallel_config
runner.dp_size, runner.dp_rank, runner.mc2_tokens_capacity = 4, 1, 16
runner.use_aclgraph = False
sync = runner._sync_metadata_across_dp

runtime.skip_sizes = stock_checks._SKIP
counted("positional", lambda: sync(3, False, False))
counted("keyword", lambda: sync(num_tokens=3, with_prefill=True, enable_dbo=False))
counted("at the bound", lambda: sync(16, False, False))
counted("above the bound", lambda: sync(17, False, False))
counted("DSP301", lambda: runner._select_moe_comm_method(17, False))
runtime.in_profile_run, runner.dp_size = True, 1  # alone, stock has no peers to ask
counted("profile run", lambda: sync(3, False, False))
counted("selector in a profile run", lambda: runner._select_moe_comm_method(17, False))
runtime.in_profile_run, runner.dp_size = False, 4

dispatcher = stock_checks.mc2_dispatcher(17)
def dispatch(rows):
    ids, weights = torch.zeros(rows, 8, dtype=torch.int32), torch.ones(rows, 8)
    dispatcher.get_dispatch_mc2_kwargs(torch.zeros(rows, 4), weights, ids, torch.arange(16))
counted("dispatch", lambda: dispatch(16))
counted("DSP302", lambda: dispatch(17))

runner.use_aclgraph = True
runner.vllm_config = stock_checks.engine_config(
    folder, enforce_eager=None, compilation_config={{"cudagraph_capture_sizes": [2, 8, 16]}}
)
runner.aclgraph_batch_sizes = list(reversed(runner.vllm_config.compilation_config.cudagraph_capture_sizes))
counted("dummy on the capture grid", lambda: sync(3, False, False))

runtime.skip_sizes, runner.dp_size = None, 1
counted("stock", lambda: sync(3, False, False))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("models")
    return run(CODE.format(folder=str(folder)))[0]


ONE = {"passes_skipped": 1, "passes_ragged": 1}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("positional", {**ONE, "padding_avoided_tokens": 13}),
        ("keyword", {**ONE, "padding_avoided_tokens": 13}),
        ("at the bound", {"passes_skipped": 1}),
        # Refused right after; a counter that falls would end the export, and with it the news of the refusal.
        ("above the bound", {"passes_skipped": 1}),
        ("DSP301", {"mc2_only_errors": 1}),
        ("profile run", {}),
        ("selector in a profile run", {}),
        ("dispatch", {}),
        ("DSP302", {"mc2_only_errors": 1}),
        ("dummy on the capture grid", {**ONE, "padding_tokens": 5, "padding_avoided_tokens": 8}),
        ("stock", {"passes_synced": 1}),
    ],
)
def test_what_a_call_adds(counted: Any, call: str, expected: dict[str, int]) -> None:
    assert counted[call] == expected

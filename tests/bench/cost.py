# SPDX-License-Identifier: Apache-2.0
"""`make bench-cost`: what the overlay itself costs, on stock 0.11.0: per call, per MoE layer, at import, in memory.

The objects are stock's own, without a device: those attributes that the code under test reads are set. Both sides of a
comparison are timed in turn, and what is printed is the median of the differences, with the least and the largest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("examples", "tests/serve", "tests/stock")]
os.environ |= {"VLLM_PLUGINS": "dp_sync_patch", "VLLM_LOGGING_LEVEL": "ERROR", "TASK_QUEUE_ENABLE": "0"}

import torch  # noqa: E402  (this line and the next ones need the path above)
from bench_cells import Spread, spread  # noqa: E402
from torch.utils.benchmark import Timer  # noqa: E402

DP_SIZE, LARGEST_STEP = 32, 128
TURNS = 15
PROCESSES = 15
_SECONDS = 0.05  # of one timing
_CHILD = "import psutil; me = psutil.Process(); before = me.memory_info().rss{}; print(me.memory_info().rss - before)"


def difference_us(with_overlay: Callable[[], Any], without: Callable[[], Any]) -> Spread:
    """Microseconds that one call of the first takes longer than one of the second."""

    def us(call: Callable[[], Any]) -> float:
        return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=_SECONDS).median * 1e6

    return spread(us(with_overlay) - us(without) for _ in range(TURNS))


def of_calls() -> dict[str, Spread]:
    """Of the patched methods that run in every step or in every MoE layer."""
    import stock_checks
    import vllm_ascend.ops
    import vllm_ascend.utils
    from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

    from dp_sync_patch import plan, runtime

    vllm_ascend.utils.init_ascend_soc_version()
    with tempfile.TemporaryDirectory() as folder:
        config = stock_checks.engine_config(folder)
    runner = object.__new__(NPUModelRunner)
    runner.vllm_config, runner.parallel_config = config, config.parallel_config
    runner.dp_size, runner.dp_rank, runner.use_aclgraph = DP_SIZE, 1, False
    runner.mc2_tokens_capacity = LARGEST_STEP
    dispatcher = stock_checks.mc2_dispatcher(LARGEST_STEP)
    hidden, weights = torch.zeros(LARGEST_STEP, 8), torch.ones(LARGEST_STEP, 8)
    ids, expert_map = torch.zeros(LARGEST_STEP, 8, dtype=torch.int32), torch.arange(256)

    sync, select = runner._sync_metadata_across_dp, runner._select_moe_comm_method
    dispatch = dispatcher.get_dispatch_mc2_kwargs
    found = {}

    def compare(name: str, patched: Callable[..., Any], *args: Any) -> None:
        stock = patched.__wrapped__  # type: ignore[attr-defined]
        found[name] = difference_us(lambda: patched(*args), lambda: stock(*args))

    skipping = plan.Sizes(LARGEST_STEP, LARGEST_STEP, LARGEST_STEP, LARGEST_STEP * DP_SIZE, (), 0)
    runtime.skip_sizes = skipping
    found["step, skip: metadata, over torch.full"] = difference_us(
        lambda: sync(3, False, False), lambda: torch.full((DP_SIZE,), 3, dtype=torch.int32, device="cpu")
    )
    compare("step, skip: choice of MC2, over stock", select, 3, False)
    compare("MoE layer, skip: dispatch arguments, over stock", dispatch, hidden, weights, ids, expert_map)
    # One rank alone has nobody to ask: what is left of stock's method is its first line.
    runtime.skip_sizes, runner.dp_size = None, 1
    compare("step, refusing: metadata, over stock", sync, 3, False, False)
    compare("step, refusing: choice of MC2, over stock", select, 3, False)
    compare("MoE layer, refusing: dispatch arguments, over stock", dispatch, hidden, weights, ids, expert_map)
    return found


def of_import() -> dict[str, Spread]:
    """Milliseconds and MiB of an interpreter that imports the overlay, over one that does not."""

    def child(statement: str) -> tuple[float, float]:
        code = f"import time; began = time.perf_counter(){statement}; print((time.perf_counter() - began) * 1e3)"
        run = [sys.executable, "-c", code]
        ms = float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
        run = [sys.executable, "-c", _CHILD.format(statement)]
        return ms, int(subprocess.run(run, capture_output=True, text=True, check=True).stdout) / 2**20

    parts = {"wrapt and packaging alone": "; import wrapt, packaging.specifiers", "overlay": "; import dp_sync_patch"}
    found = {}
    taken = {name: [child(statement) for _ in range(PROCESSES)] for name, statement in parts.items()}
    for name, pairs in taken.items():
        found[f"import, ms: {name}"] = spread(ms for ms, _ in pairs)
        found[f"import, MiB: {name}"] = spread(mib for _, mib in pairs)
    return found


def main() -> None:
    print(f"median (least - largest) of {TURNS} turns, microseconds of a call")
    for name, value in of_calls().items():
        print(f"  {value.median:7.2f} ({value.least:.2f} - {value.largest:.2f})  {name}")
    print(f"and of {PROCESSES} processes")
    for name, value in of_import().items():
        print(f"  {value.median:7.2f} ({value.least:.2f} - {value.largest:.2f})  {name}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""One setup of `make bench`, by the Python of its stock version: all its arms on the two-node stage, and the client.

The client is that version's own `vllm bench serve`, run in this process: its import takes longer than most loads here.
Writes `measured.json` into the output folder, a list of what `bench_cells.make_cells` reads.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("examples", "tests/serve", "tests/two_nodes")]

from bench_cells import (  # noqa: E402  (this line and the next ones need the path above)
    INPUT_LEN,
    OWN_SKIP,
    SETUPS,
    Arm,
    Load,
    Measured,
    Setup,
    Window,
    figures,
)
from demo import Cluster, DemoError, say  # noqa: E402
from launched_ranks import RECOMPUTE, changed_overlay, read_ranks  # noqa: E402
from split_node import SplitNode, split_node, start  # noqa: E402
from toy_deepseek import write_toy_deepseek  # noqa: E402
from toy_model import ToyModelShape, write_toy_model  # noqa: E402
from two_nodes import Link, TwoNodes, TwoNodesError  # noqa: E402

TURNS = 3
LOAD_TIMEOUT_S = 90
# A rank that waits this long for another one in an operator ends its node: stock's own skip may do that.
DEVICE_TIMEOUT_S = 20
# Of the overlay: where a step's graph mode is told early.
POST = "    if runtime.sync_graph_mode and not runtime.in_profile_run:\n        _looking_ahead = True"
NO_POST = POST.replace("runtime.sync_graph_mode", "False")


def arguments(setup: Setup, arm: Arm) -> list[str]:
    """Flags of the node, beside those of a small one."""
    # Above the MC2 capacity, or stock without the recompute scheduler would skip too. With its own skip two prompts in
    # a step would leave MC2 then, and it would hang.
    budget = setup.largest_step if arm is OWN_SKIP else 8 * setup.largest_step
    # As two processes, an engine and its worker spin while they wait for each other, on the cores of other ranks.
    flags = ["--max-num-batched-tokens", str(budget), "--distributed-executor-backend", "uni"]
    if setup.drafts:
        method = "deepseek_mtp" if setup.version == "0.11.0" else "mtp"
        speculative = {"method": method, "num_speculative_tokens": setup.drafts}
        flags += ["--speculative-config", json.dumps(speculative)]
    if setup.async_scheduling is not None:
        flags.append("--async-scheduling" if setup.async_scheduling else "--no-async-scheduling")
    if setup.graphs:
        captures = [1, 2, 4, setup.largest_step]
        compilation = {"cudagraph_mode": setup.graphs, "cudagraph_capture_sizes": captures}
        flags += ["--no-enforce-eager", "--compilation-config", json.dumps(compilation)]
    return [*flags, *(RECOMPUTE if arm.recompute else ())]


def environment(arm: Arm, folder: Path) -> dict[str, str]:
    """Variables of the node; `folder` is for a copy of the overlay, if it has one of its own."""
    found = {"VIRTUAL_NPU_TIMEOUT_S": str(DEVICE_TIMEOUT_S), "VLLM_DISABLE_COMPILE_CACHE": "1"}
    if arm.graph_level:
        found["DP_SYNC_PATCH_GRAPH_MODE"] = arm.graph_level
    if arm.late:
        found |= changed_overlay(folder, "patches/graph_mode.py", POST, NO_POST)
    return found


def bench_serve(url: str, model: Path, load: Load, output_len: int) -> list[dict[str, Any]]:
    """All commands of the load at the same time; what each of them returns.

    Raises:
        DemoError: a request was not answered.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async

    def parse(command: list[str]) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        add_cli_args(parser)  # a new one each time: it has the beginning of the request ids
        return parser.parse_args(command)

    common = [
        *("--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions", "--ignore-eos"),
        *("--model", str(model), "--served-model-name", "toy", "--dataset-name", "random", "--disable-tqdm"),
        *("--random-input-len", str(INPUT_LEN), "--random-output-len", str(output_len), "--random-range-ratio", "0"),
        *("--ready-check-timeout-sec", "0", "--percentile-metrics", "tpot", "--metric-percentiles", "50,99"),
    ]
    runs = [parse([*common, *command]) for command in load.commands]

    async def together() -> list[dict[str, Any]]:
        return await asyncio.wait_for(asyncio.gather(*map(main_async, runs)), LOAD_TIMEOUT_S)

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        results = asyncio.run(together())
    for run, result in zip(runs, results, strict=True):
        if result["completed"] != run.num_prompts:
            raise DemoError(f"{result['completed']} of {run.num_prompts} requests were answered:\n{said.getvalue()}")
    return results


def wait_until_quiet(node: SplitNode, quiet_s: float = 0.3, timeout_s: float = 60) -> None:
    """After the last request the ranks go on with dummies, up to their next vote."""
    sizes: list[int] = []
    deadline = time.monotonic() + timeout_s
    while (now := [path.stat().st_size for half in node.halves for path in half.ledger.iterdir()]) != sizes:
        sizes = now
        if time.monotonic() > deadline:
            raise DemoError(f"the ranks still make steps {timeout_s:.0f} s after the last request")
        time.sleep(quiet_s)


def turns(setup: Setup, count: int) -> Iterator[tuple[Load, int, int, Arm]]:
    """The first load once more at first, not to be counted (turn -1): the first steps of a node are slow."""
    for arm in setup.arms:
        yield setup.loads[0], 0, -1, arm
    for load in setup.loads:
        for delay_us, turn in itertools.product(setup.delays_us(load), range(count)):
            for arm in setup.arms:
                yield load, delay_us, turn, arm


def measure(
    nodes: TwoNodes, node: SplitNode, model: Path, load: Load, output_len: int, delay_us: int
) -> dict[str, float]:
    nodes.set(Link(delay_us))
    # Stock 0.11.0 synchronises on the devices: a ring or a halving of two nodes crosses the link twice.
    node.set_hccl_delay(2 * delay_us)
    began = time.monotonic()
    results = nodes.run(0, lambda: bench_serve(node.head.url, model, load, output_len))
    ended = time.monotonic()
    wait_until_quiet(node)
    busiest = max(results, key=lambda result: result["completed"])
    return {
        "began": began,
        "ended": ended,
        "tpot_ms_p50": busiest["p50_tpot_ms"],
        "tpot_ms_p99": busiest["p99_tpot_ms"],
        "output_tokens_per_s": sum(result["total_output_tokens"] for result in results) / (ended - began),
    }


def run(setup: Setup, folder: Path, count: int) -> list[Measured]:
    """All measurements, the figures of them from the ledgers of the nodes, which have to have ended for that."""
    model = folder / "model"
    if setup.drafts:
        write_toy_deepseek(model)
    else:
        write_toy_model(model, ToyModelShape())
    arms: dict[str, SplitNode] = {}
    windows: list[Window] = []
    failed: dict[str, str] = {}
    with TwoNodes(ROOT / "build" / "two_nodes", Link()) as nodes, Cluster() as cluster:
        for number, arm in enumerate(setup.arms):
            arms[arm.name] = split_node(
                nodes,
                folder / f"arm{number}",
                model,
                arguments(setup, arm),
                size=setup.dp_size,
                overlay=arm.overlay,
                environment=environment(arm, folder / f"overlay{number}"),
            )
        start(nodes, cluster, arms.values())
        say(f"{setup.name}: {len(arms)} nodes are up")
        for load, delay_us, turn, arm in turns(setup, count):
            if arm.name in failed:
                continue
            which = {"load": load.name, "delay_us": delay_us, "turn": turn, "arm": arm.name}
            try:
                window = Window(**which, **measure(nodes, arms[arm.name], model, load, setup.output_len, delay_us))
            except (DemoError, TimeoutError, OSError) as error:
                failed[arm.name] = reason(error, arms[arm.name])
                say(f"{setup.name}, {arm.name}: {failed[arm.name]}\n{error}")
            else:
                windows.append(window)
                say(f"{arm.name}: {load.name}, {delay_us} us, TPOT {window.tpot_ms_p50:.1f} ms")
    measured = []
    ranks = {name: read_ranks(node.halves) for name, node in arms.items() if name not in failed}
    for load, delay_us, turn, arm in turns(setup, count):
        which = {"load": load.name, "delay_us": delay_us, "turn": turn, "arm": arm.name}
        if turn >= 0 and arm.name in failed:
            measured.append({**which, "failed": failed[arm.name]})
        elif turn >= 0:
            window = next(one for one in windows if which.items() <= vars(one).items())
            measured.append({**which, "figures": asdict(figures(window, ranks[arm.name]))})
    return measured


def reason(error: Exception, node: SplitNode) -> str:
    """In one line, what the operator would find in the log, or what the client got."""
    for half in node.halves:
        for line in half.log.splitlines():
            if "timeout, waited" in line:
                return line[line.index("timeout, waited") :]
    return (str(error) or type(error).__name__).splitlines()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setup", choices=[setup.name for setup in SETUPS])
    parser.add_argument("--output", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--turns", type=int, default=TURNS)
    options = parser.parse_args()
    # A proxy of the environment must not come between the client and a loopback address.
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    setup = next(setup for setup in SETUPS if setup.name == options.setup)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no node and no namespace is left behind
    try:
        measured = run(setup, options.output, options.turns)
    except (DemoError, TwoNodesError) as error:
        say(f"{setup.name}: {error}")
        return 1
    (options.output / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""`make scale`: what the DP metadata all_reduce costs in a step, for 2 to 256 ranks, by a model that is checked here.

Gloo reduces a few numbers over n ranks in a ring: 2 (n - 1) rounds, in each of which a rank sends to the next one and
waits for the previous one. A message between ranks of one node takes a hop, one to another node a hop and the delay of
the link. `ring_us` follows the rounds; the hop is fitted to what is measured without a delay, and the model then has to
meet what is measured with the others, on 2 to 16 ranks on two nodes. What it leaves out: ranks that arrive late, and
jitter, which only add to it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("examples", "tests/serve", "tests/two_nodes")]

from demo import free_port  # noqa: E402  (this line and the next ones need the path above)
from two_nodes import ADDRESSES, DEVICE, Link, TwoNodes, TwoNodesError  # noqa: E402

MEASURED_SIZES = (2, 4, 8, 16)
DELAYS_US = (0, 250, 1000, 5000)
CALLS = 40
# Stock's vector has a number for each rank, and two or three flags.
FLAGS = 2
# The sheet: ranks, and how many of them are on one node.
SHEET_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
RANKS_PER_NODE = 16


def ring_us(size: int, per_node: int, hop_us: float, delay_us: float) -> float:
    """Microseconds of an all_reduce over `size` ranks, `per_node` of them beside each other on a node."""
    done = [0.0] * size
    for _ in range(2 * (size - 1)):
        took = [hop_us + (delay_us if (rank % per_node) == 0 and size > per_node else 0.0) for rank in range(size)]
        done = [max(done[rank], done[rank - 1] + took[rank]) for rank in range(size)]
    return max(done)


@dataclass(frozen=True)
class Point:
    """A median in microseconds, and that of all calls the least and the largest."""

    size: int
    delay_us: int
    median_us: float
    least_us: float
    largest_us: float


def rank_main(rank: int, size: int, node: int, port: int) -> None:
    """A rank; reads the number of calls from stdin, line by line, and answers with their times."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore(ADDRESSES[0], port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    print("ready", flush=True)
    for line in sys.stdin:
        taken = []
        for _ in range(int(line)):
            dist.barrier()  # all begin at about the same time
            counts = torch.zeros(size + FLAGS, dtype=torch.int32)
            began = time.perf_counter()
            dist.all_reduce(counts)
            taken.append((time.perf_counter() - began) * 1e6)
        print(json.dumps(taken), flush=True)
    dist.destroy_process_group()


def measure(nodes: TwoNodes, size: int) -> list[Point]:
    """All delays, with `size` ranks, half of them on each node."""
    port = free_port(set())
    ranks = []
    for rank in range(size):
        node = rank // (size // 2)
        command = [sys.executable, __file__, "--rank", *map(str, (rank, size, node, port))]
        own = {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        ranks.append(
            subprocess.Popen(
                nodes.on(node, *command),
                env={**os.environ, **own},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )

    def ask(calls: int) -> list[list[float]]:
        for process in ranks:
            assert process.stdin is not None
            process.stdin.write(f"{calls}\n")
            process.stdin.flush()
        return [json.loads(read(process)) for process in ranks]

    try:
        for process in ranks:
            if read(process) != "ready":
                raise TwoNodesError(f"a rank of {size} did not start")
        points = []
        for delay_us in DELAYS_US:
            nodes.set(Link(delay_us))
            ask(5)
            # A call has taken as long as its slowest rank.
            taken = [max(times) for times in zip(*ask(CALLS), strict=True)]
            points.append(Point(size, delay_us, statistics.median(taken), min(taken), max(taken)))
        return points
    finally:
        for process in ranks:
            assert process.stdin is not None
            process.stdin.close()
        for process in ranks:
            process.wait(timeout=60)


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def fit_hop_us(points: Sequence[Point]) -> float:
    """From those without a delay, by least squares: there every round takes a hop."""
    flat = [(2 * (point.size - 1), point.median_us) for point in points if point.delay_us == 0]
    return sum(rounds * us for rounds, us in flat) / sum(rounds**2 for rounds, _ in flat)


def check(points: Sequence[Point], hop_us: float) -> str:
    """Measured against modelled, in Markdown."""
    lines = ["| ranks | delay, ms | measured, ms (least-largest) | model, ms |\n|---|---|---|---|\n"]
    for point in points:
        model = ring_us(point.size, point.size // 2, hop_us, point.delay_us) / 1000
        measured = f"{point.median_us / 1000:.2f} ({point.least_us / 1000:.2f}-{point.largest_us / 1000:.2f})"
        lines.append(f"| {point.size} | {point.delay_us / 1000:g} | {measured} | {model:.2f} |\n")
    return "".join(lines)


def sheet(hop_us: float) -> str:
    """Milliseconds of one all_reduce, in Markdown. A step makes one, and one more for each round of drafts."""
    head = ["ranks", "nodes", *(f"{delay / 1000:g} ms" for delay in DELAYS_US)]
    lines = [f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n"]
    for size in SHEET_SIZES:
        per_node = min(RANKS_PER_NODE, size // 2)
        values = (f"{ring_us(size, per_node, hop_us, delay) / 1000:.2f}" for delay in DELAYS_US)
        lines.append(f"| {size} | {size // per_node} | {' | '.join(values)} |\n")
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", nargs=4, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(*options.rank)
        return 0
    try:
        with TwoNodes(ROOT / "build" / "two_nodes") as nodes:
            points = [point for size in MEASURED_SIZES for point in measure(nodes, size)]
    except TwoNodesError as error:
        print(error, file=sys.stderr)
        return 1
    hop_us = fit_hop_us(points)
    print(f"a hop takes {hop_us:.0f} us\n\n{check(points, hop_us)}\n{sheet(hop_us)}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

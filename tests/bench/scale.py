# SPDX-License-Identifier: Apache-2.0
"""`make scale`: what the DP metadata all_reduce costs in a step, for 2 to 256 ranks, by a model that is checked here.

Gloo reduces a vector over n ranks in a ring (gloo/allreduce.cc): it cuts the vector into 2 n segments of whole
elements, passes each on from rank to rank to add them up, and once more to hand out the sums. Two segments of a rank
are under way at a time, an empty one is left out, and a rank sends a segment only when the receiver has told it that it
waits for one. So a segment that goes to another node pays the delay of the link twice, unless the receiver was early.
`crossings` follows exactly that, message by message, and counts how often the link is crossed.

On one machine the ranks share the cores, so that the time of a hop grows with their number. What is measured with a
delay therefore has to lie between the delays alone, and these and all that is measured without a delay.
What the model leaves out: ranks that come late, jitter and loss, which all only add to it.
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

from demo import free_port  # noqa: E402  (this line and the next one need the path above)
from two_nodes import ADDRESSES, DEVICE, Link, TwoNodes, TwoNodesError  # noqa: E402

MEASURED_SIZES = (2, 4, 8, 16)
DELAYS_US = (0, 250, 1000, 5000)
CALLS = 20
# Of a measured time: what the link itself adds, and ranks that wake up late.
TOLERANCE, TOLERANCE_US = 0.1, 300
# From one call to the next: all that it may take, and some rest.
PERIOD_FACTOR, PERIOD_S_PER_RANK = 1.5, 0.01
SHEET_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
RANKS_PER_NODE = 16


@dataclass(frozen=True)
class Vector:
    """What is reduced: `per_rank` numbers (int32) for each rank, and `flags` more."""

    name: str
    per_rank: int
    flags: int

    def elements(self, size: int) -> int:
        return self.per_rank * size + self.flags


VECTORS = (
    Vector("stock 0.12.0rc1, 0.13.0", 1, 2),  # 0.12.0rc1 has one flag less, which changes nothing
    Vector("stock 0.18.0, 0.23.0", 2, 0),  # drafts of 0.18.0: as above
    Vector("overlay, graph level sync", 0, 1),
)


def crossings(size: int, elements: int, per_node: int) -> int:
    """How many times, one after another, an all_reduce over `size` ranks that begin together crosses the link; that is
    its time in one-way delays. `per_node` ranks are on each node."""
    segments = 2 * size
    length = -(-elements // segments)

    def takes(sender: int, receiver: int) -> int:
        return int(sender // per_node != receiver // per_node)

    begun = [0] * size
    for first in (1, 0):  # adding up, handing out: the chunk of this rank (of two segments) that goes first
        posted: list[list[int]] = []  # when each rank has posted its n-th send and receive
        for turn in range(segments):
            now = list(posted[-1] if posted else begun)
            if turn >= 2:
                before = posted[turn - 2]
                for receiver in range(size):
                    sender = (receiver + 1) % size
                    segment = (2 * (sender + first) + turn - 2) % segments
                    if segment * length >= elements:
                        continue
                    sent = max(before[sender], before[receiver] + takes(receiver, sender))
                    now[sender] = max(now[sender], sent)
                    now[receiver] = max(now[receiver], sent + takes(sender, receiver))
            posted.append(now)
        begun = posted[-1]
    return max(begun)


def crossings_of(vector: Vector, size: int) -> int:
    """With half of the ranks on each of two nodes, and more nodes where that were more than `RANKS_PER_NODE`."""
    return crossings(size, vector.elements(size), min(RANKS_PER_NODE, size // 2))


@dataclass(frozen=True)
class Point:
    """A median in microseconds, and that of all calls the least and the largest."""

    size: int
    vector: Vector
    delay_us: int
    median_us: float
    least_us: float
    largest_us: float


def rank_main(rank: int, size: int, node: int, port: int) -> None:
    """A rank; reads from stdin, line by line, how many elements to reduce, how often, when first (by the clock that all
    processes share) and at what interval, and answers with the microseconds from each of these times to its end."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    store = distributed.TCPStore(ADDRESSES[0], port, size, is_master=rank == 0)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    print("ready", flush=True)
    for line in sys.stdin:
        elements, calls, start, period = json.loads(line)
        taken = []
        for call in range(calls):
            counts = torch.zeros(elements, dtype=torch.int32)
            begin = start + call * period
            # No barrier: the ranks leave one as far apart as the delays that are to be measured.
            time.sleep(max(0.0, begin - time.monotonic()))
            distributed.all_reduce(counts)
            taken.append((time.monotonic() - begin) * 1e6)
        print(json.dumps(taken), flush=True)
    distributed.destroy_process_group()


def measure(nodes: TwoNodes, size: int) -> list[Point]:
    """All delays and vectors, with `size` ranks, half of them on each node."""
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

    def ask(vector: Vector, calls: int, delay_us: float) -> list[list[float]]:
        period = PERIOD_FACTOR * crossings_of(vector, size) * delay_us / 1e6 + PERIOD_S_PER_RANK * size
        work = [vector.elements(size), calls, time.monotonic() + period, period]
        for process in ranks:
            assert process.stdin is not None
            process.stdin.write(f"{json.dumps(work)}\n")
            process.stdin.flush()
        return [json.loads(read(process)) for process in ranks]

    try:
        for process in ranks:
            if read(process) != "ready":
                raise TwoNodesError(f"a rank of {size} did not start")
        points = []
        for delay_us in DELAYS_US:
            nodes.set(Link(delay_us))
            for vector in VECTORS:
                ask(vector, 3, delay_us)
                # A call has taken as long as its slowest rank.
                taken = [max(times) for times in zip(*ask(vector, CALLS, delay_us), strict=True)]
                points.append(Point(size, vector, delay_us, statistics.median(taken), min(taken), max(taken)))
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


def check(points: Sequence[Point]) -> tuple[str, bool]:
    """Measured beside modelled, in Markdown, and whether every point is where the model has it."""
    own = {(point.size, point.vector): point.median_us for point in points if point.delay_us == 0}
    lines = ["| vector | ranks | delay, ms | measured, ms (least-largest) | model, ms | |\n|---|---|---|---|---|---|\n"]
    all_hold = True
    for point in points:
        delays_us = crossings_of(point.vector, point.size) * point.delay_us
        with_own_us = delays_us + own[point.size, point.vector]
        low, high = delays_us * (1 - TOLERANCE) - TOLERANCE_US, with_own_us * (1 + TOLERANCE) + TOLERANCE_US
        holds = low <= point.median_us <= high
        all_hold &= holds
        measured = f"{point.median_us / 1000:.2f} ({point.least_us / 1000:.2f}-{point.largest_us / 1000:.2f})"
        model = f"{delays_us / 1000:.2f} to {with_own_us / 1000:.2f}"
        lines.append(
            f"| {point.vector.name} | {point.size} | {point.delay_us / 1000:g} | {measured} | {model} | "
            f"{'' if holds else '**does not hold**'} |\n"
        )
    return "".join(lines), all_hold


def sheet() -> str:
    """Crossings of the link by one all_reduce, in Markdown. A step makes one, and one more for each round of drafts."""
    lines = [f"| | {' | '.join(f'DP{size}' for size in SHEET_SIZES)} |\n|{'---|' * (1 + len(SHEET_SIZES))}\n"]
    for vector in VECTORS:
        lines.append(f"| {vector.name} | {' | '.join(str(crossings_of(vector, size)) for size in SHEET_SIZES)} |\n")
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
    told, holds = check(points)
    print(f"{told}\n{sheet()}", end="")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())

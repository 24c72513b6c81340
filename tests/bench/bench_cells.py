# SPDX-License-Identifier: Apache-2.0
"""What `make bench` measures, and how figures are made of it. Nothing here starts anything.

A setup is one kind of node; each of its arms is such a node, and all arms are up at the same time. A cell is one load
at one delay of the link; it is measured several times, the arms in turn, so that whatever changes on the machine
meanwhile changes for all of them. What is compared are the arms of one turn.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from launched_ranks import MAX_NUM_SEQS, Event
from ledger_report import VOTE_GROUPS

DELAYS_US = (0, 250, 1000, 5000)  # one way
FEW_DELAYS_US = (0, 1000)
SHOWN_DELAY_US = 1000  # in README's table, with the first load; the files have all


@dataclass(frozen=True)
class Arm:
    """One way to run the same node. `graph_level` is the overlay's setting.

    `late`: with a copy of the overlay that tells its graph mode when it needs those of the others, and not before.
    """

    name: str
    overlay: bool
    recompute: bool = True
    graph_level: str = ""
    late: bool = False


# Without the recompute scheduler stock synchronises as soon as a batch of --max-num-batched-tokens is above its MC2
# capacity. 0.11.0 synchronises always.
BASELINE = Arm("stock", overlay=False, recompute=False)
OWN_SKIP = Arm("stock, own skip", overlay=False)
OVERLAY = Arm("overlay", overlay=True)
GRAPH_SYNC = Arm("overlay, sync", overlay=True, graph_level="sync")
GRAPH_SYNC_LATE = Arm("overlay, sync, told late", overlay=True, graph_level="sync", late=True)
GRAPH_UNIFORM = Arm("overlay, uniform", overlay=True, graph_level="uniform")


@dataclass(frozen=True)
class Load:
    """Runs of `vllm bench serve` at the same time, as their flags. `pinned`: one of them names the DP rank."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    pinned: bool = False


def _requests(prompts: int, concurrency: int, *more: str) -> tuple[str, ...]:
    return "--num-prompts", str(prompts), "--max-concurrency", str(concurrency), *more


EVEN = Load("even", (_requests(8, 8),))
SKEWED = Load("skewed", (_requests(6, 6, "--header", "X-data-parallel-rank=0"), _requests(1, 1)), pinned=True)
TRICKLE = Load("trickle", (_requests(2, 1),))
INPUT_LEN = 6  # of every request, in tokens: a prompt is one step on every arm


@dataclass(frozen=True)
class Setup:
    """One kind of node. `async_scheduling` is None where the version's default is left alone.

    `dp_size`: with two DP ranks each has a core of a small machine; more share them, and wait for each other there too.
    `output_len`: of every request, in tokens.
    """

    name: str
    version: str
    arms: tuple[Arm, ...]
    drafts: int = 0
    async_scheduling: bool | None = None
    graphs: str = ""
    dp_size: int = 2
    output_len: int = 96

    @property
    def loads(self) -> tuple[Load, ...]:
        """The server of 0.11.0 does not take a DP rank from its clients. Where ranks share cores, one load will do."""
        if self.dp_size > 2:
            return (EVEN,)
        return tuple(load for load in (EVEN, SKEWED, TRICKLE) if not load.pinned or self.version != "0.11.0")

    def delays_us(self, load: Load) -> tuple[int, ...]:
        return DELAYS_US if load is EVEN and not self.graphs and self.dp_size == 2 else FEW_DELAYS_US

    @property
    def largest_step(self) -> int:
        """Tokens of one DP rank with the recompute scheduler."""
        return MAX_NUM_SEQS * (1 + self.drafts)


_THREE = (BASELINE, OWN_SKIP, OVERLAY)
SETUPS = (
    Setup("0.11.0", "0.11.0", (BASELINE, OVERLAY)),
    Setup("0.11.0, 3 drafts", "0.11.0", (BASELINE, OVERLAY), drafts=3),
    Setup("0.13.0", "0.13.0", _THREE),
    Setup("0.23.0, async", "0.23.0", _THREE, async_scheduling=True),
    Setup("0.23.0, async, DP4", "0.23.0", _THREE, async_scheduling=True, dp_size=4),
    # Triton's interpreter, which drafts on 0.23.0 need without an NPU, makes steps slow.
    Setup("0.23.0, async, 3 drafts", "0.23.0", _THREE, drafts=3, async_scheduling=True, output_len=24),
    Setup("0.23.0, 3 drafts", "0.23.0", _THREE, drafts=3, async_scheduling=False, output_len=24),
    Setup("0.13.0, FULL_DECODE_ONLY", "0.13.0", (BASELINE, GRAPH_SYNC, GRAPH_UNIFORM), graphs="FULL_DECODE_ONLY"),
    Setup(
        "0.23.0, FULL_DECODE_ONLY",
        "0.23.0",
        (BASELINE, GRAPH_SYNC_LATE, GRAPH_SYNC, GRAPH_UNIFORM),
        graphs="FULL_DECODE_ONLY",
    ),
    Setup("0.23.0, PIECEWISE", "0.23.0", (BASELINE, OVERLAY), graphs="PIECEWISE"),
)
VERSIONS = tuple(dict.fromkeys(setup.version for setup in SETUPS))


@dataclass(frozen=True)
class Figures:
    """Of one measurement. Steps are those of all ranks that began in it; times of the host in microseconds.

    `begun_early_us_p50`: in steps with requests, how long a collective that was begun early went on before the host
    waited for it, which is what can be hidden of it.
    """

    steps: int
    dp_collectives_per_step: float
    sync_host_us_p50: float
    sync_host_us_p99: float
    begun_early_us_p50: float
    padded_token_share: float
    tpot_ms_p50: float
    tpot_ms_p99: float
    output_tokens_per_s: float


RATIOS = ("tpot_ms_p50", "tpot_ms_p99", "output_tokens_per_s")


@dataclass(frozen=True)
class Window:
    """A measurement: which one it is, when it was (`time.monotonic()`), and what the client saw."""

    load: str
    delay_us: int
    turn: int
    arm: str
    began: float
    ended: float
    tpot_ms_p50: float
    tpot_ms_p99: float
    output_tokens_per_s: float


def figures(window: Window, ranks: Sequence[Iterable[Event]]) -> Figures:
    """Of the steps in the window.

    Args:
        ranks: the events of each rank, see `launched_ranks.read_ranks`. Each rank needs a step in the window.

    Raises:
        ValueError: a rank has none.
    """
    host_us: list[float] = []
    early_us: list[float] = []
    collectives = scheduled = computed = 0
    for number, events in enumerate(ranks):
        steps: dict[int, float] = {}
        tokens: dict[int, int] = {}
        rows: dict[int, int] = {}
        begun = 0.0
        for event in events:
            step = event.get("step", -1)
            if event["ev"] == "step" and step >= 0 and window.began <= event["t"] < window.ended:
                steps[step], tokens[step] = 0.0, event["scheduled_tokens"]
            elif step not in steps:
                continue
            elif event["ev"] in ("collective", "collective_wait") and _of_the_dp_group(event):
                steps[step] += event["host_us"]
                collectives += event["ev"] == "collective"
                if event["ev"] == "collective":
                    begun = event["t"]
                elif tokens[step]:
                    early_us.append((event["t"] - begun) * 1e6 - event["host_us"])
            elif event["ev"] == "ep" and event["op"] == "dispatch":
                rows.setdefault(step, event["bs"])  # the first one is the target's, drafts follow
        if not steps:
            raise ValueError(f"rank {number} has no step in {window}")
        host_us += steps.values()
        # A step above stock's MC2 capacity, several prompts at once, has no dispatch.
        computed += sum(rows.values())
        scheduled += sum(tokens[step] for step in rows)
    return Figures(
        steps=len(host_us),
        dp_collectives_per_step=collectives / len(host_us),
        sync_host_us_p50=statistics.median(host_us),
        sync_host_us_p99=percentile(host_us, 99),
        begun_early_us_p50=statistics.median(early_us or [0.0]),
        padded_token_share=1 - scheduled / computed,
        tpot_ms_p50=window.tpot_ms_p50,
        tpot_ms_p99=window.tpot_ms_p99,
        output_tokens_per_s=window.output_tokens_per_s,
    )


def _of_the_dp_group(event: Event) -> bool:
    """vLLM's group "dp:0". The engines' vote every 32 steps is in one of its own."""
    return event["group"] not in VOTE_GROUPS and event["group"].split(":")[0] == "dp"


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many of a hundred do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


@dataclass(frozen=True)
class Spread:
    """Median of the turns, and the least and the largest of them."""

    median: float
    least: float
    largest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.largest:.2f})"


def spread(values: Iterable[float]) -> Spread:
    found = list(values)
    return Spread(statistics.median(found), min(found), max(found))


@dataclass(frozen=True)
class Cell:
    """One arm at one load and delay. `ratios` are to the baseline of the same turn; `measured` has the field names of
    Figures. `failed`: what happened to a node that did not get here; then there is nothing else."""

    setup: str
    load: str
    delay_us: int
    arm: str
    measured: dict[str, Spread]
    ratios: dict[str, Spread]
    failed: str = ""


Measured = dict[str, Any]  # the fields of Window that tell which one it is, and `figures` or `failed`


def make_cells(setup: str, measured: Iterable[Measured]) -> list[Cell]:
    """Of all measurements of a setup, in the order of their first ones.

    Raises:
        ValueError: the baseline made no collective in a cell, so that there is nothing to compare with.
    """
    turns: dict[tuple[str, int], dict[str, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    for one in measured:
        turns[one["load"], one["delay_us"]][one["arm"]].append(one)
    cells = []
    for (load, delay_us), arms in turns.items():
        baseline = {one["turn"]: one["figures"] for one in arms[BASELINE.name] if "figures" in one}
        if not baseline or any(found["dp_collectives_per_step"] == 0 for found in baseline.values()):
            raise ValueError(f"{setup}, {load}, {delay_us} us: stock made no DP collective; there is no baseline")
        for arm, ones in arms.items():
            if failed := next((one["failed"] for one in ones if "failed" in one), ""):
                cells.append(Cell(setup, load, delay_us, arm, {}, {}, failed))
                continue
            names = [field.name for field in fields(Figures)]
            found = {name: spread(one["figures"][name] for one in ones) for name in names}
            both = [(one["figures"], baseline[one["turn"]]) for one in ones if one["turn"] in baseline]
            ratios = {name: spread(own[name] / stock[name] for own, stock in both) for name in RATIOS}
            cells.append(Cell(setup, load, delay_us, arm, found, ratios))
    return cells


HEAD = (
    "node, load",
    "arm",
    "DP collectives per step",
    "host waits per step, ms, p50 (p99)",
    "padded tokens",
    "TPOT, ms",
    "TPOT against stock",
    "tokens/s against stock",
)


def table(cells: Iterable[Cell], delay_us: int) -> str:
    """In Markdown: every arm at one delay."""
    rows: list[tuple[str, ...]] = [HEAD, ("---",) * len(HEAD)]
    shown = (cell for cell in cells if cell.delay_us == delay_us)
    for (setup, load), arms in groupby(shown, lambda cell: (cell.setup, cell.load)):
        for number, cell in enumerate(arms):
            first = f"{setup}: {load}" if number == 0 else ""
            found = (f"failed: {cell.failed}", *[""] * (len(HEAD) - 3)) if cell.failed else _row(cell)
            rows.append((first, cell.arm, *found))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(cell: Cell) -> tuple[str, ...]:
    found = {name: value.median for name, value in cell.measured.items()}
    waits = f"{found['sync_host_us_p50'] / 1000:.2f} ({found['sync_host_us_p99'] / 1000:.2f})"
    against = ("", "") if cell.arm == BASELINE.name else (str(cell.ratios[name]) for name in (RATIOS[0], RATIOS[2]))
    tpot = f"{found['tpot_ms_p50']:.1f}"
    return f"{found['dp_collectives_per_step']:.2f}", waits, f"{found['padded_token_share']:.0%}", tpot, *against


def flat(cell: Cell) -> dict[str, Any]:
    """A row of the CSV file: each figure with its median, least and largest value."""
    row: dict[str, Any] = {name: getattr(cell, name) for name in ("setup", "load", "delay_us", "arm", "failed")}
    for prefix, found in (("", cell.measured), ("ratio_", cell.ratios)):
        for name, value in found.items():
            row |= {f"{prefix}{name}_{part}": round(number, 4) for part, number in vars(value).items()}
    return row


def to_json(cells: Iterable[Cell], runs: dict[str, Any]) -> str:
    """`runs`: by setup, what is to be known of the run that its cells are of."""
    document = {"runs": runs, "cells": [{**vars(cell), **_plain(cell)} for cell in cells]}
    return json.dumps(document, indent=1) + "\n"


def _plain(cell: Cell) -> dict[str, Any]:
    return {
        name: {figure: [round(number, 4) for number in vars(value).values()] for figure, value in found.items()}
        for name, found in (("measured", cell.measured), ("ratios", cell.ratios))
    }


def from_json(text: str) -> tuple[list[Cell], dict[str, Any]]:
    document = json.loads(text)
    cells = []
    for one in document["cells"]:
        spreads = {
            name: {figure: Spread(*numbers) for figure, numbers in one[name].items()} for name in ("measured", "ratios")
        }
        cells.append(Cell(**{**one, **spreads}))
    return cells, document["runs"]

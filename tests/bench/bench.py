# SPDX-License-Identifier: Apache-2.0
"""`make bench`: stock against the overlay on two nodes, on three stock versions; bench_cells.py says what is measured.

Each setup is run by bench_node.py in the environment of its version. last_bench.json, .csv, .md and .svg beside this
file and the table in README have the last run of each setup, and are written anew after each.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("examples", "tests/serve", "tests/versions")]

from bench_cells import (  # noqa: E402  (this line and the next ones need the path above)
    BASELINE,
    DELAYS_US,
    EVEN,
    SETUPS,
    SHOWN_DELAY_US,
    Cell,
    Setup,
    flat,
    from_json,
    make_cells,
    table,
    to_json,
)
from demo import say  # noqa: E402
from readme_part import with_part  # noqa: E402

HERE = Path(__file__).resolve().parent
LAST = HERE / "last_bench.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- figures: make bench -->\n", "<!-- end of figures -->\n"
COLUMNS = 3  # of the plot


def run(setup: Setup, folder: Path, turns: int) -> list[dict[str, Any]] | None:
    """What was measured; None when that failed, which the output tells."""
    python = ROOT / "build" / f"venv-{setup.version}" / "bin" / "python"
    command = [str(python), str(HERE / "bench_node.py"), setup.name, "--output", str(folder), "--turns", str(turns)]
    with subprocess.Popen(command, cwd=ROOT) as node:
        try:
            code = node.wait()
        except BaseException:  # also Ctrl-C: it has nodes and namespaces to take down, which nobody else knows
            node.terminate()
            node.wait()
            raise
    if code:
        return None
    found: list[dict[str, Any]] = json.loads((folder / "measured.json").read_text())
    return found


def about(minutes: float, turns: int) -> dict[str, Any]:
    """What a reader has to know of the run of a setup."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "date": date.today().isoformat(),
        "minutes": round(minutes),
        "turns": turns,
        "cores": os.cpu_count(),
        "machine": model[1].strip() if model else platform.machine(),
    }


def to_csv(cells: Sequence[Cell]) -> str:
    rows = [flat(cell) for cell in cells]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plot(cells: Sequence[Cell], path: Path) -> None:
    """A panel for each setup: time per output token over the delay of the link, even load."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bench"
    from matplotlib import pyplot

    even = [cell for cell in cells if cell.load == EVEN.name and not cell.failed]
    setups = list(dict.fromkeys(cell.setup for cell in even))
    rows = -(-len(setups) // COLUMNS)
    figure, panels = pyplot.subplots(rows, COLUMNS, figsize=(4.2 * COLUMNS, 3.2 * rows), squeeze=False)
    for panel, setup in zip(panels.flat, setups, strict=False):
        arms = list(dict.fromkeys(cell.arm for cell in even if cell.setup == setup))
        for number, arm in enumerate(arms):
            own = [cell for cell in even if (cell.setup, cell.arm) == (setup, arm)]
            values = [cell.measured["tpot_ms_p50"] for cell in own]
            # The delays are no scale: what is of interest lies between the first two.
            at = [DELAYS_US.index(cell.delay_us) + 0.06 * (number - (len(arms) - 1) / 2) for cell in own]
            panel.errorbar(
                at,
                [value.median for value in values],
                yerr=[
                    [value.median - value.least for value in values],
                    [value.largest - value.median for value in values],
                ],
                label=arm,
                marker="o",
                capsize=3,
                linestyle="--" if arm == BASELINE.name else "-",
            )
        panel.set_title(setup)
        panel.set_ylim(bottom=0)
        panel.set_xticks(range(len(DELAYS_US)), [f"{delay / 1000:g}" for delay in DELAYS_US])
        panel.set_xlabel("one-way delay between the nodes, ms")
        panel.set_ylabel("time per output token, ms")
        panel.grid(alpha=0.3)
        panel.legend()
    for panel in list(panels.flat)[len(setups) :]:
        panel.set_visible(False)
    figure.suptitle(
        "Two nodes, DP2 unless said, 8 requests at a time, virtual NPU: median, least and largest of the turns"
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def section(cells: Sequence[Cell], runs: dict[str, Any]) -> str:
    """README's part: the table, and which runs it is of."""
    alike: dict[str, list[str]] = {}
    for name, run in runs.items():
        described = f"{run['turns']} turns, {run['cores']} cores of {run['machine']}, {run['date']}"
        alike.setdefault(described, []).append(name)
    minutes = sum(run["minutes"] for run in runs.values())
    told = "; ".join(f"{described}: {', '.join(names)}" for described, names in alike.items())
    if len(alike) == 1:
        told = next(iter(alike))
    even = [cell for cell in cells if cell.load == EVEN.name]
    return f"{table(even, SHOWN_DELAY_US)}\n{told}. All of it takes {minutes} minutes.\n"


def tables(cells: Sequence[Cell]) -> str:
    """All cells, a table for each delay."""
    head = '# All loads and delays of `make bench`\n\nSee README, "What it is worth".\n'
    parts = (f"## {delay_us / 1000:g} ms one way\n\n{table(cells, delay_us)}" for delay_us in DELAYS_US)
    return "\n".join([head, *parts])


def in_order(cells: Sequence[Cell], runs: dict[str, Any]) -> tuple[list[Cell], dict[str, Any]]:
    """Those of setups that there are, in their order."""
    names = [setup.name for setup in SETUPS if setup.name in runs]
    return [cell for name in names for cell in cells if cell.setup == name], {name: runs[name] for name in names}


def write(cells: Sequence[Cell], runs: dict[str, Any], path: Path, readme: Path) -> None:
    """The four files, with the name of `path`, and README's part."""
    path.write_text(to_json(cells, runs))
    cells, runs = from_json(path.read_text())  # as rounded there
    path.with_suffix(".csv").write_text(to_csv(cells))
    path.with_suffix(".md").write_text(tables(cells))
    plot(cells, path.with_suffix(".svg"))
    readme.write_text(with_part(readme.read_text(), BEGIN, section(cells, runs), END))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setups", nargs="*", help="; ".join(setup.name for setup in SETUPS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--again", action="store_true", help="write table and plot of the last runs once more")
    options = parser.parse_args()
    cells, runs = from_json(LAST.read_text()) if LAST.exists() else ([], {})
    if options.again:
        write(cells, runs, LAST, README)
        return 0
    if unknown := set(options.setups) - {setup.name for setup in SETUPS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {'; '.join(setup.name for setup in SETUPS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    failed = []
    chosen = [setup for setup in SETUPS if not options.setups or setup.name in options.setups]
    for number, setup in enumerate(chosen):
        began = time.monotonic()
        measured = run(setup, options.output / f"setup{number}", options.turns)
        try:
            found = make_cells(setup.name, measured or [])
        except ValueError as error:
            say(str(error))
            found = []
        if not found:
            failed.append(setup.name)
            continue
        print(table(found, SHOWN_DELAY_US))
        runs[setup.name] = about((time.monotonic() - began) / 60, options.turns)
        cells, runs = in_order([*(cell for cell in cells if cell.setup != setup.name), *found], runs)
        write(cells, runs, LAST, README)
    for name in failed:
        say(f"FAILED {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

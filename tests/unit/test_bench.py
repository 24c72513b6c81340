# SPDX-License-Identifier: Apache-2.0
"""The figures of `make bench`: from ledgers to cells, tables and files."""

from __future__ import annotations

import csv
import io
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import bench
import bench_node
import pytest
from bench_cells import (
    BASELINE,
    DELAYS_US,
    EVEN,
    GRAPH_SYNC,
    GRAPH_SYNC_LATE,
    OVERLAY,
    OWN_SKIP,
    SETUPS,
    SHOWN_DELAY_US,
    SKEWED,
    Figures,
    Measured,
    Spread,
    Window,
    figures,
    from_json,
    make_cells,
    percentile,
    table,
    to_json,
)
from readme_part import with_part

import dp_sync_patch

WINDOW = Window("even", 1000, 0, "stock", 10.0, 20.0, 5.0, 9.0, 100.0)
RUN = {"date": "2026-11-29", "minutes": 1, "turns": 2, "cores": 2, "machine": "a machine"}
RUNS = {"0.23.0, async": RUN, "0.11.0": RUN}


def step(number: int, at: float, scheduled: int, rows: int, host_us: float, *drafts: int) -> list[dict[str, Any]]:
    """A step of one rank with one collective in the DP group and a vote, two layers and draft passes."""
    sizes = [rows, rows, *drafts]
    kind = "execute" if scheduled else "dummy"
    return [
        {"ev": "step", "step": number, "t": at, "kind": kind, "scheduled_tokens": scheduled},
        {"ev": "collective", "step": number, "t": at, "group": "dp:0", "host_us": host_us},
        {"ev": "collective", "step": number, "group": "stateless", "host_us": 5000.0},
        {"ev": "collective", "step": number, "group": "ep:0", "host_us": 7000.0},
        *({"ev": "ep", "op": "dispatch", "step": number, "bs": size} for size in sizes),
        *({"ev": "ep", "op": "combine", "step": number, "bs": size} for size in sizes),
    ]


def test_figures_of_a_window() -> None:
    busy = [
        {"ev": "collective", "step": -1, "group": "dp:0", "host_us": 1e6},  # start-up
        *step(0, 9.9, 8, 8, 900.0),  # before the window
        *step(1, 10.0, 3, 4, 100.0, 1, 1),
        *step(2, 19.9, 4, 4, 200.0),
        *step(3, 20.0, 8, 8, 900.0),  # after it
    ]
    busy += step(4, 15.0, 48, 48, 200.0)[:2]  # by all-gather
    idle = [*step(0, 9.8, 0, 4, 900.0), *step(1, 10.1, 0, 4, 300.0), *step(2, 20.1, 0, 8, 900.0)]
    found = figures(WINDOW, [busy, idle])
    assert found == Figures(
        steps=4,
        dp_collectives_per_step=1.0,
        sync_host_us_p50=200.0,
        sync_host_us_p99=300.0,
        begun_early_us_p50=0.0,
        padded_token_share=1 - 7 / 12,
        tpot_ms_p50=5.0,
        tpot_ms_p99=9.0,
        output_tokens_per_s=100.0,
    )
    with pytest.raises(ValueError, match="rank 1 has no step"):
        figures(WINDOW, [busy, idle[:6]])


def test_the_wait_for_a_collective_that_was_begun_before_counts() -> None:
    wait = {"ev": "collective_wait", "step": 1, "t": 12.001, "group": "dp:0", "host_us": 40.0}
    idle = [*step(1, 12.0, 0, 4, 100.0), {**wait, "t": 12.005}]  # a dummy has nothing to do meanwhile
    found = figures(WINDOW, [[*step(1, 12.0, 3, 4, 100.0), wait], idle])
    assert (found.sync_host_us_p50, found.dp_collectives_per_step) == (140.0, 1.0)
    assert found.begun_early_us_p50 == pytest.approx(960.0)


@pytest.mark.parametrize(("percent", "expected"), [(50, 2), (75, 3), (76, 4), (99, 4), (1, 1)])
def test_percentile(percent: int, expected: int) -> None:
    assert percentile([3, 1, 4, 2], percent) == expected


def measured(arm: str, turn: int, tpot: float, collectives: float, delay_us: int = SHOWN_DELAY_US) -> Measured:
    values = {field.name: 1.0 for field in fields(Figures)}
    values |= {"tpot_ms_p50": tpot, "dp_collectives_per_step": collectives, "padded_token_share": 0.25}
    return {"load": "even", "delay_us": delay_us, "turn": turn, "arm": arm, "figures": values}


MEASURED = [
    measured(BASELINE.name, 0, 10.0, 1.0),
    measured(OVERLAY.name, 0, 5.0, 0.0),
    measured(BASELINE.name, 1, 30.0, 1.0),
    measured(OVERLAY.name, 1, 12.0, 0.0),
    {"load": "even", "delay_us": SHOWN_DELAY_US, "turn": 0, "arm": OWN_SKIP.name, "failed": "timeout, waited 20 s"},
]


def test_arms_are_compared_turn_by_turn() -> None:
    stock, overlay, own_skip = make_cells("0.23.0", MEASURED)
    assert stock.measured["tpot_ms_p50"] == Spread(20.0, 10.0, 30.0)
    assert overlay.measured["tpot_ms_p50"] == Spread(8.5, 5.0, 12.0)
    assert overlay.ratios["tpot_ms_p50"] == Spread(0.45, 0.4, 0.5)
    assert own_skip.failed == "timeout, waited 20 s"


def test_a_baseline_without_collectives_is_none() -> None:
    with pytest.raises(ValueError, match="no baseline"):
        make_cells("0.23.0", [measured(BASELINE.name, 0, 10.0, 0.0), *MEASURED[1:2]])
    with pytest.raises(ValueError, match="no baseline"):
        make_cells("0.23.0", MEASURED[1:2])


def test_files_have_everything(tmp_path: Path) -> None:
    cells = make_cells("0.11.0", [*MEASURED, *(measured(BASELINE.name, 0, 10.0, 1.0, us) for us in DELAYS_US[3:])])
    assert from_json(to_json(cells, RUNS)) == (cells, RUNS)
    rows = list(csv.DictReader(io.StringIO(bench.to_csv(cells))))
    assert [(row["arm"], row["tpot_ms_p50_median"], row["failed"]) for row in rows[:3]] == [
        ("stock", "20.0", ""), ("overlay", "8.5", ""), ("stock, own skip", "", "timeout, waited 20 s"),
    ]  # fmt: skip
    assert rows[1]["ratio_tpot_ms_p50_largest"] == "0.5"
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{bench.BEGIN}old\n{bench.END}after\n")
    bench.write(cells, RUNS, tmp_path / "bench.json", readme)
    drawn = (tmp_path / "bench.svg").read_text()
    assert "<svg" in drawn
    assert (tmp_path / "bench.csv").read_text() == bench.to_csv(cells)
    told = (tmp_path / "bench.md").read_text()
    assert told == bench.tables(cells)
    assert told.count("| stock |") == 2
    assert "\n\n## 5 ms one way\n\n| node, load |" in told
    assert readme.read_text().startswith(f"before\n{bench.BEGIN}| node, load |")
    told = "2 turns, 2 cores of a machine, 2026-11-29. All of it takes 2 minutes."
    assert readme.read_text().endswith(f"\n\n{told}\n{bench.END}after\n")


def test_a_setup_is_run_again_alone() -> None:
    old, new = make_cells("0.23.0, async", MEASURED), make_cells("0.11.0", MEASURED)
    cells, runs = bench.in_order([*old, *new, *make_cells("gone", MEASURED)], {**RUNS, "gone": RUN})
    assert (cells, list(runs)) == ([*new, *old], ["0.11.0", "0.23.0, async"])
    runs["0.11.0"] = {**RUN, "date": "2026-11-30"}
    assert bench.section(cells, runs).endswith(
        "\n2 turns, 2 cores of a machine, 2026-11-30: 0.11.0; "
        "2 turns, 2 cores of a machine, 2026-11-29: 0.23.0, async. All of it takes 2 minutes.\n"
    )


def test_the_table_shows_one_delay() -> None:
    cells = make_cells("0.23.0", [*MEASURED, measured(BASELINE.name, 0, 10.0, 1.0, 5000)])
    rows = table(cells, SHOWN_DELAY_US).splitlines()[2:]
    assert rows == [
        "| 0.23.0: even | stock | 1.00 | 0.00 (0.00) | 25% | 20.0 |  |  |",
        "|  | overlay | 0.00 | 0.00 (0.00) | 25% | 8.5 | 0.45 (0.40-0.50) | 1.00 (1.00-1.00) |",
        "|  | stock, own skip | failed: timeout, waited 20 s |  |  |  |  |  |",
    ]


def test_readme_has_a_place_for_the_figures() -> None:
    readme = bench.README.read_text()
    assert bench.BEGIN in with_part(readme, bench.BEGIN, "new\n", bench.END)
    with pytest.raises(ValueError, match="README needs '<!-- figures: make bench -->'"):
        with_part(readme.replace(bench.END, ""), bench.BEGIN, "new\n", bench.END)


def test_readme_and_the_files_are_of_the_last_runs(tmp_path: Path) -> None:
    """`bench.py --again` writes them anew."""
    if not bench.LAST.exists():
        assert f"{bench.BEGIN}Not run as a whole yet.\n{bench.END}" in bench.README.read_text()
        assert not list(bench.HERE.glob("last_bench.*"))
        return
    cells, runs = from_json(bench.LAST.read_text())
    assert bench.in_order(cells, runs) == (cells, runs)
    assert {cell.setup for cell in cells} == set(runs)
    readme = tmp_path / "README.md"
    readme.write_text(bench.README.read_text())
    bench.write(cells, runs, tmp_path / "last_bench.json", readme)
    assert readme.read_text() == bench.README.read_text()
    for name in ("last_bench.json", "last_bench.csv", "last_bench.md"):
        assert (tmp_path / name).read_text() == bench.LAST.with_name(name).read_text()
    assert bench.LAST.with_suffix(".svg").exists()


def test_setups() -> None:
    assert len({setup.name for setup in SETUPS}) == len(SETUPS)
    for setup in SETUPS:
        assert setup.arms[0] is BASELINE
        assert all(SHOWN_DELAY_US in setup.delays_us(load) for load in setup.loads)
        assert (SKEWED in setup.loads) == (setup.version != "0.11.0" and setup.dp_size == 2)
    # Every delay on every version.
    assert {setup.version for setup in SETUPS if setup.delays_us(EVEN) == DELAYS_US} == {"0.11.0", "0.13.0", "0.23.0"}
    assert replace(SETUPS[0], drafts=3).largest_step == 32


def test_the_arm_that_tells_its_mode_late_differs_by_one_condition(tmp_path: Path) -> None:
    plain = bench_node.environment(GRAPH_SYNC, tmp_path / "plain")
    late = bench_node.environment(GRAPH_SYNC_LATE, tmp_path / "late")
    assert set(late) - set(plain) == {"PYTHONPATH", "PYTHONSAFEPATH"}
    copy = tmp_path / "late" / "dp_sync_patch"
    assert not (tmp_path / "plain").exists()
    differing = [
        (path.relative_to(copy).as_posix(), old, new)
        for path in copy.rglob("*.py")
        for old, new in zip(
            (Path(dp_sync_patch.__file__).parent / path.relative_to(copy)).read_text().splitlines(),
            path.read_text().splitlines(),
            strict=True,
        )
        if old != new
    ]
    ((file, old, new),) = differing
    assert file == "patches/graph_mode.py"
    assert old.replace("runtime.sync_graph_mode", "False") == new

# SPDX-License-Identifier: Apache-2.0
"""`make matrix`: every supported stock version in an environment of its own, one after another, and the table of it.

The result of the last run of each column of a version is kept in last_matrix.json; README's support table is made from
that, from `dp_sync_patch.stock` and from known_sources.json. tests/unit fails when one of them is older than the other.

This module is also the pytest plugin of that run: `--columns` leaves out the tests of other columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from readme_part import with_part

from dp_sync_patch import stock
from dp_sync_patch.patches import TRIGGERS, points_of

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).with_name("last_matrix.json")
NEWER = Path(__file__).with_name("known_sources.json")
README = ROOT / "README.md"
BEGIN, END = "<!-- support table: make matrix -->\n", "<!-- end of support table -->\n"

COLUMNS = ("skip proven", "hazards shown", "refusals", "drafts", "checks", "virtual NPU")
# Module, or module and beginning of a test's name -> its column; the first that fits.
_COLUMN_OF = {
    "tests.versions.test_decode_node.test_skip": "skip proven",
    "tests.versions.test_decode_node.test_stock": "hazards shown",
    "tests.versions.test_hazards": "hazards shown",
    "tests.versions.test_graphs.test_stock": "hazards shown",
    "tests.versions.test_graphs": "skip proven",
    "tests.versions.test_draft_passes.test_stock": "hazards shown",
    "tests.versions.test_draft_passes": "drafts",
    "tests.versions.test_w8a8": "skip proven",
    "tests.versions": "refusals",
    "tests.serve.test_realistic_node": "drafts",
    "tests.serve.test_states": "refusals",
    "tests.serve.test_faults": "refusals",
    "tests.serve": "skip proven",
    "tests.stock.test_conditions": "refusals",
    "tests.stock.test_advice": "refusals",
    "tests.virtual_npu": "virtual NPU",
    "": "checks",
}
# tests/serve is about 0.11.0 alone; tests/stock and tests/versions choose what applies.
_EVERYWHERE = ("tests/unit", "tests/stock", "tests/versions", "tests/virtual_npu")


def column_of(name: str) -> str:
    """`name`: the test's module with dots, a dot, and the test's name."""
    return next(column for beginning, column in _COLUMN_OF.items() if name.startswith(beginning))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--columns", default=",".join(COLUMNS), help="leave the tests of other columns out")
    parser.addoption("--reports", action="append", type=Path, default=[], help="leave the tests of a report out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    columns, done = config.getoption("--columns").split(","), outcomes(config.getoption("--reports"))
    chosen, left_out = [], []
    for item in items:
        module, _, name = item.nodeid.partition("::")
        name = f"{module.removesuffix('.py').replace('/', '.')}.{name}"
        (chosen if column_of(name) in columns and name not in done else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


def fingerprint(entry: stock.Stock) -> str:
    """Of what the overlay says about a version: the row in stock.py, and the patch points with their signatures.

    A field that the row leaves at its default is not part of it, so that one that is new does not concern the others.
    """
    points = [
        (point.target, point.signature, point.wrapper.__name__)
        for unit in TRIGGERS
        for point in points_of(unit, entry.vllm_ascend)
    ]
    defaults = {field.name: field.default for field in dataclasses.fields(entry)}
    row = [
        (name, sorted(value) if isinstance(value, frozenset) else value)
        for name, value in vars(entry).items()
        if value != defaults[name]
    ]
    return hashlib.sha256(json.dumps([row, points]).encode()).hexdigest()[:16]


def table(results: dict[str, Any], newer: list[dict[str, Any]]) -> str:
    """In Markdown. A cell is what passed, or what failed of how many; a dash: no such test for this version.

    A cell that was run before the overlay changed what it says about the version has a date of its own.
    """
    head = ("vllm-ascend", "vllm", *COLUMNS, "last run")
    rows = [head, ("---",) * len(head)]
    for entry in stock.KNOWN:
        columns, now = results.get(entry.vllm_ascend, {}), fingerprint(entry)
        cells = (_cell(columns.get(name), now) for name in COLUMNS)
        current = [found["date"] for found in columns.values() if found["fingerprint"] == now]
        rows.append((entry.vllm_ascend, entry.vllm, *cells, max(current, default="not run" if not columns else "-")))
    for source in newer:
        cells = [source["verdict"], *("-" for _ in COLUMNS[1:])]
        rows.append((source["version"], source["vllm"], *cells, "source only"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(found: dict[str, Any] | None, now: str) -> str:
    if not found:
        return "-"
    passed, failed = found.get("passed", 0), found.get("failed", 0)
    text = f"{passed} passed" if not failed else f"**{failed} of {passed + failed} failed**"
    return text if found["fingerprint"] == now else f"{text}, {found['date']}"


def outcomes(reports: Iterable[Path]) -> dict[str, bool]:
    """Test -> whether it passed, in the last of the reports that have it. Skipped is not passed: nothing here may be
    skipped unseen."""
    found: dict[str, bool] = {}
    for report in reports:
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            name = f"{case.get('classname')}.{case.get('name')}"
            found[name] = all(case.find(bad) is None for bad in ("failure", "error", "skipped"))
    return found


def read_junit(reports: Iterable[Path]) -> dict[str, Counter[str]]:
    """Column -> how many passed, failed."""
    found: dict[str, Counter[str]] = {}
    for name, good in outcomes(reports).items():
        found.setdefault(column_of(name), Counter())["passed" if good else "failed"] += 1
    return found


def run(version: str, columns: Sequence[str], reports: list[Path], arguments: list[str]) -> dict[str, Any]:
    """Sets the environment up and runs everything that applies; the output of pytest passes through.

    Args:
        columns: those to run.
        reports: of the same version and state, as of `make test`; their tests are not run again.

    Returns:
        column -> passed, failed, date, fingerprint.
    """
    subprocess.run(["make", "setup", f"STOCK={version}"], cwd=ROOT, check=True)
    report = ROOT / "build" / "matrix" / f"{version}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    began = time.monotonic()
    targets = ("tests",) if version == stock.KNOWN[0].vllm_ascend else _EVERYWHERE
    python = ROOT / "build" / f"venv-{version}" / "bin" / "python"
    # What judges the result of this run cannot be part of it; the simulation is of all versions, see `make test-long`.
    targets = (*targets, "--ignore", "tests/unit/test_matrix.py", "--ignore", "tests/simulation")
    chosen = ("-p", "matrix", "--columns", ",".join(columns), *(f"--reports={path.resolve()}" for path in reports))
    command = [str(python), "-m", "pytest", *targets, "-m", "", *chosen, f"--junitxml={report}", *arguments]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if not report.exists():
        raise SystemExit(f"{version}: pytest left no report (exit status {code})")
    print(f"{version}: {(time.monotonic() - began) / 60:.0f} minutes", flush=True)
    entry = next(entry for entry in stock.KNOWN if entry.vllm_ascend == version)
    run_as = {"date": date.today().isoformat(), "fingerprint": fingerprint(entry)}
    return {name: {**counts, **run_as} for name, counts in read_junit([*reports, report]).items() if name in columns}


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "versions",
        nargs="*",
        help="vllm-ascend versions (all supported ones by default; set has_been_run of another one first)",
    )
    parser.add_argument(
        "--columns", type=lambda text: text.split(","), default=COLUMNS, help="with commas between them"
    )
    parser.add_argument("--report", action="append", type=Path, default=[], help="of a part that has been run already")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="further arguments of pytest")
    options = parser.parse_args()
    known = [entry.vllm_ascend for entry in stock.KNOWN]
    supported = [entry.vllm_ascend for entry in stock.KNOWN if entry.has_been_run]
    if unknown := set(options.versions) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if unknown := set(options.columns) - set(COLUMNS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; columns: {', '.join(COLUMNS)}")
    good = True
    for version in options.versions or supported:
        columns = run(version, options.columns, options.report, options.pytest)
        good &= not any(counts["failed"] for counts in columns.values())
        results = load(RESULT)
        results[version] = results.get(version, {}) | columns
        RESULT.write_text(json.dumps({name: results[name] for name in known if name in results}, indent=2) + "\n")
        text = table(results, load(NEWER))
        README.write_text(with_part(README.read_text(), BEGIN, text, END))
        print(text, flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

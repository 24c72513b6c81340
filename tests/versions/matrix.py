# SPDX-License-Identifier: Apache-2.0
"""`make matrix`: every supported stock version in an environment of its own, one after another, and the table of it.

The result of the last run of each version is kept in last_matrix.json; README's support table is made from that, from
`dp_sync_patch.stock` and from known_sources.json. tests/unit fails when one of them is older than the other.
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
from datetime import date
from pathlib import Path
from typing import Any

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
    """In Markdown. A cell is what passed, or what failed of how many; a dash: no such test for this version."""
    head = ("vllm-ascend", "vllm", *COLUMNS, "last run")
    rows = [head, ("---",) * len(head)]
    for entry in stock.KNOWN:
        found = results.get(entry.vllm_ascend, {"columns": {}, "date": "not run"})
        cells = (_cell(found["columns"].get(name)) for name in COLUMNS)
        rows.append((entry.vllm_ascend, entry.vllm, *cells, found["date"]))
    for source in newer:
        cells = [source["verdict"], *("-" for _ in COLUMNS[1:])]
        rows.append((source["version"], source["vllm"], *cells, "source only"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(counts: dict[str, int] | None) -> str:
    if not counts:
        return "-"
    passed, failed = counts.get("passed", 0), counts.get("failed", 0)
    return f"{passed} passed" if not failed else f"**{failed} of {passed + failed} failed**"


def read_junit(path: Path) -> dict[str, Counter[str]]:
    """Column -> how many passed, failed. A skipped test counts as failed: nothing here may be skipped unseen."""
    found: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        column = next(column for beginning, column in _COLUMN_OF.items() if name.startswith(beginning))
        good = all(case.find(bad) is None for bad in ("failure", "error", "skipped"))
        found.setdefault(column, Counter())["passed" if good else "failed"] += 1
    return found


def run(version: str, arguments: list[str]) -> dict[str, Any]:
    """Sets the environment up and runs everything that applies; the output of pytest passes through."""
    subprocess.run(["make", "setup", f"STOCK={version}"], cwd=ROOT, check=True)
    report = ROOT / "build" / "matrix" / f"{version}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    began = time.monotonic()
    targets = ("tests",) if version == stock.KNOWN[0].vllm_ascend else _EVERYWHERE
    python = ROOT / "build" / f"venv-{version}" / "bin" / "python"
    # What judges the result of this run cannot be part of it; the simulation is of all versions, see `make test-long`.
    targets = (*targets, "--ignore", "tests/unit/test_matrix.py", "--ignore", "tests/simulation")
    command = [str(python), "-m", "pytest", *targets, "-m", "", f"--junitxml={report}", *arguments]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if not report.exists():
        raise SystemExit(f"{version}: pytest left no report (exit status {code})")
    entry = next(entry for entry in stock.KNOWN if entry.vllm_ascend == version)
    return {
        "columns": read_junit(report),
        "date": date.today().isoformat(),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "fingerprint": fingerprint(entry),
    }


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "versions",
        nargs="*",
        help="vllm-ascend versions (all supported ones by default; set has_been_run of another one first)",
    )
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="further arguments of pytest")
    options = parser.parse_args()
    known = [entry.vllm_ascend for entry in stock.KNOWN]
    supported = [entry.vllm_ascend for entry in stock.KNOWN if entry.has_been_run]
    if unknown := set(options.versions) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    good = True
    for version in options.versions or supported:
        result = run(version, options.pytest)
        good &= not any(counts["failed"] for counts in result["columns"].values())
        results = load(RESULT) | {version: result}
        RESULT.write_text(json.dumps({name: results[name] for name in known if name in results}, indent=2) + "\n")
        text = table(results, load(NEWER))
        README.write_text(with_part(README.read_text(), BEGIN, text, END))
        print(text, flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The support table in README belongs to the last matrix run, and that run to what the overlay says today."""

from __future__ import annotations

from pathlib import Path

import matrix
import pytest
from readme_part import with_part

from dp_sync_patch import stock

RESULTS = matrix.load(matrix.RESULT)
REQUIRED = ("skip proven", "refusals", "checks", "virtual NPU")


def test_readme_has_the_table_of_the_last_run() -> None:
    readme = matrix.README.read_text()
    assert readme.count(matrix.BEGIN) == readme.count(matrix.END) == 1
    table = matrix.table(RESULTS, matrix.load(matrix.NEWER))
    assert readme == with_part(readme, matrix.BEGIN, table, matrix.END)


@pytest.mark.parametrize("entry", [entry for entry in stock.KNOWN if entry.has_been_run], ids=lambda e: e.vllm_ascend)
def test_a_supported_version_passed(entry: stock.Stock) -> None:
    """All that is required, some time. What is older than the overlay's description of it is dated in README."""
    found = RESULTS[entry.vllm_ascend]
    assert not any(column.get("failed") for column in found.values())
    required = (*REQUIRED, "hazards shown") if entry.own_skip else REQUIRED
    assert [name for name in required if not found.get(name, {}).get("passed")] == []


def test_a_changed_row_or_signature_is_noticed() -> None:
    entry = stock.KNOWN[-1]
    assert matrix.fingerprint(entry) == matrix.fingerprint(entry)
    prints = {matrix.fingerprint(one) for one in (*stock.KNOWN, stock.replace(entry, a2_max_local_experts=25))}
    assert len(prints) == len(stock.KNOWN) + 1


def test_the_report_of_pytest_is_read_by_column(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.versions.test_decode_node" name="test_skip_a"/>
        <testcase classname="tests.versions.test_decode_node" name="test_stock_b"/>
        <testcase classname="tests.virtual_npu.tests.test_hccl" name="test_c"><failure/></testcase>
        <testcase classname="tests.virtual_npu.tests.test_hccl" name="test_d"/>
        <testcase classname="tests.stock.test_plugins" name="test_e"><skipped/></testcase>
        </testsuite></testsuites>"""
    )
    counts = matrix.read_junit([report])
    assert counts == {
        "skip proven": {"passed": 1},
        "hazards shown": {"passed": 1},
        "virtual NPU": {"passed": 1, "failed": 1},
        "checks": {"failed": 1},
    }
    (entry,) = [entry for entry in stock.KNOWN if entry.vllm_ascend == "0.18.0"]
    run_as = {"date": "2026-01-02", "fingerprint": matrix.fingerprint(entry)}
    found = {name: {**column, **run_as} for name, column in counts.items()}
    found["checks"] |= {"date": "2026-01-01", "fingerprint": "before a change"}
    text = matrix.table({"0.18.0": found}, [])
    (row,) = [line for line in text.splitlines() if line.startswith("| 0.18.0 ")]
    assert row.split(" | ")[2:] == [
        "1 passed",
        "1 passed",
        "-",
        "-",
        "**1 of 1 failed**, 2026-01-01",
        "**1 of 2 failed**",
        "2026-01-02 |",
    ]
    assert "| 0.23.0 | 0.23.0 | - | - | - | - | - | - | not run |" in text

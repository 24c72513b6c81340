# SPDX-License-Identifier: Apache-2.0
"""README and code say the same: reason codes, settings, patched objects."""

from __future__ import annotations

import re
from pathlib import Path

from dp_sync_patch import metrics, settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SOURCES = {path: path.read_text() for path in sorted((ROOT / "dp_sync_patch").rglob("*.py"))}


def test_every_reason_code_is_listed_once() -> None:
    listed = re.findall(r"^\| (DSP\d{3}) \|", README, flags=re.MULTILINE)
    used = {code for text in SOURCES.values() for code in re.findall(r"DSP\d{3}", text)}
    assert listed == sorted(set(listed))
    assert set(listed) == used


def test_every_setting_is_listed_with_its_default() -> None:
    rows = re.findall(r"^\| `DP_SYNC_PATCH_(\w+)` \| [^|]+ \| `([^`]+)` \|", README, flags=re.MULTILINE)
    defaults = settings.Settings().values()
    assert {name.lower(): default for name, default in rows} == {
        name: f"{value:g}" if isinstance(value, float) else value for name, value in defaults.items()
    }


def test_every_patched_object_is_listed() -> None:
    pattern = re.compile(r'"((?:NPUModelRunner|NPUWorker|TokenDispatcherWithMC2|MtpProposer|EngineCore)\.\w+)"')
    names = {name for text in SOURCES.values() for name in pattern.findall(text)}
    names |= {"select_moe_comm_method", "should_skip_allreduce_across_dp_group"}
    assert len(names) >= 14
    section = README.split("## What is patched")[1].split("\n## ")[0]
    for name in names:
        owner, _, method = name.rpartition(".")
        assert f"`{name}`" in section or (f"`{owner}." in section and f"`.{method}`" in section), name


def test_every_metric_is_listed() -> None:
    section = README.split("## Metrics")[1].split("\n## ")[0]
    listed = set(re.findall(r"`(?:dp_sync_patch_|\.\.\._)(\w+)_total`", section))
    assert listed == set(metrics.HELP)
    assert "`dp_sync_patch_skip`" in section


def test_every_fault_names_a_test_that_exists() -> None:
    faults = (ROOT / "tests" / "serve" / "FAULTS.md").read_text()
    rows = [row for row in faults.splitlines() if row.startswith("| ") and not row.startswith("| fault ")]
    named = [re.search(r"\| `(test_\w+)` \|$", row) for row in rows]
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) > 10
    for row, name in zip(rows, named, strict=True):
        assert name is not None, row
        assert f"def {name[1]}(" in tests, row

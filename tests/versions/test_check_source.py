# SPDX-License-Identifier: Apache-2.0
"""The check of source text agrees with what importing the installed stock shows, and notices what it has to notice.

known_sources.json holds what it found in releases that come as source only. They are known, not run, and refused.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import check_source
import pytest
from check_source import Source, as_written, check, check_point, importers, is_clean, overrides

from dp_sync_patch import stock
from dp_sync_patch.errors import StandDownError
from dp_sync_patch.patches import TRIGGERS, PatchPoint, points_of

pytestmark = [pytest.mark.timeout(600), pytest.mark.matrix]

VERSION = stock.require().vllm_ascend
SITE = Path(str(metadata.distribution("vllm-ascend").locate_file("")))
POINTS = [point for unit in TRIGGERS for point in points_of(unit, VERSION)]
KNOWN = json.loads(Path(__file__).with_name("known_sources.json").read_text())

# The same functions as Python sees them, described by the overlay's own code. Stock without a patch.
IMPORTED = """
import importlib, json, wrapt
from dp_sync_patch.command_line import import_stock
from dp_sync_patch.patches import TRIGGERS, describe, points_of
import_stock()
points = [point for unit in TRIGGERS for point in points_of(unit, VERSION)]
found = {point.target: wrapt.resolve_path(importlib.import_module(point.module), point.name)[2] for point in points}
print(json.dumps({target: describe(original) for target, original in found.items()}))
"""

# What every engine process of vLLM does; the overlay's hooks run with the import.
ENGINE = """
import json
import dp_sync_patch
import vllm.v1.engine.core
print(json.dumps(dp_sync_patch.status()))
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_the_source_says_what_the_imported_functions_say() -> None:
    answer = python("-c", f"VERSION = {VERSION!r}\n{IMPORTED}", DP_SYNC_PATCH_MODE="off")
    assert answer.returncode == 0, answer.stderr[-4000:]
    imported = json.loads(answer.stdout.splitlines()[-1])
    source = Source(SITE)
    assert {point.target: check_source.signature(source.find(point.module, point.name)) for point in POINTS} == {
        target: as_written(text) for target, text in imported.items()
    }


def test_the_installed_stock_is_as_recorded() -> None:
    findings = check([SITE], check_source.read_version([SITE]))
    assert findings["vllm_ascend"] == VERSION
    assert findings["points"] == {point.target: "found" for point in POINTS}
    assert is_clean(findings)


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[str, str, str], Source]:
    """The installed source with one module in which `pattern` is replaced."""

    def edit(module: str, pattern: str, replacement: str) -> Source:
        path = Path(*module.split(".")).with_suffix(".py")
        text, count = re.subn(pattern, replacement, (SITE / path).read_text(), flags=re.MULTILINE)
        assert count, f"{pattern} is not in {path}"
        copy = tmp_path / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
        return Source(tmp_path, SITE)

    return edit


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.target)
def test_a_renamed_point_is_missing(edited: Callable[[str, str, str], Source], point: PatchPoint) -> None:
    name = point.name.rpartition(".")[2]
    source = edited(point.module, rf"\b{name}\b", f"{name}_renamed")
    assert check_point(source, point) == "missing"
    others = [other for other in POINTS if other.name.rpartition(".")[2] != name]
    assert {check_point(source, other) for other in others} == {"found"}


@pytest.mark.parametrize("point", [point for point in POINTS if "." in point.name], ids=lambda point: point.target)
def test_another_argument_is_a_difference(edited: Callable[[str, str, str], Source], point: PatchPoint) -> None:
    owner, _, name = point.name.partition(".")
    instead = f"class {owner}:\n    def {name}(self, something_new): ...\n\n\nclass Rest:"
    source = edited(point.module, rf"^class {owner}\b[^\n]*:$", instead)
    assert check_point(source, point) == f"takes (self, something_new) instead of {as_written(point.signature)}"


def test_a_subclass_with_a_method_of_its_own_is_found(tmp_path: Path) -> None:
    package = tmp_path / "vllm_ascend"
    package.mkdir()
    (package / "new.py").write_text("class Mine(runners.NPUModelRunner):\n    def load_model(self): ...\n")
    new = set(overrides(Source(tmp_path, SITE), POINTS)) - set(overrides(Source(SITE), POINTS))
    assert new == {"vllm_ascend.new:Mine.load_model"}


@pytest.mark.parametrize("targets", check_source.READS, ids=lambda targets: targets[0])
def test_what_the_overlay_reads_is_looked_for(
    edited: Callable[[str, str, str], Source], targets: tuple[str, ...]
) -> None:
    here = [target for target in targets if Source(SITE).find(*target.split(":"))]
    assert here
    for module, name in (target.split(":") for target in here):
        source = edited(module, rf"\b{name.rpartition('.')[2]}\b", "renamed")
    assert check_source.unreadable(source) == [" or ".join(targets)]


if FUNCTIONS := [point for point in POINTS if "." not in point.name]:

    @pytest.mark.parametrize("point", FUNCTIONS, ids=lambda point: point.target)
    def test_a_new_importer_by_name_is_found(tmp_path: Path, point: PatchPoint) -> None:
        before = importers(Source(SITE), POINTS)
        new = tmp_path / "vllm_ascend" / "new.py"
        new.parent.mkdir()
        new.write_text(f"def late():\n    from {point.module} import {point.name}\n")
        assert importers(Source(tmp_path, SITE), POINTS) == before
        new.write_text(f"try:\n    from {point.module} import {point.name}\nexcept ImportError:\n    pass\n")
        found = importers(Source(tmp_path, SITE), POINTS)
        assert set(found[point.name]) - set(before.get(point.name, [])) == {"vllm_ascend.new"}


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row["version"])
def test_a_release_that_was_only_read_is_refused(monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]) -> None:
    assert row["verdict"] == "known, not run"
    # A patch point that came, went or moved since is one that nobody looked for there.
    points = [point for unit in TRIGGERS for point in points_of(unit, row["version"])]
    assert set(row["findings"]["points"]) == {point.target for point in points}
    monkeypatch.setattr(stock, "installed", lambda: {"vllm": row["vllm"], "vllm-ascend": row["version"]})
    with pytest.raises(StandDownError) as refusal:
        stock.require()
    assert str(refusal.value).startswith("DSP006 unsupported stock: found ")
    assert row["version"] in str(refusal.value)
    assert stock.supported() in str(refusal.value)


def test_a_newer_release_patches_nothing_and_says_so(tmp_path: Path) -> None:
    """Through the installed packages' metadata, which is all that the overlay can see of a release."""
    row = KNOWN[-1]
    for name, version in (("vllm", row["vllm"]), ("vllm-ascend", row["version"])):
        found = metadata.distribution(name)
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "entry_points.txt").write_text(found.read_text("entry_points.txt") or "")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    answer = python("-c", ENGINE, PYTHONPATH=path)
    assert answer.returncode == 0, answer.stderr[-4000:]
    refusal = f"DSP006 unsupported stock: found vllm {row['vllm']}, vllm-ascend {row['version']}, "
    warning = f"{refusal}supported {stock.supported()}; nothing is patched, this process runs stock vllm-ascend"
    assert (answer.stdout + answer.stderr).count(warning) == 1
    status = json.loads(answer.stdout.splitlines()[-1])
    assert status["points"] == []
    assert status["units"]["engine"].startswith(refusal)

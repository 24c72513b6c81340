# SPDX-License-Identifier: Apache-2.0
"""Which stock versions are patched: those that the overlay has been run on, and nothing between or beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dp_sync_patch import source_check, stock
from dp_sync_patch.errors import SettingsError, StandDownError

# vllm-ascend -> vllm
PAIRS = {"0.11.0": "0.11.0", "0.12.0rc1": "0.12.0", "0.13.0": "0.13.0", "0.18.0": "0.18.0", "0.23.0": "0.23.0"}


@pytest.mark.parametrize(("ascend", "vllm"), PAIRS.items())
@pytest.mark.parametrize("build", ["", "+empty"])
def test_a_version_that_has_been_run_is_found(ascend: str, vllm: str, build: str) -> None:
    found = stock.find({"vllm": vllm + build, "vllm-ascend": ascend})
    assert found is not None
    assert (found.vllm_ascend, found.vllm) == (ascend, vllm)


@pytest.mark.parametrize(
    ("vllm", "ascend"),
    [
        ("0.12.0", "0.12.0"),  # a pre-release is known, the release is not
        ("0.13.0", "0.12.0rc1"),
        ("0.18.1", "0.18.1"),  # between two known ones
        ("0.25.1", "0.25.1rc1"),  # newer than all
        ("0.23.0", "0.23.0rc1"),
        ("0.23.0", "0.23.0.post1"),
        ("0.23.0", "0.23.1.dev3+gabcdef0"),
        ("0.11.0", "0.23.0"),
        (None, "0.23.0"),
    ],
)
def test_any_other_version_is_refused_with_the_list(
    monkeypatch: pytest.MonkeyPatch, vllm: str | None, ascend: str
) -> None:
    monkeypatch.setattr(stock, "installed", lambda: {"vllm": vllm, "vllm-ascend": ascend})
    with pytest.raises(StandDownError, match="DSP006") as refusal:
        stock.require()
    for text in (ascend, *(f"vllm {vllm} + vllm-ascend {ascend}" for ascend, vllm in PAIRS.items())):
        assert text in str(refusal.value)


def test_a_version_that_was_only_read_is_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    read = stock.replace(stock.KNOWN[-1], vllm_ascend="0.30.0", vllm="0.30.0", has_been_run=False)
    monkeypatch.setattr(stock, "KNOWN", (*stock.KNOWN, read))
    assert stock.find({"vllm": "0.30.0", "vllm-ascend": "0.30.0"}) is None
    assert "0.30.0" not in stock.supported()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A build of a release's source that calls itself a development version (vllm-ascend#16559)."""
    monkeypatch.setattr(stock, "installed", lambda: {"vllm": "0.23.0+empty", "vllm-ascend": "0.23.1.dev0+g5cb98caaa"})
    worker = tmp_path / "fake_ascend" / "worker"
    worker.mkdir(parents=True)
    (worker.parent / "__init__.py").touch()
    (worker / "runner.py").write_text("def run(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    digests = tmp_path / "digests.json"
    digests.write_text(json.dumps({"0.23.0": {"fake_ascend/worker": source_check.digest("fake_ascend/worker")}}))
    monkeypatch.setattr(source_check, "DIGESTS", digests)
    return worker


def test_a_development_build_is_refused_unless_the_operator_names_the_release(
    monkeypatch: pytest.MonkeyPatch, built: Path
) -> None:
    with pytest.raises(StandDownError, match=r"DSP006.*0\.23\.1\.dev0"):
        stock.require()
    monkeypatch.setenv("DP_SYNC_PATCH_SAME_AS", "0.23.0")
    assert stock.require().vllm_ascend == "0.23.0"
    assert "fake_ascend" not in sys.modules


def test_the_named_release_has_to_have_the_same_source(monkeypatch: pytest.MonkeyPatch, built: Path) -> None:
    monkeypatch.setenv("DP_SYNC_PATCH_SAME_AS", "0.23.0")
    (built / "_version.py").write_text("version = '0.23.1.dev0'\n")  # written by the build
    assert stock.require().vllm_ascend == "0.23.0"
    (built / "runner.py").write_text("def run(): return 1\n")
    with pytest.raises(StandDownError, match=r"DSP012.*0\.23\.1\.dev0.*not the source of 0\.23\.0: fake_ascend/worker"):
        stock.require()
    (built / "runner.py").unlink()
    with pytest.raises(StandDownError, match="DSP012"):
        stock.require()


def test_the_named_release_has_to_be_a_supported_one(monkeypatch: pytest.MonkeyPatch, built: Path) -> None:
    monkeypatch.setenv("DP_SYNC_PATCH_SAME_AS", "0.23.1")
    with pytest.raises(StandDownError, match=r"DSP006 same_as=0\.23\.1"):
        stock.require()
    monkeypatch.setenv("DP_SYNC_PATCH_SAME_AS", "newest")
    with pytest.raises(SettingsError, match=r"DSP402.*same_as='newest'"):
        stock.require()

# SPDX-License-Identifier: Apache-2.0
"""What the overlay records about the source of the installed stock version, compared with that source."""

from __future__ import annotations

import json
import re
from importlib import metadata

import pytest

from dp_sync_patch import source_check, stock

STOCK = stock.require()


@pytest.fixture(scope="module")
def sources() -> str:
    """All Python source of both packages."""
    return "\n".join(
        entry.locate().read_text(errors="ignore")
        for package in ("vllm", "vllm-ascend")
        for entry in metadata.files(package) or ()
        if entry.suffix == ".py"
    )


@pytest.mark.parametrize("option", stock.OPTIONS)
def test_an_option_is_read_by_the_versions_that_know_it(sources: str, option: str) -> None:
    """A name that stock does not have changes nothing there, so it is no reason for a refusal."""
    assert STOCK.reads(option) == bool(re.search(rf"\b{option}\b", sources))


def test_recorded_digests_are_those_of_this_release() -> None:
    recorded = json.loads(source_check.DIGESTS.read_text())
    assert set(recorded) == {entry.vllm_ascend for entry in stock.KNOWN}
    assert {place: source_check.digest(place) for place in recorded[STOCK.vllm_ascend]} == recorded[STOCK.vllm_ascend]


@pytest.mark.parametrize("other", [entry.vllm_ascend for entry in stock.KNOWN if entry is not STOCK])
def test_another_release_has_another_source(other: str) -> None:
    assert "vllm_ascend/worker" in source_check.differing(other)

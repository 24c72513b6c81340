# SPDX-License-Identifier: Apache-2.0
"""The model of gloo's ring, by hand; `make scale` holds it against measured times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import scale
from scale import VECTORS, Point, crossings, crossings_of, sheet

README = Path(__file__).resolve().parents[2] / "README.md"
*_, MODE = VECTORS


@pytest.mark.parametrize(
    ("size", "elements", "per_node", "expected"),
    [
        # Rank 0 tells rank 1 that it waits, rank 1 sends, and waits for the sum, which it has told meanwhile.
        (2, 1, 1, 3),
        # Both tell and send, and both again for the sums.
        (2, 4, 1, 4),
        # The sum of one number passes the border between the nodes on its way round and on its way back.
        (4, 1, 2, 4),
        # Two for each of 2 (n - 1) rounds, as every segment has an element.
        (4, 8, 2, 12),
        (16, 32, 8, 60),
        # All on one node.
        (4, 6, 4, 0),
    ],
)
def test_the_link_is_crossed(size: int, elements: int, per_node: int, expected: int) -> None:
    assert crossings(size, elements, per_node) == expected


def test_what_stock_reduces_and_what_the_overlay_does() -> None:
    sizes = [vector.elements(16) for vector in VECTORS]
    assert sizes == [18, 32, 1]
    assert [crossings_of(vector, 16) for vector in VECTORS] == [34, 60, 4]
    # 16 ranks on each node, so that more ranks are more nodes.
    assert crossings_of(MODE, 64) == 2 * crossings_of(MODE, 32)


def test_a_point_that_the_model_does_not_hold_for_is_marked() -> None:
    alone = Point(4, MODE, 0, 700.0, 600.0, 900.0)
    fits = replace(alone, delay_us=1000, median_us=4500.0, least_us=4100.0, largest_us=5000.0)
    told, holds = scale.check([alone, fits])
    assert holds
    assert told.splitlines()[-1] == "| overlay, graph level sync | 4 | 1 | 4.50 (4.10-5.00) | 4.00 to 4.70 |  |"
    for median_us in (3000.0, 6000.0):
        told, holds = scale.check([alone, replace(fits, median_us=median_us)])
        assert not holds
        assert told.count("does not hold") == 1


def test_readme_has_the_sheet() -> None:
    assert sheet() in README.read_text()

# SPDX-License-Identifier: Apache-2.0
"""The model of gloo's ring, by hand; `make scale` holds it against measured times."""

from __future__ import annotations

import pytest
import scale
from scale import Point, fit_hop_us, ring_us, sheet

HOP, DELAY = 10.0, 1000.0


@pytest.mark.parametrize(
    ("size", "per_node", "hops", "crossings"),
    [
        (2, 2, 2, 0),
        (2, 1, 2, 2),  # there and back
        (4, 4, 6, 0),
        (4, 2, 6, 3),  # every second hop
        (16, 8, 30, 4),  # the first of them, and every eighth one after it
        (4, 1, 6, 6),  # a node for each rank
        (256, 16, 510, 32),
    ],
)
def test_ring(size: int, per_node: int, hops: int, crossings: int) -> None:
    assert ring_us(size, per_node, HOP, DELAY) == hops * HOP + crossings * DELAY


def test_the_hop_is_fitted_to_what_was_measured_without_a_delay() -> None:
    exact = [Point(size, 0, 2 * (size - 1) * HOP, 0, 0) for size in (2, 4, 16)]
    assert fit_hop_us([*exact, Point(4, 5000, 1e6, 0, 0)]) == pytest.approx(HOP)


def test_what_is_printed() -> None:
    assert scale.check([Point(4, 1000, 3100, 3000, 4000)], HOP).splitlines()[2] == "| 4 | 1 | 3.10 (3.00-4.00) | 3.06 |"
    rows = sheet(HOP).splitlines()
    assert rows[2] == "| 2 | 2 | 0.02 | 0.52 | 2.02 | 10.02 |"
    assert rows[-1] == "| 256 | 16 | 5.10 | 13.10 | 37.10 | 165.10 |"

# SPDX-License-Identifier: Apache-2.0
"""The column of the support table that a test counts in goes into pytest's JUnit report, see tests/versions/matrix.py."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if mark := item.get_closest_marker("column"):
            item.user_properties.append(("column", mark.args[0]))

# SPDX-License-Identifier: Apache-2.0
"""The support table's column that a test counts in goes into the JUnit report, see tests/versions/matrix.py."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if mark := item.get_closest_marker("column"):
            item.user_properties.append(("column", mark.args[0]))

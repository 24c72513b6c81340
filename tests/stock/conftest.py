# SPDX-License-Identifier: Apache-2.0
"""Runs in real interpreters take up to a minute each, on one core; those marked `ahead` use the other one meanwhile.

A test with `@pytest.mark.ahead(function, *arguments)` gets what the function returns from the fixture `ahead`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from this_stock import PLUGINS, STOCK

# Loading and patching is tested on every version; these are about what 0.11.0 alone has (its signatures, its flags), or
# what it does not have.
if STOCK.own_skip:
    collect_ignore = [f"test_{name}.py" for name in ("behaviour", "counters", "conditions", "advice", "explain")]
else:
    collect_ignore = ["test_own_skip.py"]
if "ascend_service_profiling" not in PLUGINS:
    collect_ignore.append("test_profiling.py")

_RESULT = pytest.StashKey[Future[Any]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ahead(function, *arguments): called before the test's turn, see the fixture")


@pytest.fixture(scope="session", autouse=True)
def _start_ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the first test of this folder, so that tests elsewhere have the machine for themselves."""
    with ThreadPoolExecutor(1) as pool:
        for item in request.session.items:
            if mark := item.get_closest_marker("ahead"):
                item.stash[_RESULT] = pool.submit(*mark.args)
        yield
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def ahead(request: pytest.FixtureRequest) -> Any:
    return request.node.stash[_RESULT].result()

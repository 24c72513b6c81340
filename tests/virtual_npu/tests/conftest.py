# SPDX-License-Identifier: Apache-2.0
"""Starts ranks: processes that use the virtual CANN through its C interface."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from virtual_npu.triton_backend import stands_in

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from ranks import RankResult, run_ranks  # noqa: E402  (needs the path above, and so do the rank processes)
from torch_forks import TorchForks  # noqa: E402

# Where stock does not count on triton-ascend, the virtual NPU has no part in Triton.
collect_ignore = [] if stands_in() else ["test_triton.py"]

FORKS = pytest.StashKey[TorchForks]()


@pytest.fixture(scope="session")
def library() -> str:
    """Path of the library under test: VIRTUAL_NPU_TEST_LIBRARY, or the installed virtual CANN."""
    given = os.environ.get("VIRTUAL_NPU_TEST_LIBRARY")
    if given:
        return given
    package = importlib.util.find_spec("virtual_npu")
    assert package is not None, "the virtual NPU is not installed: make setup"
    assert package.origin is not None
    return str(Path(package.origin).parent / "lib" / "libvirtual_cann.so")


class Launcher:
    """Runs one function as `size` rank processes; see ranks.run_ranks."""

    def __init__(self, library: str, folder: Path) -> None:
        self._library = library
        self._folder = folder
        self._count = 0

    def __call__(self, size: int, function: str, *args: Any, **options: Any) -> list[RankResult]:
        self._count += 1
        folder = self._folder / f"run{self._count}"
        folder.mkdir()
        return run_ranks(self._library, folder, size, function, args, **options)

    def values(self, size: int, function: str, *args: Any, **options: Any) -> list[Any]:
        """The ranks' return values; a rank that raised or died fails the test with its error and stderr."""
        results = self(size, function, *args, **options)
        for rank, result in enumerate(results):
            assert result.ok, f"rank {rank} failed ({result.error or result.exit_code})\n{result.stderr}"
        return [result.value for result in results]


@pytest.fixture
def launch(library: str, tmp_path: Path) -> Launcher:
    return Launcher(library, tmp_path)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Torch is imported while other tests run."""
    if not session.config.option.collectonly and any("torch_forks" in item.fixturenames for item in session.items):
        session.config.stash[FORKS] = TorchForks()


@pytest.fixture(scope="session")
def torch_forks(pytestconfig: pytest.Config) -> Iterator[TorchForks]:
    """Processes that have torch, see torch_forks.py."""
    forks = pytestconfig.stash[FORKS]
    yield forks
    forks.close()

# SPDX-License-Identifier: Apache-2.0
"""A run of `make bench` that is broken off takes its nodes and namespaces with it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from bench import HERE
from bench_cells import SETUPS

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]


def of_the_run(folder: Path) -> list[psutil.Process]:
    """Nodes are started with files in this folder."""
    return [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or ())]


def namespaces() -> set[str]:
    return set(subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines())


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = namespaces()
    command = [
        sys.executable,
        str(HERE / "bench.py"),
        SETUPS[0].name,
        "--turns",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    with subprocess.Popen(command) as run:
        deadline = time.monotonic() + 120
        # Two halves of each arm, while they start.
        while len([one for one in of_the_run(tmp_path) if "serve" in one.info["cmdline"]]) < 2 * len(SETUPS[0].arms):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert namespaces() > before
        run.terminate()
        assert run.wait(timeout=120) != 0
    assert not of_the_run(tmp_path)
    assert namespaces() == before

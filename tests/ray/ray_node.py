# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of one node in a network namespace of its own, and decode nodes that run on it.

Nothing of it can be reached from outside, and everything in the namespace belongs to it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from demo import HOST, Cluster, DemoError, Process
from launched_ranks import Server

Result = TypeVar("Result")
DEVICES = 4
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_NAMES = "dp-ray-"  # and the process id
_STARTED = "Ray runtime started"
# Every process that Ray starts imports the stack anew, which takes minutes on a busy machine.
START_TIMEOUT_S = 900
# Ray gives its own processes 15 to 30 s to start, which is not enough on a busy machine unless they come first.
_HEAD_START = 10
_ENVIRONMENT = {
    "RAY_ADDRESS": f"{HOST}:6379",  # its default; in the namespace all ports are free
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",  # equal lines of several ranks are several lines
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": str(_HEAD_START),  # on top of that of Ray; else 15, and workers starve on a busy machine
    "RAY_agent_register_timeout_ms": str(START_TIMEOUT_S * 1000),
    "RAY_worker_register_timeout_seconds": str(START_TIMEOUT_S),
    "RAY_gcs_server_request_timeout_seconds": "120",
    "VIRTUAL_NPU_DEVICES": str(DEVICES),
}


class RayNode:
    """A context: the namespace, and Ray in it, exist inside it only.

    Args:
        folder: for logs.
        environment: of Ray, and so of all processes that it starts.
    """

    def __init__(self, cluster: Cluster, folder: Path, environment: dict[str, str]) -> None:
        self._cluster = cluster
        self._folder = folder
        self._environment = environment | _ENVIRONMENT
        self._name = f"{_NAMES}{os.getpid()}"

    def __enter__(self) -> RayNode:
        _remove_orphans()
        with ExitStack() as stack:
            _ip("netns", "add", self._name)
            stack.callback(_remove, self._name)
            _ip("-n", self._name, "link", "set", "lo", "up")
            temporary = _temporary(self._name)
            temporary.mkdir()
            stack.callback(self._keep_logs, temporary)
            self._environment["RAY_TMPDIR"] = str(temporary)
            command = [
                *(
                    "nice",
                    "-n",
                    f"-{_HEAD_START}",
                    sys.executable,
                    "-m",
                    "ray.scripts.scripts",
                    "start",
                    "--head",
                    "--block",
                ),
                *(f"--node-ip-address={HOST}", "--num-cpus=2", "--object-store-memory=100000000"),
                *("--no-monitor", "--include-dashboard=false"),
            ]
            head = Process("Ray", self._on(command), self._folder / "ray.log", self._environment)
            self._cluster.start(head)
            stack.callback(self._cluster.stop, head)
            _wait_until_started(head)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, node: Server) -> None:
        """Its environment holds for `vllm serve` alone; what Ray starts has that of Ray. It ends before Ray does."""
        process = node.process
        process.command = self._on(process.command)
        process.env |= {name: value for name, value in self._environment.items() if name.startswith("RAY_")}
        self._cluster.start(process)
        self._stack.callback(self._cluster.stop, process)

    def wait_until_ready(self, node: Server) -> None:
        urls = {node.process: f"{node.url}/health"}
        self.run(lambda: self._cluster.wait_until_ready(urls, START_TIMEOUT_S))

    def run(self, function: Callable[[], Result]) -> Result:
        """Calls it in a thread that is in the namespace."""

        def enter() -> None:
            with Path("/run/netns", self._name).open() as namespace:
                if _LIBC.setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"a thread could not enter the namespace {self._name}")

        thread = ThreadPoolExecutor(1, initializer=enter)
        try:
            return thread.submit(function).result()
        finally:
            thread.shutdown(wait=False)

    def _on(self, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self._name, *command]

    def _keep_logs(self, temporary: Path) -> None:
        for logs in temporary.glob("ray/session_2*/logs"):
            shutil.copytree(logs, self._folder / "ray_logs", symlinks=True, dirs_exist_ok=True)


def _wait_until_started(head: Process, tries: int = 3) -> None:
    """Where their head start was not enough, it is started again."""
    while _STARTED not in head.log.read_text(errors="replace"):
        head.remember()
        if head.returncode() is not None:
            tries -= 1
            if not tries:
                raise DemoError(f"Ray has not started. {head.log} ends:\n{head.tail()}")
            head.start_again()
        time.sleep(0.2)


def _temporary(name: str) -> Path:
    """Short, for the paths of sockets."""
    return Path(tempfile.gettempdir(), name)


def _remove(name: str) -> None:
    """A namespace and its folder. Ray's workers are in sessions of their own; whatever is in the namespace is Ray's."""
    deadline = time.monotonic() + 10
    while (found := _ip("netns", "pids", name).split()) and time.monotonic() < deadline:
        for process in map(int, found):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    _ip("netns", "del", name)
    shutil.rmtree(_temporary(name), ignore_errors=True)


def _remove_orphans() -> None:
    """Those of a test run that was killed."""
    for path in Path("/run/netns").glob(f"{_NAMES}*"):
        if not Path("/proc", path.name.removeprefix(_NAMES)).exists():
            _remove(path.name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout

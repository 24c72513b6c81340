# SPDX-License-Identifier: Apache-2.0
"""Two "nodes" on one machine: two network namespaces with a link between them that takes its time.

What runs on a node is started by the command prefix of `TwoNodes.on`. TCP between the nodes pays the delay of the link;
what goes through shared memory, such as the virtual devices, does not.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

SOURCE = Path(__file__).with_name("link.cpp")
TUN = Path("/dev/net/tun")
DEVICE = "link0"  # in both namespaces
# A network for documentation (RFC 5737): nothing outside of the namespaces has such an address.
ADDRESSES = ("192.0.2.1", "192.0.2.2")
_PREFIX_LENGTH = 30
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
Result = TypeVar("Result")
_NAMES = "dp-sync-"  # and the process id
# As large as a TUN device takes: the link costs CPU time for each packet, which a real one does not.
_MTU = 65520
# With IPv6 a new device would send by itself.
_NO_IPV6 = "/proc/sys/net/ipv6/conf/default/disable_ipv6"


class TwoNodesError(RuntimeError):
    """The two nodes cannot be made here, or the link has failed."""


@dataclass(frozen=True)
class Link:
    """One way. A packet waits `delay_us` plus up to `jitter_us`; `loss` of the packets (0 to 1) are dropped."""

    delay_us: int = 0
    jitter_us: int = 0
    loss: float = 0.0


def build(folder: Path) -> Path:
    """Compiles the forwarder into `folder`, unless it is there already."""
    binary = folder / "link"
    if binary.exists() and binary.stat().st_mtime >= SOURCE.stat().st_mtime:
        return binary
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise TwoNodesError(f"the link between the nodes needs a C++ compiler: {compiler!r} was not found")
    folder.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(binary), str(SOURCE)]
    subprocess.run(command, check=True)
    return binary


class TwoNodes:
    """A context: the namespaces and the link exist inside it only.

    Args:
        folder: for the forwarder's binary.

    Raises:
        TwoNodesError: no root, no /dev/net/tun, no iproute2, no compiler; on leaving, that the link had failed.
    """

    def __init__(self, folder: Path, link: Link = Link()) -> None:
        self._folder = folder
        self._first = link
        self.names = tuple(f"{_NAMES}{os.getpid()}-{node}" for node in range(2))
        self.traffic: dict[str, Any] = {}  # after the end, what the link carried

    def __enter__(self) -> TwoNodes:
        self._check_machine()
        binary = build(self._folder)
        _remove_orphans()
        with ExitStack() as stack:
            for name in self.names:
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "del", name)
                _ip("netns", "exec", name, "sh", "-c", f"test ! -e {_NO_IPV6} || echo 1 > {_NO_IPV6}")
            self._process = subprocess.Popen(
                [binary, *self.names, DEVICE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(self._end)
            self._expect("ready")
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", DEVICE, "mtu", str(_MTU), "up")
                _ip("-n", name, "address", "add", f"{address}/{_PREFIX_LENGTH}", "dev", DEVICE)
            self.set(self._first)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def on(self, node: int, *command: str) -> list[str]:
        """`command` as it is started on a node, 0 or 1."""
        return ["ip", "netns", "exec", self.names[node], *command]

    def run(self, node: int, function: Callable[[], Result]) -> Result:
        """Calls it in a thread of that node. The sockets, processes and threads that it makes are there as well."""

        def enter() -> None:
            with Path("/run/netns", self.names[node]).open() as namespace:
                if _LIBC.setns(namespace.fileno(), _CLONE_NEWNET):
                    code = ctypes.get_errno()
                    raise TwoNodesError(f"a thread could not enter node {node}: {os.strerror(code)}")

        thread = ThreadPoolExecutor(1)
        try:
            thread.submit(enter).result()
            return thread.submit(function).result()
        finally:
            # When the caller is interrupted, what the thread waits for may only end after it.
            thread.shutdown(wait=False)

    def set(self, link: Link) -> None:
        """From now on; packets that are under way keep their time."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its last words are read below
            self._process.stdin.write(f"{link.delay_us} {link.jitter_us} {link.loss}\n")
            self._process.stdin.flush()
        self._expect("ok")

    def _expect(self, answer: str) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if line == answer:
            return
        if line:
            raise TwoNodesError(line)
        _, errors = self._process.communicate()
        raise self._ended(errors)

    def _end(self) -> None:
        """It ends with its input. One that ended before has been no link for a while."""
        if self._process.returncode is None:
            output, errors = self._process.communicate(timeout=30)
            if self._process.returncode:
                raise self._ended(errors)
            self.traffic = json.loads(output)

    def _ended(self, errors: str) -> TwoNodesError:
        return TwoNodesError(errors.strip() or f"the link ended with status {self._process.returncode}")

    @staticmethod
    def _check_machine() -> None:
        if os.geteuid() != 0:
            raise TwoNodesError("network namespaces need root")
        if not TUN.exists():
            raise TwoNodesError(f"the link between the nodes needs {TUN}, which this machine does not have")
        if shutil.which("ip") is None:
            raise TwoNodesError("network namespaces need the command ip (iproute2), which was not found")


def _remove_orphans() -> None:
    """Namespaces of a process that was killed; its link has ended with it."""
    for path in Path("/run/netns").glob(f"{_NAMES}*-[01]"):
        if not Path("/proc", path.name.removeprefix(_NAMES)[:-2]).exists():
            _ip("netns", "del", path.name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TwoNodesError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

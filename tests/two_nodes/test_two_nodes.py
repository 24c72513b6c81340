# SPDX-License-Identifier: Apache-2.0
"""The link between two nodes: its delay, its loss, its end, and what is said where it cannot be made."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import two_nodes
from two_nodes import ADDRESSES, Link, TwoNodes, TwoNodesError

pytestmark = [pytest.mark.timeout(120), pytest.mark.long]
FOLDER = Path(__file__).resolve().parents[2] / "build" / "two_nodes"
# A server that answers each byte with one, until its client has gone.
ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := connection.recv(65536):
        connection.sendall(data)
"""
# Round trips of one byte each, in microseconds, then a larger amount and back.
CLIENT = """
import json, socket, sys, time
address, port, count, size = sys.argv[1], *map(int, sys.argv[2:])
with socket.create_connection((address, port), timeout=20) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        times.append((time.perf_counter() - began) * 1e6)
    sent = bytes(range(256)) * (size // 256)
    connection.sendall(sent)
    got = b""
    while len(got) < len(sent):
        got += connection.recv(65536)
    assert got == sent
print(json.dumps(times))
"""


def round_trips(nodes: TwoNodes, count: int, size: int = 0) -> list[float]:
    """Microseconds, between the two nodes."""
    server = subprocess.Popen(nodes.on(1, sys.executable, "-c", ECHO, ADDRESSES[1]), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        client = nodes.on(0, sys.executable, "-c", CLIENT, ADDRESSES[1], port, str(count), str(size))
        done = subprocess.run(client, capture_output=True, text=True, timeout=60, check=True)
        assert server.wait(20) == 0
    finally:
        server.kill()
    return [float(time) for time in done.stdout.strip("[] \n").split(",")]


def test_the_delay_is_paid_in_each_direction_and_can_be_changed() -> None:
    with TwoNodes(FOLDER) as nodes:
        medians = []
        for delay_us in (0, 5000, 1000):
            nodes.set(Link(delay_us))
            times = round_trips(nodes, 50)
            assert min(times) >= 2 * delay_us
            medians.append(statistics.median(times))
    # The rest is what this machine needs, which other processes on it make longer.
    assert medians[0] < 5000
    assert medians[1] > medians[2] > medians[0]


def test_nothing_is_lost_or_reordered_without_loss_and_with_jitter() -> None:
    with TwoNodes(FOLDER, Link(200, 2000)) as nodes:
        round_trips(nodes, 20, size=4 << 20)
    assert nodes.traffic["lost"] == 0
    assert nodes.traffic["bytes"] > 8 << 20


def test_tcp_survives_loss() -> None:
    with TwoNodes(FOLDER, Link(100, 0, 0.02)) as nodes:
        round_trips(nodes, 20, size=1 << 20)
    assert 0 < nodes.traffic["lost"] < nodes.traffic["received"] / 5


def test_nothing_is_left_behind() -> None:
    def names() -> str:
        return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout

    with TwoNodes(FOLDER) as nodes:
        assert all(name in names() for name in nodes.names)
        process = nodes._process
        with pytest.raises(TwoNodesError, match="File exists"):
            TwoNodes(FOLDER).__enter__()
    assert process.returncode == 0
    assert not any(name in names() for name in nodes.names)
    with pytest.raises(ValueError, match="in the context"), TwoNodes(FOLDER) as nodes:
        raise ValueError("in the context")
    assert not any(name in names() for name in nodes.names)


def test_what_a_killed_process_left_is_removed() -> None:
    script = "import sys, two_nodes; from pathlib import Path; two_nodes.TwoNodes(Path(sys.argv[1])).__enter__(); "
    script += "print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(FOLDER)]
    folder = {"PYTHONPATH": str(Path(two_nodes.__file__).parent)}
    process = subprocess.Popen(
        command, env=os.environ | folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    orphans = [Path(f"/run/netns/dp-sync-{process.pid}-{node}") for node in range(2)]
    with TwoNodes(FOLDER):
        assert all(path.exists() for path in orphans)  # of a process that lives
    process.kill()
    process.wait()
    with TwoNodes(FOLDER):
        assert not any(path.exists() for path in orphans)


def test_a_link_that_fails_is_told_of() -> None:
    with pytest.raises(TwoNodesError, match="the link ended with status -9"), TwoNodes(FOLDER) as nodes:
        nodes._process.kill()
    assert not any(Path("/run/netns", name).exists() for name in nodes.names)
    with TwoNodes(FOLDER) as nodes:
        nodes._process.kill()
        nodes._process.wait()
        with pytest.raises(TwoNodesError, match="the link ended with status -9"):
            nodes.set(Link(1))
    assert not any(Path("/run/netns", name).exists() for name in nodes.names)


def test_a_bad_setting_is_refused_and_changes_nothing() -> None:
    with TwoNodes(FOLDER, Link(2000)) as nodes:
        for bad in (Link(-1), Link(0, 2_000_000), Link(0, 0, 1.0)):
            with pytest.raises(
                TwoNodesError, match=r"DELAY_US JITTER_US LOSS .*: " + f"{bad.delay_us} {bad.jitter_us}"
            ):
                nodes.set(bad)
        assert min(round_trips(nodes, 5)) >= 4000


def test_what_the_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(TwoNodesError, match="need root"):
            TwoNodes(FOLDER).__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(two_nodes, "TUN", tmp_path / "tun")
        with pytest.raises(TwoNodesError, match=r"needs .*/tun, which this machine does not have"):
            TwoNodes(FOLDER).__enter__()
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        with pytest.raises(TwoNodesError, match="'no-such-compiler' was not found"):
            TwoNodes(tmp_path / "build").__enter__()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(TwoNodesError, match="the command ip"):
            TwoNodes(FOLDER).__enter__()


def test_the_link_names_what_it_cannot_open() -> None:
    binary = two_nodes.build(FOLDER)
    done = subprocess.run([binary, "no-such", "no-such", "link0"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "link: /run/netns/no-such: No such file or directory\n"

# SPDX-License-Identifier: Apache-2.0
"""What the demo promises about its children: none survives, and a failed one is shown with its cause."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from demo import HOST, Cluster, DemoError, Process, check_port, free_port, node_environment
from load import make_requests

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# A server that ignores polite signals, with a child in a session of its own that does so too; both would run on.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print("pids", os.getpid(), child.pid, flush=True)
time.sleep(300)
"""


def process(tmp_path: Path, code: str) -> Process:
    return Process("node", [sys.executable, "-c", code], tmp_path / "node.log", dict(os.environ))


def wait_for_pids(log: Path) -> list[int]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        words = log.read_text(encoding="utf-8").split() if log.exists() else []
        if words:
            return [int(word) for word in words[1:]]
        time.sleep(0.05)
    raise AssertionError("the child did not come up")


def alive(pid: int) -> bool:
    """False for a process that has ended, even if nobody has reaped it yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_no_descendant_survives_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Leaving the context ignores SIGINT and SIGTERM, as the demo's process is about to end; this one is not.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with Cluster() as cluster:
        node = cluster.start(process(tmp_path, STUBBORN))
        pids = wait_for_pids(node.log)
        assert all(map(alive, pids))
        node.stop(grace_s=0.5)
    assert len(pids) == 2
    assert not any(map(alive, pids))


def test_an_orphan_is_found_when_its_parent_died_first(tmp_path: Path) -> None:
    node = process(tmp_path, STUBBORN)
    node.start()
    parent, orphan = wait_for_pids(node.log)
    node.remember()
    os.kill(parent, signal.SIGKILL)
    node.stop(grace_s=0.5)
    assert not alive(orphan)


def test_a_failed_start_shows_the_cause_and_the_end_of_the_log(tmp_path: Path) -> None:
    code = (
        "print('(EngineCore pid=1) ERROR [core.py:1] torch.foo.SomeError: operator X is not emulated')\n"
        "for i in range(50): print('line', i)\n"
        "raise SystemExit(3)"
    )
    cluster = Cluster()
    node = cluster.start(process(tmp_path, code))
    with pytest.raises(DemoError) as failure:
        cluster.wait_until_ready({node: f"http://{HOST}:9/health"}, 30)
    text = str(failure.value)
    assert "node ended with status 3" in text
    assert "operator X is not emulated" in text
    assert "line 49" in text
    assert "line 20\n" not in text
    node.stop()


PORT_TAKEN = """
import http.server, os, pathlib, sys
(pathlib.Path(os.environ["VIRTUAL_NPU_LEDGER_DIR"]) / str(os.getpid())).touch()
if not pathlib.Path("again").exists():
    pathlib.Path("again").touch()
    raise OSError("[core.py:1] torch.distributed.DistNetworkError: port: 40000, EADDRINUSE, address already in use")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def test_a_node_that_lost_a_port_is_started_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    cluster = Cluster()
    port = free_port(set())
    node = process(tmp_path, PORT_TAKEN)
    node.command.append(str(port))
    node.env["VIRTUAL_NPU_LEDGER_DIR"] = str(ledger)
    companion = process(tmp_path, "print('up', flush=True); import time; time.sleep(300)")
    companion.log = tmp_path / "companion.log"
    node.companions.append(companion)
    cluster.start(companion)
    first = companion.popen
    cluster.start(node)
    try:
        cluster.wait_until_ready({node: f"http://{HOST}:{port}/"}, 30)
        assert "DistNetworkError" in (tmp_path / "node.first.log").read_text()
        assert len(list(ledger.iterdir())) == 1
        assert first is not None
        assert first.poll() is not None
        assert companion.returncode() is None
        assert (tmp_path / "companion.first.log").exists()
    finally:
        node.stop(grace_s=1)
        companion.stop(grace_s=1)
    always = process(tmp_path, "raise OSError('torch.distributed.DistNetworkError: address already in use')")
    cluster = Cluster()
    cluster.start(always)
    with pytest.raises(DemoError, match="node ended with status 1"):
        cluster.wait_until_ready({always: f"http://{HOST}:9/"}, 30)
    always.stop()


def test_a_start_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    cluster = Cluster()
    node = cluster.start(process(tmp_path, "import time; time.sleep(300)"))
    try:
        with pytest.raises(DemoError, match="node was not ready after 1 s"):
            cluster.wait_until_ready({node: f"http://{HOST}:9/health"}, 1)
    finally:
        node.stop(grace_s=1)


def test_a_busy_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind((HOST, 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(DemoError, match=f"port {port} on {HOST} cannot be used"):
            check_port(port)
        command = [sys.executable, str(EXAMPLES / "demo.py"), "--port", str(port), "--output", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"demo: port {port} on {HOST} cannot be used")
    assert not (tmp_path / "out").exists()


def test_settings_of_the_caller_do_not_reach_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_LOGGING_LEVEL", "DP_SYNC_PATCH_MODE", "VIRTUAL_NPU_TIMEOUT_S", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.setenv(name, "0")
    env = node_environment(tmp_path)
    assert not {"VLLM_LOGGING_LEVEL", "DP_SYNC_PATCH_MODE", "VIRTUAL_NPU_TIMEOUT_S"} & env.keys()
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in env
    assert env["VIRTUAL_NPU_LEDGER_DIR"] == str(tmp_path)


def test_the_load_is_mixed_and_the_same_every_time() -> None:
    requests = make_requests(20)
    assert requests == make_requests(20)
    lengths = [len(request.prompt) for request in requests if isinstance(request.prompt, list)]
    assert (min(lengths), max(lengths)) == (5, 200)
    assert (min(request.max_tokens for request in requests), max(request.max_tokens for request in requests)) == (4, 64)
    assert sum(request.chat for request in requests) == 5
    with pytest.raises(ValueError, match="at least 16"):
        make_requests(15)

# SPDX-License-Identifier: Apache-2.0
"""The counters on their way to Prometheus, in processes of their own; tests/serve compares them with a ledger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]

# A worker after its verdict, and an engine whose executor calls into that one worker, as the uni executor does.
_SETUP = """
import json, os, sys, threading, time
from types import SimpleNamespace
from dp_sync_patch import metrics, runtime
from dp_sync_patch.plan import State

runtime.reported_state = lambda: getattr(State, sys.argv[1]) if sys.argv[1] != "-" else None
worker = SimpleNamespace(vllm_config=SimpleNamespace(
    model_config=SimpleNamespace(served_model_name="toy"), parallel_config=SimpleNamespace(data_parallel_rank=3)))
executor = SimpleNamespace(collective_rpc=lambda method: [method(worker)])
engine = SimpleNamespace(log_stats=sys.argv[2] == "stats", model_executor=executor)

def seen():
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return [line for line in generate_latest(registry).decode().splitlines() if line.startswith("dp_sync_patch")]

def state():
    return {"imported": "prometheus_client" in sys.modules, "threads": threading.active_count()}
"""


def run(code: str, *arguments: str, directory: Path | None) -> tuple[Any, str]:
    environ = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    if directory is not None:
        environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    done = subprocess.run(
        [sys.executable, "-c", _SETUP + code, *arguments],
        cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False,
        env=environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("state", ["SKIP", "SYNC"])
def test_counters_reach_another_process(tmp_path: Path, state: str) -> None:
    code = """
metrics.counts.passes_skipped += 5
metrics.start_in_workers(engine)
metrics.start_in_workers(engine)
metrics.counts.passes_skipped += 2
metrics.counts.padding_avoided_tokens += 40
metrics._exporter.copy()
metrics.counts.passes_ragged += 1
metrics.refused()
print(json.dumps(seen()))
"""
    lines, _ = run(code, state, "stats", directory=tmp_path)
    labels = '{engine="3",model_name="toy"}'
    assert sorted(lines) == sorted(
        [
            f"dp_sync_patch_passes_skipped_total{labels} 7.0",
            f"dp_sync_patch_passes_synced_total{labels} 0.0",
            f"dp_sync_patch_passes_ragged_total{labels} 1.0",
            f"dp_sync_patch_padding_tokens_total{labels} 0.0",
            f"dp_sync_patch_padding_avoided_tokens_total{labels} 40.0",
            f"dp_sync_patch_draft_passes_added_total{labels} 0.0",
            f"dp_sync_patch_mc2_only_errors_total{labels} 1.0",
            f"dp_sync_patch_skip{labels} {1.0 if state == 'SKIP' else 0.0}",
        ]
    )


def test_the_thread_copies_by_itself(tmp_path: Path) -> None:
    code = """
metrics._PERIOD_S = 0.05
metrics.start_in_workers(engine)
metrics.counts.passes_synced += 9
deadline = time.monotonic() + 20
while not any(line.endswith(" 9.0") for line in seen()) and time.monotonic() < deadline:
    time.sleep(0.05)
print(json.dumps([seen(), [thread.daemon for thread in threading.enumerate() if "metrics" in thread.name]]))
"""
    (lines, daemons), _ = run(code, "SYNC", "stats", directory=tmp_path)
    assert 'dp_sync_patch_passes_synced_total{engine="3",model_name="toy"} 9.0' in lines
    assert daemons == [True]


@pytest.mark.parametrize(
    ("state", "stats", "directory"),
    [("SKIP", "-", True), ("SKIP", "stats", False), ("-", "stats", True), ("OFF", "stats", True)],
    ids=["--disable-log-stats", "no directory", "not the first TP rank", "state off"],
)
def test_nothing_is_started_where_metrics_are_off(tmp_path: Path, state: str, stats: str, directory: bool) -> None:
    code = "before = state()\nmetrics.start_in_workers(engine)\nmetrics.refused()\nprint(json.dumps([before, state()]))"
    (before, after), log = run(code, state, stats, directory=tmp_path if directory else None)
    assert before == after == {"imported": False, "threads": 1}
    assert list(tmp_path.iterdir()) == []
    assert "DSP414" not in log


def test_a_process_forked_too_early_says_so(tmp_path: Path) -> None:
    """prometheus_client chooses how it stores values when it is imported, here before the directory was known."""
    code = f"""
import prometheus_client
os.environ["PROMETHEUS_MULTIPROC_DIR"] = {str(tmp_path)!r}
metrics.start_in_workers(engine)
print(json.dumps(state()["threads"]))
"""
    threads, log = run(code, "SKIP", "stats", directory=None)
    assert threads == 1
    assert "DSP414" in log
    assert "export it before `vllm serve`" in log


@pytest.mark.parametrize("end", ["return", "SystemExit", "MC2OnlyError"])
@pytest.mark.parametrize("parent", ["fresh", "has imported prometheus_client"])
def test_the_last_counts_of_a_forked_engine_are_copied(tmp_path: Path, end: str, parent: str) -> None:
    """vLLM's processes are multiprocessing children: they end without atexit, by SystemExit when they get SIGTERM."""
    code = f"""
import multiprocessing
from dp_sync_patch.errors import MC2OnlyError
if {parent!r} != "fresh":
    import prometheus_client
metrics._PERIOD_S = 1000
def engine_process():
    metrics.start_in_workers(engine)
    metrics._exporter.copy()
    metrics.counts.passes_skipped += 7
    if {end!r} != "return":
        raise {{"SystemExit": SystemExit(), "MC2OnlyError": MC2OnlyError("DSP301", "left MC2")}}[{end!r}]
child = multiprocessing.get_context("fork").Process(target=engine_process)
child.start()
child.join()
print(json.dumps(seen()))
"""
    lines, _ = run(code, "SKIP", "stats", directory=tmp_path)
    assert 'dp_sync_patch_passes_skipped_total{engine="3",model_name="toy"} 7.0' in lines


def test_a_log_line_now_and_then_when_something_has_changed(tmp_path: Path) -> None:
    code = """
import logging
logging.basicConfig(level=logging.INFO)
metrics._PERIOD_S, metrics._LOG_EVERY = 0.01, 2
copies = 0
class Exporter(metrics._Exporter):
    def copy(self):
        global copies
        super().copy()
        copies += 1
metrics._Exporter = Exporter
metrics.start_in_workers(engine)
for passes in (4, 3):
    metrics.counts.passes_skipped += passes
    until = copies + 6
    while copies < until:
        time.sleep(0.01)
print(json.dumps(copies))
"""
    copies, log = run(code, "SKIP", "stats", directory=tmp_path)
    assert copies >= 12
    lines = [line for line in log.splitlines() if "counted since" in line]
    assert [line.partition("passes_skipped ")[2].partition(",")[0] for line in lines] == ["4", "7"]
    assert lines[0].startswith("INFO:vllm.dp_sync_patch:DP rank 3, counted since its start: passes_skipped 4, passes_")


@pytest.mark.parametrize("when", ["at start", "no such directory", "later"])
def test_a_failing_exporter_leaves_the_engine_alone(tmp_path: Path, when: str) -> None:
    code = f"""
if {when!r} == "at start":
    executor.collective_rpc = lambda method: 1 / 0
metrics.start_in_workers(engine)
if {when!r} == "later":
    metrics._exporter._counters.clear()
metrics.refused()
metrics.refused()
for thread in threading.enumerate():
    if "metrics" in thread.name:
        thread.join()
print(json.dumps(metrics.counts.values()["mc2_only_errors"]))
"""
    directory = tmp_path / "none" if when == "no such directory" else tmp_path
    errors, log = run("metrics._PERIOD_S = 0.01\n" + code, "SKIP", "stats", directory=directory)
    assert errors == 2
    assert log.count("DSP414 counters are no") == 1

# SPDX-License-Identifier: Apache-2.0
"""`examples/demo.py` as `make demo` runs it: a prefill/decode pair over HTTP, stock against overlay."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import demo
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_node import read_rank


@pytest.mark.timeout(900)
def test_the_demo_shows_what_it_promises(tmp_path: Path) -> None:
    segments = set(os.listdir("/dev/shm"))
    output = tmp_path / "demo"
    command = [sys.executable, demo.__file__, "--output", str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        text, _ = run.communicate()
    assert run.returncode == 0, text

    report = json.loads((output / "report.json").read_text())
    assert report["stock_version"] == "0.11.0"
    assert report["requests"] >= 16
    assert report["tokens_equal"] is True
    assert report["dp_collectives_per_decode_step"]["stock"] >= 1
    assert report["dp_collectives_per_decode_step"]["overlay"] == 0
    assert report["sync_host_us_per_step"]["stock"] > report["sync_host_us_per_step"]["overlay"] == 0
    assert report["ep_bs_ragged_steps"] > 0
    for figure in ("padded_token_share", "tpot_ms"):
        assert set(report[figure]) == {"stock", "overlay"}

    log = (output / "overlay" / "node.log").read_text(errors="replace")
    for rank in range(demo.DP_SIZE):
        assert f"DSP000 skip: no DP metadata all_reduce on rank {rank};" in log
    assert "DSP" not in (output / "stock" / "node.log").read_text(errors="replace")

    check_counters(output)

    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(output) in " ".join(p.info["cmdline"] or [])]
    assert left == []
    # What a living process has mapped is that of another test run on this machine.
    assert set(os.listdir("/dev/shm")) - segments - mapped_segments() == set()


def mapped_segments() -> set[str]:
    """Names in /dev/shm that any process has mapped."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended
            found |= set(re.findall(r"/dev/shm/(\S+)", maps.read_text(errors="replace")))
    return found


def check_counters(output: Path) -> None:
    """The overlay's counters on the decode node's /metrics against the ledgers of its ranks."""
    text = (output / "overlay" / "metrics.txt").read_text()
    assert "vllm:generation_tokens_total" in text
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("dp_sync_patch_"):
                assert sample.labels["model_name"] == demo.MODEL
                found.setdefault(sample.labels["engine"], {})[sample.name.removeprefix("dp_sync_patch_")] = sample.value
    assert sorted(found) == [str(rank) for rank in range(demo.DP_SIZE)]
    ranks = [read_rank(path) for path in sorted((output / "overlay" / "ledger").iterdir())]
    for counters, rank in zip((found[engine] for engine in sorted(found)), ranks, strict=True):
        assert counters["skip"] == 1
        # A few warm-up passes come on top of the steps.
        assert rank.steps <= counters["passes_skipped_total"] <= rank.steps + 8
        assert counters["passes_synced_total"] == counters["mc2_only_errors_total"] == 0
        assert 0 < counters["passes_ragged_total"] <= counters["passes_skipped_total"]
        assert counters["padding_tokens_total"] == 0  # eager: no graph sizes
        assert 0 < counters["padding_avoided_tokens_total"] < 8 * counters["passes_skipped_total"]
    assert "dp_sync_patch" not in (output / "stock" / "metrics.txt").read_text()

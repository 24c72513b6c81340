# SPDX-License-Identifier: Apache-2.0
"""Decode nodes whose engines or workers Ray starts, against the same nodes without Ray.

Ray's processes inherit nothing from `vllm serve`, and what concerns the overlay is given to that alone here.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from demo import Cluster
from launched_ranks import Server, server
from load import LoadResult, make_requests, run_load
from node_runs import DP2, graph_flags
from ray_node import START_TIMEOUT_S, RayNode
from toy_model import ToyModelShape, write_toy_model

pytestmark = [pytest.mark.long, pytest.mark.timeout(3 * START_TIMEOUT_S)]
RAY_ENGINES = ("--data-parallel-backend", "ray")
TP2 = ("--tensor-parallel-size", "2")
RAY_WORKERS = ("--distributed-executor-backend", "ray")
# Without it Ray shows a worker one device only, and stock looks there for the one that has the number of its TP rank.
ALL_DEVICES = {"RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1"}
# A process that one of them did not reach would end the start: engines and workers compare them (DSP208, DSP201).
BY_ENVIRONMENT = {"DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S": "600"}
BY_SECTION = {"graph_mode": "refuse"}


def ray_node(
    folder: Path, flags: Iterable[str], *, section: dict[str, Any], environment: dict[str, str] | None = None
) -> Server:
    """DP2 EP2 with the overlay, the recompute scheduler and counters.

    Args:
        section: the overlay's, in the configuration of the KV connector.
    """
    counts = folder / "counts"
    counts.mkdir(parents=True)
    transfer = {
        "kv_connector": "FileKVConnector",
        "kv_connector_module_path": "kv_connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"directory": str(folder / "kv"), "dp_sync_patch": section},
    }
    arguments = [*DP2, "--kv-transfer-config", json.dumps(transfer), *flags]
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(counts)} | (environment or {})
    return server(folder, folder.parent / "model", arguments, overlay=True, environment=environment)


def of_ray(node: Server) -> dict[str, str]:
    """The environment of `ray start`: that of the node, without the choice of plugins."""
    return {name: value for name, value in node.process.env.items() if name != "VLLM_PLUGINS"}


def answers(node: Server) -> list[list[int]]:
    """Tokens of 16 requests that come straight to the node; none fails."""
    results: list[LoadResult] = asyncio.run(run_load(node.url, "toy", make_requests(16), timeout_s=600))
    assert [result.error for result in results] == [None] * 16
    return [result.token_ids for result in results]


def counters(node: Server) -> dict[str, list[float]]:
    """Of engines 0 and 1, which copy them every two seconds."""
    deadline = time.monotonic() + 60
    while True:
        text = httpx.get(f"{node.url}/metrics", timeout=60, trust_env=False).text
        found = re.findall(r'^dp_sync_patch_(skip|passes_skipped_total)\{engine="(\d)".*\} (\S+)$', text, re.M)
        values = {name: [float(value) for one, _, value in sorted(found) if one == name] for name, _, _ in found}
        if all(values.get("passes_skipped_total", [0])) or time.monotonic() > deadline:
            return values
        time.sleep(1)


def assert_skips(log: str, tp_size: int) -> None:
    assert sorted(map(int, re.findall(r"DSP000 skip: .* on rank (\d+);", log))) == [0, tp_size]
    bounded = re.findall(r"DP rank (\d): at most 8 tokens per step instead of 64", log)
    assert sorted(bounded) == ["0", "1"]
    assert not set(re.findall(r"DSP\d+", log)) - {"DSP000"}


@pytest.mark.parametrize(
    ("flags", "over_ray", "ray_environment", "tp_size"),
    [
        pytest.param((), RAY_ENGINES, {}, 1, id="engines"),
        pytest.param(TP2, RAY_WORKERS, ALL_DEVICES, 2, id="workers"),
    ],
)
def test_a_node_over_ray_skips_and_answers_as_without_ray(
    tmp_path: Path, flags: tuple[str, ...], over_ray: tuple[str, ...], ray_environment: dict[str, str], tp_size: int
) -> None:
    model = write_toy_model(tmp_path / "model", ToyModelShape())
    alone = server(tmp_path / "mp", model, [*DP2, *flags], overlay=True)
    with Cluster() as cluster:
        cluster.start(alone.process)
        cluster.wait_until_ready({alone.process: f"{alone.url}/health"}, START_TIMEOUT_S)
        expected = answers(alone)
        cluster.check()
    assert_skips(alone.log, tp_size)

    node = ray_node(tmp_path / "ray", [*flags, *over_ray], section=BY_SECTION, environment=ray_environment)
    with Cluster() as cluster, RayNode(cluster, tmp_path / "ray", of_ray(node)) as ray:
        node.process.env |= BY_ENVIRONMENT
        ray.start(node)
        ray.wait_until_ready(node)
        assert ray.run(lambda: answers(node)) == expected
        shown = ray.run(lambda: counters(node))
        cluster.check()
    assert_skips(node.log, tp_size)
    assert shown["skip"] == [1, 1]
    assert len(shown["passes_skipped_total"]) == 2
    assert all(shown["passes_skipped_total"])


def test_settings_reach_what_ray_starts(tmp_path: Path) -> None:
    """The environment says that the node must skip, and the section takes away what this node could skip with."""
    write_toy_model(tmp_path / "model", ToyModelShape())
    flags = [*RAY_ENGINES, *graph_flags("FULL_DECODE_ONLY", [1, 2, 4, 8])]
    node = ray_node(tmp_path / "ray", flags, section={"graph_mode": "refuse"})
    with Cluster() as cluster, RayNode(cluster, tmp_path / "ray", of_ray(node)) as ray:
        node.process.env |= {"DP_SYNC_PATCH_MODE": "require"}
        ray.start(node)
        assert node.ended_within(START_TIMEOUT_S)
    refused = re.findall(r"DSP122 ranks may run different graph modes.*; in force on rank (\d)", node.log)
    assert sorted(refused) == ["0", "1"]
    assert "DSP204 mode=require, but: DSP122" in node.log

# SPDX-License-Identifier: Apache-2.0
"""A prefill node that stays up and one decode node after another beside it, behind the proxy, and their ledgers."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import HOST, MODEL, OVERLAY_PLUGINS, STOCK_PLUGINS, Cluster, Demo, Process
from launched_ranks import wait_until_idle
from load import LoadRequest, run_load

Call = dict[str, Any]


@dataclass
class Rank:
    """One rank's ledger, start-up left out. Steps are numbered alike on all ranks."""

    rank: int  # in the EP group
    steps: int
    dp_collectives: int
    kinds: Counter[str]  # HCCL collectives by operator
    groups: set[str]  # vLLM's names of the groups that these were in
    votes: int
    dispatches: dict[int, list[Call]]  # step -> dispatch calls in order
    combines: dict[int, list[Call]]
    scheduled: dict[int, int]  # step -> scheduled tokens, 0 for a dummy
    began: dict[int, float]  # step -> time.monotonic()


def read_rank(path: Path) -> Rank:
    events = [json.loads(line) for line in path.read_text().splitlines()]
    groups = {event["comm"]: event["name"] for event in events if event["ev"] == "group"}
    serving = [event for event in events if event.get("step", -1) >= 0]
    steps = [event for event in serving if event["ev"] == "step"]
    collectives = [event for event in serving if event["ev"] == "collective"]
    device = [event for event in collectives if "comm" in event]
    calls: dict[str, dict[int, list[Call]]] = {"dispatch": {}, "combine": {}}
    for event in serving:
        if event["ev"] == "ep":
            calls[event["op"]].setdefault(event["step"], []).append(event)
    (rank,) = {event["rank"] for event in events if event["ev"] == "ep"}
    return Rank(
        rank=rank,
        steps=len(steps),
        # HCCL's are told by their communicator, gloo's (stock from 0.12.0rc1 on) by their group.
        dp_collectives=sum((event.get("group") or groups[event["comm"]]) == "dp:0" for event in collectives),
        kinds=Counter(event["kind"] for event in device),
        groups={groups[event["comm"]] for event in device},
        votes=sum(event.get("group") == "stateless" for event in collectives),
        dispatches=calls["dispatch"],
        combines=calls["combine"],
        scheduled={event["step"]: event["scheduled_tokens"] for event in steps},
        began={event["step"]: event["t"] for event in steps},
    )


class PrefillDecodePair:
    """The demo's nodes with another model and other flags; the decode node is replaced, its port stays.

    Args:
        cluster: owns all processes.
        model: folder of the checkpoint.
        common: flags of both nodes; like all flags here, they win over the demo's.
        prefill: flags of the prefill node, which is stock.
    """

    def __init__(
        self, cluster: Cluster, folder: Path, model: Path, common: Iterable[str], prefill: Iterable[str]
    ) -> None:
        self._cluster = cluster
        self._demo = Demo(folder, port=None, requests=16, runs=[])
        self._demo.model = model
        self._demo.transfers.mkdir(parents=True)
        self._common = list(common)
        environment = {"VLLM_PLUGINS": STOCK_PLUGINS, "ASCEND_RT_VISIBLE_DEVICES": "7"}
        self._prefill = self._demo.node(
            "prefill node", "prefill", self._demo.prefill_port, "kv_producer", environment, [*self._common, *prefill]
        )
        self._proxy = self._demo.proxy("prefill")
        for process in (self._prefill, self._proxy):
            cluster.start(process)

    def decode_node(
        self, name: str, arguments: Iterable[str], *, overlay: bool, environment: dict[str, str] | None = None
    ) -> DecodeNode:
        """Starts a decode node, as stock or with the overlay, and waits for all three processes."""
        plugins = {"VLLM_PLUGINS": OVERLAY_PLUGINS if overlay else STOCK_PLUGINS, "VIRTUAL_NPU_TIMEOUT_S": "60"}
        flags = [*self._common, "--enable-expert-parallel", "--api-server-count", "1", *arguments]
        port = self._demo.decode_port
        process = self._demo.node(name, name, port, "kv_consumer", plugins | (environment or {}), flags)
        self._cluster.start(process)
        proxy_url, decode_url = f"http://{HOST}:{self._demo.proxy_port}", f"http://{HOST}:{port}"
        prefill_url = f"http://{HOST}:{self._demo.prefill_port}"
        urls = {self._prefill: prefill_url, process: decode_url, self._proxy: proxy_url}
        self._cluster.wait_until_ready({one: f"{url}/health" for one, url in urls.items()})
        return DecodeNode(self._cluster, process, proxy_url, decode_url, self._demo.output / name / "ledger")


@dataclass
class DecodeNode:
    """A decode node that serves; leaving the context ends it, and its ledgers can be read."""

    cluster: Cluster
    process: Process
    proxy_url: str
    url: str
    ledger: Path

    def __enter__(self) -> DecodeNode:
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.stop(self.process)

    def send(self, proxied: list[LoadRequest], direct: list[LoadRequest] | None = None) -> list[list[int]]:
        """Streams requests through the proxy and others straight to the decode node, where they have no remote KV.

        Returns the token ids of the proxied ones, then of the others. Raises AssertionError with the node's last log
        lines if one fails.
        """

        async def both() -> list[Any]:
            loads = [(self.proxy_url, proxied), (self.url, direct or [])]
            return [result for found in await asyncio.gather(*(run_load(url, MODEL, load) for url, load in loads))
                    for result in found]  # fmt: skip

        results = asyncio.run(both())
        errors = [result.error for result in results if result.error]
        assert not errors, f"{errors}\n{self.process.tail()}"
        return [result.token_ids for result in results]

    def wait_until_idle(self) -> float:
        """Waits for the end of the dummy steps up to the engines' next vote; returns time.monotonic()."""
        wait_until_idle([self])
        return time.monotonic()

    def ranks(self) -> list[Rank]:
        """In the order of the EP group. Read it after the node has ended."""
        return sorted(map(read_rank, self.ledger.iterdir()), key=lambda rank: rank.rank)

    @property
    def log(self) -> str:
        return self.process.log.read_text(errors="replace")

# SPDX-License-Identifier: Apache-2.0
"""One decode deployment over two nodes: half of the DP ranks beside the API server, half on a headless node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from demo import Cluster
from launched_ranks import Server, new_port, server
from two_nodes import ADDRESSES, DEVICE, TwoNodes


@dataclass(frozen=True)
class SplitNode:
    """`head` answers, on the loopback device of node 0; both have a folder of ledgers."""

    head: Server
    tail: Server
    hccl_delay_file: Path

    @property
    def halves(self) -> tuple[Server, Server]:
        return self.head, self.tail

    def set_hccl_delay(self, delay_us: int) -> None:
        """What each HCCL collective takes longer from now on: between virtual devices nothing goes over the link."""
        new = self.hccl_delay_file.with_suffix(".new")
        new.write_text(str(delay_us))
        new.rename(self.hccl_delay_file)


def start(nodes: TwoNodes, cluster: Cluster, deployments: Iterable[SplitNode]) -> None:
    """All of them at once. Returns when requests are answered."""

    def on_node_0() -> None:
        heads = {}
        for one in deployments:
            cluster.start(one.tail.process)
            cluster.start(one.head.process)
            heads[one.head.process] = f"{one.head.url}/health"
        cluster.wait_until_ready(heads)

    nodes.run(0, on_node_0)


def split_node(
    nodes: TwoNodes,
    folder: Path,
    model: Path,
    arguments: Iterable[str],
    *,
    size: int,
    overlay: bool,
    environment: dict[str, str] | None = None,
) -> SplitNode:
    """`size` DP ranks, not started.

    Args:
        arguments: flags of both halves, see `launched_ranks.server`.
        environment: variables of both halves.
    """
    local = size // 2
    folder.mkdir(parents=True)
    hccl_delay_file = folder / "hccl_delay_us"
    hccl_delay_file.write_text("0")
    common = [
        *("--data-parallel-size", str(size), "--data-parallel-size-local", str(local)),
        *("--data-parallel-address", ADDRESSES[0], "--data-parallel-rpc-port", str(new_port())),
        *arguments,
    ]
    own = (["--api-server-count", "1"], ["--headless", "--data-parallel-start-rank", str(local)])
    halves = []
    for node, flags in enumerate(own):
        devices = range(node * local, (node + 1) * local)
        variables = {
            "VLLM_HOST_IP": ADDRESSES[node],
            "GLOO_SOCKET_IFNAME": DEVICE,
            "HCCL_SOCKET_IFNAME": DEVICE,
            "VIRTUAL_NPU_LINK_DELAY_FILE": str(hccl_delay_file),
            "ASCEND_RT_VISIBLE_DEVICES": ",".join(map(str, devices)),
            **(environment or {}),
        }
        half = server(folder / f"node{node}", model, [*common, *flags], overlay=overlay, environment=variables)
        halves.append(half)
    head, tail = halves
    tail.process.command = nodes.on(1, *tail.process.command)
    head.process.companions.append(tail.process)
    return SplitNode(head, tail, hccl_delay_file)

# SPDX-License-Identifier: Apache-2.0
"""One decode node of the installed stock version, DP2 EP2 by default: what it answered, and what its ledgers say.

The requests go straight to the decode node, so each of them is prefilled there, which is what a prompt without remote
KV does. All figures come from the ledgers of the virtual NPU.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import httpx
import pytest
from demo import Cluster
from launched_ranks import RECOMPUTE, Event, Prompt, Server, read_ranks, server, wait_until_idle

Request = tuple[list[list[int]], int, int | None]  # prompts, tokens to generate for each, DP rank

DP2 = ("--data-parallel-size", "2", "--api-server-count", "1", *RECOMPUTE)
# Stock does not look at it, the overlay refuses: a prompt with images could then not be scheduled in pieces.
REFUSED = ("--disable-chunked-mm-input",)

# Stock 0.18.0 puts a Triton kernel into full graphs, also where there is no Triton, as with torch_npu 2.9 here.
_GRAPH_OPTIONS = {"recompute_scheduler_enable": True, "ascend_compilation_config": {"fuse_muls_add": False}}


def graph_flags(mode: str, sizes: list[int]) -> list[str]:
    """Of a node with the recompute scheduler and graphs of these sizes."""
    compilation = {"cudagraph_mode": mode, "cudagraph_capture_sizes": sizes}
    flags = ["--no-enforce-eager", "--compilation-config", json.dumps(compilation)]
    return [*flags, "--additional-config", json.dumps(_GRAPH_OPTIONS)]


@dataclass(frozen=True)
class Run:
    """`ranks` are those of the EP group: with TP, the ranks of one DP rank follow each other.

    The last step of a rank is left out: processes of 0.23.0 end without writing all that they have of it.
    """

    tokens: list[list[int]]
    ranks: list[list[Event]]
    log: str

    def serving(self, rank: int) -> list[Event]:
        last = max(event.get("step", -1) for event in self.ranks[rank])
        return [event for event in self.ranks[rank] if 0 <= event.get("step", -1) < last]

    def dp_collectives(self, rank: int, kind: str | None = None) -> Counter[int]:
        """Step -> collectives in the DP group, of one kind or of all: on the A2 a step outside MC2 has others there."""
        return Counter(
            event["step"]
            for event in self.serving(rank)
            if event["ev"] == "collective" and event["group"] in ("dp", "dp:0") and kind in (None, event["kind"])
        )

    def collective_sizes(self, rank: int) -> set[int]:
        """Bytes of those in the DP group."""
        found = (event for event in self.serving(rank) if event["ev"] == "collective")
        return {event["bytes"] for event in found if event["group"] in ("dp", "dp:0")}

    def steps(self, rank: int) -> list[int]:
        return [event["step"] for event in self.serving(rank) if event["ev"] == "step"]

    def scheduled(self, rank: int) -> dict[int, int]:
        """Step -> scheduled tokens, 0 for a dummy."""
        return {event["step"]: event["scheduled_tokens"] for event in self.serving(rank) if event["ev"] == "step"}

    def calls(self, rank: int, operator: str) -> list[Event]:
        """`operator` is dispatch or combine."""
        return [event for event in self.serving(rank) if event["ev"] == "ep" and event["op"] == operator]

    def calls_by_step(self, rank: int, operator: str) -> dict[int, int]:
        return {**dict.fromkeys(self.steps(rank), 0), **Counter(call["step"] for call in self.calls(rank, operator))}

    def dispatches(self, rank: int) -> list[Event]:
        return self.calls(rank, "dispatch")


def make_prompts(lengths: Iterable[tuple[int, int]], seed: int = 5) -> list[Prompt]:
    """Prompts of random tokens.

    Args:
        lengths: of each prompt, and how many tokens to generate for it.
    """
    draw = random.Random(seed)
    return [([draw.randrange(3, 384) for _ in range(length)], count) for length, count in lengths]


def seeded(*prompts: tuple[int, int, int]) -> list[Prompt]:
    """Each from its length, tokens to generate and seed."""
    return [make_prompts([(length, count)], seed)[0] for length, count, seed in prompts]


def serve(node: Server, prompts: list[Prompt], ranks: Sequence[int] | None = None) -> Run:
    """One prompt while the other ranks are idle, then all of them at once, each on the rank given for it, if any.

    Neighbours with one rank and as many tokens to generate are one request.
    """
    if ranks is None:
        requests: list[Request] = [([prompt], count, None) for prompt, count in prompts]
    else:
        placed = groupby(zip(prompts, ranks, strict=True), lambda item: (item[0][1], item[1]))
        requests = [([prompt for (prompt, _), _ in group], count, rank) for (count, rank), group in placed]
    with Cluster() as cluster:
        cluster.start(node.process)
        cluster.wait_until_ready({node.process: f"{node.url}/health"})
        tokens = [node.complete(*prompts[0])]
        with ThreadPoolExecutor(len(requests)) as pool:
            tokens += chain.from_iterable(pool.map(lambda request: node.complete_together(*request), requests))
        wait_until_idle([node])
        cluster.check()
    return Run(tokens, read_ranks([node]), node.log)


def run(
    folder: Path, model: Path, prompts: list[Prompt], arguments: tuple[str, ...], *, kv_role: str = "kv_consumer"
) -> Run:
    """DP2 EP2 with the overlay and the recompute scheduler."""
    return serve(server(folder, model, [*DP2, *arguments], overlay=True, kv_role=kv_role), prompts)


def assert_stock_skips_and_hangs(
    folder: Path,
    model: Path,
    arguments: tuple[str, ...],
    prompts: list[Prompt],
    *,
    harmless: Prompt | None = None,
    kv_role: str = "kv_consumer",
) -> None:
    """Stock runs without any all_reduce and answers none of `prompts`, sent at once: a rank waits for a peer that does
    something else, until the device reports it and the node ends. Before that it answers `harmless`."""
    short = {"VIRTUAL_NPU_TIMEOUT_S": "8"}
    node = server(folder, model, [*DP2, *arguments], overlay=False, kv_role=kv_role, environment=short)
    with Cluster() as cluster, ThreadPoolExecutor(len(prompts)) as pool:
        cluster.start(node.process)
        cluster.wait_until_ready({node.process: f"{node.url}/health"})
        if harmless is not None:
            node.complete(*harmless)
            wait_until_idle([node])
        # A server whose engine has died waits for its clients before it ends.
        answers = [pool.submit(node.complete, *prompt, timeout_s=60) for prompt in prompts]
        for answer in answers:
            with pytest.raises(httpx.HTTPError):
                answer.result()
        assert node.ended_within(90)
    events = [json.loads(line) for path in node.ledger.iterdir() for line in path.read_text().splitlines()]
    steps = [event for event in events if event.get("step", -1) >= 0]
    assert any(event["ev"] == "step" for event in steps)
    assert not [event for event in steps if event.get("group") == "dp:0"], "stock does not skip here"
    assert "timeout, waited 8 s for rank" in node.log


def assert_synchronised(result: Run, prompts: list[Prompt], code: str, *, passes: int = 1) -> None:
    """All requests were answered, and every step has one all_reduce for each of its passes, on every rank."""
    assert [len(tokens) for tokens in result.tokens] == [count for _, count in [prompts[0], *prompts]]
    assert code in result.log
    assert "DSP000" not in result.log
    for rank in range(len(result.ranks)):
        steps = result.steps(rank)
        assert len(steps) > 32
        assert result.dp_collectives(rank, "all_reduce") == dict.fromkeys(steps, passes)

# SPDX-License-Identifier: Apache-2.0
"""One decode node without a prefill node: real `vllm serve`, requests sent straight to it, and its ledgers."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import HOST, OVERLAY_PLUGINS, STOCK_PLUGINS, Cluster, Process, free_port, node_environment
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

Prompt = tuple[list[int], int]  # token ids, and how many tokens to generate


@dataclass
class Rank:
    """One rank's ledger, start-up left out. Steps are numbered alike on all ranks."""

    steps: int
    dp_collectives: int
    kinds: Counter[str]  # HCCL collectives by operator
    votes: int
    dispatches: dict[int, list[dict[str, Any]]]  # step -> dispatch calls in order


@dataclass
class Served:
    """Tokens per request, the ranks' ledgers, and the node's log."""

    tokens: list[list[int]]
    ranks: list[Rank]
    log: str


def read_rank(path: Path) -> Rank:
    events = [json.loads(line) for line in path.read_text().splitlines()]
    groups = {event["comm"]: event["name"] for event in events if event["ev"] == "group"}
    serving = [event for event in events if event.get("step", -1) >= 0]
    collectives = [event for event in serving if event["ev"] == "collective"]
    device = [event for event in collectives if "comm" in event]
    dispatches: dict[int, list[dict[str, Any]]] = {}
    for event in serving:
        if event["ev"] == "ep" and event["op"] == "dispatch":
            dispatches.setdefault(event["step"], []).append(event)
    return Rank(
        steps=sum(event["ev"] == "step" for event in serving),
        dp_collectives=sum(groups[event["comm"]] == "dp:0" for event in device),
        kinds=Counter(event["kind"] for event in device),
        votes=sum(event.get("group") == "stateless" for event in collectives),
        dispatches=dispatches,
    )


def serve(
    folder: Path, model: Path, prompts: list[Prompt], overlay: bool, arguments: list[str], environment: dict[str, str]
) -> Served:
    """Start the node as stock or with the overlay, send `prompts` 0.3 s apart, stop it."""
    ledger = folder / "ledger"
    ledger.mkdir(parents=True)
    port = free_port(set())
    transfer = {
        "kv_connector": "FileKVConnector",
        "kv_connector_module_path": "kv_connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"directory": str(folder / "kv")},
    }
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "toy"),
        *("--host", HOST, "--port", str(port), "--enforce-eager", "--no-enable-prefix-caching"),
        *("--enable-expert-parallel", "--api-server-count", "1", "--kv-transfer-config", json.dumps(transfer)),
        *("--additional-config", json.dumps({"recompute_scheduler_enable": True})),
        *arguments,
    ]
    plugins = OVERLAY_PLUGINS if overlay else STOCK_PLUGINS
    env = node_environment(ledger) | {"VLLM_PLUGINS": plugins, "VIRTUAL_NPU_TIMEOUT_S": "60"} | environment
    node = Process("decode node", command, folder / "node.log", env)
    with Cluster() as cluster:
        cluster.start(node)
        cluster.wait_until_ready({node: f"http://{HOST}:{port}/health"})
        tokens = asyncio.run(_send(f"http://{HOST}:{port}/v1", prompts))
        cluster.check()
    return Served(tokens, [read_rank(path) for path in sorted(ledger.iterdir())], node.log.read_text(errors="replace"))


async def _send(base_url: str, prompts: list[Prompt]) -> list[list[int]]:
    http_client = DefaultAsyncHttpxClient(trust_env=False)  # no proxy between us and a loopback address
    async with AsyncOpenAI(
        base_url=base_url, api_key="none", timeout=300, max_retries=0, http_client=http_client
    ) as client:

        async def one(index: int, prompt: list[int], max_tokens: int) -> list[int]:
            await asyncio.sleep(0.3 * index)
            extra = {"return_token_ids": True, "ignore_eos": True}
            answer: Any = await client.completions.create(
                model="toy", prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=extra
            )
            token_ids: list[int] = answer.choices[0].model_extra["token_ids"]
            return token_ids

        return list(await asyncio.gather(*(one(index, *prompt) for index, prompt in enumerate(prompts))))

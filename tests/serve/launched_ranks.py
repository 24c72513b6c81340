# SPDX-License-Identifier: Apache-2.0
"""Real `vllm serve` processes of one deployment: one for all DP ranks, or one per rank (external load balancer).

Requests go straight to a process of choice, and every figure comes from the ledgers of the virtual NPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo
import httpx
from demo import HOST, OVERLAY_PLUGINS, STOCK_PLUGINS, Process, free_port, node_environment

Event = dict[str, Any]
Prompt = tuple[list[int], int]  # token ids, and how many tokens to generate
# A small node: its worst step is 8 tokens with the recompute scheduler, and start-up takes little longer than imports.
MAX_NUM_SEQS = 8
SMALL = (
    *("--max-model-len", "384", "--max-num-seqs", str(MAX_NUM_SEQS)),
    *("--max-num-batched-tokens", "64", "--num-gpu-blocks-override", "16"),
)
RECOMPUTE = ("--additional-config", json.dumps({"recompute_scheduler_enable": True}))
# Sixteen devices of the A2, from where on stock uses MC2 there.
A2_SIZE = 16
A2 = {
    **{"VIRTUAL_NPU_SOC": "Ascend910B1", "VIRTUAL_NPU_DEVICES": str(A2_SIZE)},
    "ASCEND_RT_VISIBLE_DEVICES": ",".join(map(str, range(A2_SIZE))),
}
VOTE_EVERY = 32  # steps; vLLM's engines then ask each other whether any has unfinished requests
_ports: set[int] = set()  # handed out by this process; all servers of a test choose before the first one listens
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Baseline:
    """A toy model, prompts, and what stock makes of them one after another on DP2 EP2."""

    model: Path
    prompts: list[Prompt]
    tokens: list[list[int]]
    ranks: list[list[Event]]
    log: str


@dataclass(eq=False)
class Server:
    """One `vllm serve` with the engines that it started, and the folder of their ledgers."""

    process: Process
    url: str
    ledger: Path

    def complete(
        self,
        prompt: list[int],
        max_tokens: int,
        timeout_s: float = 120,
        rank: int | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> list[int]:
        """Greedy completion of token ids; returns exactly max_tokens ids. Raises httpx.HTTPError.

        Args:
            rank: the DP rank that is to answer, instead of the least busy one; 0.11.0 does not look at it.
            sampling: parameters of vLLM's completions API; not greedy then, if it has a temperature.
        """
        return self._complete(prompt, max_tokens, timeout_s, rank, sampling)[0]

    def complete_together(self, prompts: list[list[int]], max_tokens: int, rank: int | None = None) -> list[list[int]]:
        """As one request: a rank has all of them at the same time, however busy the machine is."""
        return self._complete(prompts, max_tokens, 120, rank, None)

    def leads(self, prompt: list[int], max_tokens: int) -> list[float]:
        """By how much the logit of each token of the greedy completion is above that of the next likely one."""
        body = {"model": "toy", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "logprobs": 2, "return_tokens_as_token_ids": True}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120, trust_env=False)
        response.raise_for_status()
        likely = [sorted(top.values()) for top in response.json()["choices"][0]["logprobs"]["top_logprobs"]]
        return [top[-1] - top[-2] for top in likely]

    def _complete(
        self,
        prompt: list[int] | list[list[int]],
        max_tokens: int,
        timeout_s: float,
        rank: int | None,
        sampling: dict[str, Any] | None,
    ) -> list[list[int]]:
        body = {
            **{"model": "toy", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0},
            **{"ignore_eos": True, "return_token_ids": True},
            **(sampling or {}),
        }
        headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
        url = f"{self.url}/v1/completions"
        response = httpx.post(url, json=body, headers=headers, timeout=timeout_s, trust_env=False)
        response.raise_for_status()
        return [choice["token_ids"] for choice in response.json()["choices"]]

    @property
    def log(self) -> str:
        return _COLOUR.sub("", self.process.log.read_text(errors="replace"))

    def ended_within(self, seconds: float) -> bool:
        """Waits until the process has ended by itself."""
        deadline = time.monotonic() + seconds
        while self.process.returncode() is None and time.monotonic() < deadline:
            self.process.remember()
            time.sleep(0.1)
        return self.process.returncode() is not None


def new_port() -> int:
    """A free port that no other server of this process has been given."""
    return free_port(_ports)


def server(
    folder: Path,
    model: Path,
    arguments: Iterable[str],
    *,
    overlay: bool,
    kv_role: str = "kv_consumer",
    environment: dict[str, str] | None = None,
) -> Server:
    """A decode node's `vllm serve` in `folder` (not started), as stock or with the overlay.

    Args:
        arguments: flags beside those that make it a small eager decode node; later ones win.
        kv_role: another one makes it a node that may prefill.
        environment: variables on top of the demo's.
    """
    ledger = folder / "ledger"
    ledger.mkdir(parents=True)
    port = new_port()
    transfer = {
        "kv_connector": "FileKVConnector",
        "kv_connector_module_path": "kv_connector",
        "kv_role": kv_role,
        "kv_connector_extra_config": {"directory": str(folder / "kv")},
    }
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "toy"),
        *("--host", HOST, "--port", str(port), "--enforce-eager", "--no-enable-prefix-caching"),
        *("--enable-expert-parallel", "--kv-transfer-config", json.dumps(transfer)),
        *(*SMALL, *arguments),
    ]
    env = node_environment(ledger) | {"VLLM_PLUGINS": OVERLAY_PLUGINS if overlay else STOCK_PLUGINS}
    process = Process(folder.name, command, folder / "node.log", env | (environment or {}))
    return Server(process, f"http://{HOST}:{port}", ledger)


def launched_apart(
    folder: Path,
    model: Path,
    arguments: Iterable[str],
    *,
    overlay: Sequence[bool],
    environments: Sequence[dict[str, str]] = (),
    own_arguments: Sequence[Iterable[str]] = (),
) -> list[Server]:
    """One server per DP rank, each on its own device, as behind an external load balancer.

    Args:
        overlay: for each rank whether it loads the overlay; its length is the number of ranks.
        environments: variables of each rank on top of the demo's.
        own_arguments: flags of each rank beside `arguments`.
    """
    size = len(overlay)
    common = [
        *("--data-parallel-size", str(size), "--data-parallel-size-local", "1"),
        *("--data-parallel-address", HOST, "--data-parallel-rpc-port", str(new_port())),
        *arguments,
    ]
    servers = []
    for rank, with_overlay in enumerate(overlay):
        environment = {"ASCEND_RT_VISIBLE_DEVICES": str(rank)} | (environments[rank] if environments else {})
        flags = [*common, "--data-parallel-rank", str(rank), *(own_arguments[rank] if own_arguments else ())]
        servers.append(server(folder / f"rank{rank}", model, flags, overlay=with_overlay, environment=environment))
    return servers


def changed_overlay(folder: Path, file: str, old: str, new: str) -> dict[str, str]:
    """A copy of the overlay with one text replaced; returns the environment of a process that is to load the copy."""
    spec = importlib.util.find_spec("dp_sync_patch")
    assert spec is not None
    assert spec.origin is not None
    copy = folder / "dp_sync_patch"
    shutil.copytree(Path(spec.origin).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / file).read_text()
    assert text.count(old) == 1
    (copy / file).write_text(text.replace(old, new))
    # Without PYTHONSAFEPATH the current folder, which may be the checkout, comes first.
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(demo.HERE)]), "PYTHONSAFEPATH": "1"}


def wait_until_idle(servers: Iterable[Server], quiet_s: float = 0.3, timeout_s: float = 60) -> int:
    """Waits until no engine steps any more, and returns how many steps each of them has made.

    After the last request the engines go on with dummies up to their next vote: they stop together, after a multiple
    of 32 steps. Raises TimeoutError.
    """
    folders = [one.ledger for one in servers]
    deadline = time.monotonic() + timeout_s
    seen: list[int] = []
    since = time.monotonic()
    while True:
        steps = [path.read_bytes().count(b'"ev":"step"') for folder in folders for path in folder.iterdir()]
        if steps != seen:
            seen, since = steps, time.monotonic()
        if len(set(steps)) == 1 and steps[0] % VOTE_EVERY == 0 and time.monotonic() - since > quiet_s:
            return steps[0]
        if time.monotonic() > deadline:
            raise TimeoutError(f"the engines did not become idle within {timeout_s:.0f} s; steps: {steps}")
        time.sleep(0.05)


def one_at_a_time(node: Server, prompts: Iterable[Prompt]) -> list[list[int]]:
    """Every request meets an idle deployment, so that runs of it can be compared step by step."""
    tokens = []
    for prompt, count in prompts:
        tokens.append(node.complete(prompt, count))
        wait_until_idle([node])
    return tokens


def read_ranks(servers: Iterable[Server]) -> list[list[Event]]:
    """The events of each EP rank, in rank order, with the vLLM group of every collective under "group".

    Read it after the servers have ended: events of a step are written when the next one begins.
    """
    ranks: dict[int, list[Event]] = {}
    for one in servers:
        for path in sorted(one.ledger.iterdir()):
            events = [json.loads(line) for line in path.read_text().splitlines()]
            groups = {event["comm"]: event["name"] for event in events if event["ev"] == "group"}
            for event in events:
                if event["ev"] == "collective" and "comm" in event:
                    event["group"] = groups.get(event["comm"], "unnamed")
            mc2 = {event["rank"] for event in events if event["ev"] == "ep"}
            if mc2:
                assert len(mc2) == 1
                assert ranks.setdefault(mc2.pop(), events) is events, "two ledgers of one rank"
    assert sorted(ranks) == list(range(len(ranks)))
    return [ranks[rank] for rank in sorted(ranks)]


def scheduled(ranks: list[list[Event]]) -> list[int]:
    """Tokens of each step of a request, whichever rank had it."""
    steps = [event for events in ranks for event in events if event["ev"] == "step" and event["scheduled_tokens"]]
    return [event["scheduled_tokens"] for event in sorted(steps, key=lambda event: event["step"])]

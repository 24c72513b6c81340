# SPDX-License-Identifier: Apache-2.0
"""`make soak`: half an hour of mixed load on a decode node with DP4 and ACL graphs, and the same prompts on stock.

Clients come and go, a part of them leaves in the middle of an answer, and every now and then all ranks run dry. Then
the node is looked at: memory, file handles, shared segments. At the end every answer has to be the one that stock
gives, the counters of the ranks have to agree, and nothing may have grown. Writes build/soak/report.json; exit status 1
tells that something was found.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shutil
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import httpx  # noqa: E402  (this line and the next ones need the path above)
import psutil  # noqa: E402
from demo import Cluster, say  # noqa: E402
from launched_ranks import RECOMPUTE, Prompt, Server, server  # noqa: E402
from openai import AsyncOpenAI, DefaultAsyncHttpxClient  # noqa: E402
from toy_model import ToyModelShape, write_toy_model  # noqa: E402

DP_SIZE = 4
POOL = 60
CLIENTS = 16
LEAVING = 0.25  # of the requests are left in the middle
BUSY_S = (10.0, 40.0)  # between two moments at which all ranks run dry
GRAPHS = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
FLAGS = ["--data-parallel-size", str(DP_SIZE), "--api-server-count", "1"]
# Growth of a process between the first and the last third of the samples that is still called none.
ALLOWED_MIB = 16.0


@dataclass(frozen=True)
class Sample:
    """The node while it is idle: memory and open files by process id, and how many shared segments they map."""

    at_s: float
    rss_mib: dict[int, float]
    files: dict[int, int]
    segments: int


@dataclass
class Load:
    """What the clients saw. `answers`: pool index -> the different answers to it."""

    complete: int = 0
    left: int = 0
    answers: dict[int, set[tuple[int, ...]]] = field(default_factory=dict)
    beginnings: dict[int, set[tuple[int, ...]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def make_pool(seed: int) -> list[Prompt]:
    """Prompts that need one KV block of 128 tokens at most; a third of them is no longer than the bound of a step."""
    draw = random.Random(seed)
    vocab = ToyModelShape().vocab_size
    lengths = [draw.randint(1, 8) if index % 3 == 0 else draw.randint(9, 70) for index in range(POOL)]
    return [([draw.randrange(3, vocab) for _ in range(length)], draw.randint(1, 50)) for length in lengths]


async def one_request(client: AsyncOpenAI, pool: list[Prompt], index: int, leave_after: int | None, load: Load) -> None:
    prompt, count = pool[index]
    body = {"return_token_ids": True, "ignore_eos": True}
    tokens: list[int] = []
    stream = await client.completions.create(
        model="toy", prompt=prompt, max_tokens=count, temperature=0.0, stream=True, extra_body=body
    )
    async with stream:  # leaving it closes the connection, which aborts the request
        async for chunk in stream:
            for choice in chunk.choices:
                tokens += (choice.model_extra or {}).get("token_ids") or []
            if leave_after is not None and len(tokens) >= leave_after:
                break
    if len(tokens) == count:
        load.complete += 1
        load.answers.setdefault(index, set()).add(tuple(tokens))
    elif leave_after is not None:
        load.left += 1
        load.beginnings.setdefault(index, set()).add(tuple(tokens))
    else:
        load.errors.append(f"prompt {index}: {len(tokens)} tokens instead of {count}")


async def busy(url: str, pool: list[Prompt], seconds: float, clients: int, draw: random.Random, load: Load) -> None:
    """`clients` of them send one request after another for so long, and finish those that they have begun."""
    until = time.monotonic() + seconds

    async def client_of(own: random.Random) -> None:
        while time.monotonic() < until:
            index = own.randrange(len(pool))
            leave_after = own.randrange(1, pool[index][1] + 1) if own.random() < LEAVING else None
            try:
                await one_request(client, pool, index, leave_after, load)
            except Exception as error:  # noqa: BLE001 - recorded, and the others go on
                load.errors.append(f"prompt {index}: {type(error).__name__}: {error}")
                return
            await asyncio.sleep(own.choice((0.0, 0.0, 0.2, 1.0)))

    http_client = DefaultAsyncHttpxClient(trust_env=False)
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0, http_client=http_client
    ) as client:
        await asyncio.gather(*(client_of(random.Random(draw.random())) for _ in range(clients)))


def wait_until_dry(node: Server, timeout_s: float = 120) -> None:
    """Until no rank writes to its ledger for a second. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    sizes: list[int] = []
    while (now := [path.stat().st_size for path in sorted(node.ledger.iterdir())]) != sizes:
        sizes = now
        if time.monotonic() > deadline:
            raise TimeoutError(f"the ranks still make steps {timeout_s:.0f} s after the last request")
        time.sleep(1.0)


def look_at(node: Server, began: float) -> Sample:
    assert node.process.popen is not None
    server_process = psutil.Process(node.process.popen.pid)
    processes = [server_process, *server_process.children(recursive=True)]
    segments = {one.path for process in processes for one in process.memory_maps() if one.path.startswith("/dev/shm/")}
    return Sample(
        round(time.monotonic() - began, 1),
        {process.pid: process.memory_info().rss / 2**20 for process in processes},
        {process.pid: process.num_fds() for process in processes},
        len(segments),
    )


def grown(samples: list[Sample]) -> list[str]:
    """What grew between the first and the last third of the samples, of any process."""
    if len(samples) < 6:
        return [f"{len(samples)} samples are too few to tell whether anything grows"]
    third = len(samples) // 3
    early, late = samples[:third], samples[-third:]
    found = []
    if any(sample.files.keys() != samples[0].files.keys() for sample in samples):
        return ["processes came or went"]
    for pid in samples[0].rss_mib:
        growth = statistics.median(one.rss_mib[pid] for one in late) - statistics.median(
            one.rss_mib[pid] for one in early
        )
        if growth > ALLOWED_MIB:
            found.append(f"process {pid}: {growth:.1f} MiB more memory")
        more = max(one.files[pid] for one in late) - max(one.files[pid] for one in early)
        if more > 0:
            found.append(f"process {pid}: {more} more open files")
    if late[-1].segments > early[-1].segments:
        found.append(f"{late[-1].segments - early[-1].segments} more shared segments")
    return found


def counters(node: Server) -> dict[str, dict[str, float]]:
    """Name -> engine -> value, of the overlay's counters."""
    found: dict[str, dict[str, float]] = {}
    text = httpx.get(f"{node.url}/metrics", trust_env=False).text
    for name, engine, value in re.findall(r'^dp_sync_patch_(\w+)\{engine="(\d+)"[^}]*\} (\S+)$', text, re.MULTILINE):
        found.setdefault(name, {})[engine] = float(value)
    return found


def inconsistent(found: dict[str, dict[str, float]]) -> list[str]:
    """All ranks skip, make equally many passes, and none of them failed."""
    skipped = found.get("passes_skipped_total", {})
    problems = []
    if len(skipped) != DP_SIZE or len(set(skipped.values())) != 1 or not all(skipped.values()):
        problems.append(f"passes without the all_reduce differ: {skipped}")
    for name in ("passes_synced_total", "mc2_only_errors_total"):
        if any(found.get(name, {"none": 1.0}).values()):
            problems.append(f"{name}: {found.get(name)}")
    return problems


def in_ledgers(node: Server) -> tuple[Counter[str], list[str]]:
    """Steps by mode of their first dispatch, and violations."""
    modes: Counter[str] = Counter()
    violations = []
    for path in node.ledger.iterdir():
        with path.open() as lines:
            last = -1
            for line in lines:
                if '"ev":"violation"' in line:
                    violations.append(line.strip())
                elif '"op":"dispatch"' in line:
                    event = json.loads(line)
                    if event["step"] > last:
                        modes[event["mode"]] += 1
                        last = event["step"]
    return modes, violations


def differing(load: Load, expected: list[list[int]]) -> list[str]:
    found = []
    for index, answers in sorted(load.answers.items()):
        if answers != {tuple(expected[index])}:
            found.append(f"prompt {index}: {len(answers)} answers, and not that of stock")
    for index, beginnings in sorted(load.beginnings.items()):
        if any(tuple(expected[index][: len(one)]) != one for one in beginnings):
            found.append(f"prompt {index}: left with other tokens than those of stock")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "soak")
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    (options.output / "metrics").mkdir(parents=True)
    model = write_toy_model(options.output / "model", ToyModelShape())
    pool, draw, load = make_pool(options.seed), random.Random(options.seed), Load()

    stock = server(options.output / "stock", model, FLAGS, overlay=False)
    with Cluster() as cluster:
        cluster.start(stock.process)
        cluster.wait_until_ready({stock.process: f"{stock.url}/health"})
        expected = [stock.complete(*prompt) for prompt in pool]
    say(f"stock has answered {len(pool)} prompts")

    graphs = ["--no-enforce-eager", "--compilation-config", json.dumps(GRAPHS), *RECOMPUTE]
    environment = {
        "DP_SYNC_PATCH_GRAPH_MODE": "sync",
        "VLLM_DISABLE_COMPILE_CACHE": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(options.output / "metrics"),
    }
    node = server(options.output / "node", model, [*FLAGS, *graphs], overlay=True, environment=environment)
    samples = []
    with Cluster() as cluster:
        cluster.start(node.process)
        cluster.wait_until_ready({node.process: f"{node.url}/health"})
        began = time.monotonic()
        while time.monotonic() - began < options.minutes * 60 and not load.errors:
            # One client leaves three ranks without requests; all of them fill every rank.
            clients = draw.choice((1, 3, CLIENTS, CLIENTS))
            asyncio.run(busy(node.url, pool, draw.uniform(*BUSY_S), clients, draw, load))
            wait_until_dry(node)
            samples.append(look_at(node, began))
            cluster.check()
            say(f"{load.complete} answers, {load.left} left, {len(load.errors)} errors")
        time.sleep(3)  # the counters are copied every two seconds
        counted = counters(node)
    modes, violations = in_ledgers(node)
    problems = [*load.errors, *differing(load, expected), *inconsistent(counted), *violations, *grown(samples)]
    if not modes["graph"] or not modes["eager"]:
        problems.append(f"steps in graphs and eager ones were both expected: {dict(modes)}")
    if not load.left:
        problems.append("no client left in the middle of an answer")
    report = {
        "minutes": options.minutes,
        "answers": load.complete,
        "left": load.left,
        "steps": dict(modes),
        "counters": counted,
        "samples": [asdict(sample) for sample in samples],
        "problems": problems,
    }
    (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    say(f"{load.complete} answers, {load.left} left in the middle, steps of all ranks {dict(modes)}")
    for problem in problems[:20]:
        say(f"PROBLEM {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

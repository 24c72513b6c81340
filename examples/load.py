# SPDX-License-Identifier: Apache-2.0
"""Streaming requests through the OpenAI client: the same requests, in the same order, at the same offsets, every time.

The arrivals are uneven on purpose: one lone request (the other ranks idle), then a burst that fills all ranks, then
single ones. Prompts are 5 to 200 tokens, outputs 4 to 64, greedy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

_WORDS = ("rank", "step", "token", "batch", "expert", "router", "cache", "block", "prompt", "decode", "node", "queue")


@dataclass(frozen=True)
class LoadRequest:
    """One request. `prompt` is a list of token ids, or text, or (with `chat`) the text of a user message."""

    index: int
    start_s: float
    prompt: list[int] | str
    max_tokens: int
    chat: bool = False


@dataclass
class LoadResult:
    """token_ids and text of the answer; ttft_ms from sending to the first token, tpot_ms between later tokens."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    finish_reason: str | None = None
    ttft_ms: float = 0.0
    tpot_ms: float | None = None
    error: str | None = None


def make_requests(count: int = 20, seed: int = 7, vocab_size: int = 384, first_token: int = 3) -> list[LoadRequest]:
    """`count` requests (at least 16). Every fourth is text, every fourth a chat, the others are token ids.

    The burst's prompts end shortly before a KV block of 128 tokens does, so that two of them on a rank with few blocks
    soon need one more than there is.
    """
    if count < 16:
        raise ValueError(f"count must be at least 16, found {count}")
    rng = random.Random(seed)
    requests = []
    start_s = 0.0
    for index in range(count):
        # The first two are the longest and the shortest case, and the first one is alone for a while.
        if index == 0:
            prompt_length, max_tokens = 5, 64
        elif index == 1:
            start_s += 1.0
            prompt_length, max_tokens = 200, 4
        elif index <= 9:
            prompt_length, max_tokens = rng.randint(100, 126), rng.randint(30, 64)
        else:
            start_s += rng.choice((0.05, 0.3, 0.8))
            prompt_length, max_tokens = rng.randint(5, 200), rng.randint(4, 64)
        chat = index % 4 == 3
        prompt: list[int] | str
        if chat or index % 4 == 2:
            prompt = " ".join(rng.choice(_WORDS) for _ in range(max(1, prompt_length // 2)))
        else:
            prompt = [rng.randrange(first_token, vocab_size) for _ in range(prompt_length)]
        requests.append(LoadRequest(index, round(start_s, 3), prompt, max_tokens, chat))
    return requests


async def _run_one(client: AsyncOpenAI, model: str, request: LoadRequest) -> LoadResult:
    result = LoadResult(request.index)
    await asyncio.sleep(request.start_s)
    sent = time.perf_counter()
    first = last = 0.0
    common: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "seed": request.index,
        "stream": True,
        "stream_options": {"include_usage": True},
        # The toy model may draw the end token at any time; the lengths have to be the ones asked for.
        "extra_body": {"return_token_ids": True, "ignore_eos": True},
    }
    stream: Any
    if request.chat:
        messages: Any = [{"role": "user", "content": request.prompt}]
        stream = await client.chat.completions.create(messages=messages, **common)
    else:
        stream = await client.completions.create(prompt=request.prompt, **common)
    async for chunk in stream:
        if chunk.usage is not None:
            result.prompt_tokens = chunk.usage.prompt_tokens
        for choice in chunk.choices:
            new_ids = (choice.model_extra or {}).get("token_ids") or []
            result.token_ids += new_ids
            result.text += (choice.delta.content or "") if request.chat else choice.text
            result.finish_reason = choice.finish_reason or result.finish_reason
            if new_ids:
                last = time.perf_counter()
                first = first or last
    if len(result.token_ids) != request.max_tokens:
        result.error = f"{len(result.token_ids)} tokens instead of {request.max_tokens}"
    result.ttft_ms = (first - sent) * 1e3
    if len(result.token_ids) > 1:
        result.tpot_ms = (last - first) * 1e3 / (len(result.token_ids) - 1)
    return result


async def run_load(
    base_url: str,
    model: str,
    requests: list[LoadRequest],
    *,
    timeout_s: float = 300.0,
    on_done: Callable[[LoadResult], None] | None = None,
) -> list[LoadResult]:
    """Sends all requests and returns their results in order. A failed one carries `error` instead of raising.

    base_url is the root of the proxy or of a server, without /v1.
    """

    async def guarded(request: LoadRequest) -> LoadResult:
        try:
            result = await asyncio.wait_for(_run_one(client, model, request), timeout_s)
        except Exception as error:  # noqa: BLE001 - recorded: one failed request must not hide the others
            result = LoadResult(request.index, error=f"{type(error).__name__}: {error}")
        if on_done is not None:
            on_done(result)
        return result

    # trust_env: a proxy of the environment must not come between the client and a loopback address.
    http_client = DefaultAsyncHttpxClient(trust_env=False)
    settings: dict[str, Any] = {"base_url": f"{base_url}/v1", "api_key": "none", "timeout": timeout_s}
    async with AsyncOpenAI(**settings, max_retries=0, http_client=http_client) as client:
        return list(await asyncio.gather(*(guarded(request) for request in requests)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Send the demo's streaming requests and record tokens and timings.")
    parser.add_argument("base_url", help="root URL, for example http://127.0.0.1:8000")
    parser.add_argument("--model", default="toy")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    results = asyncio.run(run_load(args.base_url, args.model, make_requests(args.count)))
    document = json.dumps([asdict(result) for result in results], indent=1)
    if args.output:
        args.output.write_text(document + "\n", encoding="utf-8")
    else:
        print(document)
    failed = [result for result in results if result.error]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(results)} requests failed: {failed[0].error}")


if __name__ == "__main__":
    main()

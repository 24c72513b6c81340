# SPDX-License-Identifier: Apache-2.0
"""The proxy over real HTTP on loopback, in front of two small ASGI nodes that behave as vLLM 0.11.0 does on the wire.

The nodes share a deterministic token function of the whole prompt, so an answer that was interrupted and re-submitted
must equal one that was not. A "recomputed" answer has the shape of the stock scheduler's: one more chunk without text
whose token id repeats the last one.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai import APIError, OpenAI
from proxy import create_app

PROMPT = [7, 8, 9, 10]
CHAT_PROMPT = [100, 101, 102]  # what the nodes' chat template makes of any conversation


def next_token(token_ids: list[int]) -> int:
    return sum((index + 1) * token for index, token in enumerate(token_ids)) % 997 + 1


def generate(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


def text_of(token_ids: list[int]) -> str:
    return "".join(f" {token}" for token in token_ids)


@dataclass
class Node:
    """One node. `recompute_after` holds, per submission to the decode node, after how many tokens it hands back."""

    role: str
    transfers: dict[str, list[int]]
    recompute_after: list[int] = field(default_factory=list)
    delay_s: float = 0.0
    refuse_with: int | None = None
    die_after: int | None = None
    seen: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)
    cancelled: int = 0

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/health")
        async def health() -> Response:
            return Response(status_code=200)

        @app.get("/v1/models")
        async def models() -> Response:
            return JSONResponse({"object": "list", "data": [{"id": "toy"}]})

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            return await self.answer(request, False)

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            return await self.answer(request, True)

        return app

    async def answer(self, request: Request, chat: bool) -> Response:
        body = await request.json()
        self.seen.append((request.url.path, body, request.headers["X-Request-Id"]))
        if self.refuse_with is not None:
            return JSONResponse({"error": {"message": "no", "code": self.refuse_with}}, self.refuse_with)
        prompt = CHAT_PROMPT if chat else body["prompt"]
        limit = body.get("max_completion_tokens") if chat else None
        limit = limit or body.get("max_tokens") or 16
        params = body.get("kv_transfer_params") or {}
        if self.role == "prefill":
            assert limit == 1, "the prefill node was asked for more than one token"
            assert params["do_remote_decode"] is True
            assert body["stream"] is False
            self.transfers[params["transfer_id"]] = prompt
            params = {"do_remote_prefill": True, "transfer_id": params["transfer_id"]}
            return JSONResponse(whole(chat, prompt, generate(prompt, 1), "length", None, params))
        assert params["do_remote_prefill"] is True
        assert self.transfers.pop(params["transfer_id"]) == prompt, "the KV cache is that of another prompt"
        tokens = generate(prompt, limit)
        reason: tuple[str, str | None] = ("length", None)
        if self.recompute_after and self.recompute_after[0] < limit:
            tokens = tokens[: self.recompute_after.pop(0)]
            reason = ("stop", "recomputed")
        if not body.get("stream"):
            for _ in tokens:
                await asyncio.sleep(self.delay_s)
                if await request.is_disconnected():
                    self.cancelled += 1
                    return Response(status_code=499)
            repeated = [tokens[-1]] if reason[1] else []
            return JSONResponse(whole(chat, prompt, tokens, *reason, None, repeated))
        return StreamingResponse(self.chunks(chat, body, prompt, tokens, *reason), media_type="text/event-stream")

    async def chunks(
        self, chat: bool, body: dict[str, Any], prompt: list[int], tokens: list[int], finish: str, stop: str | None
    ) -> AsyncIterator[str]:
        identity = {"id": f"x-{len(self.seen)}", "created": 1, "model": "toy", "object": "chunk"}
        usage = (body.get("stream_options") or {}).get("include_usage")
        try:
            if chat:
                role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield event({**identity, "choices": [role], "prompt_token_ids": prompt})
            for index, token in enumerate(tokens):
                if self.die_after == index:
                    yield event({"error": {"message": "EngineDeadError", "code": 500}})
                    yield "data: [DONE]\n\n"
                    return
                await asyncio.sleep(self.delay_s)
                last = index == len(tokens) - 1 and stop is None
                choice = chunk_choice(chat, [token], text_of([token]), finish if last else None, None)
                if not chat and index == 0:
                    choice["prompt_token_ids"] = prompt
                yield event({**identity, "choices": [choice]})
            if stop is not None:
                yield event({**identity, "choices": [chunk_choice(chat, [tokens[-1]], "", finish, stop)]})
            if usage:
                total = len(tokens) + (stop is not None)
                numbers = {
                    "prompt_tokens": len(prompt),
                    "completion_tokens": total,
                    "total_tokens": len(prompt) + total,
                }
                yield event({**identity, "choices": [], "usage": numbers})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"


def chunk_choice(chat: bool, tokens: list[int], text: str, finish: str | None, stop: str | None) -> dict[str, Any]:
    content: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    return {"index": 0, **content, "finish_reason": finish, "stop_reason": stop, "token_ids": tokens, "logprobs": None}


def whole(
    chat: bool,
    prompt: list[int],
    tokens: list[int],
    finish: str,
    stop: str | None,
    params: dict[str, Any] | None,
    repeated: list[int] | None = None,
) -> dict[str, Any]:
    text = text_of(tokens)
    content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    ids = tokens + (repeated or [])
    choice = {"index": 0, **content, "finish_reason": finish, "stop_reason": stop, "token_ids": ids, "logprobs": None}
    answer: dict[str, Any] = {"id": "x", "object": "o", "created": 1, "model": "toy", "choices": [choice]}
    (answer if chat else choice)["prompt_token_ids"] = prompt
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)}
    return {**answer, "usage": usage, "kv_transfer_params": params}


class Server:
    """uvicorn in a thread, on a socket that is bound before it starts."""

    def __init__(self, app: FastAPI) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def start(self) -> None:
        self.thread.start()
        deadline = time.monotonic() + 20
        while not self.server.started:
            assert time.monotonic() < deadline, "uvicorn did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.socket.close()


@dataclass
class Setup:
    prefill: Node
    decode: Node
    url: str
    prefill_url: str
    decode_url: str

    def client(self) -> OpenAI:
        http_client = httpx.Client(trust_env=False)
        return OpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=0, timeout=20, http_client=http_client)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=20, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20, trust_env=False)


@pytest.fixture
def setup() -> Iterator[Setup]:
    transfers: dict[str, list[int]] = {}
    nodes = [Node("prefill", transfers), Node("decode", transfers)]
    servers = [Server(node.app()) for node in nodes]
    servers.append(Server(create_app(servers[0].url, servers[1].url, max_submissions=4)))
    for server in servers:
        server.start()
    yield Setup(*nodes, servers[2].url, servers[0].url, servers[1].url)
    for server in reversed(servers):
        server.stop()


EXTRA = {"return_token_ids": True}


def stream_completion(setup: Setup, max_tokens: int, **arguments: Any) -> tuple[list[int], str, list[Any]]:
    ids: list[int] = []
    text = ""
    chunks = list(
        setup.client().completions.create(
            model="toy", prompt=PROMPT, max_tokens=max_tokens, stream=True, extra_body=EXTRA, **arguments
        )
    )
    for chunk in chunks:
        for choice in chunk.choices:
            ids += (choice.model_extra or {})["token_ids"]
            text += choice.text
    return ids, text, chunks


def test_streamed_completion_passes_through_both_nodes(setup: Setup) -> None:
    ids, text, chunks = stream_completion(setup, 6, stream_options={"include_usage": True})
    assert ids == generate(PROMPT, 6)
    assert text == text_of(ids)
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[-2].choices[0].finish_reason == "length"
    assert [path for path, _, _ in setup.prefill.seen] == ["/v1/completions"]
    assert setup.prefill.transfers == {}, "the decode node did not fetch the KV cache"


def test_whole_completion(setup: Setup) -> None:
    answer = setup.client().completions.create(model="toy", prompt=PROMPT, max_tokens=5)
    assert answer.choices[0].text == text_of(generate(PROMPT, 5))
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert (answer.choices[0].model_extra or {}).get("token_ids") is None, "token ids nobody asked for"


@pytest.mark.parametrize("handed_back", [[1], [3], [2, 3], [1, 1, 1]])
def test_recomputed_stream_is_token_exact(setup: Setup, handed_back: list[int]) -> None:
    setup.decode.recompute_after = list(handed_back)
    ids, text, chunks = stream_completion(setup, 9, stream_options={"include_usage": True})
    assert ids == generate(PROMPT, 9)
    assert text == text_of(ids)
    assert setup.decode.recompute_after == []
    # One answer for the client: one id, one finish, no trace of the stop reason, its own usage.
    assert len({chunk.id for chunk in chunks}) == 1
    finishes = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert finishes == ["length"]
    assert "recomputed" not in "".join(chunk.model_dump_json() for chunk in chunks)
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert [(usage.prompt_tokens, usage.completion_tokens) for usage in usages] == [(len(PROMPT), 9)]
    # Each submission went through both nodes under an id of its own, with the remaining number of tokens.
    limits = [body["max_tokens"] for _, body, _ in setup.decode.seen]
    assert limits == [9 - sum(handed_back[:n]) for n in range(len(handed_back) + 1)]
    assert len({request_id for _, _, request_id in setup.decode.seen}) == len(limits)
    assert len(setup.prefill.seen) == len(limits)
    assert setup.get("/health").json()["resubmitted"] == len(handed_back)


def test_recomputed_whole_completion_is_token_exact(setup: Setup) -> None:
    setup.decode.recompute_after = [2, 3]
    answer = setup.client().completions.create(model="toy", prompt=PROMPT, max_tokens=9, extra_body=EXTRA)
    expected = generate(PROMPT, 9)
    assert answer.choices[0].text == text_of(expected)
    assert (answer.choices[0].model_extra or {})["token_ids"] == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 9)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("handed_back", [[], [2], [1, 4]])
def test_chat(setup: Setup, streamed: bool, handed_back: list[int]) -> None:
    setup.decode.recompute_after = list(handed_back)
    messages: Any = [{"role": "user", "content": "hi"}]
    expected = generate(CHAT_PROMPT, 8)
    create = setup.client().chat.completions.create
    if streamed:
        text, ids = "", []
        for chunk in create(model="toy", messages=messages, max_completion_tokens=8, stream=True, extra_body=EXTRA):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                ids += (choice.model_extra or {}).get("token_ids") or []
        assert ids == expected
    else:
        text = create(model="toy", messages=messages, max_completion_tokens=8).choices[0].message.content or ""
    assert text == text_of(expected)
    # Carried on as token ids: a second pass through the chat template would change the prompt.
    assert [path for path, _, _ in setup.decode.seen] == [
        "/v1/chat/completions",
        *["/v1/completions"] * len(handed_back),
    ]


def test_sampling_parameters_are_carried_over(setup: Setup) -> None:
    setup.decode.recompute_after = [2]
    setup.client().chat.completions.create(
        model="toy", messages=[{"role": "user", "content": "hi"}], max_tokens=6, temperature=0.5, seed=3, stop=["zz"],
        extra_body={"ignore_eos": True, "min_tokens": 5},
    )  # fmt: skip
    second = setup.decode.seen[1][1]
    assert second["prompt"] == CHAT_PROMPT + generate(CHAT_PROMPT, 2)
    assert {key: second[key] for key in ("max_tokens", "temperature", "seed", "stop", "ignore_eos", "min_tokens")} == {
        "max_tokens": 4, "temperature": 0.5, "seed": 3, "stop": ["zz"], "ignore_eos": True, "min_tokens": 3,
    }  # fmt: skip


def test_endless_recomputation_ends_with_an_error(setup: Setup) -> None:
    setup.decode.recompute_after = [1] * 10
    response = setup.post("/v1/completions", {"model": "toy", "prompt": PROMPT, "max_tokens": 50})
    assert response.status_code == 502
    assert "recomputed the request 4 times" in response.json()["error"]["message"]
    assert setup.decode_url in response.json()["error"]["message"]


def test_structured_output_is_not_carried_on(setup: Setup) -> None:
    setup.decode.recompute_after = [1]
    body = {"model": "toy", "prompt": PROMPT, "max_tokens": 5, "guided_regex": "a+"}
    response = setup.post("/v1/completions", body)
    assert response.status_code == 502
    assert "guided_regex" in response.json()["error"]["message"]


@pytest.mark.parametrize("down", ["prefill", "decode"])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_failing_node_is_named(setup: Setup, down: str, streamed: bool) -> None:
    getattr(setup, down).refuse_with = 500
    body = {"model": "toy", "prompt": PROMPT, "max_tokens": 5, "stream": streamed}
    response = setup.post("/v1/completions", body)
    assert response.status_code == 502
    message = response.json()["error"]["message"]
    assert message.startswith(f"{down} node {getattr(setup, down + '_url')}: HTTP 500")


def test_an_unreachable_node_is_named_and_unhealthy() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}"
        proxy = Server(create_app(dead, dead))
        proxy.start()
        try:
            response = httpx.post(
                proxy.url + "/v1/completions", json={"prompt": PROMPT, "model": "toy"}, timeout=20, trust_env=False
            )
            health = httpx.get(proxy.url + "/health", timeout=20, trust_env=False)
        finally:
            proxy.stop()
    assert response.status_code == 502
    assert response.json()["error"]["message"].startswith(f"prefill node {dead}: ConnectError")
    assert health.status_code == 503
    assert "ConnectError" in health.json()["decode"]


def test_a_node_that_dies_in_the_stream_is_named(setup: Setup) -> None:
    setup.decode.die_after = 3
    with pytest.raises(APIError, match=f"decode node {setup.decode_url}.*EngineDeadError"):
        stream_completion(setup, 6)


def test_the_fault_of_the_client_is_passed_on(setup: Setup) -> None:
    setup.prefill.refuse_with = 404
    response = setup.post("/v1/completions", {"model": "nope", "prompt": PROMPT})
    assert response.status_code == 404
    assert response.json() == {"error": {"message": "no", "code": 404}}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": PROMPT, "n": 2}, "n and best_of"),
        ({"prompt": ["a", "b"]}, "one prompt per request"),
        ({"prompt": PROMPT, "prompt_logprobs": 1}, "prompt_logprobs"),
        ([], "not a JSON object"),
    ],
)
def test_requests_that_cannot_be_served(setup: Setup, body: Any, reason: str) -> None:
    response = setup.post("/v1/completions", body)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]
    assert setup.prefill.seen == []


@pytest.mark.parametrize("streamed", [True, False])
def test_client_disconnect_reaches_the_decode_node(setup: Setup, streamed: bool) -> None:
    setup.decode.delay_s = 0.05
    body = {"model": "toy", "prompt": PROMPT, "max_tokens": 400, "stream": streamed}
    if streamed:
        with httpx.stream("POST", setup.url + "/v1/completions", json=body, timeout=20, trust_env=False) as response:
            lines = response.iter_lines()
            for _ in range(4):
                next(lines)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(setup.url + "/v1/completions", json=body, timeout=0.5, trust_env=False)
    deadline = time.monotonic() + 10
    while not setup.decode.cancelled and time.monotonic() < deadline:
        time.sleep(0.02)
    assert setup.decode.cancelled == 1, "the decode node went on generating for nobody"
    setup.decode.delay_s = 0.0
    assert setup.client().completions.create(model="toy", prompt=PROMPT, max_tokens=2).choices[0].text


def test_models_and_health(setup: Setup) -> None:
    assert setup.get("/v1/models").json()["data"] == [{"id": "toy"}]
    response = setup.get("/health")
    assert (response.status_code, response.json()) == (200, {"prefill": "ok", "decode": "ok", "resubmitted": 0})

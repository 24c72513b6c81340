# SPDX-License-Identifier: Apache-2.0
"""A small OpenAI-compatible proxy in front of one prefill node and one decode node.

A request is first sent to the prefill node with `max_tokens=1` and `do_remote_decode`. The answer carries the
parameters under which the decode node finds the KV cache, and the token ids of the prompt. The decode node then serves
the request, streamed or not.

A decode node with vllm-ascend's recompute scheduler that runs out of KV blocks ends a request with
`stop_reason="recomputed"` instead of prefilling it again. The proxy then re-submits prompt plus generated tokens as
token ids, so that nothing is tokenised twice, and the client sees one uninterrupted answer. The last token id of a
"recomputed" answer repeats the one before it (it is only there because an answer may not be empty) and is dropped.

Limits: one prompt and one choice per request, no prompt_logprobs. A re-submission fails with an error for tools,
structured output, and chat with logprobs; a stop string that begins before and ends after it is not seen; sampling with
a seed starts a new random stream. Greedy output is exact.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

T = TypeVar("T")
RECOMPUTED = "recomputed"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

# A grammar, a tool parser or chat logprobs have state that a re-submission would lose.
_STATEFUL_KEYS = (
    "tools",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structural_tag",
)

# Parameters that mean the same on both endpoints and are carried over when a chat is re-submitted as a completion.
_SAMPLING_KEYS = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stream",
    "stream_options",
    "user",
    "priority",
    "bad_words",
    "allowed_token_ids",
)


class ClientError(Exception):
    """A request this proxy cannot serve: 400 with the reason."""


class NodeError(Exception):
    """A node that failed; `status` and `body` are set if it answered with an error of its own."""

    def __init__(self, role: str, url: str, reason: str, status: int | None = None, body: bytes = b"") -> None:
        super().__init__(f"{role} node {url}: {reason}")
        self.status = status
        self.body = body

    @property
    def is_client_fault(self) -> bool:
        return self.status is not None and 400 <= self.status < 500


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


def error_body(message: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": "proxy_error", "param": None, "code": code}}


@dataclass
class Node:
    """One `vllm serve` behind the proxy. role is "prefill" or "decode" and appears in error messages."""

    role: str
    url: str
    client: httpx.AsyncClient

    async def post(self, path: str, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        """POST with a JSON answer. Raises NodeError."""
        try:
            response = await self.client.post(self.url + path, json=body, headers={"X-Request-Id": request_id})
        except httpx.HTTPError as error:
            raise NodeError(self.role, self.url, f"{type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise self._refused(response.status_code, response.content)
        answer: dict[str, Any] = response.json()
        return answer

    async def stream(self, path: str, body: dict[str, Any], request_id: str) -> AsyncGenerator[dict[str, Any], None]:
        """The JSON chunks of a server-sent event stream, without the closing [DONE]. Raises NodeError."""
        headers = {"X-Request-Id": request_id}
        finished = False
        try:
            async with self.client.stream("POST", self.url + path, json=body, headers=headers) as response:
                if response.status_code != 200:
                    raise self._refused(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    payload = line[5:].strip()
                    if payload == "[DONE]":
                        finished = True
                        break
                    chunk: dict[str, Any] = json.loads(payload)
                    if "error" in chunk:
                        raise NodeError(self.role, self.url, f"error in the stream: {chunk['error']}")
                    yield chunk
        except httpx.HTTPError as error:
            raise NodeError(self.role, self.url, f"{type(error).__name__}: {error}") from error
        if not finished:
            raise NodeError(self.role, self.url, "the stream ended without [DONE]")

    def _refused(self, status: int, body: bytes) -> NodeError:
        return NodeError(self.role, self.url, f"HTTP {status}: {body[:500].decode(errors='replace')}", status, body)

    async def health(self) -> str:
        try:
            response = await self.client.get(self.url + "/health", timeout=5)
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        return "ok" if response.status_code == 200 else f"HTTP {response.status_code}"


@dataclass
class Job:
    """One client request over all its submissions. token_ids are the output tokens handed on so far."""

    path: str
    body: dict[str, Any]
    request_id: str
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    submissions: int = 0

    @property
    def is_chat(self) -> bool:
        return self.path == CHAT

    @property
    def wants_token_ids(self) -> bool:
        return bool(self.body.get("return_token_ids"))

    @property
    def wants_final_usage(self) -> bool:
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    def check(self) -> None:
        """Raises ClientError for what cannot be split over two nodes and several submissions."""
        if self.body.get("n") not in (None, 1) or self.body.get("best_of") not in (None, 1):
            raise ClientError("n and best_of above 1 are not supported: the KV cache is handed over once")
        if self.body.get("prompt_logprobs") is not None or self.body.get("use_beam_search"):
            raise ClientError("prompt_logprobs and use_beam_search are not supported with disaggregated prefill")
        prompt = self.body.get("prompt")
        if not self.is_chat and isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            raise ClientError("one prompt per request")

    def next_submission(self) -> tuple[str, dict[str, Any], str]:
        """(path, body, request id) of the next submission; a second one is prompt + generated tokens as token ids.

        Every submission has its own id: after "recomputed" the engine still holds the state of the old one.
        """
        self.submissions += 1
        request_id = f"{self.request_id}-{self.submissions}"
        if self.submissions == 1:
            return self.path, {**self.body, "return_token_ids": True}, request_id
        body = dict(self.body) if not self.is_chat else {k: self.body[k] for k in _SAMPLING_KEYS if k in self.body}
        body |= {"prompt": self.prompt_token_ids + self.token_ids, "return_token_ids": True, "echo": False}
        limit = self.max_tokens()
        body["max_tokens"] = None if limit is None else limit - len(self.token_ids)
        if self.body.get("min_tokens"):
            body["min_tokens"] = max(0, self.body["min_tokens"] - len(self.token_ids))
        return COMPLETIONS, body, request_id

    def max_tokens(self) -> int | None:
        """Output token limit of the client; None means up to the model length. Completions default to 16 in vLLM."""
        limit = self.body.get("max_completion_tokens") if self.is_chat else None
        if limit is None:
            limit = self.body.get("max_tokens", None if self.is_chat else 16)
        return limit

    def check_resubmission(self, node: Node, max_submissions: int) -> None:
        """Raises NodeError if the request cannot be carried on."""
        stateful = [key for key in _STATEFUL_KEYS if self.body.get(key)]
        if self.is_chat and self.body.get("logprobs"):
            stateful.append("logprobs")
        if stateful:
            reason = f"recomputed a request that cannot be carried on: {', '.join(stateful)}"
            raise NodeError(node.role, node.url, reason)
        if self.submissions >= max_submissions:
            raise NodeError(node.role, node.url, f"recomputed the request {self.submissions} times, giving up")

    def usage(self) -> dict[str, int]:
        prompt, completion = len(self.prompt_token_ids), len(self.token_ids)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def drop_repeated_token(choice: dict[str, Any]) -> None:
    """Removes the repeated last token id (and its logprobs entry) from a "recomputed" choice, and its stop reason."""
    if choice.get("token_ids"):
        choice["token_ids"] = choice["token_ids"][:-1]
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict):
        kept = len(choice.get("token_ids") or ())
        choice["logprobs"] = {k: v[:kept] if isinstance(v, list) else v for k, v in logprobs.items()}
    choice["finish_reason"] = choice["stop_reason"] = None


class PrefillDecodeProxy:
    """The two nodes and the two ways (streamed, whole) to run a Job over them."""

    def __init__(self, prefill: Node, decode: Node, max_submissions: int = 64) -> None:
        self.prefill = prefill
        self.decode = decode
        self.max_submissions = max_submissions
        self.resubmitted = 0

    async def _hand_over(self, path: str, body: dict[str, Any], request_id: str, job: Job) -> dict[str, Any]:
        """Runs the prompt on the prefill node; returns the body for the decode node."""
        prefill_body = {**body, "stream": False, "max_tokens": 1}
        prefill_body["kv_transfer_params"] = {"do_remote_decode": True, "transfer_id": request_id}
        prefill_body.pop("stream_options", None)
        if prefill_body.get("min_tokens"):
            prefill_body["min_tokens"] = 1
        if path == CHAT:
            prefill_body["max_completion_tokens"] = 1
        answer = await self.prefill.post(path, prefill_body, request_id)
        params = answer.get("kv_transfer_params")
        holder = answer if path == CHAT else answer["choices"][0]
        prompt_token_ids = holder.get("prompt_token_ids")
        if not params or prompt_token_ids is None:
            reason = "the answer has no kv_transfer_params or no prompt_token_ids; is kv_role kv_producer set?"
            raise NodeError(self.prefill.role, self.prefill.url, reason)
        if not job.prompt_token_ids:
            job.prompt_token_ids = list(prompt_token_ids)
        return {**body, "kv_transfer_params": params}

    async def complete(self, job: Job) -> dict[str, Any]:
        """The whole answer as one JSON document, however many submissions it took."""
        first: dict[str, Any] = {}
        text = ""
        while True:
            path, body, request_id = job.next_submission()
            body = await self._hand_over(path, body, request_id, job)
            answer = await self.decode.post(path, body, request_id)
            choice = answer["choices"][0]
            recomputed = choice.get("stop_reason") == RECOMPUTED
            if recomputed:
                drop_repeated_token(choice)
            job.token_ids += choice.get("token_ids") or []
            text += (choice["message"]["content"] or "") if path == CHAT else choice["text"]
            if job.submissions == 1:
                first = answer
            else:
                kept = first["choices"][0]
                if kept.get("logprobs") and choice.get("logprobs"):
                    joined = {k: v + choice["logprobs"][k] for k, v in kept["logprobs"].items()}
                    kept["logprobs"] = joined
                kept["finish_reason"], kept["stop_reason"] = choice["finish_reason"], choice.get("stop_reason")
            if not recomputed:
                break
            self.resubmitted += 1
            job.check_resubmission(self.decode, self.max_submissions)
        kept = first["choices"][0]
        if job.submissions > 1:
            if job.is_chat:
                kept["message"]["content"] = text
            else:
                kept["text"] = text
            first["usage"] = {**(first.get("usage") or {}), **job.usage()}
        kept["token_ids"] = job.token_ids if job.wants_token_ids else None
        if not job.wants_token_ids:
            first.pop("prompt_token_ids", None)
            kept.pop("prompt_token_ids", None)
        first["kv_transfer_params"] = None
        return first

    async def stream(self, job: Job) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks for the client: as the decode node sends them, with the seams of re-submissions removed."""
        identity: dict[str, Any] = {}
        while True:
            path, body, request_id = job.next_submission()
            body = await self._hand_over(path, body, request_id, job)
            recomputed = False
            chunks = self.decode.stream(path, body, request_id)
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    identity = identity or {k: chunk[k] for k in ("id", "created", "object", "model") if k in chunk}
                    chunk |= identity
                    for choice in chunk["choices"]:
                        if choice.get("stop_reason") == RECOMPUTED:
                            recomputed = True
                            drop_repeated_token(choice)
                        job.token_ids += choice.get("token_ids") or []
                    if self._for_client(job, path, chunk, recomputed):
                        yield chunk
            if not recomputed:
                return
            self.resubmitted += 1
            job.check_resubmission(self.decode, self.max_submissions)

    @staticmethod
    def _for_client(job: Job, path: str, chunk: dict[str, Any], recomputed: bool) -> bool:
        """Rewrites one chunk in place; False if there is nothing in it for the client."""
        if chunk.get("usage"):
            if recomputed and not chunk["choices"]:
                return False  # the usage chunk of a submission that goes on
            if job.submissions > 1 or recomputed:
                chunk["usage"] = {**chunk["usage"], **job.usage()}
        for choice in chunk["choices"]:
            if job.is_chat and path == COMPLETIONS:
                choice["delta"] = {"content": choice.pop("text")}
            if job.submissions > 1:
                choice.pop("prompt_token_ids", None)
            if not job.wants_token_ids:
                choice.pop("token_ids", None)
                choice.pop("prompt_token_ids", None)
        if not job.wants_token_ids:
            chunk.pop("prompt_token_ids", None)
        if recomputed:
            choice = chunk["choices"][0]
            content = (choice["delta"].get("content") or "") if job.is_chat else choice["text"]
            return bool(content or choice.get("token_ids"))
        return True


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Awaits `work`, cancels it and raises ClientGone when the client closes the connection first."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone
        return worker.result()
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


def error_response(error: Exception) -> Response:
    if isinstance(error, ClientError):
        return JSONResponse(error_body(str(error), 400), 400)
    if isinstance(error, NodeError) and error.is_client_fault:
        return Response(error.body, error.status or 502, media_type="application/json")
    return JSONResponse(error_body(str(error), 502), 502)


def create_app(prefill_url: str, decode_url: str, *, max_submissions: int = 64) -> FastAPI:
    """The ASGI application. Both URLs are roots such as http://127.0.0.1:8000."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # A decode answer may take as long as its tokens take; a node that is down is noticed on connect.
        timeout = httpx.Timeout(None, connect=10)
        # A connection for each request: a node closes idle ones after five seconds, and may do so while a request is on
        # its way.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as client:
            app.state.proxy = PrefillDecodeProxy(
                Node("prefill", prefill_url.rstrip("/"), client),
                Node("decode", decode_url.rstrip("/"), client),
                max_submissions,
            )
            yield

    app = FastAPI(lifespan=lifespan, title="prefill/decode proxy")

    async def serve(request: Request, path: str) -> Response:
        proxy: PrefillDecodeProxy = app.state.proxy
        try:
            body = await request.json()
        except json.JSONDecodeError as error:
            return error_response(ClientError(f"the body is not JSON: {error}"))
        if not isinstance(body, dict):
            return error_response(ClientError("the body is not a JSON object"))
        # The id names a file of the KV connector, so it is never one that a client has chosen.
        job = Job(path, body, uuid.uuid4().hex)
        try:
            job.check()
            if not body.get("stream"):
                return JSONResponse(await until_disconnect(request, proxy.complete(job)))
            chunks = proxy.stream(job)
            # The first chunk decides the status: an error before it is an HTTP error, later ones go into the stream.
            first = await until_disconnect(request, anext(chunks, None))
            if first is None:
                raise NodeError("decode", proxy.decode.url, "the stream held no chunk")
        except ClientGone:
            return Response(status_code=499)
        except (ClientError, NodeError) as error:
            return error_response(error)

        async def events() -> AsyncIterator[str]:
            async with contextlib.aclosing(chunks):
                yield f"data: {json.dumps(first)}\n\n"
                try:
                    async for chunk in chunks:
                        yield f"data: {json.dumps(chunk)}\n\n"
                except NodeError as error:
                    yield f"data: {json.dumps(error_body(str(error), 502))}\n\n"
                yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post(COMPLETIONS)
    async def completions(request: Request) -> Response:
        return await serve(request, COMPLETIONS)

    @app.post(CHAT)
    async def chat_completions(request: Request) -> Response:
        return await serve(request, CHAT)

    @app.get("/v1/models")
    async def models() -> Response:
        node: Node = app.state.proxy.decode
        try:
            response = await node.client.get(node.url + "/v1/models", timeout=10)
        except httpx.HTTPError as error:
            return error_response(NodeError(node.role, node.url, f"{type(error).__name__}: {error}"))
        return Response(response.content, response.status_code, media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        proxy: PrefillDecodeProxy = app.state.proxy
        prefill, decode = await asyncio.gather(proxy.prefill.health(), proxy.decode.health())
        healthy = prefill == decode == "ok"
        state = {"prefill": prefill, "decode": decode, "resubmitted": proxy.resubmitted}
        return JSONResponse(state, 200 if healthy else 503)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Proxy in front of a prefill node and a decode node.")
    parser.add_argument("--prefill", required=True, help="root URL of the kv_producer node")
    parser.add_argument("--decode", required=True, help="root URL of the kv_consumer node")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(create_app(args.prefill, args.decode), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()

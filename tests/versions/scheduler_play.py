# SPDX-License-Identifier: Apache-2.0
"""Stock's recompute scheduler, with the overlay's graph level `uniform` on top and a worker that only keeps books.

`python scheduler_play.py MODEL` plays schedules at random: prompts with KV from elsewhere (between two steps, or within
one) and without, of all lengths up to max_model_len, with and without common beginnings, requests that are given up,
little or enough KV cache, drafts that are right, wrong or too few. It says what happened how often, and the first thing
that was wrong. The scheduler, the KV cache manager and the requests are stock's. The worker knows which token has its
KV at which position of a request, and complains about a step that reads a position with another one, or that is no
uniform decode batch.
"""

from __future__ import annotations

import json
import random
import sys
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from dp_sync_patch.patches import scheduler_bound

MAX_MODEL_LEN, MAX_NUM_SEQS, BLOCK_SIZE = 48, 4, 4
VOCAB = 5  # few enough for a token of no meaning to be right at times


class Wrong(AssertionError):
    """The step could not be a decode graph, or its result would be wrong."""


class PlayConnector(KVConnectorBase_V1):
    """The scheduler's side of a consumer. `remote`: requests whose KV comes, and whether it does between two steps."""

    remote: ClassVar[dict[str, bool]] = {}

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        between = self.remote.get(request.request_id)
        if between is None or request.num_computed_tokens:
            return 0, False
        count = request.num_tokens if between else request.num_tokens - 1
        return max(count - num_computed_tokens, 0), between and count > num_computed_tokens

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            del self.remote[request.request_id]

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def start_load_kv(self, *_: Any, **__: Any) -> None: ...

    def wait_for_layer_load(self, *_: Any) -> None: ...

    def save_kv_layer(self, *_: Any, **__: Any) -> None: ...

    def wait_for_save(self) -> None: ...


def next_token(tokens: list[int]) -> int:
    """The target model."""
    return hash(tuple(tokens)) % VOCAB


@dataclass
class Sequence:
    """What the worker knows of a request."""

    prompt: list[int]
    tokens: list[int]  # prompt and output, known on the device at once
    kv: dict[int, int] = field(default_factory=dict)  # position -> token
    drafts: list[int] = field(default_factory=list)  # for its next step
    # Behind the accepted tokens of its last step, if that had drafts, as the worker of 0.23.0 counts: the number from
    # the host is too high then.
    placed: int | None = None


class Play:
    """One scheduler with its worker."""

    def __init__(self, config: Any, query_len: int, seed: int, make_uniform: Callable[[Any, int], None]) -> None:
        self.random = random.Random(seed)
        self.query_len = query_len
        self.asynchronous = config.scheduler_config.async_scheduling
        few = self.random.random() < 0.3
        blocks = 1 + (self.random.randint(16, 28) if few else 128)
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float16)
        config.cache_config.num_gpu_blocks = blocks
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
        )
        make_uniform(self.scheduler, query_len)
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self.sequences: dict[str, Sequence] = {}
        self.requests: dict[str, Request] = {}
        self.last_step: set[str] = set()
        self.loading: set[str] = set()  # requests whose KV is on its way here
        self.received: set[str] = set()
        self.handed_back: set[str] = set()
        self.happened: Counter[str] = Counter()
        self.beginning = [self.random.randrange(VOCAB) for _ in range(MAX_MODEL_LEN)]

    def run(self, *, grammar: bool) -> None:
        """To the end of all requests. Raises Wrong."""
        self.grammar = grammar
        waiting = self.random.randint(1, 10)
        in_flight: list[tuple[Any, ModelRunnerOutput]] = []
        for _ in range(2000):
            if waiting and self.random.random() < 0.4:
                waiting -= 1
                self.arrive()
            if self.random.random() < 0.02:
                self.give_up()
            if not waiting and not in_flight and not self.scheduler.has_requests():
                break
            output = self.scheduler.schedule()
            in_flight.append((output, self.execute(output)))
            ahead = self.asynchronous if output.total_num_scheduled_tokens else 0
            while len(in_flight) > ahead:
                self.update(*in_flight.pop(0))
        else:
            unfinished = [
                f"{name} {one.status.name}, {one.num_computed_tokens} of {one.num_tokens} computed"
                for name, one in self.scheduler.requests.items()
            ]
            raise Wrong(f"never ends: {unfinished}")
        for name, request in self.requests.items():
            self.judge(name, request)

    def arrive(self) -> None:
        name = str(len(self.requests))
        draw = self.random
        length = draw.choice(
            (draw.randint(1, 8), draw.randint(1, MAX_MODEL_LEN - 1), MAX_MODEL_LEN - draw.randint(1, 6))
        )
        common = draw.choice((0, length))
        prompt = self.beginning[:common] + [draw.randrange(VOCAB) for _ in range(length - common)]
        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(max_tokens=draw.choice((1, 2, 5, 20, MAX_MODEL_LEN)), ignore_eos=True),
            pooling_params=None,
            block_hasher=self.hasher,
        )
        kind = draw.choice((None, True, True, False))
        if kind is not None:
            PlayConnector.remote[name] = kind
        self.happened[{None: "without remote KV", True: "KV between steps", False: "KV within a step"}[kind]] += 1
        self.sequences[name] = Sequence(prompt, list(prompt))
        self.requests[name] = request
        self.scheduler.add_request(request)

    def give_up(self) -> None:
        from vllm.v1.request import RequestStatus

        if alive := sorted(self.scheduler.requests):
            self.scheduler.finish_requests(self.random.choice(alive), RequestStatus.FINISHED_ABORTED)
            self.happened["given up"] += 1

    def execute(self, output: Any) -> ModelRunnerOutput:
        """One step of the worker."""
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for name, count in computed.items():
            self.happened["hits"] += name not in self.received and 0 < count < len(self.sequences[name].prompt) - 1
            # What a cache of the node has of it, or comes within this step.
            self.sequences[name].kv |= dict(enumerate(self.sequences[name].prompt[:count]))
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sampled = []
        for name, count in output.num_scheduled_tokens.items():
            drafts = output.scheduled_spec_decode_tokens.get(name, [])
            sampled.append(self._compute(name, computed[name], count, drafts))
        self.happened["steps"] += bool(sampled)
        self.last_step = set(output.num_scheduled_tokens)
        for name, request in self.scheduler.requests.items():
            if request.status.name == "WAITING_FOR_REMOTE_KVS" and name not in self.received:
                self.loading.add(name)
        received = {name for name in sorted(self.loading) if self.random.random() < 0.5}
        self.loading -= received
        self.received |= received
        for name in received:
            sequence = self.sequences[name]
            sequence.kv |= dict(enumerate(sequence.prompt))
        names = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=KVConnectorOutput(finished_recving=received),
        )

    def _compute(self, name: str, computed: int, count: int, drafts: list[int]) -> list[int]:
        sequence = self.sequences[name]
        follows = self.asynchronous and name in self.last_step
        if follows and sequence.placed is not None:
            computed = sequence.placed
            if drafts and sequence.drafts:
                drafts = [*sequence.drafts, *drafts[len(sequence.drafts) :]][: len(drafts)]
        if count != self.query_len:
            raise Wrong(f"{count} tokens of request {name}, {computed} computed of {len(sequence.tokens)}")
        known = len(sequence.tokens)
        output_in_flight = follows and known > len(sequence.prompt)
        if output_in_flight and count - len(drafts) != 1:
            raise Wrong(f"request {name} needs tokens that are still on their way to the host")
        if computed + count > MAX_MODEL_LEN or computed + count - len(drafts) > known:
            raise Wrong(f"request {name} goes beyond: {computed} + {count}, {len(drafts)} drafts, {known} known")
        given = [*sequence.tokens[computed:known], *drafts][:count]
        room = len(self.scheduler.kv_cache_manager.get_block_ids(name)[0]) * BLOCK_SIZE
        if computed + count > room:
            raise Wrong(f"request {name} has blocks for {room} tokens, and computes up to {computed + count}")
        sequence.kv |= {computed + place: token for place, token in enumerate(given)}
        sequence.placed, sequence.drafts = None, []
        if computed + count < known:
            self.happened["pieces"] += 1
            return []
        if computed + count - len(drafts) != known:
            raise Wrong(f"request {name} is sampled at {computed + count - len(drafts)}, {known} known")
        if wrong := [place for place in range(known) if sequence.kv.get(place) != sequence.tokens[place]]:
            raise Wrong(f"request {name} reads KV of other tokens at {wrong}, {computed} + {count}")
        made = []
        for draft in (*drafts, None):
            made.append(next_token(sequence.tokens))
            sequence.tokens.append(made[-1])
            if draft != made[-1]:
                break
        if drafts:
            sequence.placed = computed + len(made)
        self.happened["accepted"] += len(made) - 1
        self.happened["filled"] += bool(drafts) and not follows
        sequence.drafts = self._propose(sequence.tokens)
        return made

    def _propose(self, tokens: list[int]) -> list[int]:
        right = self.random.randint(0, self.query_len - 1)
        guess = list(tokens)
        for place in range(self.query_len - 1):
            guess.append(next_token(guess) if place < right else self.random.randrange(VOCAB))
        return guess[len(tokens) :]

    def update(self, output: Any, result: ModelRunnerOutput) -> None:
        before = set(self.scheduler.requests)
        self.scheduler.update_from_output(output, result)
        for request in getattr(output, "recomputed_reqs", None) or ():
            self.happened["handed back"] += 1
            self.handed_back.add(request.request_id)
        self.happened["finished"] += len(before - set(self.scheduler.requests))
        if not self.asynchronous and result.req_ids:
            drafts = [self.sequences[name].drafts for name in result.req_ids]
            if self.grammar:
                drafts = [some[: self.random.randint(0, len(some))] for some in drafts]
            self.scheduler.update_draft_token_ids(DraftTokenIds(result.req_ids, drafts))

    def judge(self, name: str, request: Request) -> None:
        """The answer: what the target model says, and as much of it as stock gives."""
        if name not in self.handed_back and not request.is_finished():
            raise Wrong(f"request {name} is {request.status.name} at the end")
        tokens = list(self.sequences[name].prompt)
        for _ in request.output_token_ids:
            tokens.append(next_token(tokens))
        if list(request.all_token_ids) != tokens:
            raise Wrong(f"request {name} got {list(request.all_token_ids)} instead of {tokens}")
        expected = min(request.max_tokens, MAX_MODEL_LEN - request.num_prompt_tokens)
        if request.status.name == "FINISHED_LENGTH_CAPPED" and request.num_output_tokens != expected:
            raise Wrong(f"request {name} got {request.num_output_tokens} tokens instead of {expected}")
        self.happened["ended at max_model_len"] += request.num_tokens == MAX_MODEL_LEN


def configuration(model: str, drafts: int, asynchronous: bool) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    transfer = {"kv_connector": "PlayConnector", "kv_connector_module_path": __name__, "kv_role": "kv_consumer"}
    words = [
        *("--model", model, "--data-parallel-size", "2", "--enable-expert-parallel", "--enforce-eager"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-batched-tokens", "15"),
        *(
            "--enable-prefix-caching",
            "--skip-tokenizer-init",
            "--async-scheduling" if asynchronous else "--no-async-scheduling",
        ),
        *("--kv-transfer-config", json.dumps(transfer)),
        *("--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": drafts})),
        *("--additional-config", json.dumps({"recompute_scheduler_enable": True})),
    ]
    args = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words)
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


def changed(old: str, new: str) -> Callable[[Any, int], None]:
    """`make_uniform` of an overlay with this one difference."""
    path = Path(str(scheduler_bound.__file__))
    text = path.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{old!r} is {text.count(old)} times in {path}")
    module = types.ModuleType("changed_scheduler_bound")
    exec(compile(text.replace(old, new), str(path), "exec"), vars(module))
    make_uniform: Callable[[Any, int], None] = module.make_uniform
    return make_uniform


def answer(question: dict[str, Any], config: Any) -> dict[str, Any]:
    """Plays until something is wrong, or to the last seed."""
    make_uniform: Callable[[Any, int], None] = scheduler_bound.make_uniform
    if question.get("stock"):
        make_uniform = lambda scheduler, query_len: None  # noqa: E731
    elif "change" in question:
        make_uniform = changed(*question["change"])
    happened: Counter[str] = Counter()
    for seed in range(question["seeds"]):
        PlayConnector.remote.clear()
        play = Play(config, 1 + question["drafts"], seed, make_uniform)
        try:
            play.run(grammar=question.get("grammar", False))
        except AssertionError as error:  # ours, or one of stock's own
            return {"wrong": f"seed {seed}: {type(error).__name__} {error}", **happened}
        happened += play.happened
    return {"wrong": "", **happened}


def main(model: str) -> None:
    """Questions on stdin (drafts, asynchronous, seeds; grammar, stock, change), answers on stdout, as JSON."""
    init_none_hash(sha256)
    configurations: dict[tuple[int, bool], Any] = {}
    answers = []
    for question in json.load(sys.stdin):
        kind = question["drafts"], question["asynchronous"]
        if kind not in configurations:
            configurations[kind] = configuration(model, *kind)
        answers.append(answer(question, configurations[kind]))
    print("\n" + json.dumps(answers))


if __name__ == "__main__":
    # As a module of its name, which the connector is found by.
    sys.path.insert(0, str(Path(__file__).parent))
    import scheduler_play

    scheduler_play.main(sys.argv[1])

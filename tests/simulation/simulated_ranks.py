# SPDX-License-Identifier: Apache-2.0
"""DP ranks of a decode node in lockstep, without processes and devices: thousands of schedules in seconds.

What decides here is the overlay itself: `make_plan`, `agreement.decide`, `runtime.settle`, the wrappers around the sync
functions, the selector, the MC2 arguments and the drafts, and what an engine puts on its scheduler. What they wrap is a
model of stock, written down from its behaviour: the scheduler's step, the dummy of an idle rank, padding to graphs, the
choice of the method, the draft passes, and vLLM's vote on going on. The graph dispatcher is vLLM's own. tests/versions
runs the same wrappers on stock itself.

A step of a rank is the list of what it does together with others. A step is in order when these lists can meet: the
same operators in the same order, with arguments that the operator documentation allows together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from dp_sync_patch import agreement, runtime, settings
from dp_sync_patch.agreement import Verdict
from dp_sync_patch.errors import AgreementError, MC2OnlyError
from dp_sync_patch.facts import Facts
from dp_sync_patch.patches import comm_selector, draft_passes, graph_mode, mc2_arguments, metadata_sync, scheduler_bound
from dp_sync_patch.plan import OPERATOR_LIMIT, Plan, Sizes, State, concerns, make_plan

VOTE_EVERY = 4  # steps; 32 in vLLM
MAX_MODEL_LEN = 64
# Steps after the last arrival by which every request must have ended.
_DRAINED = 300
# A collective over DP ranks whose shape is the rank's own token count, by the option that brings it.
_GATHERS = (
    *("mlp_tensor_parallel", "embedding_tensor_parallel", "sequence_parallel", "flashcomm2", "shared_expert_dp"),
    *("lmhead_tensor_parallel_size", "oproj_tensor_parallel_size"),
)
_DBO_FROM = 4  # tokens from which a batch is split in two


class Violation(AssertionError):
    """Ranks that wait for each other for ever, a call that gives wrong results, or a request that is never computed."""


@dataclass(frozen=True)
class Behaviour:
    """How a stock version differs from others in what a step does together with other ranks."""

    own_skip: bool
    drafts_stop_after_prefill: bool  # then a batch with prefill makes one draft pass only
    prompts_are_not_uniform: bool = False  # with drafts: the first piece of one, as long as a decode step
    drafts_at_once: bool = False  # a request from the prefill node has some in its first step
    drafts_in_full_graphs: str = ""  # "batch": where it is a uniform one; "target": where the target pass is in one


STOCK = {
    "0.11.0": Behaviour(own_skip=False, drafts_stop_after_prefill=True),
    "0.13.0": Behaviour(own_skip=True, drafts_stop_after_prefill=True, drafts_in_full_graphs="batch"),
    "0.18.0": Behaviour(
        own_skip=True,
        drafts_stop_after_prefill=False,
        prompts_are_not_uniform=True,
        drafts_at_once=True,
        drafts_in_full_graphs="target",
    ),
}
STOCK["0.23.0"] = STOCK["0.18.0"]  # in what is simulated here; the overlay offers more on it, see stock.Stock


@dataclass(frozen=True)
class Node:
    """One deployment, rank by rank; `overlay`: whether it is loaded."""

    facts: tuple[Facts, ...]
    overlay: tuple[bool, ...]
    modes: tuple[str, ...]  # this setting of each rank
    graph_mode: str  # this setting

    @property
    def behaviour(self) -> Behaviour:
        return STOCK[self.facts[0].stock_version]


def node(
    facts: Facts,
    changed: dict[int, Facts] | None = None,
    *,
    without: Iterable[int] = (),
    off: Iterable[int] = (),
    graph_mode: str = "refuse",
) -> Node:
    """`changed`: ranks that have been configured otherwise; `without`: those that have no overlay; `off`: mode=off."""
    ranks = range(facts.data_parallel_size)
    return Node(
        tuple((changed or {}).get(rank, facts) for rank in ranks),
        tuple(rank not in set(without) for rank in ranks),
        tuple("off" if rank in set(off) else "auto" for rank in ranks),
        graph_mode,
    )


class DictStore:
    """The store of one start-up."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str, /) -> None:
        with self._lock:
            self._values[key] = value

    def get(self, key: str, /) -> bytes:
        return self._values[key].encode()

    def check(self, keys: list[str], /) -> bool:
        return all(key in self._values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        with self._lock:
            if self._values.get(key, "") == expected:
                self._values[key] = desired
            return self._values[key].encode()


@dataclass(frozen=True)
class Decision:
    """What one rank has latched; a rank without the overlay has none."""

    facts: Facts
    plan: Plan
    state: State
    verdict: Verdict | None
    rank: int


def start(deployment: Node) -> list[Decision | None]:
    """The start-up of all ranks. Raises AgreementError where one of them ends there."""
    store = DictStore()
    size = len(deployment.facts)
    # Whoever is missing is waited for in vain.
    timeouts = {"timeout_s": 30.0 if all(deployment.overlay) else 0.5, "grace_s": 0.5}
    found: list[Decision | AgreementError | None] = [None] * size

    def begin(rank: int) -> None:
        facts = deployment.facts[rank]
        given = {"mode": deployment.modes[rank], "graph_mode": deployment.graph_mode}
        configured = settings.load(SimpleNamespace(kv_transfer_config=None, additional_config={"dp_sync_patch": given}))
        plan = make_plan(facts, configured.mode, graph_mode=configured.graph_mode)
        verdict = None
        if concerns(facts):
            record = runtime._record(configured, facts, plan)
            verdict = agreement.decide(store, record, round_name="start-1", rank=rank, world_size=size, **timeouts)
        try:
            state = runtime.settle(plan.state, verdict, own_skip=deployment.behaviour.own_skip)
            found[rank] = Decision(facts, plan, state, verdict, rank)
        except AgreementError as error:
            found[rank] = error

    threads = [threading.Thread(target=begin, args=(rank,)) for rank in range(size) if deployment.overlay[rank]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, AgreementError):
            raise one
    return [one for one in found if not isinstance(one, AgreementError)]


@dataclass(eq=False)
class Request:
    """Named as in vLLM where the overlay looks at it."""

    num_tokens: int  # of the prompt and the output so far
    num_computed_tokens: int  # of them with KV
    left: int  # tokens to generate
    spec_token_ids: list[int] = field(default_factory=list)  # proposed for the next step
    num_output_placeholders: int = 0
    request_id: str = ""
    use_structured_output: bool = False

    @property
    def num_tokens_with_spec(self) -> int:
        return self.num_tokens + len(self.spec_token_ids)

    @property
    def prefilling(self) -> bool:
        return self.num_tokens - self.num_computed_tokens > 1


# What happens on one rank before one of its steps: the requests that come, or what becomes of those it has.
ARRIVALS: dict[str, Callable[[Facts], list[Request]]] = {
    "nothing": lambda facts: [],
    # The KV of all tokens but the last has come from the prefill node; no drafts yet.
    "hand-off": lambda facts: [Request(9, 8, 3)],
    "full house": lambda facts: [Request(9, 8, 2) for _ in range(facts.max_num_seqs)],
    # Without remote KV: as long as a decode step with drafts, in a step that fits, and in one that does not.
    "one token": lambda facts: [Request(1, 0, 2)],
    "short prompt": lambda facts: [Request(3, 0, 2)],
    "long prompt": lambda facts: [Request(MAX_MODEL_LEN - 8, 0, 2)],
    # No room for all drafts.
    "tail": lambda facts: [Request(MAX_MODEL_LEN - 2, MAX_MODEL_LEN - 3, 2)],
    "preemption": lambda facts: [],
}


@dataclass(eq=False)
class Scheduler:
    """vLLM's, with a budget of tokens in each step; vllm-ascend's hands a preempted request back."""

    facts: Facts
    max_num_scheduled_tokens: int
    drafts_at_once: bool  # a request has some in its first step, if there is room
    scheduler_config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(long_prefill_token_threshold=0))
    running: list[Request] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    max_model_len: int = MAX_MODEL_LEN

    def __post_init__(self) -> None:
        self.num_spec_tokens = self.facts.num_speculative_tokens
        # KV comes between two steps here.
        self.connector = SimpleNamespace(get_num_new_matched_tokens=None, update_state_after_alloc=None)

    @property
    def unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def arrive(self, kind: str) -> None:
        for request in ARRIVALS[kind](self.facts):
            self.add_request(request)
            if request.num_computed_tokens:
                self._update_waiting_for_remote_kv(request)
        if kind == "preemption" and self.running:
            preempted = self.running.pop()
            if not (self.facts.recompute_in_effect and self.facts.kv_role == "kv_consumer"):
                preempted.num_computed_tokens = 0
                preempted.spec_token_ids = []
                self.waiting.insert(0, preempted)

    def add_request(self, request: Request) -> None:
        if self.drafts_at_once and self.max_model_len >= request.num_tokens + self.num_spec_tokens:
            request.spec_token_ids = [-1] * self.num_spec_tokens
        self.waiting.append(request)

    def _update_waiting_for_remote_kv(self, request: Request) -> None:
        pass

    def schedule(self) -> SimpleNamespace:
        """`requests` of this step, and the tokens of each; `num_scheduled_tokens` is for the overlay."""
        # A scheduler that is not known may do as it likes.
        budget = self.max_num_scheduled_tokens if self.facts.scheduler_known else 2**31
        limit = self.scheduler_config.long_prefill_token_threshold or 2**31
        step = []
        for request in (*self.running, *self.waiting):
            if request not in self.running and len(self.running) == self.facts.max_num_seqs:
                break
            wanted = request.num_tokens - request.num_computed_tokens
            room = self.max_model_len - 1 - request.num_computed_tokens
            tokens = min(wanted + len(request.spec_token_ids), limit, budget, room)
            if tokens < wanted and not self.facts.splits_prompts:
                break
            if tokens == 0:
                break
            if request not in self.running:
                self.running.append(request)
            step.append((request, tokens))
            budget -= tokens
        self.waiting = [request for request in self.waiting if request not in self.running]
        for request, _ in step:
            request.spec_token_ids = []
        # Without async scheduling nothing is ever on its way.
        return SimpleNamespace(requests=step, num_scheduled_tokens={}, scheduled_spec_decode_tokens={})

    def update(self, step: list[tuple[Request, int]], accepted: int) -> None:
        """After a step; of its drafts, `accepted` are right, as far as there are so many."""
        for request, tokens in step:
            wanted = request.num_tokens - request.num_computed_tokens
            request.num_computed_tokens += min(tokens, wanted)
            if tokens < wanted:
                continue
            made = 1 + min(accepted, tokens - wanted)
            request.num_computed_tokens += made - 1
            request.num_tokens += made
            request.left -= made
            request.spec_token_ids = [0] * self.num_spec_tokens
            if request.left <= 0 or request.num_tokens >= self.max_model_len:
                self.running.remove(request)


@dataclass(eq=False)
class Rank:
    """One DP rank: engine and worker. Methods named as in stock 0.11.0 where the overlay wraps them."""

    behaviour: Behaviour
    facts: Facts
    decision: Decision | None  # None: no overlay
    rank: int
    events: list[tuple[Any, ...]] = field(default_factory=list)
    peers: list[tuple[int, bool]] = field(default_factory=list)  # token count and with_prefill of all ranks
    modes: list[int] = field(default_factory=list)  # graph mode of all ranks

    def __post_init__(self) -> None:
        self.with_prefill = False
        self.num_speculative_tokens = self.facts.num_speculative_tokens
        self.decode_token_per_req = 1 + self.num_speculative_tokens
        self.dp_size = self.facts.data_parallel_size
        self.dp_rank = self.rank
        self.runner = self  # that of the proposer
        self.use_aclgraph = self.facts.graph_mode != "NONE"
        sizes = self.skip_sizes
        captures = sizes.capture_sizes if sizes else self.facts.capture_sizes
        self.aclgraph_batch_sizes = sorted(captures) if self.use_aclgraph else []
        self.capacity = sizes.bound if sizes else self.facts.mc2_tokens_capacity
        self.vllm_config = SimpleNamespace(pad_for_cudagraph=self.pad)
        self.graphs = self._graphs()
        if self.behaviour.own_skip:
            self.cudagraph_dispatcher = SimpleNamespace(
                dispatch=lambda num_tokens, uniform_decode: self.dispatch(
                    BatchDescriptor(self.pad(num_tokens), uniform_decode)
                )
            )
        else:
            self.aclgraph_dispatcher = SimpleNamespace(dispatch=self.dispatch)
        self.speculative_config = self.num_speculative_tokens or None
        self.uniform_decode_query_len = self.decode_token_per_req
        self.scheduler = Scheduler(
            self.facts, self.facts.max_num_batched_tokens, drafts_at_once=self.behaviour.drafts_at_once
        )
        self.dispatcher = SimpleNamespace(need_expert_scale=bool(self.facts.hierarchy), ep_rank_id=self.rank)
        # Latched where the dispatchers are built.
        self.latched_skip = self.behaviour.own_skip and self.should_skip()

    @property
    def input_batch(self) -> SimpleNamespace:
        computed = np.array([request.num_computed_tokens for request, _ in self.step])
        return SimpleNamespace(num_reqs=len(self.step), num_computed_tokens_cpu=computed)

    @property
    def query_start_loc(self) -> SimpleNamespace:
        return SimpleNamespace(np=np.cumsum([0, *(count for _, count in self.step)]))

    @property
    def skip_sizes(self) -> Sizes | None:
        return self.decision.plan.sizes if self.decision and self.decision.state is State.SKIP else None

    def wrapped(self, wrapper: Callable[..., Any], stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`stock` as this rank has it: with the overlay's wrapper, or without."""
        if self.decision is None:
            return stock(*args, **kwargs)
        global _acting
        _acting = self
        runtime.skip_sizes = self.skip_sizes
        runtime.sync_graph_mode = self.decision.plan.graph_level == "sync"
        runtime.uniform_batches = self.decision.plan.graph_level == "uniform"
        runtime._runner = self
        runtime._latched = self.decision  # type: ignore[assignment]  # it has what is read here
        return wrapper(stock, self, args, kwargs)

    def pad(self, num_tokens: int) -> int:
        """To the smallest graph that is large enough."""
        return next((size for size in self.aclgraph_batch_sizes if size >= num_tokens), num_tokens)

    def bind(self) -> None:
        """What the engine does with the answer of its worker."""
        plan = self.wrapped(lambda *_: runtime.plan_in_force(None), lambda: None)
        if plan is not None:
            scheduler_bound.keep_to(self.scheduler, plan, self.rank)

    # A step: its tokens first, so that the all_reduce of any rank has an answer, then its graph mode, for the same
    # reason, then the target and the drafts.

    def begin(self) -> tuple[int, bool]:
        self.step = self.scheduler.schedule().requests
        self.events = []
        tokens = sum(count for _, count in self.step)
        self.uniform = all(count == self.decode_token_per_req for _, count in self.step)
        if self.behaviour.prompts_are_not_uniform and self.num_speculative_tokens:
            self.uniform = self.uniform and all(request.num_computed_tokens for request, _ in self.step)
        prefill = any(request.prefilling for request, _ in self.step)
        if not tokens:
            return self.decode_token_per_req, False  # the dummy of an idle rank
        return self.pad(tokens), prefill

    def synchronise(self, num_tokens: int, prefill: bool) -> int:
        self.tokens, self.with_prefill = self.synchronised("target", num_tokens, prefill)
        mode: int = self.graphs.dispatch(BatchDescriptor(self.tokens, self.uniform))[0].value
        return mode

    def target(self) -> None:
        if self.step:
            counts = {number: count for number, (_, count) in enumerate(self.step)}
            output = SimpleNamespace(num_scheduled_tokens=counts, total_num_scheduled_tokens=sum(counts.values()))
            self.wrapped(graph_mode.post_graph_mode, lambda _: None, output)
        self.mode, _ = self.dispatch(BatchDescriptor(self.tokens, self.uniform))
        if self.behaviour.own_skip:
            # The mode in the metadata sync, and what stock does by it.
            own = self.mode.value
            *_, common = self.wrapped(graph_mode.agree_in_metadata, lambda _: (self.tokens, None, own), self.tokens)
            self.mode = CUDAGraphMode(common)
        self.forward("target", self.tokens, self.mode != CUDAGraphMode.NONE)
        for attribute in _GATHERS:
            if getattr(self.facts, attribute) not in ("", 1):
                self.events.append(("gather", attribute, self.tokens))

    def drafts(self, num_tokens: int, prefill: bool) -> None:
        if not self.facts.num_speculative_tokens:
            return
        if self.step and self.behaviour.own_skip:
            self._propose(num_tokens, prefill)  # not patched there
        elif self.step:
            self.wrapped(draft_passes.level_draft_passes, self._propose, num_tokens, prefill)
        else:
            self.dummy_run(num_tokens, aclgraph_runtime_mode=self.mode)

    def _propose(self, num_tokens: int, prefill: bool) -> None:
        tokens, with_prefill = self.synchronised("drafts", num_tokens, prefill)
        stop = with_prefill and self.behaviour.drafts_stop_after_prefill
        full = {"batch": self.uniform, "target": self.mode == CUDAGraphMode.FULL}
        mode, _ = self.dispatch(BatchDescriptor(tokens, full.get(self.behaviour.drafts_in_full_graphs, False)))
        for _ in range(1 if stop else self.num_speculative_tokens):
            self.forward("draft", tokens, self.drafts_in_graph(mode))

    def dummy_run(self, num_tokens: int, aclgraph_runtime_mode: CUDAGraphMode, **_: Any) -> None:
        tokens, with_prefill = self.synchronised("drafts", num_tokens, False)
        # The idle rank of 0.13.0 does not ask for the flag; 0.11.0 and 0.13.0 both run all passes but for it.
        stop = with_prefill and self.behaviour.drafts_stop_after_prefill
        for _ in range(1 if stop else self.num_speculative_tokens):
            self.forward("draft", tokens, self.drafts_in_graph(aclgraph_runtime_mode))

    def drafts_in_graph(self, mode: CUDAGraphMode) -> bool:
        return mode != CUDAGraphMode.NONE if self.behaviour.drafts_in_full_graphs else mode == CUDAGraphMode.PIECEWISE

    def dispatch(self, descriptor: BatchDescriptor) -> Any:
        """Of the graph dispatcher."""
        if self.behaviour.own_skip:
            tokens, uniform = descriptor.num_tokens, descriptor.uniform_decode
            stock = lambda num_tokens, uniform_decode: self.graphs.dispatch(BatchDescriptor(num_tokens, uniform_decode))  # noqa: E731
            return self.wrapped(graph_mode.expect_full_graph, stock, num_tokens=tokens, uniform_decode=uniform)
        return self.wrapped(
            lambda wrapped, _, args, kwargs: graph_mode.agree_on_graph_mode(wrapped, self.graphs, args, kwargs),
            self.graphs.dispatch,
            descriptor,
        )

    def _graphs(self) -> CudagraphDispatcher:
        """vLLM's own, with what it reads of the configuration."""
        graphs = CudagraphDispatcher.__new__(CudagraphDispatcher)
        graphs.compilation_config = SimpleNamespace(cudagraph_capture_sizes=self.aclgraph_batch_sizes)
        graphs.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=self.facts.max_num_seqs))
        graphs.cudagraph_keys = {CUDAGraphMode.PIECEWISE: set(), CUDAGraphMode.FULL: set()}
        graphs.initialize_cudagraph_keys(CUDAGraphMode[self.facts.graph_mode], self.decode_token_per_req)
        return graphs

    def synchronised(self, phase: str, num_tokens: int, prefill: bool) -> tuple[int, bool]:
        """`_sync_metadata_across_dp`."""
        if self.behaviour.own_skip:

            def sync(num_tokens: int, with_prefill: bool) -> tuple[Any, ...]:
                if self.should_skip():
                    return num_tokens, torch.full((self.dp_size,), num_tokens, dtype=torch.int32), with_prefill
                return self.all_reduce(phase)

            result = self.wrapped(metadata_sync.count_pass, sync, num_tokens, prefill)
        else:
            stock = lambda *_: self.all_reduce(phase)  # noqa: E731
            result = self.wrapped(metadata_sync.skip_all_reduce, stock, num_tokens, prefill, False)
        return result[0], result[2]

    def should_skip(self) -> bool:
        decided: bool = self.wrapped(
            lambda stock, _, args, kwargs: metadata_sync.decide_skip(stock, None, args, kwargs),
            self._stock_should_skip,
            None,
        )
        return decided

    def _stock_should_skip(self, _vllm_config: Any) -> bool:
        """By decode batches alone, for any consumer; blind to hierarchy, to local prefill and to the graph mode."""
        facts = self.facts
        potential = min(facts.max_num_seqs * self.decode_token_per_req, 512)
        return facts.kv_role in ("kv_consumer", "kv_both") and potential <= facts.mc2_tokens_capacity

    def all_reduce(self, phase: str) -> tuple[Any, ...]:
        self.events.append(("all_reduce", phase))
        tokens = max(count for count, _ in self.peers)
        prefill = any(flag for _, flag in self.peers)
        return tokens, torch.full((self.dp_size,), tokens, dtype=torch.int32), prefill, False

    def forward(self, name: str, num_tokens: int, in_graph: bool) -> None:
        """The MoE layers of one pass, as one."""
        method = self.wrapped(comm_selector.assert_mc2, self._select, num_tokens)
        rows = -(-num_tokens // self.facts.tensor_parallel_size)
        parts = 2 if self.facts.dbo and num_tokens >= _DBO_FROM else 1
        for _ in range(parts):
            if method.name == "MC2":
                arguments = self.wrapped(self._fixed, self._mc2_arguments, rows)
                mask = "x_active_mask" in arguments
                how = "graph" if in_graph else "eager"
                self.events.append(("MC2", name, rows, arguments["global_bs"], mask, how))
            else:
                self.events.append((method.name, name, rows))

    def _fixed(self, stock: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = (*args, None, None, None, "mask")  # the mask is the fifth argument of 0.12.0rc1 and 0.13.0
        return mc2_arguments.fix_dispatch_arguments(lambda rows, *_: stock(rows), self.dispatcher, given, kwargs)

    def _mc2_arguments(self, rows: int) -> dict[str, Any]:
        arguments = {"x": SimpleNamespace(shape=(rows,)), "global_bs": 0, "x_active_mask": "mask"}
        if self.latched_skip or self.facts.stock_version == "0.13.0":
            arguments["global_bs"] = self.capacity // self.facts.tensor_parallel_size * self.facts.ep_world_size
            del arguments["x_active_mask"]
        return arguments

    def _select(self, num_tokens: int) -> Any:
        facts = self.facts
        crowded = facts.a2_max_local_experts and facts.num_experts // facts.ep_world_size > facts.a2_max_local_experts
        if not facts.enable_expert_parallel or facts.soc not in OPERATOR_LIMIT:
            name = "ALLGATHER"
        elif facts.model_without_mc2:
            name = "ALLTOALL"
        elif facts.soc == "A2":
            fits = facts.ep_world_size * facts.pipeline_parallel_size >= 16 and not crowded
            name = "MC2" if fits and num_tokens <= self.capacity else "ALLGATHER"
        else:
            name = "MC2" if num_tokens <= self.capacity else "ALLTOALL"
        return SimpleNamespace(name=name)


_acting: Rank  # whose wrapper runs


def post(mode: int) -> Any:
    """In place of the all_reduce of the graph mode."""
    _acting.events.append(("all_reduce", "mode"))
    return SimpleNamespace(mode=mode, lowest=min(_acting.modes), work=SimpleNamespace(wait=lambda: None))


def judge(ranks: Sequence[Rank]) -> None:
    """Whether what the ranks did in one step, or in one pass before the first, can meet. Raises Violation."""
    for number, together in enumerate(zip(*(rank.events for rank in ranks), strict=False)):
        kinds = {event[:2] if event[0] in ("gather", "all_reduce") else event[0] for event in together}
        where = f"operator {number} of the step: {together}"
        if len(kinds) > 1:
            raise Violation(f"ranks wait for each other in different operators, {where}")
        kind = together[0][0]
        if kind in ("gather", "ALLGATHER") and len({event[2] for event in together}) > 1:
            raise Violation(f"a gather of different shapes, {where}")
        if kind == "MC2":
            _judge_mc2(ranks[0].facts, together, where)
    if len({len(rank.events) for rank in ranks}) > 1:
        raise Violation(f"a rank waits for one that has ended its step: {[len(rank.events) for rank in ranks]}")


def _judge_mc2(facts: Facts, together: Sequence[tuple[Any, ...]], where: str) -> None:
    """The operator's contract over all ranks of one call."""
    _, _, rows, global_bs, mask, mode = zip(*together, strict=True)
    if len(set(global_bs)) > 1:
        raise Violation(f"global_bs differs, {where}")
    unequal = len(set(rows)) > 1
    if unequal and (global_bs[0] == 0 or any(mask)):
        raise Violation(f"different row counts need a global_bs and no mask, {where}")
    if facts.hierarchy and (unequal or global_bs[0]):
        raise Violation(f"hierarchical MC2 takes equal row counts and global_bs=0 only, {where}")
    if global_bs[0] and max(rows) * facts.ep_world_size > global_bs[0]:
        raise Violation(f"more rows than global_bs has room for, {where}")
    if max(rows) > OPERATOR_LIMIT[facts.soc]:
        raise Violation(f"more rows than the operator takes, {where}")
    if len(set(mode)) > 1:
        raise Violation(f"graph and eager in one call, {where}")


@dataclass(frozen=True)
class Outcome:
    steps: int
    all_reduces: int  # of one rank, of the DP metadata
    mode_syncs: int  # of one rank, of the graph mode
    eager: int  # MC2 calls of one rank that are not in a graph
    ragged: int  # MC2 calls with different row counts


def serve(deployment: Node, decisions: Sequence[Decision | None], schedule: Sequence[Sequence[str]]) -> Outcome:
    """All steps from the first arrival until every rank has run dry.

    Args:
        schedule: for each step the arrival on each rank.

    Raises:
        Violation: see there.
    """
    ranks = [
        Rank(deployment.behaviour, facts, decision, rank)
        for rank, (facts, decision) in enumerate(zip(deployment.facts, decisions, strict=True))
    ]
    try:
        return _serve(ranks, schedule)
    except MC2OnlyError as error:
        raise Violation(f"a rank ends: {error}") from error
    finally:
        runtime.skip_sizes = runtime._latched = runtime._runner = None
        runtime.sync_graph_mode = runtime.uniform_batches = False


def _serve(ranks: list[Rank], schedule: Sequence[Sequence[str]]) -> Outcome:
    for rank in ranks:
        rank.bind()
    for size in ranks[0].facts.compile_sizes:
        _together(ranks, [(size, False)] * len(ranks), drafts=False)
    steps = all_reduces = mode_syncs = eager = ragged = 0
    while True:
        for rank, arrival in zip(ranks, schedule[steps] if steps < len(schedule) else (), strict=False):
            rank.scheduler.arrive(arrival)
        counts = [rank.begin() for rank in ranks]
        _together(ranks, counts, drafts=True)
        found = [event[1] for event in ranks[0].events if event[0] == "all_reduce"]
        mode_syncs += found.count("mode")
        all_reduces += len(found) - found.count("mode")
        eager += sum(event[0] == "MC2" and event[-1] == "eager" for event in ranks[0].events)
        ragged += sum(
            calls[0][0] == "MC2" and len({call[2] for call in calls}) > 1
            for calls in zip(*(rank.events for rank in ranks), strict=True)
        )
        for rank in ranks:
            rank.scheduler.update(rank.step, accepted=(steps + rank.rank) % (1 + rank.facts.num_speculative_tokens))
        steps += 1
        if steps >= len(schedule) and steps % VOTE_EVERY == 0 and not any(r.scheduler.unfinished for r in ranks):
            return Outcome(steps, all_reduces, mode_syncs, eager, ragged)
        if steps > len(schedule) + _DRAINED:
            raise Violation("a request is never computed")


def _together(ranks: list[Rank], counts: list[tuple[int, bool]], *, drafts: bool) -> None:
    for rank in ranks:
        if not drafts:
            rank.events, rank.step, rank.uniform = [], [], True
        rank.peers = counts
    modes = [rank.synchronise(*count) for rank, count in zip(ranks, counts, strict=True)]
    for rank, count in zip(ranks, counts, strict=True):
        rank.modes = modes
        rank.target()
        if drafts:
            rank.drafts(*count)
    judge(ranks)

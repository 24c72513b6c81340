# SPDX-License-Identifier: Apache-2.0
"""Facts -> Plan. Pure: no torch, no vllm, no environment, no step data. Every condition is a row of RULES."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from dp_sync_patch.facts import Facts

# Rows the dispatch operator accepts from one EP rank (full-mesh algorithm).
OPERATOR_LIMIT = {"A2": 256, "A3": 512}
# Stock chooses MC2 on A2 only from this many ranks on.
_A2_MIN_RANKS = 16
_MB = 1024 * 1024


class State(IntEnum):
    """The three states of a process; the smallest state that any rule asks for wins."""

    OFF = 0
    SYNC = 1
    SKIP = 2


@dataclass(frozen=True)
class Sizes:
    """The worst case, as numbers. All of it follows from configuration."""

    token_budget: int  # tokens the scheduler may put into one step of one DP rank
    bound: int  # the same after graph and TP padding: the largest num_tokens an MC2 pass can see
    tokens_per_rank: int  # rows one EP rank hands to dispatch at most
    global_bs: int  # tokens_per_rank * ep_world_size
    capture_sizes: tuple[int, ...]  # the graphs worth capturing: those not above the bound
    window_mb: int  # HCCL_BUFFSIZE that this global_bs needs; 0 where it is not computed


@dataclass(frozen=True)
class Refusal:
    """Why the skip is not on: the value found, the value needed, the flag that would help."""

    code: str
    sentence: str
    found: str
    needed: str
    flag: str

    def __str__(self) -> str:
        advice = f"; to change it: {self.flag}" if self.flag else ""
        return f"{self.code} {self.sentence}: found {self.found}, needed {self.needed}{advice}"


@dataclass(frozen=True)
class Plan:
    """What this rank would do; the ranks agree on it before any of them does it."""

    state: State
    reasons: tuple[Refusal, ...]
    sizes: Sizes
    # How all ranks come to the same graph mode in a step. one: every batch has the same. uniform: every batch is a
    # uniform decode batch, see patches/scheduler_bound.py. sync: they agree in each step, see patches/graph_mode.py.
    graph_level: str = "one"


@dataclass(frozen=True)
class Rule:
    """One condition. `holds` must not read anything but its arguments."""

    code: str
    state: State  # what is left when the rule does not hold
    sentence: str
    holds: Callable[[Facts, Sizes], bool]
    found: Callable[[Facts, Sizes], Any]
    needed: Callable[[Facts, Sizes], Any]
    flag: Callable[[Facts, Sizes], str]


def compute_sizes(facts: Facts) -> Sizes:
    """The worst case of one step, in padded terms."""
    token_budget = facts.max_num_batched_tokens
    if facts.recompute_in_effect:
        requests = max(facts.max_num_seqs, facts.decode_max_num_seqs)
        token_budget = min(token_budget, requests * facts.query_len)

    captures = facts.capture_sizes if facts.graph_mode != "NONE" else ()
    graph = bisect_left(captures, token_budget)
    padded = captures[graph] if graph < len(captures) else token_budget
    tokens_per_rank = -(-padded // facts.tensor_parallel_size)
    bound = tokens_per_rank * facts.tensor_parallel_size
    return Sizes(
        token_budget=token_budget,
        bound=bound,
        tokens_per_rank=tokens_per_rank,
        global_bs=tokens_per_rank * facts.ep_world_size,
        capture_sizes=tuple(size for size in captures if size <= bound),
        window_mb=_window_mb(facts, tokens_per_rank),
    )


def _window_mb(facts: Facts, tokens_per_rank: int) -> int:
    """HCCL_BUFFSIZE in MB that dispatch and combine need for `tokens_per_rank` rows (full-mesh algorithm).

    A3: what its tiling checks, two halves of (dispatch slots + combine rows) in units of 512 B; the operator counts
    its default of one shared expert even when there is none. A2: the documented need (its tiling does not check).
    """
    ranks, experts, top_k = facts.ep_world_size, facts.num_experts, facts.experts_per_token
    if facts.soc not in OPERATOR_LIMIT or not experts or not top_k:
        return 0
    local_experts = -(-experts // ranks)
    row = facts.hidden_size * 2
    if facts.soc == "A3":
        slot = _align(_align(row, 32) + 64, 512)
        need = 2 * tokens_per_rank * (local_experts * ranks * slot + (top_k + 1) * _align(row, 512))
    else:
        need = 2 * (tokens_per_rank * ranks * min(local_experts, top_k) * row + 2 * _MB)
    return -(-need // _MB)


def _align(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def make_plan(facts: Facts, mode: str = "auto", extra: Iterable[Refusal] = (), *, graph_mode: str = "auto") -> Plan:
    """Apply all rules.

    Args:
        mode: this setting.
        extra: refusals found outside the configuration (a patch point that is not intact).
        graph_mode: this setting.
    """
    sizes = compute_sizes(facts)
    broken = [rule for rule in RULES if not rule.holds(facts, sizes)]
    graph_level = "one"
    if any(rule.code == "DSP122" for rule in broken):
        levels = _graph_levels(facts, sizes)
        possible = [level for level, lacks in levels.items() if graph_mode in ("auto", level) and not lacks]
        graph_level = next(iter(possible), "one")
        broken = [rule for rule in broken if rule.code != "DSP122" or not possible]
    state = min((rule.state for rule in broken), default=State.SKIP)
    # Where a deployment is none of our business, or not a decode node, further conditions would only be noise.
    decisive = [rule for rule in broken if rule.state is State.OFF] or [r for r in broken if r.code == "DSP102"]
    if any(rule.code == "DSP104" for rule in broken):
        # These judge a bound that has to become smaller anyway, so their numbers would mislead.
        decisive = decisive or [r for r in broken if r.code not in ("DSP105", "DSP106", "DSP112", "DSP123")]
    reasons = [
        Refusal(
            code=rule.code,
            sentence=rule.sentence,
            found=str(rule.found(facts, sizes)),
            needed=str(rule.needed(facts, sizes)),
            flag=rule.flag(facts, sizes),
        )
        for rule in decisive or broken
    ]
    reasons.extend(extra)
    if mode == "off":
        state = State.OFF
        reasons = [Refusal("DSP005", "switched off by its own setting", "mode=off", "mode=auto", "mode=auto")]
    elif state is State.SKIP and reasons:
        state = State.SYNC
    return Plan(state, tuple(reasons), sizes, graph_level if state is State.SKIP else "one")


def _graph_levels(facts: Facts, sizes: Sizes) -> dict[str, list[str]]:
    """The levels for separate routines, the fastest first, and for each one the flags that it lacks."""
    if not facts.graph_mode_known:
        return {}
    return {"uniform": list(_uniform_lacks(facts, sizes)), "sync": list(_mode_sync_lacks(facts))}


def _graph_level_flags(facts: Facts, sizes: Sizes) -> Iterator[str]:
    for level, lacks in _graph_levels(facts, sizes).items():
        if all(flag.startswith("--") for flag in lacks):
            yield " with ".join([f"DP_SYNC_PATCH_GRAPH_MODE={level}", *lacks])


def _uniform_lacks(facts: Facts, sizes: Sizes) -> Iterator[str]:
    """What keeps a scheduler with a fixed number of tokens per request from making every batch a uniform decode batch
    with a FULL graph. A request that is preempted has to leave this node: computing it again in such small pieces would
    take for ever.
    """
    if facts.num_speculative_tokens and not facts.uniform_with_drafts:
        yield "without --speculative-config"
    if not facts.recompute_in_effect:
        yield _recompute_flag(facts)
    if not facts.splits_prompts:
        yield "--enable-chunked-prefill without --disable-chunked-mm-input"
    # Stock has FULL graphs up to this size, whatever the captures are.
    if max(sizes.capture_sizes, default=0) > facts.max_num_seqs * facts.query_len:
        yield _captures_flag(facts, sizes.token_budget)


def _mode_sync_lacks(facts: Facts) -> Iterator[str]:
    """Draft passes are not agreed on: they have to have the same mode on all ranks by themselves."""
    if facts.num_speculative_tokens and not facts.drafts_follow_graph_mode:
        yield "without --speculative-config"


def concerns(facts: Facts) -> bool:
    """Whether these ranks have anything to agree about: False means that no store is touched."""
    sizes = compute_sizes(facts)
    return all(rule.holds(facts, sizes) for rule in RULES if rule.state is State.OFF)


def _capacity_flag(facts: Facts, sizes: Sizes) -> str:
    capacity = facts.mc2_tokens_capacity
    if facts.graph_mode != "NONE":
        capacity = min(capacity, max(facts.capture_sizes, default=0))
    options = [_smaller_step(facts, capacity)]
    if not facts.recompute_in_effect:
        options.insert(0, _recompute_flag(facts))
    if facts.graph_mode != "NONE" and sizes.tokens_per_rank <= OPERATOR_LIMIT.get(facts.soc, 0):
        options.append(_captures_flag(facts, sizes.token_budget))
    return " or ".join(options)


def _window_flag(facts: Facts, sizes: Sizes) -> str:
    """The window follows the graph that the largest step is padded to; a graph of just that size costs the least."""
    options = [f"HCCL_BUFFSIZE={sizes.window_mb}"]
    exact = -(-sizes.token_budget // facts.tensor_parallel_size)
    if exact < sizes.tokens_per_rank:
        options.append(f"HCCL_BUFFSIZE={_window_mb(facts, exact)} with {_captures_flag(facts, sizes.token_budget)}")
    return " or ".join(options)


def _captures_flag(facts: Facts, largest: int) -> str:
    captures = [size for size in facts.capture_sizes if size < largest] + [largest]
    return f"--compilation-config '{{\"cudagraph_capture_sizes\": {captures}}}'"


def _recompute_flag(facts: Facts) -> str:
    if not facts.recompute_requested:
        return "--additional-config '{\"recompute_scheduler_enable\": true}'"
    hidden_by = {"AsyncScheduler": "--async-scheduling", "AscendScheduler": "additional_config.ascend_scheduler_config"}
    scheduler = facts.scheduler_cls.rpartition(".")[2]
    cause = hidden_by.get(scheduler, f"the scheduler {facts.scheduler_cls}")
    return f"without {cause}, which hides recompute_scheduler_enable"


def _smaller_step(facts: Facts, tokens: int) -> str:
    """The flags for steps of at most `tokens` tokens.

    All of them: stock refuses a budget below max_num_seqs, scales a capture list that ends below max_num_seqs * q, and
    pads the largest step to the next graph.
    """
    requests = max(tokens // facts.query_len, 1)
    fewer = facts.recompute_in_effect or facts.max_num_seqs > requests
    budget = requests * facts.query_len if fewer else tokens
    flags = [f"--max-num-seqs {requests}"] if fewer else []
    if not facts.recompute_in_effect:
        flags.append(f"--max-num-batched-tokens {budget}")
    if facts.graph_mode != "NONE" and not any(budget <= size <= tokens for size in facts.capture_sizes):
        flags.append(_captures_flag(facts, budget))
    return " with ".join(flags)


def _rule(
    code: str,
    sentence: str,
    holds: Callable[[Facts, Sizes], bool],
    found: Callable[[Facts, Sizes], Any],
    needed: Any,
    flag: str | Callable[[Facts, Sizes], str],
    state: State = State.SYNC,
) -> Rule:
    return Rule(
        code,
        state,
        sentence,
        holds,
        found,
        needed if callable(needed) else lambda f, s: needed,
        flag if callable(flag) else lambda f, s: flag,
    )


def _option(code: str, sentence: str, attribute: str, needed: Any, flag: str) -> Rule:
    """A setting that has to have one value."""
    return _rule(
        code, sentence, lambda f, s: getattr(f, attribute) == needed, lambda f, s: getattr(f, attribute), needed, flag
    )


def _absent(code: str, sentence: str, attribute: str, state: State = State.SYNC) -> Rule:
    """A feature that must be off: it changes a buffer that ranks share, or the sequence of operators."""
    return _rule(
        code, sentence, lambda f, s: not getattr(f, attribute), lambda f, s: getattr(f, attribute), "none of it",
        lambda f, s: f"without {getattr(f, attribute)}", state,
    )  # fmt: skip


# fmt: off
RULES: tuple[Rule, ...] = (
    # Not our business: nothing to skip, or no defined set of ranks to agree with.
    _rule("DSP001", "there is one DP rank only", lambda f, s: f.data_parallel_size > 1,
          lambda f, s: f.data_parallel_size, "above 1", "--data-parallel-size", State.OFF),
    _rule("DSP002", "the model has no experts", lambda f, s: f.is_moe, lambda f, s: f.model_type, "a MoE model", "",
          State.OFF),
    _rule("DSP003", "an external launcher runs the ranks", lambda f, s: f.executor_backend != "external_launcher",
          lambda f, s: f.executor_backend, "mp, uni or ray", "--distributed-executor-backend mp", State.OFF),
    _absent("DSP004", "elastic EP re-forms the group after start-up", "elastic_ep", State.OFF),
    # Every pass has to use plain MC2.
    _option("DSP101", "expert parallelism decides between MC2 and all-gather", "enable_expert_parallel", True,
            "--enable-expert-parallel"),
    _option("DSP102", "only a decode node never has to prefill", "kv_role", "kv_consumer",
            '--kv-transfer-config with "kv_role": "kv_consumer"'),
    _rule("DSP103", "MC2 is not known on this device", lambda f, s: f.soc in OPERATOR_LIMIT,
          lambda f, s: f.soc, "A2 or A3", ""),
    _rule("DSP104", "the largest possible step does not fit the MC2 capacity",
          lambda f, s: s.bound <= f.mc2_tokens_capacity,
          lambda f, s: f"{s.bound} tokens per DP rank", lambda f, s: f"at most {f.mc2_tokens_capacity}",
          _capacity_flag),
    _rule("DSP105", "the dispatch operator rejects the largest possible step",
          lambda f, s: f.soc not in OPERATOR_LIMIT or s.tokens_per_rank <= OPERATOR_LIMIT[f.soc],
          lambda f, s: f"{s.tokens_per_rank} tokens per EP rank on {f.soc}",
          lambda f, s: f"at most {OPERATOR_LIMIT.get(f.soc)}",
          lambda f, s: _smaller_step(f, OPERATOR_LIMIT.get(f.soc, 0) * f.tensor_parallel_size)),
    _rule("DSP106", "the HCCL window is too small for the agreed global_bs",
          lambda f, s: s.window_mb <= f.hccl_buffsize_mb,
          lambda f, s: f"{f.hccl_buffsize_mb} MB" if f.hccl_buffsize_mb else "no positive number in HCCL_BUFFSIZE",
          lambda f, s: f"at least {s.window_mb} MB", _window_flag),
    _rule("DSP107", "stock uses MC2 on A2 from 16 ranks on",
          lambda f, s: f.soc != "A2" or f.ep_world_size * f.pipeline_parallel_size >= _A2_MIN_RANKS,
          lambda f, s: f"{f.ep_world_size * f.pipeline_parallel_size} ranks", f"at least {_A2_MIN_RANKS}",
          lambda f, s: f"--data-parallel-size {-(-_A2_MIN_RANKS // f.tensor_parallel_size)}"),
    _rule("DSP108", "the HCCL window cannot be computed for this model",
          lambda f, s: f.soc not in OPERATOR_LIMIT or bool(f.num_experts and f.experts_per_token),
          lambda f, s: f"{f.num_experts} experts, {f.experts_per_token} per token", "both in the model's config", ""),
    _rule("DSP109", "MC2 needs the same number of experts on each rank",
          lambda f, s: f.num_experts % f.ep_world_size == 0, lambda f, s: f"{f.num_experts} experts",
          lambda f, s: f"a multiple of {f.ep_world_size}", "--data-parallel-size"),
    _absent("DSP110", "hierarchical MC2 needs equal token counts", "hierarchy"),
    _option("DSP111", "this model type never uses MC2", "model_without_mc2", False, ""),
    _rule("DSP112", "a warm-up pass would leave MC2",
          lambda f, s: max(f.compile_sizes, default=0) <= s.bound, lambda f, s: f"compile_sizes {f.compile_sizes}",
          lambda f, s: f"none above {s.bound}", "smaller compile_sizes in --compilation-config"),
    # The worst case has to be enforced, and the graph mode has to be the same on all ranks.
    _rule("DSP113", "stock leaves MC2 on A2 above a number of experts per rank",
          lambda f, s: f.soc != "A2" or not f.a2_max_local_experts
          or f.num_experts // f.ep_world_size <= f.a2_max_local_experts,
          lambda f, s: f"{f.num_experts // f.ep_world_size} experts per rank",
          lambda f, s: f"at most {f.a2_max_local_experts}",
          lambda f, s: f"--data-parallel-size {-(-f.num_experts // f.a2_max_local_experts) // f.tensor_parallel_size}"),
    _absent("DSP114", "the fused MC2 operators do not promise to take different token counts", "fused_mc2"),
    _rule("DSP120", "this scheduler is not known to honour its token budget", lambda f, s: f.scheduler_known,
          lambda f, s: f.scheduler_cls, "one of vLLM's or vllm-ascend's own", "without --scheduler-cls"),
    _rule("DSP121", "a prompt that arrives without remote KV could never be scheduled in pieces",
          lambda f, s: f.splits_prompts or s.token_budget >= f.max_num_batched_tokens,
          lambda f, s: "chunked prefill off or multimodal input not split", "chunked prefill of every input",
          "--enable-chunked-prefill without --disable-chunked-mm-input"),
    _rule("DSP122", "ranks may run different graph modes in one step", lambda f, s: not f.separate_routines,
          lambda f, s: f.graph_mode, "one graph routine for every batch, or none",
          lambda f, s: "--enforce-eager" if not f.graph_mode_known else " or ".join(
              ["--compilation-config '{\"cudagraph_mode\": \"PIECEWISE\"}'", "--enforce-eager",
               *_graph_level_flags(f, s)])),
    _rule("DSP123", "steps above the largest graph run eager, others as a graph",
          lambda f, s: f.graph_mode == "NONE" or s.token_budget <= max(s.capture_sizes, default=0),
          lambda f, s: f"captures up to {max(f.capture_sizes, default=0)}", lambda f, s: f"up to {s.token_budget}",
          lambda f, s: f"{_captures_flag(f, s.token_budget)} or --enforce-eager"),
    _rule("DSP124", "the default process group does not span all ranks",
          lambda f, s: f.process_group_size == f.ep_world_size * f.pipeline_parallel_size,
          lambda f, s: f.process_group_size, lambda f, s: f.ep_world_size * f.pipeline_parallel_size, ""),
    _rule("DSP125", "graphs have not been run with the skip on this stock", lambda f, s: f.graph_mode_known,
          lambda f, s: f.graph_mode, "no graphs", "--enforce-eager"),
    # Features whose collectives have the shape of the local batch, or that change the sequence of EP operators.
    _rule("DSP130", "this worker overrides the patched functions", lambda f, s: f.worker_cls_known,
          lambda f, s: f.worker_cls, "the worker of vllm-ascend without torchair",
          "without --worker-cls, torchair_graph_config and enable_shared_expert_dp"),
    _absent("DSP131", "shared-expert DP reads the token counts of other ranks", "shared_expert_dp"),
    _absent("DSP132", "sequence parallelism gathers padded batches over EP", "sequence_parallel"),
    _option("DSP133", "LM-head TP gathers over DP ranks", "lmhead_tensor_parallel_size", 1,
            "without additional_config.lmhead_tensor_parallel_size"),
    _option("DSP134", "o_proj TP exchanges rows over DP ranks", "oproj_tensor_parallel_size", 1,
            "without additional_config.oproj_tensor_parallel_size"),
    _absent("DSP135", "MLP TP gathers over DP ranks", "mlp_tensor_parallel"),
    _absent("DSP136", "dual-batch overlap must be agreed in every step", "dbo"),
    _absent("DSP137", "EPLB counts on equal steps and is not tested with the skip", "eplb"),
    _absent("DSP138", "LoRA is not tested with the skip", "lora"),
    _option("DSP139", "pipeline parallelism is not tested with the skip", "pipeline_parallel_size", 1,
            "--pipeline-parallel-size 1"),
    _rule("DSP140", "context parallelism is not tested with the skip",
          lambda f, s: f.decode_context_parallel_size == f.prefill_context_parallel_size == 1,
          lambda f, s: f"decode {f.decode_context_parallel_size}, prefill {f.prefill_context_parallel_size}", "1 and 1",
          "--decode-context-parallel-size 1 --prefill-context-parallel-size 1"),
    _rule("DSP141", "draft passes of this method synchronise on their own", lambda f, s: f.speculative_method_known,
          lambda f, s: f.speculative_method, "mtp (deepseek_mtp on 0.11.0) or none",
          '--speculative-config with "method": "mtp" ("deepseek_mtp" on 0.11.0)'),
    _rule("DSP142", "this many draft passes are not known to be right with the skip on this stock",
          lambda f, s: f.num_speculative_tokens <= f.max_draft_passes,
          lambda f, s: f"num_speculative_tokens {f.num_speculative_tokens}",
          lambda f, s: f"at most {f.max_draft_passes}",
          lambda f, s: f'--speculative-config with "num_speculative_tokens": {f.max_draft_passes}' if f.max_draft_passes
          else "without --speculative-config"),
    _absent("DSP143", "embedding and o_lora TP exchange rows over DP ranks", "embedding_tensor_parallel"),
    _absent("DSP144", "FlashComm2 exchanges rows padded to the busiest rank", "flashcomm2"),
    _absent("DSP145", "balance scheduling gathers over the DP ranks in every step", "balance_scheduling"),
    _absent("DSP146", "the second model runner does not use what is patched", "model_runner_v2"),
)
# fmt: on

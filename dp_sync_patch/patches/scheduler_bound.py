# SPDX-License-Identifier: Apache-2.0
"""The worst case, enforced on a decode node's scheduler: its token budget, and where it helps the shape of batches."""

from typing import Any

from dp_sync_patch.errors import logger
from dp_sync_patch.plan import Plan


def keep_to(scheduler: Any, plan: Plan, dp_rank: int) -> None:
    """Before the first step: a step never holds more tokens than the ranks have agreed on.

    A prompt without remote KV, or a request whose KV could not be loaded, is then computed here in chunks that fit MC2.
    """
    budget = plan.sizes.token_budget
    if budget < scheduler.max_num_scheduled_tokens:
        logger.info(
            "DP rank %d: at most %d tokens per step instead of %d, so that every step fits MC2",
            dp_rank,
            budget,
            scheduler.max_num_scheduled_tokens,
        )
        scheduler.max_num_scheduled_tokens = budget
    if plan.graph_level == "uniform":
        make_uniform(scheduler, 1 + scheduler.num_spec_tokens)


def make_uniform(scheduler: Any, query_len: int) -> None:
    """Graph level `uniform`: `query_len` tokens (1 + drafts) of each request per step, or none: decode batches.

    Stock's own limit for long prompts cuts them to that; every scheduler that hands preempted requests back heeds it,
    for running and for waiting requests. With drafts it takes more, see `_keep_uniform`. The idle ranks' dummies are
    decode batches as well, so all ranks replay FULL graphs. In the worker `patches.graph_mode` holds every batch to it.
    """
    scheduler.scheduler_config.long_prefill_token_threshold = query_len
    if query_len > 1:
        # Whatever budget is left for a request must not cut it.
        scheduler.max_num_scheduled_tokens -= scheduler.max_num_scheduled_tokens % query_len
        _keep_uniform(scheduler, query_len)


def _keep_uniform(scheduler: Any, query_len: int) -> None:
    """Fill up or hold back the requests to which stock would give fewer than `query_len` tokens in their next step.

    Those are the last piece of a prompt, a request whose drafts a grammar has thrown out, and all that come near
    `max_model_len`. From 0.18.0 on the recompute scheduler itself gives placeholder drafts to a request that comes from
    the prefill node; only near `max_model_len` it has none (or, on 0.18.0, goes beyond).
    """
    receive, schedule = scheduler._update_waiting_for_remote_kv, scheduler.schedule

    def received(request: Any) -> None:
        receive(request)
        _fill_up(request, query_len, scheduler.max_model_len)

    # Requests with several known tokens and drafts in their last step. While its output is on its way, the worker of
    # 0.23.0 goes on behind the first token of such a step (`update_num_computed_tokens_for_batch_change`).
    unsettled: set[str] = set()

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        nonlocal unsettled
        held = {}
        for request in scheduler.running:
            waits = request.num_output_placeholders > 0 and request.request_id in unsettled
            if waits or not _fill_up(request, query_len, scheduler.max_model_len):
                held[request] = (
                    request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
                )
        for request, count in held.items():
            request.num_output_placeholders -= count  # nothing is left to be computed, so stock passes over it
        try:
            output = schedule(*args, **kwargs)
        finally:
            for request, count in held.items():
                request.num_output_placeholders += count
        counts, drafts = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
        unsettled = {request.request_id for request in held}
        unsettled.update(name for name in drafts if counts[name] - len(drafts[name]) > 1)
        return output

    scheduler._update_waiting_for_remote_kv, scheduler.schedule = received, scheduled
    connector = scheduler.connector  # a node with kv_role has one
    match, allocate = connector.get_num_new_matched_tokens, connector.update_state_after_alloc
    hit = 0  # tokens of the request that stock looks at

    def matched(request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        nonlocal hit
        tokens, load_kv_async = match(request, num_computed_tokens)
        if tokens and not load_kv_async and request.num_tokens + query_len > scheduler.max_model_len:
            tokens = 0  # else a few would be left, with no room for drafts, and nothing to fill them up with
        hit = num_computed_tokens + (tokens or 0)
        return tokens, load_kv_async

    def allocated(request: Any, blocks: Any, num_external_tokens: int) -> None:
        allocate(request, blocks, num_external_tokens)
        # Stock counts the drafts by this before it sets it, and would compute tokens that there are not.
        request.num_computed_tokens = request.num_computed_tokens or hit

    connector.get_num_new_matched_tokens, connector.update_state_after_alloc = matched, allocated


def _fill_up(request: Any, query_len: int, max_model_len: int) -> bool:
    """Give the request what it lacks of `query_len` tokens for its next step. False: it has to wait for a step.

    With drafts, as long as there is room for them. Any token will do: the target takes a draft only where it would have
    chosen it itself, and draws from the rest of the distribution otherwise. Without room some tokens before are
    computed once more, which puts the same KV to the same places; all of them have to be known for it, so that with
    async scheduling the output of the last step has to arrive first.
    """
    left = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
    room = max_model_len - 1 - request.num_computed_tokens
    if not 0 < left < query_len or room <= 0:
        return True
    if room < query_len:
        if request.num_output_placeholders:
            return False
        request.num_computed_tokens -= query_len - room
        left += query_len - room
    lacking = query_len - left - len(request.spec_token_ids)
    if lacking > 0:
        # Of a grammar's request, as stock does it: the grammar is not asked about it.
        token = -1 if request.use_structured_output else 0
        request.spec_token_ids = [*request.spec_token_ids, *[token] * lacking]
    return True

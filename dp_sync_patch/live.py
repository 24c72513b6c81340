# SPDX-License-Identifier: Apache-2.0
"""What is read from and written to stock's live objects, where versions differ. Only in processes with a worker."""

import importlib
from typing import Any

# 0.11.0 has the dispatchers here; every later version below ops.fused_moe.
_MOE_PACKAGES = ("vllm_ascend.ops.fused_moe", "vllm_ascend.ops.moe")
_DEVICES = {"_910B": "A2", "_910_93": "A3"}  # as 0.12.0rc1 calls them


def mc2_tokens_capacity(runner: Any) -> int:
    """Tokens per DP rank up to which stock's selector chooses MC2."""
    context = _forward_context()
    capacity: int = runner.mc2_tokens_capacity if context is None else context.get_mc2_tokens_capacity()
    return capacity


def set_mc2_tokens_capacity(runner: Any, capacity: int) -> None:
    """Make the selector (and on 0.23.0 the dispatchers) use `capacity`. Before the model is loaded."""
    context = _forward_context()
    if context is None:
        runner.mc2_tokens_capacity = capacity
    else:
        # Stock's own setter keeps the first value of a process.
        context._mc2_tokens_capacity = capacity


def latch_mc2_tokens_capacity(runner: Any, vllm_config: Any) -> None:
    """As the runner's constructor does it, on an object that has what that part of it reads."""
    context = _forward_context()
    if context is None:
        from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

        NPUModelRunner._init_mc2_tokens_capacity(runner)
    else:
        context._mc2_tokens_capacity = None
        context.set_mc2_tokens_capacity(vllm_config, runner.max_num_reqs, runner.uniform_decode_query_len)


def set_capture_sizes(runner: Any, sizes: tuple[int, ...]) -> None:
    """Capture graphs of these sizes (ascending) only. Before the model is loaded."""
    from vllm_ascend import utils

    compilation = runner.compilation_config
    compilation.cudagraph_capture_sizes = None  # both take a list that is there already for the user's
    if hasattr(utils, "update_cudagraph_capture_sizes"):
        utils.update_cudagraph_capture_sizes(runner.vllm_config, list(sizes))
        runner.cudagraph_batch_sizes = list(sizes)
    else:
        compilation.init_with_cudagraph_sizes(list(sizes))
        runner.aclgraph_batch_sizes = list(reversed(compilation.cudagraph_capture_sizes))


def graph_mode_of_step(runner: Any, scheduler_output: Any) -> Any:
    """The CUDAGraphMode that stock will choose for this batch, from what it is chosen by. After `_update_states`."""
    counts = scheduler_output.num_scheduled_tokens.values()
    tokens = scheduler_output.total_num_scheduled_tokens
    query_len = runner.uniform_decode_query_len
    uniform = max(counts) == query_len and tokens == query_len * len(counts)
    if hasattr(runner, "aclgraph_dispatcher"):
        from vllm.forward_context import BatchDescriptor

        if tokens <= runner.aclgraph_batch_sizes[-1]:
            tokens = runner.vllm_config.pad_for_cudagraph(tokens)
        return runner.aclgraph_dispatcher.dispatch(BatchDescriptor(num_tokens=tokens, uniform_decode=uniform))[0]
    if runner.speculative_config:
        # A piece of a prompt may be as long as a decode step.
        uniform = uniform and all(runner.input_batch.num_computed_tokens_cpu[: len(counts)] > 0)
    return runner.cudagraph_dispatcher.dispatch(num_tokens=tokens, uniform_decode=uniform)[0]


def is_uniform_step(runner: Any) -> bool:
    """Whether each request has as many tokens as in a decode step. From 0.18.0 on, once the inputs are prepared."""
    starts = runner.query_start_loc.np[: runner.input_batch.num_reqs + 1]
    return all(starts[1:] - starts[:-1] == runner.uniform_decode_query_len)


def _forward_context() -> Any:
    """The module that holds the capacity from 0.12.0rc1 on; on 0.11.0 the runner does (None)."""
    from vllm_ascend import ascend_forward_context

    return ascend_forward_context if hasattr(ascend_forward_context, "_mc2_tokens_capacity") else None


def device_type() -> str:
    """A2, A3 or another name of stock's device type."""
    from vllm_ascend import utils

    asked = getattr(utils, "get_ascend_device_type", None) or utils.get_ascend_soc_version
    name: str = asked().name
    return _DEVICES.get(name, name)


def model_is_built() -> bool:
    """Whether MoE dispatchers exist in this process."""
    for package in _MOE_PACKAGES:
        try:
            module = importlib.import_module(f"{package}.moe_comm_method")
        except ModuleNotFoundError:
            continue
        return bool(module._MoECommMethods)
    raise AttributeError("vllm_ascend has no moe_comm_method")

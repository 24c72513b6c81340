# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` command line -> the plan, without an engine and without an NPU. For the tools only.

Parser and configuration are vLLM's and vllm-ascend's own, so what stock rewrites (capture sizes, scheduler, graph
mode) is in the answer. Stock keeps parts of its configuration per process: one command line per process.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from dp_sync_patch import facts, live, settings, stock
from dp_sync_patch.errors import DpSyncPatchError
from dp_sync_patch.patches import TRIGGERS
from dp_sync_patch.plan import OPERATOR_LIMIT, State, make_plan

# Given by the operator: asking the device for its name would initialise it.
SOCS = tuple(OPERATOR_LIMIT)
_API_SERVER = "vllm.entrypoints.openai.api_server"


class CommandLineError(DpSyncPatchError):
    """The command line cannot be turned into a configuration."""


class StockImportError(DpSyncPatchError):
    """vLLM, vllm-ascend or torch_npu cannot be imported here, or not as on an Ascend node."""


def import_stock() -> None:
    """Import what the patches wait for, and with it all of stock.

    Raises:
        StockImportError: one line with the package that fails and the cause, or vLLM has another platform here.
    """
    entry = stock.current()
    # Through the worker, as vLLM does it: 0.23.0's model runner alone meets a circular import.
    first = [entry.worker_cls.rpartition(".")[0]] if entry else []
    try:
        importlib.import_module("vllm_ascend")  # before vLLM meets what is wrong with it, and only logs it
        from vllm.platforms import current_platform

        if current_platform.device_type != "npu":
            # Without any platform, importing the rest ends the process (std::bad_alloc on 0.12.0rc1 and 0.13.0). If
            # this part cannot be imported, that is the cause.
            importlib.import_module("vllm_ascend.platform")
            name = type(current_platform).__name__
            raise StockImportError("DSP425", f"vLLM's platform here is {name}, not the Ascend one")
        for module in (*first, *TRIGGERS.values()):
            importlib.import_module(module)
    except DpSyncPatchError:
        raise
    except Exception as error:
        # torch_npu raises what it likes where its libraries are missing, and torch wraps that once more.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        line = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"
        raise StockImportError("DSP430", f"stock cannot be imported: {line}{_where(cause)}") from error


def _where(error: BaseException) -> str:
    """The package that raised, unless that was an import statement of our own."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    passed_over = (*sys.stdlib_module_names, "__main__", "dp_sync_patch")
    return next((f" (in {top})" for name in reversed(modules) if (top := name.split(".")[0]) not in passed_over), "")


def explain(words: Sequence[str], soc: str) -> dict[str, Any]:
    """What the overlay would do on a node that is started like this.

    Args:
        words: `[NAME=value ...] vllm serve MODEL flags`, or `python -m vllm.entrypoints.openai.api_server flags`.
            The assignments are put into the environment of this process.
        soc: A2 or A3, the device that the node will run on.

    Returns:
        JSON values: `state` (off, sync, skip), `reasons` (code, sentence, found, needed, flag), `sizes` (tokens, MB),
        `dispatch_output` (of the agreed bound and of stock's capacity, see there), `facts`, `settings` (value and
        source), `command`, `soc`, `required_but_off` (`mode=require` would stop the node), `notes` (what a command
        line cannot tell).

    Raises:
        CommandLineError: not a serve command, or stock refuses it.
        SettingsError: a setting of the overlay is wrong.
        StandDownError: this stock is not supported.
        StockImportError: see there.
    """
    entry = stock.require()
    program, flags = prepare(words)
    settings.load()  # before seconds of imports
    import_stock()
    config = _vllm_config(program, flags)
    configured = settings.load(config)
    from vllm_ascend.utils import is_moe_model

    mc2_capacity = mc2_tokens_capacity(config)
    found = facts.read(
        config,
        entry,
        is_moe=is_moe_model(config),
        soc=soc,
        mc2_tokens_capacity=mc2_capacity,
        process_group_size=config.parallel_config.world_size_across_dp,
    )
    plan = make_plan(found, configured.mode, graph_mode=configured.graph_mode)
    sources = dict(configured.sources)
    return {
        "command": list(words),
        "soc": soc,
        "state": plan.state.name.lower(),
        "reasons": [asdict(reason) for reason in plan.reasons],
        "sizes": asdict(plan.sizes),
        "dispatch_output": {
            "bound": dispatch_output(found, plan.sizes.tokens_per_rank),
            "mc2_tokens_capacity": dispatch_output(found, -(-mc2_capacity // found.tensor_parallel_size)),
        },
        "graph_level": plan.graph_level,
        "facts": asdict(found),
        "settings": {name: {"value": value, "source": sources[name]} for name, value in configured.values().items()},
        "required_but_off": configured.mode == "require" and plan.state is not State.SKIP,
        "notes": _notes(config.parallel_config),
    }


def prepare(words: Sequence[str]) -> tuple[str, list[str]]:
    """Put the assignments in front of the program (`NAME=value`, also after `env`) into the environment.

    Returns:
        the program, `serve` or `api_server`, and its arguments.

    Raises:
        CommandLineError: not a serve command.
    """
    if _API_SERVER in words:
        program, at = "api_server", words.index(_API_SERVER) + 1
    elif "serve" in words and any("vllm" in word for word in words[: words.index("serve")]):
        program, at = "serve", words.index("serve")
    else:
        raise CommandLineError("DSP431", f"not a serve command: {' '.join(words) or '(nothing)'}")
    for name, equals, value in (word.partition("=") for word in words[:at]):
        if equals and name.isidentifier():
            os.environ[name] = value
    # Nothing is downloaded for an explanation, unless the operator asks for it.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return program, list(words[at:])


def dispatch_output(found: facts.Facts, tokens_per_rank: int) -> dict[str, int]:
    """What dispatch allocates for `expand_x` in each MoE layer on each EP rank, whatever the step holds.

    Args:
        tokens_per_rank: `global_bs` divided by the EP ranks.

    Returns:
        `rows`, and `mb` of them in bfloat16. Unquantised `npu_swiglu` computes all of these rows.
    """
    local_experts = -(-found.num_experts // found.ep_world_size)
    rows = tokens_per_rank * found.ep_world_size * min(local_experts, found.experts_per_token)
    return {"rows": rows, "mb": round(rows * found.hidden_size * 2 / 2**20)}


def _notes(parallel: Any) -> list[str]:
    """What a command line cannot tell."""
    notes = [
        "every rank has to come to the same plan; they compare it when they start",
        "environment variables that the command line does not set are those of this shell",
    ]
    if parallel.data_parallel_external_lb:
        notes.append(f"this is DP rank {parallel.data_parallel_rank} alone: explain the command line of each rank")
    if "ray" in (parallel.data_parallel_backend, parallel.distributed_executor_backend):
        notes.append("Ray processes on other machines have the environment of `ray start` there, see README on Ray")
    return notes


def _vllm_config(program: str, flags: list[str]) -> Any:
    """The VllmConfig that the program would create from these arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.openai.cli_args import FlexibleArgumentParser, make_arg_parser

    try:
        parser: Any = FlexibleArgumentParser(prog="vllm")
        if program == "serve":
            ServeSubcommand().subparser_init(parser.add_subparsers(required=True))
        else:
            parser = make_arg_parser(parser)
        args = parser.parse_args(flags)
        if getattr(args, "model_tag", None) is not None:
            args.model = args.model_tag
        return AsyncEngineArgs.from_cli_args(args).create_engine_config(headless=args.headless)
    except SystemExit:
        raise CommandLineError("DSP431", "vLLM's parser refuses this command line, see above") from None
    except DpSyncPatchError:
        raise
    except Exception as error:
        # Whatever stock refuses with is an answer; pydantic spreads it over several lines.
        text = " ".join(str(error).split())
        raise CommandLineError("DSP432", f"stock refuses this command line: {type(error).__name__}: {text}") from error


def mc2_tokens_capacity(config: Any) -> int:
    """Tokens per DP rank, by stock's own method or function on what that reads (no runner, no device)."""
    scheduler, speculative = config.scheduler_config, config.speculative_config
    max_num_reqs = max(scheduler.max_num_seqs, getattr(scheduler, "decode_max_num_seqs", 0))
    query_len = 1 + (speculative.num_speculative_tokens if speculative else 0)
    runner = SimpleNamespace(
        compilation_config=config.compilation_config,
        parallel_config=config.parallel_config,
        model_config=config.model_config,
        max_num_reqs=max_num_reqs,
        uniform_decode_query_len=query_len,
        max_num_tokens=scheduler.max_num_batched_tokens,
        _make_buffer=lambda *args, **kwargs: None,  # for multimodal input, nothing to do with the capacity
    )
    live.latch_mc2_tokens_capacity(runner, config)
    return live.mc2_tokens_capacity(runner)

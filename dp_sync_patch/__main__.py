# SPDX-License-Identifier: Apache-2.0
"""python -m dp_sync_patch status | check | explain. Each answers for this environment, not for a running server.

Exit status: 0 all right (explain: the plan is `skip`), 1 it is not, 2 it cannot be worked out or a usage error.

With --json one object is printed. Each of them has `findings` (code, severity, sentence, advice); where something
cannot be worked out, `error`. Besides these
    status: what `environment.describe` gives, and `process`, which is `dp_sync_patch.status()` after stock is imported;
    check: the same, `problems` (a text for each thing that is wrong), and with a command line `plan`, as `explain`;
    explain: what `command_line.explain` gives.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import dp_sync_patch
from dp_sync_patch import command_line, environment
from dp_sync_patch.errors import DpSyncPatchError
from dp_sync_patch.patches import CHANGED, WRAPPED

OK, NOT_OK, UNKNOWN = 0, 1, 2


def main(argv: list[str] | None = None) -> int:
    """Run one command. Results go to stdout, everything that stock prints goes to stderr."""
    code: int
    answer: dict[str, Any]
    options = _parser().parse_args(argv)
    command = getattr(options, "command", [])
    if command[:1] == ["--"]:
        command = command[1:]
    with _stdout_to_stderr(quiet=not options.verbose):
        try:
            code, answer = options.run(command, getattr(options, "soc", None))
        except DpSyncPatchError as error:
            # What is wrong with the environment often is the cause.
            code, answer = UNKNOWN, {"error": str(error), "findings": _findings()}
    print(json.dumps(answer, indent=2, sort_keys=True) if options.json else "\n".join(_lines(options.name, answer)))
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dp_sync_patch", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="name", required=True)
    helps = {
        status: "versions, settings, entry points, VLLM_PLUGINS, and the patch points as this process applies them",
        check: "status, judged; also undoes the patches, and loads vLLM's plugins as a server would",
        explain: "the plan for a command line, and what would have to change for the skip",
    }
    for run, text in helps.items():
        sub = commands.add_parser(run.__name__, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="one JSON object instead of text")
        sub.add_argument("--verbose", action="store_true", help="show what stock logs, on stderr")
        if run is not status:
            sub.add_argument("--soc", choices=command_line.SOCS, required=run is explain, help="device of the node")
            sub.add_argument(
                "command",
                nargs=argparse.REMAINDER,
                metavar="-- [NAME=value ...] vllm serve ...",
                help="the command line that starts the decode node",
            )
    return parser


def status(command: list[str], soc: str | None) -> tuple[int, dict[str, Any]]:
    """Describe; 2 when stock cannot be imported here, or a setting is wrong."""
    answer = environment.describe()
    try:
        command_line.import_stock()
    except DpSyncPatchError as error:
        answer["error"] = str(error)
    try:
        answer["process"] = dp_sync_patch.status()
    except DpSyncPatchError as error:
        answer["error"] = str(error)
    return (UNKNOWN if "error" in answer else OK), answer


def check(command: list[str], soc: str | None) -> tuple[int, dict[str, Any]]:
    """Judge: 1 when something keeps the overlay from working here, or `command` from skipping."""
    if command:
        if soc is None:
            raise command_line.CommandLineError("DSP431", "--soc is needed with a command line")
        command_line.prepare(command)  # its assignments hold for everything below
    code, answer = status([], None)
    problems = [str(environment.Finding(**finding)) for finding in answer["findings"]]
    answer["problems"] = problems
    if code == UNKNOWN:
        return code, answer
    problems += [f"error: {problem}" for problem in _patch_problems(answer["process"])]
    problems += [f"error: DSP425 {problem}" for problem in _plugin_problems()]
    if command:
        try:
            answer["plan"] = command_line.explain(command, str(soc))
        except DpSyncPatchError as error:
            return UNKNOWN, {**answer, "error": str(error)}
        if answer["plan"]["state"] != "skip":
            problems += [f"error: {_reason(reason)}" for reason in answer["plan"]["reasons"]]
    return (NOT_OK if problems else OK), answer


def _patch_problems(process: dict[str, Any]) -> Iterator[str]:
    """Whether everything was applied and can be undone. Afterwards all is applied again, where it could be undone."""
    if process["settings"]["mode"]["value"] == "off":
        yield "DSP005 switched off by its own setting: mode=off, no worker is patched"
        return
    yield from (f"unit {unit}: {state}" for unit, state in process["units"].items() if state != "applied")
    states = {point["state"] for point in process["points"]}
    if WRAPPED in states and CHANGED not in states:
        return  # nothing wrong with that, but what is below cannot be taken out
    try:
        dp_sync_patch.uninstall()
    except DpSyncPatchError as error:
        yield str(error)
    else:
        dp_sync_patch.runtime.install()


def _plugin_problems() -> Iterator[str]:
    """What vLLM's own plugin loader makes of this environment."""
    from vllm.plugins import load_general_plugins

    try:
        load_general_plugins()
    except Exception as error:  # noqa: BLE001  any plugin of anybody, and it stops vLLM
        yield f"vLLM would stop while it loads its plugins: {type(error).__name__}: {error}"


def explain(command: list[str], soc: str | None) -> tuple[int, dict[str, Any]]:
    """The plan: 0 skip, 1 sync or off, or something keeps the overlay from being loaded."""
    answer = command_line.explain(command, str(soc))
    answer["findings"] = _findings()  # after the assignments of the command line are in the environment
    return (OK if answer["state"] == "skip" and not answer["findings"] else NOT_OK), answer


def _findings() -> list[dict[str, Any]]:
    return [vars(finding) for finding in environment.findings()]


def _lines(name: str, answer: dict[str, Any]) -> Iterator[str]:
    if "versions" in answer:
        yield "versions: " + ", ".join(
            f"{name} {value or 'not installed'}" for name, value in answer["versions"].items()
        )
        yield f"supported: {answer['supported']}"
        for group, entries in answer["entry_points"].items():
            yield f"{group}: {', '.join(entries) or 'none'}"
        plugins = answer["VLLM_PLUGINS"]
        yield f"VLLM_PLUGINS: {'unset, everything is loaded' if plugins is None else plugins}"
    if process := answer.get("process"):
        for setting, entry in process["settings"].items():
            yield f"setting {setting}: {entry['value']} ({entry['source']})"
        for unit, state in process["units"].items():
            yield f"unit {unit}: {state}"
        for point in process["points"]:
            yield f"  {point['target']}: {point['state']}; {point['how']}"
    if plan := answer.get("plan", answer if "sizes" in answer else None):
        yield from _plan_lines(plan)
    if "error" in answer:
        yield f"error: {answer['error']}"
    if name == "check":
        yield from answer.get("problems", [])
        yield "check: " + ("problems found" if answer.get("problems") or "error" in answer else "all right")
    else:
        yield from (str(environment.Finding(**finding)) for finding in answer.get("findings", []))
    if "process" in answer:
        yield "This is what a process started here would do. A server that runs already is not asked."


def _plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    sizes, facts = plan["sizes"], plan["facts"]
    yield f"plan on {plan['soc']}: {plan['state']}"
    yield from (f"  {_reason(reason)}" for reason in plan["reasons"])
    yield (
        f"  at most {sizes['token_budget']} tokens per step and DP rank, padded {sizes['bound']}, "
        f"{sizes['tokens_per_rank']} per EP rank; global_bs {sizes['global_bs']} over "
        f"{facts['data_parallel_size'] * facts['tensor_parallel_size']} ranks; "
        f"mc2_tokens_capacity of stock {facts['mc2_tokens_capacity']}"
    )
    yield f"  HCCL window: {sizes['window_mb']} MB needed, HCCL_BUFFSIZE {facts['hccl_buffsize_mb']} MB"
    agreed, latched = (plan["dispatch_output"][of] for of in ("bound", "mc2_tokens_capacity"))
    yield (
        f"  dispatch returns {agreed['rows']} rows, {agreed['mb']} MB, per MoE layer; "
        f"{latched['rows']} rows, {latched['mb']} MB with a global_bs of stock's capacity"
    )
    captures = f"captures {list(facts['capture_sizes'])}" if facts["graph_mode"] != "NONE" else "eager"
    yield f"  graph mode {facts['graph_mode']}: {captures}; scheduler {facts['scheduler_cls']}"
    if plan["state"] == "skip":
        level = {"sync": ", one of the graph mode per step", "uniform": ", decode batches only"}
        yield (
            f"  in force: no DP metadata all_reduce{level.get(plan['graph_level'], '')}; "
            f"mc2_tokens_capacity {sizes['bound']}, captures {list(sizes['capture_sizes'])}, "
            f"scheduler budget {sizes['token_budget']}"
        )
    elif plan["required_but_off"]:
        yield "  in force: mode=require, the node refuses to start"
    else:
        yield "  in force: stock vllm-ascend, with its all_reduce"
    yield from (f"  note: {note}" for note in plan["notes"])


def _reason(reason: dict[str, str]) -> str:
    return str(dp_sync_patch.plan.Refusal(**reason))


@contextlib.contextmanager
def _stdout_to_stderr(quiet: bool) -> Iterator[None]:
    """Stock logs to stdout, also from C: move the descriptor too, so that `--json` prints JSON only."""
    if quiet:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        logging.captureWarnings(True)
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


if __name__ == "__main__":
    sys.exit(main())

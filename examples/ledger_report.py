# SPDX-License-Identifier: Apache-2.0
"""Figures of a decode node, computed from the ledgers of the virtual NPU.

Each process writes one file of JSON lines:

* `comm`: this process is `rank` of `size` in communicator `comm`; `group`: the vLLM group (`dp:0`, `ep:0`) of a `comm`
* `step`: an engine step begins; `kind` is execute or dummy, `scheduled_tokens` what the scheduler asked for
* `collective`: a host-blocking collective, with its `comm` (HCCL) or its `group` (gloo), `bytes` and `host_us`
* `collective_wait`: the host has waited so long, `host_us`, for a collective that was begun in the background
* `ep`: an MC2 dispatch or combine, with `ordinal` in its communicator, `bs`, `global_bs`, `mask`
* `violation`: an MC2 call broke its contract and was let through

Events carry the step they belong to. Steps below 0 are start-up (profile, warm-up) and are no decode steps. A ledger
that is missing, cut off or contradicts another is a LedgerError: no figure is ever computed from an absence.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# vLLM's engines ask every 32 steps, over a gloo group of their own, whether any of them has unfinished requests.
VOTE_GROUPS = ("dp-vote", "stateless")
# A node is stopped by a signal, so the last step may have run on some ranks only: this many steps may be cut off.
MAX_CUT_STEPS = 2


class LedgerError(Exception):
    """The ledgers do not allow a figure; the text says which file and why."""


@dataclass
class StepRecord:
    """What one process did in one decode step. host_us are microseconds the host was blocked."""

    kind: str
    scheduled_tokens: int
    dp_collectives: int = 0
    dp_host_us: float = 0.0
    votes: int = 0
    ep_host_us: float = 0.0
    dispatches: list[int] = field(default_factory=list)  # positions in RankLedger.dispatches


@dataclass
class Dispatch:
    """One MC2 dispatch of one rank; step < 0 is start-up."""

    ordinal: int
    step: int
    bs: int
    global_bs: int
    mask: bool


@dataclass
class RankLedger:
    """One process of the node: its place in the EP group, its decode steps, and its dispatches in order."""

    path: Path
    ep_comm: str
    ep_rank: int
    ep_size: int
    tp_rank: int
    steps: dict[int, StepRecord]
    dispatches: list[Dispatch]
    violations: int
    start_up_violations: int


@dataclass(frozen=True)
class LedgerFigures:
    """Figures of one run. Per-step values are per rank and decode step; times are medians unless the name says mean.

    dp_collectives is the total, which includes a last step that the stop signal cut off.
    """

    ranks: int
    decode_steps: int
    dp_collectives: int
    dp_collectives_per_decode_step: float
    vote_collectives_per_decode_step: float
    sync_host_us_per_step: float
    sync_host_us_per_step_mean: float
    ep_host_us_per_step: float
    tokens_scheduled: int
    tokens_computed: int
    tokens_computed_per_step: float
    dummy_tokens: int
    padded_token_share: float
    ep_bs_ragged_steps: int
    ep_global_bs: list[int]
    ep_masked_dispatches: int
    violations: int
    start_up_violations: int


def _read_events(path: Path) -> list[dict[str, Any]]:
    events = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # a line that a killed process did not finish
                continue
            raise LedgerError(f"{path.name}:{number} is not JSON: {error}") from error
        if not isinstance(event, dict) or "ev" not in event:
            raise LedgerError(f"{path.name}:{number} is not an event: {line[:80]}")
        events.append(event)
    return events


def _read_rank(path: Path) -> RankLedger | None:
    """One file, or None for a process that never joined an EP group (an API server, a helper)."""
    try:
        return _interpret(path, _read_events(path))
    except KeyError as error:
        raise LedgerError(f"{path.name}: an event lacks the field {error}") from error


def _interpret(path: Path, events: list[dict[str, Any]]) -> RankLedger | None:
    comms: dict[str, tuple[int, int]] = {}
    groups: dict[str, str] = {}
    for event in events:
        if event["ev"] == "comm":
            comms[event["comm"]] = (event["rank"], event["size"])
        elif event["ev"] == "group":
            groups[event["comm"]] = event["name"]
    if not any(event["ev"] == "ep" for event in events):
        if any(event["ev"] == "step" and event["step"] >= 0 for event in events):
            raise LedgerError(f"{path.name} has decode steps but no MC2 call: the node did not run MC2")
        return None
    ep_comms = {event["comm"] for event in events if event["ev"] == "ep"}
    if len(ep_comms) != 1 or not ep_comms <= comms.keys():
        raise LedgerError(f"{path.name}: MC2 calls on communicators {sorted(ep_comms)}, known are {sorted(comms)}")
    ep_comm = ep_comms.pop()
    tp_rank = next((comms[comm][0] for comm, name in groups.items() if name.startswith("tp:") and comm in comms), 0)

    steps: dict[int, StepRecord] = {}
    dispatches: list[Dispatch] = []
    violations = [0, 0]
    for event in events:
        kind, step = event["ev"], event.get("step", -1)
        if kind == "step" and step >= 0:
            if step in steps:
                raise LedgerError(f"{path.name}: step {step} begins twice")
            steps[step] = StepRecord(event["kind"], event["scheduled_tokens"])
            continue
        if kind == "violation":
            violations[step >= 0] += 1
        if kind not in ("collective", "collective_wait", "ep"):
            continue
        if step >= 0 and step not in steps:
            raise LedgerError(f"{path.name}: a {kind} event belongs to step {step}, which never began")
        if kind != "ep":
            _count_collective(path, event, groups, steps.get(step))
            continue
        if step >= 0:
            steps[step].ep_host_us += event["host_us"]
        if event["op"] == "dispatch":
            if step >= 0:
                steps[step].dispatches.append(len(dispatches))
            call = Dispatch(event["ordinal"], step, event["bs"], event["global_bs"], bool(event["mask"]))
            dispatches.append(call)
    at_start_up, in_steps = violations
    return RankLedger(path, ep_comm, *comms[ep_comm], tp_rank, steps, dispatches, in_steps, at_start_up)


def _count_collective(path: Path, event: dict[str, Any], groups: dict[str, str], step: StepRecord | None) -> None:
    if step is None:
        return
    group = event.get("group") or groups.get(event.get("comm", ""))
    if group is None:
        raise LedgerError(f"{path.name}: collective on communicator {event.get('comm')!r}, whose group is unknown")
    if group in VOTE_GROUPS:
        step.votes += 1
    elif group.startswith("dp:"):
        step.dp_collectives += event["ev"] == "collective"
        step.dp_host_us += event["host_us"]


def _check_ranks(ranks: list[RankLedger], directory: Path) -> None:
    if not ranks:
        raise LedgerError(f"{directory.name} holds no ledger of a process that called MC2")
    sizes = {(rank.ep_comm, rank.ep_size) for rank in ranks}
    if len(sizes) != 1:
        raise LedgerError(f"the processes belong to different EP groups: {sorted(sizes)}")
    size = ranks[0].ep_size
    found = sorted(rank.ep_rank for rank in ranks)
    if found != list(range(size)):
        raise LedgerError(f"the EP group has {size} ranks, ledgers exist for {found}")
    for rank in ranks:
        if not rank.steps:
            raise LedgerError(f"{rank.path.name} (EP rank {rank.ep_rank}) has no decode step")


def _complete_dispatches(ranks: list[RankLedger]) -> int:
    """How many dispatches all ranks made, which must have had the same ordinals on each of them."""
    counts = [len(rank.dispatches) for rank in ranks]
    per_step = max(len(step.dispatches) for rank in ranks for step in rank.steps.values())
    if per_step == 0:
        raise LedgerError("no decode step dispatched to experts")
    if max(counts) - min(counts) > MAX_CUT_STEPS * per_step:
        raise LedgerError(f"the ranks made {sorted(counts)} dispatches: they did not run the same steps")
    for position in range(min(counts)):
        ordinals = {rank.dispatches[position].ordinal for rank in ranks}
        if len(ordinals) != 1:
            raise LedgerError(f"dispatch {position} has the ordinals {sorted(ordinals)}: a ledger has a gap")
    return min(counts)


def read_figures(directory: Path) -> LedgerFigures:
    """Figures of the node whose processes wrote their ledgers to `directory`. Raises LedgerError."""
    paths = sorted(path for path in directory.glob("*") if path.is_file()) if directory.is_dir() else []
    if not paths:
        raise LedgerError(f"there is no ledger in {directory.name}")
    ranks = [rank for rank in map(_read_rank, paths) if rank is not None]
    _check_ranks(ranks, directory)
    complete = _complete_dispatches(ranks)

    # A step counts if all ranks took part in its dispatches; the last one may have been cut off by the stop signal.
    sync_us, ep_us = [], []
    all_collectives = collectives = votes = scheduled = computed = dummy = 0
    for rank in ranks:
        last_step = list(rank.steps.values())[-1]
        for step in rank.steps.values():
            # The total has every step in it: a collective is one, whatever else its step did.
            all_collectives += step.dp_collectives
            if not step.dispatches:
                if step is not last_step:
                    raise LedgerError(f"{rank.path.name}: a step with {step.scheduled_tokens} tokens made no MC2 call")
                continue
            if step.dispatches[-1] >= complete:
                continue
            sizes = {rank.dispatches[position].bs for position in step.dispatches}
            if len(sizes) != 1:
                raise LedgerError(f"{rank.path.name}: MoE layers of one step ran with different sizes {sorted(sizes)}")
            rows = sizes.pop()
            sync_us.append(step.dp_host_us)
            ep_us.append(step.ep_host_us)
            collectives += step.dp_collectives
            votes += step.votes
            computed += rows
            if step.kind == "dummy":
                dummy += rows
            elif rank.tp_rank == 0:
                scheduled += step.scheduled_tokens
    if computed == 0:
        raise LedgerError("no complete decode step")
    if scheduled > computed:
        raise LedgerError(f"{scheduled} tokens were scheduled but only {computed} computed")

    ragged: set[int] = set()
    bounds: set[int] = set()
    masked = 0
    for position in range(complete):
        calls = [rank.dispatches[position] for rank in ranks]
        decode = [call.step >= 0 for call in calls]
        if any(decode) != all(decode):
            raise LedgerError(f"dispatch {position} is a start-up call on some ranks and a decode call on others")
        if not decode[0]:
            continue
        if len({call.global_bs for call in calls}) != 1:
            raise LedgerError(f"dispatch {position}: the ranks passed different global_bs")
        bounds.add(calls[0].global_bs)
        masked += sum(call.mask for call in calls)
        if len({call.bs for call in calls}) > 1:
            ragged.add(calls[0].step)

    count = len(sync_us)
    return LedgerFigures(
        ranks=len(ranks),
        decode_steps=count,
        dp_collectives=all_collectives,
        dp_collectives_per_decode_step=round(collectives / count, 4),
        vote_collectives_per_decode_step=round(votes / count, 4),
        sync_host_us_per_step=round(statistics.median(sync_us), 1),
        sync_host_us_per_step_mean=round(statistics.fmean(sync_us), 1),
        ep_host_us_per_step=round(statistics.median(ep_us), 1),
        tokens_scheduled=scheduled,
        tokens_computed=computed,
        tokens_computed_per_step=round(computed / count, 3),
        dummy_tokens=dummy,
        padded_token_share=round(1 - scheduled / computed, 4),
        ep_bs_ragged_steps=len(ragged),
        ep_global_bs=sorted(bounds),
        ep_masked_dispatches=masked,
        violations=sum(rank.violations for rank in ranks),
        start_up_violations=sum(rank.start_up_violations for rank in ranks),
    )


def build_report(
    stock_version: str,
    figures: dict[str, LedgerFigures],
    tokens: dict[str, list[list[int]]],
    tpot_ms: dict[str, float],
) -> dict[str, Any]:
    """The demo's report. Keys of the three mappings are "stock" and "overlay"; tokens are the ids per request.

    Raises LedgerError if a run has no requests or the runs have different numbers of them.
    """
    if not tokens["stock"] or len(tokens["stock"]) != len(tokens["overlay"]):
        raise LedgerError(f"{len(tokens['stock'])} requests with stock, {len(tokens['overlay'])} with the overlay")

    def both(name: str) -> dict[str, Any]:
        return {run: getattr(figures[run], name) for run in ("stock", "overlay")}

    pairs = enumerate(zip(tokens["stock"], tokens["overlay"], strict=True))
    different = [index for index, (stock, overlay) in pairs if stock != overlay]
    return {
        "stock_version": stock_version,
        "requests": len(tokens["stock"]),
        "tokens": sum(map(len, tokens["stock"])),
        "tokens_equal": not different,
        "requests_with_different_tokens": different,
        "dp_collectives_per_decode_step": both("dp_collectives_per_decode_step"),
        "vote_collectives_per_decode_step": both("vote_collectives_per_decode_step"),
        "sync_host_us_per_step": both("sync_host_us_per_step"),
        "padded_token_share": both("padded_token_share"),
        "tokens_computed_per_step": both("tokens_computed_per_step"),
        "tpot_ms": {run: round(tpot_ms[run], 3) for run in ("stock", "overlay")},
        "ep_bs_ragged_steps": figures["overlay"].ep_bs_ragged_steps,
        "timings": "virtual NPU, no claim about hardware",
        "details": {run: asdict(figures[run]) for run in ("stock", "overlay")},
    }


def failures(report: dict[str, Any], figures: dict[str, LedgerFigures]) -> list[str]:
    """What the demo promised and the report does not show, one sentence each; empty if all is well."""
    found = []
    if not report["tokens_equal"]:
        requests = report["requests_with_different_tokens"]
        found.append(f"The tokens of {len(requests)} of {report['requests']} requests differ: {requests}.")
    if figures["stock"].dp_collectives == 0:
        found.append("Stock ran without a DP metadata collective, so there is nothing to compare with.")
    if figures["overlay"].dp_collectives != 0:
        found.append(f"The overlay left {figures['overlay'].dp_collectives} DP metadata collectives in decode steps.")
    if report["ep_bs_ragged_steps"] == 0:
        found.append("No decode step had different token counts per rank, so the run proves nothing.")
    if figures["overlay"].violations or figures["overlay"].start_up_violations:
        found.append("With the overlay, MC2 calls broke their contract; see the violation events in its ledger.")
    if figures["overlay"].ep_masked_dispatches:
        found.append(f"The overlay passed an active mask to {figures['overlay'].ep_masked_dispatches} dispatches.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the figures of one node's ledgers as JSON.")
    parser.add_argument("directory", type=Path)
    print(json.dumps(asdict(read_figures(parser.parse_args().directory)), indent=1))


if __name__ == "__main__":
    main()

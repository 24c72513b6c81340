# SPDX-License-Identifier: Apache-2.0
"""Figures of hand-written ledgers with values computed by hand, and the ledgers that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ledger_report import LedgerError, LedgerFigures, build_report, failures, read_figures

Event = dict[str, Any]


def step_events(
    step: int,
    kind: str,
    scheduled: int,
    bs: int,
    *,
    sync_us: float | None = None,
    first_ordinal: int,
    mask: bool = False,
    global_bs: int = 16,
    layers: int = 2,
    size: int = 2,
) -> list[Event]:
    """One decode step: the optional DP all_reduce of `sync_us`, then dispatch (30 us) and combine (10 us) per layer."""
    events: list[Event] = [{"ev": "step", "step": step, "kind": kind, "scheduled_tokens": scheduled, "t": 0.0}]
    if sync_us is not None:
        events.append(
            {"ev": "collective", "step": step, "comm": "c-dp", "kind": "AllReduce", "bytes": 24, "host_us": sync_us}
        )
    for layer in range(layers):
        common = {"ev": "ep", "step": step, "comm": "c-ep", "bs": bs, "global_bs": global_bs, "mask": mask}
        ordinal = first_ordinal + 2 * layer
        events.append({**common, "op": "dispatch", "ordinal": ordinal, "host_us": 30.0})
        events.append({**common, "op": "combine", "ordinal": ordinal + 1, "host_us": 10.0})
    return events


def header(rank: int, size: int = 2) -> list[Event]:
    return [
        {"ev": "comm", "comm": "c-dp", "rank": rank, "size": size, "step": -1},
        {"ev": "group", "comm": "c-dp", "name": "dp:0", "step": -1},
        {"ev": "comm", "comm": "c-ep", "rank": rank, "size": size, "step": -1},
        {"ev": "group", "comm": "c-ep", "name": "mc2:0", "step": -1},
        # A profile run: a collective and a pair of calls before the first step, which must not count.
        {"ev": "collective", "step": -1, "comm": "c-dp", "kind": "AllReduce", "bytes": 24, "host_us": 9999.0},
        *(
            {"ev": "ep", "step": -1, "comm": "c-ep", "op": op, "ordinal": ordinal, "bs": 8, "global_bs": 16,
             "mask": False, "host_us": 9999.0}
            for ordinal, op in ((1, "dispatch"), (2, "combine"))
        ),
    ]  # fmt: skip


def stock_ranks() -> list[list[Event]]:
    """Two ranks, three steps. Rank 0 schedules 3, 2, 1 tokens; rank 1 is padded to it with 1, dummy, 1."""
    rank0, rank1 = header(0), header(1)
    for step, (scheduled0, scheduled1, us0, us1) in enumerate(
        [(3, 1, 100.0, 500.0), (2, 0, 50.0, 60.0), (1, 1, 40, 70)]
    ):
        first = 3 + 4 * step
        rank0 += step_events(step, "execute", scheduled0, scheduled0, sync_us=us0, first_ordinal=first)
        kind = "execute" if scheduled1 else "dummy"
        rank1 += step_events(step, kind, scheduled1, scheduled0, sync_us=us1, first_ordinal=first)
    rank0.append({"ev": "collective", "step": 2, "group": "stateless", "kind": "all_reduce", "bytes": 4, "host_us": 5.0,
                  "backend": "gloo"})  # fmt: skip
    return [rank0, rank1]


def overlay_ranks() -> list[list[Event]]:
    """The same work, not padded: the idle rank computes its own dummy token; two of three steps are ragged."""
    rank0, rank1 = header(0), header(1)
    for step, (scheduled0, scheduled1) in enumerate([(3, 1), (2, 0), (1, 1)]):
        first = 3 + 4 * step
        rank0 += step_events(step, "execute", scheduled0, scheduled0, first_ordinal=first)
        rank1 += step_events(
            step, "execute" if scheduled1 else "dummy", scheduled1, max(1, scheduled1), first_ordinal=first
        )
    return [rank0, rank1]


def write(directory: Path, ranks: list[list[Event]]) -> Path:
    directory.mkdir(exist_ok=True)
    for index, events in enumerate(ranks):
        text = "".join(json.dumps(event) + "\n" for event in events)
        (directory / f"ledger-{index}.jsonl").write_text(text, encoding="utf-8")
    return directory


def test_stock_figures(tmp_path: Path) -> None:
    figures = read_figures(write(tmp_path, stock_ranks()))
    assert figures == LedgerFigures(
        ranks=2,
        decode_steps=6,
        dp_collectives=6,
        dp_collectives_per_decode_step=1.0,
        vote_collectives_per_decode_step=round(1 / 6, 4),
        sync_host_us_per_step=65.0,  # median of 40 50 60 70 100 500
        sync_host_us_per_step_mean=round(820 / 6, 1),
        ep_host_us_per_step=80.0,
        tokens_scheduled=8,  # 3+2+1 and 1+0+1
        tokens_computed=12,  # both ranks 3, 2, 1
        tokens_computed_per_step=2.0,
        dummy_tokens=2,
        padded_token_share=round(1 - 8 / 12, 4),
        ep_bs_ragged_steps=0,
        ep_global_bs=[16],
        ep_masked_dispatches=0,
        violations=0,
        start_up_violations=0,
    )


def test_overlay_figures(tmp_path: Path) -> None:
    figures = read_figures(write(tmp_path, overlay_ranks()))
    assert figures.dp_collectives == 0
    assert figures.sync_host_us_per_step == 0
    assert figures.tokens_scheduled == 8
    assert figures.tokens_computed == 9  # 3+2+1 and 1+1(dummy)+1
    assert figures.dummy_tokens == 1
    assert figures.padded_token_share == round(1 / 9, 4)
    assert figures.ep_bs_ragged_steps == 2


def test_a_step_cut_off_by_the_stop_signal_is_left_out(tmp_path: Path) -> None:
    ranks = overlay_ranks()
    ranks[0] += step_events(3, "execute", 5, 5, first_ordinal=15)[:2]  # rank 1 never got there
    figures = read_figures(write(tmp_path, ranks))
    assert figures.decode_steps == 6
    assert figures.tokens_scheduled == 8


def test_a_collective_in_a_cut_off_step_is_still_one(tmp_path: Path) -> None:
    ranks = overlay_ranks()
    ranks[0] += step_events(3, "execute", 5, 5, sync_us=7.0, first_ordinal=15)[:2]
    assert read_figures(write(tmp_path, ranks)).dp_collectives == 1


def test_the_wait_for_a_collective_that_was_begun_before_is_no_second_one(tmp_path: Path) -> None:
    ranks = stock_ranks()
    for events in ranks:
        events.append({"ev": "collective_wait", "step": 2, "comm": "c-dp", "host_us": 1000.0})
    figures = read_figures(write(tmp_path, ranks))
    assert figures.dp_collectives == 6
    assert figures.sync_host_us_per_step_mean == round((820 + 2 * 1000) / 6, 1)


def test_an_unfinished_last_line_is_accepted(tmp_path: Path) -> None:
    write(tmp_path, overlay_ranks())
    with (tmp_path / "ledger-0.jsonl").open("a", encoding="utf-8") as ledger:
        ledger.write('{"ev":"step","st')
    assert read_figures(tmp_path).decode_steps == 6


def test_a_process_without_an_ep_group_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, [*overlay_ranks(), [{"ev": "comm", "comm": "x", "rank": 0, "size": 2, "step": -1}]])
    assert read_figures(tmp_path).ranks == 2


def test_tensor_parallel_ranks_count_scheduled_tokens_once(tmp_path: Path) -> None:
    """DP1 TP2, EP2: both ranks schedule the same 4 tokens and dispatch 2 of them each."""
    ranks = []
    for rank in range(2):
        tp = [
            {"ev": "comm", "comm": "c-tp", "rank": rank, "size": 2, "step": -1},
            {"ev": "group", "comm": "c-tp", "name": "tp:0", "step": -1},
        ]
        ranks.append(header(rank) + tp + step_events(0, "execute", 4, 2, first_ordinal=3))
    figures = read_figures(write(tmp_path, ranks))
    assert (figures.tokens_scheduled, figures.tokens_computed) == (4, 4)
    assert figures.padded_token_share == 0


def no_rank(ranks: list[list[Event]]) -> None:
    ranks.clear()


def one_rank_missing(ranks: list[list[Event]]) -> None:
    del ranks[1]


def same_rank_twice(ranks: list[list[Event]]) -> None:
    ranks[1] = ranks[0]


def unknown_group(ranks: list[list[Event]]) -> None:
    ranks[0] = [event for event in ranks[0] if event.get("name") != "dp:0"]


def lost_steps(ranks: list[list[Event]]) -> None:
    ranks[1] = [event for event in ranks[1] if event["step"] < 1]
    ranks[0] += step_events(3, "execute", 1, 1, first_ordinal=15)


def gap_in_ordinals(ranks: list[list[Event]]) -> None:
    ranks[1] = [event for event in ranks[1] if event.get("ordinal") not in (5, 6)]


def different_global_bs(ranks: list[list[Event]]) -> None:
    for event in ranks[1]:
        if event["ev"] == "ep" and event["step"] == 1:
            event["global_bs"] = 32


def missing_field(ranks: list[list[Event]]) -> None:
    del ranks[0][-1]["host_us"]


def step_never_began(ranks: list[list[Event]]) -> None:
    ranks[0] = [event for event in ranks[0] if not (event["ev"] == "step" and event["step"] == 1)]


def step_twice(ranks: list[list[Event]]) -> None:
    ranks[0].append({"ev": "step", "step": 1, "kind": "execute", "scheduled_tokens": 1})


def more_scheduled_than_computed(ranks: list[list[Event]]) -> None:
    for event in ranks[0]:
        if event["ev"] == "step":
            event["scheduled_tokens"] = 100


def no_mc2_in_decode(ranks: list[list[Event]]) -> None:
    for index, rank in enumerate(ranks):
        ranks[index] = [event for event in rank if event["ev"] != "ep"]


def layers_of_one_step_differ(ranks: list[list[Event]]) -> None:
    next(event for event in ranks[0] if event["ev"] == "ep" and event["ordinal"] == 5)["bs"] = 7


def middle_step_without_mc2(ranks: list[list[Event]]) -> None:
    for index, rank in enumerate(ranks):
        ranks[index] = [event for event in rank if not (event["ev"] == "ep" and event["step"] == 1)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_rank, "there is no ledger"),
        (one_rank_missing, r"2 ranks, ledgers exist for \[0\]"),
        (same_rank_twice, r"ledgers exist for \[0, 0\]"),
        (unknown_group, "'c-dp', whose group is unknown"),
        (lost_steps, "did not run the same steps"),
        (gap_in_ordinals, "a ledger has a gap"),
        (different_global_bs, "different global_bs"),
        (missing_field, "lacks the field 'host_us'"),
        (step_never_began, "belongs to step 1, which never began"),
        (step_twice, "step 1 begins twice"),
        (more_scheduled_than_computed, "only 12 computed"),
        (no_mc2_in_decode, "no MC2 call"),
        (layers_of_one_step_differ, r"different sizes \[3, 7\]"),
        (middle_step_without_mc2, "made no MC2 call"),
    ],
)
def test_damaged_ledgers_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    ranks = stock_ranks()
    if damage is missing_field:
        ranks[0].pop()  # the vote needs no host_us
    damage(ranks)
    with pytest.raises(LedgerError, match=message):
        read_figures(write(tmp_path, ranks))


def test_a_line_that_is_not_json_is_refused(tmp_path: Path) -> None:
    write(tmp_path, overlay_ranks())
    path = tmp_path / "ledger-1.jsonl"
    path.write_text("broken\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(LedgerError, match=r"ledger-1\.jsonl:1 is not JSON"):
        read_figures(tmp_path)


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, LedgerFigures]:
    return {
        "stock": read_figures(write(tmp_path / "stock", stock_ranks())),
        "overlay": read_figures(write(tmp_path / "overlay", overlay_ranks())),
    }


TOKENS = [[1, 2, 3], [4, 5]]


def test_report_of_a_good_run(figures: dict[str, LedgerFigures]) -> None:
    tokens = {"stock": TOKENS, "overlay": [list(ids) for ids in TOKENS]}
    report = build_report("0.11.0", figures, tokens, {"stock": 12.5, "overlay": 11.0})
    assert failures(report, figures) == []
    assert report["tokens_equal"] is True
    assert report["requests"] == 2
    assert report["stock_version"] == "0.11.0"
    assert report["dp_collectives_per_decode_step"] == {"stock": 1.0, "overlay": 0.0}
    assert report["sync_host_us_per_step"] == {"stock": 65.0, "overlay": 0.0}
    assert report["padded_token_share"] == {"stock": 0.3333, "overlay": 0.1111}
    assert report["tpot_ms"] == {"stock": 12.5, "overlay": 11.0}
    assert report["ep_bs_ragged_steps"] == 2
    assert report == json.loads(json.dumps(report))


def test_different_tokens_are_a_failure(figures: dict[str, LedgerFigures]) -> None:
    tokens = {"stock": TOKENS, "overlay": [[1, 2, 3], [4, 6]]}
    report = build_report("0.11.0", figures, tokens, {"stock": 1.0, "overlay": 1.0})
    assert report["tokens_equal"] is False
    assert failures(report, figures) == ["The tokens of 1 of 2 requests differ: [1]."]


def test_each_broken_promise_is_named(figures: dict[str, LedgerFigures], tmp_path: Path) -> None:
    swapped = {"stock": figures["overlay"], "overlay": figures["stock"]}
    report = build_report("0.11.0", swapped, {"stock": TOKENS, "overlay": TOKENS}, {"stock": 1.0, "overlay": 1.0})
    found = " ".join(failures(report, swapped))
    assert "Stock ran without a DP metadata collective" in found
    assert "The overlay left 6 DP metadata collectives" in found
    assert "No decode step had different token counts" in found


def test_a_mask_in_the_overlay_run_is_a_failure(figures: dict[str, LedgerFigures], tmp_path: Path) -> None:
    ranks = overlay_ranks()
    for event in ranks[0]:
        if event["ev"] == "ep" and event["step"] >= 0:
            event["mask"] = True
    figures["overlay"] = read_figures(write(tmp_path / "masked", ranks))
    report = build_report("0.11.0", figures, {"stock": TOKENS, "overlay": TOKENS}, {"stock": 1.0, "overlay": 1.0})
    assert failures(report, figures) == ["The overlay passed an active mask to 6 dispatches."]


@pytest.mark.parametrize(("step", "counts"), [(-1, (0, 1)), (2, (1, 0))])
def test_violations(figures: dict[str, LedgerFigures], tmp_path: Path, step: int, counts: tuple[int, int]) -> None:
    ranks = overlay_ranks()
    ranks[1].append({"ev": "violation", "rule": "duplicate_expert", "comm": "c-ep", "step": step})
    figures["overlay"] = read_figures(write(tmp_path / "violated", ranks))
    assert (figures["overlay"].violations, figures["overlay"].start_up_violations) == counts
    report = build_report("0.11.0", figures, {"stock": TOKENS, "overlay": TOKENS}, {"stock": 1.0, "overlay": 1.0})
    assert len(failures(report, figures)) == 1


@pytest.mark.parametrize("tokens", [{"stock": [], "overlay": []}, {"stock": TOKENS, "overlay": TOKENS[:1]}])
def test_runs_without_the_same_requests_are_refused(figures: dict[str, LedgerFigures], tokens: Any) -> None:
    with pytest.raises(LedgerError, match="requests with stock"):
        build_report("0.11.0", figures, tokens, {"stock": 1.0, "overlay": 1.0})

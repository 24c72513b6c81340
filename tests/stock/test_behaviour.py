# SPDX-License-Identifier: Apache-2.0
"""The overlay on real stock 0.11.0 objects; what runs in the fresh processes is in stock_checks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fresh import run

pytestmark = pytest.mark.timeout(300)


def check(name: str, *arguments: object, **environ: str) -> tuple[Any, str]:
    code = f"import json, stock_checks; print(json.dumps(stock_checks.{name}(*{[str(a) for a in arguments]!r})))"
    result, log = run(code, **environ)
    return result, log


@pytest.fixture(scope="module")
def decisions(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return check("decisions", tmp_path_factory.mktemp("models"))[0]


@pytest.mark.parametrize(
    ("variant", "state", "codes"),
    [
        ("eager", "SKIP", []),
        ("piecewise", "SKIP", []),
        ("piecewise_default", "SKIP", []),
        ("no_recompute", "SKIP", []),
        ("decode_max_num_seqs", "SKIP", []),
        ("ascend_scheduler", "SYNC", ["DSP104"]),
        ("async_scheduling", "SYNC", ["DSP104"]),
        ("piecewise_short", "SYNC", ["DSP104"]),
    ],
)
def test_decision_from_real_configuration(decisions: Any, variant: str, state: str, codes: list[str]) -> None:
    found = decisions[variant]
    assert (found["state"], found["codes"]) == (state, codes)
    # The engine makes no plan of its own: what is in force in its workers binds it, and nothing else.
    stock = [found["facts"]["max_num_batched_tokens"], 0, []]
    assert found["in force"]["OFF"] == found["in force"]["SYNC"] == stock
    if state == "SKIP":
        assert found["facts"]["max_num_seqs"] == 16
        assert found["in force"]["SKIP"] == [16, 0, [[16, "one"]]]
        # Stock swaps its default capture list for this model type; a step of 16 tokens is padded to 20 there.
        assert found["bound"] == (20 if variant == "piecewise_default" else 16)


def test_facts_of_the_decode_node(decisions: Any) -> None:
    facts = decisions["eager"]["facts"]
    expected = {
        "is_moe": True,
        "data_parallel_size": 4,
        "kv_role": "kv_consumer",
        "scheduler_cls": "vllm_ascend.core.recompute_scheduler.RecomputeScheduler",
        "recompute_in_effect": True,
        "worker_cls": "vllm_ascend.worker.worker_v1.NPUWorker",
        "hidden_size": 1024,
        "num_experts": 16,
        "experts_per_token": 8,
        "graph_mode": "NONE",
        "hccl_buffsize_mb": 200,
        "mc2_tokens_capacity": 16,
    }
    assert {name: facts[name] for name in expected} == expected
    assert decisions["piecewise"]["facts"]["capture_sizes"] == [1, 2, 4, 8, 16, 40]
    assert decisions["piecewise_short"]["facts"]["capture_sizes"] == [1, 2, 4, 8]
    # The flag alone proves nothing: here another scheduler is in force.
    for variant in ("ascend_scheduler", "async_scheduling"):
        assert decisions[variant]["facts"]["recompute_requested"]
        assert not decisions[variant]["facts"]["recompute_in_effect"]


def test_a_long_prompt_is_chunked_by_every_known_scheduler(tmp_path: Path) -> None:
    found, log = check("chunking", tmp_path)
    assert {entry["scheduler"] for entry in found.values()} == {
        "RecomputeScheduler",
        "Scheduler",
        "AsyncScheduler",
        "AscendScheduler",
    }
    for entry in found.values():
        assert (entry["before"], entry["largest"], entry["total"]) == (4096, 16, 16000)
    assert {name: entry["clamped"] for name, entry in found.items()} == {
        "recompute": 16,
        "vllm": 4096,
        "async": 4096,
        "ascend_chunked": 4096,
    }
    # Only this one skips; the other budgets are what their engines would be asked to keep to.
    assert {name for name, entry in found.items() if entry["state"] == "SKIP"} == {"recompute"}
    assert log.count("at most 16 tokens per step instead of 4096") == 1


def test_field_case_20_sync_returns_the_local_count(tmp_path: Path) -> None:
    """What the callers unpack; the flag for prefill stays local (field case 15), eager or not."""
    found, _ = check("sync", tmp_path)
    assert found["first"] == [3, False, False]
    assert found["second"] == [3, True, False]
    assert (found["dtype"], found["device"], found["shape"]) == ("torch.int32", "cpu", [4])
    assert found["max"] == 3
    assert found["fresh"] == [3, 3, 3, 3]
    assert found["padded"] == [2, 2, 8, 16, 17]
    assert found["alone"] == [3, None, True, False]
    assert found["reached_stock"]
    assert found["profile_reaches_stock"]


def test_leaving_mc2_raises(tmp_path: Path) -> None:
    found, _ = check("selector", tmp_path)
    assert found["stock"] == ["MC2", "ALLTOALL"]
    assert found["skip"] == "MC2"
    for call in ("positional", "keyword"):
        kind, message = found[call]
        assert kind == "MC2OnlyError"
        assert message.startswith("DSP301 DP rank 2: a step of 17 tokens would use ALLTOALL")
        assert "at most 16 tokens" in message
    assert found["profile"] == "ALLTOALL"


def test_operator_arguments(tmp_path: Path) -> None:
    found, _ = check("operator_arguments", tmp_path)
    for kind in ("dispatch", "combine"):
        assert (found["stock"][kind]["global_bs"], found["stock"][kind]["mask"]) == (0, True)
        assert (found["skip"][kind]["global_bs"], found["skip"][kind]["mask"]) == (64, False)
        removed = set(found["stock"][kind]["names"]) - set(found["skip"][kind]["names"])
        assert removed == {"x_active_mask"}
        assert found["largest"][kind]["global_bs"] == 64
    kind, message = found["too_many"]
    assert kind == "MC2OnlyError"
    assert message.startswith("DSP302 EP rank 1: 17 rows")


def test_field_case_25_profile_runs_draw_distinct_experts(tmp_path: Path) -> None:
    found, _ = check("forced_load_balance", tmp_path)
    # Stock: 16 * 15 * .. * 9 / 16^8 = 12 % of the rows have eight distinct experts.
    assert found["stock"]["rows_with_repeats"] > 500
    skip = found["skip"]
    assert skip["rows_with_repeats"] == 0
    assert (skip["shape"], skip["dtype"]) == (found["stock"]["shape"], found["stock"]["dtype"])
    assert skip["range"] == [0, 15]
    # 10 * 64 * 8 / 16 = 320 expected, standard deviation about 13 without repetition.
    assert all(abs(count - 320) < 80 for count in skip["per_expert"])
    assert found["outside_profile"]["first_row"] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert found["outside_profile"]["rows_with_repeats"] == 0


def test_all_rounds(tmp_path: Path) -> None:
    found, log = check("latching", tmp_path)
    status = found["status"]
    assert (status["state"], status["reasons"]) == ("skip", [])
    assert status["verdict"]["agreed"]
    assert status["plan"]["global_bs"] == 64
    assert status["settings"]["agreement_timeout_s"] == {"value": 5.0, "source": "additional_config"}
    assert log.count("DSP404 vllm-ascend 0.27.1rc1 and later refuse additional_config.dp_sync_patch") == 1
    assert (found["stock_capacity"], found["capacity"]) == (40, 16)
    assert sorted(found["captures"]) == sorted(found["batch_sizes"]) == [1, 2, 4, 8, 16]
    assert found["batch_sizes"][-1] == 16
    assert found["padded"] == [1, 4, 16]
    assert found["undecided"] == [None, ["stock", "stock"]]
    refused = (
        "AgreementError: DSP209 DP rank 0: the ranks skip, and the engine process of this rank has not confirmed that "
        "it keeps to their bound; it has to load the overlay as well"
    )
    assert found["unconfirmed"] == [True, [refused, refused]]
    assert found["confirmed"] == [False, ["stock", "stock"], 16, "one"]
    assert found["latched again"] == [False, ["stock", "stock"]]
    assert found["rounds"] == ["start-1", "kv-cache-1", "engine-1"]
    assert log.count("DSP000 skip: no DP metadata all_reduce on rank 0; bound 16 tokens per DP rank, global_bs 64") == 1
    assert found["undo"].startswith("DpSyncPatchError: DSP010")
    assert found["another_runner"].startswith("AgreementError: DSP205")
    assert found["moved"].startswith("AgreementError: DSP206")
    assert "mc2_tokens_capacity 40 instead of 16" in found["moved"]
    assert found["other_mode"].startswith(
        "AgreementError: DSP206 the configuration moved after start-up: graph_level sync instead of one"
    )


@pytest.fixture(scope="module")
def later_rounds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return check("later_rounds", tmp_path_factory.mktemp("models"))[0]


_MISSING = "no answer within 0.3 s from ranks 1-3, in the round '{}' of the start-up"
_SILENT = "no verdict from rank 0 within 120 s, in the round '{}' of the start-up"
_DIFFER = "ranks differ from ranks 1-3; rank 0: version '0.1.0' instead of '0.0.9'"
_MOVED, _ALIKE = "the configuration moved after start-up: ", "engine and workers have to be set alike: "


@pytest.mark.parametrize(("name", "code", "what"), [("kv-cache", "DSP206", _MOVED), ("engine", "DSP208", _ALIKE)])
def test_a_later_round_says_what_was_wrong_with_it(later_rounds: Any, name: str, code: str, what: str) -> None:
    """Ranks that are late or dead have not moved, and are not set otherwise."""
    found = {kind.partition(": ")[2]: entry for kind, entry in later_rounds.items() if kind.startswith(f"{name}: ")}
    assert found["missing ranks"][0] == f"AgreementError: DSP202 {_MISSING.format(name)}"
    assert found["a silent rank 0"][0] == f"AgreementError: DSP203 {_SILENT.format(name)}"
    assert found["ranks differ"][0] == f"AgreementError: {code} {what}{_DIFFER}"
    assert found["equal"][0] == ""
    for kind in ("missing ranks", "a silent rank 0", "ranks differ", "equal"):
        _, unconfirmed, refused = found[kind]
        assert unconfirmed is not (name == "engine" and kind == "equal"), kind
        assert refused.startswith("AgreementError: DSP209 DP rank 0: ") is unconfirmed, kind


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mode", {"mode": "require"}),
        ("graph_mode", {"graph_mode": "sync"}),
        ("mode and graph_mode", {"mode": "off", "graph_mode": "uniform"}),
    ],
)
def test_an_engine_that_is_set_otherwise_is_named(later_rounds: Any, name: str, values: dict[str, str]) -> None:
    """With each setting, both values and where they are from."""
    error, unconfirmed, _ = later_rounds[f"engine: another {name}"]
    wrong = "; ".join(
        f"{setting}={value!r} (additional_config) in the engine process of DP rank 0, "
        "and 'auto' (default) in its worker"
        for setting, value in values.items()
    )
    assert error.startswith(f"AgreementError: DSP208 {_ALIKE}{wrong}; ranks differ from ranks 1-3; rank 0: ")
    assert unconfirmed


def test_an_engine_that_does_not_keep_to_the_agreed_is_named(later_rounds: Any) -> None:
    larger, level, other = (
        later_rounds[f"engine: {name}"] for name in ("a larger budget", "another graph level", "another rank's")
    )
    assert larger[0].startswith(
        f"AgreementError: DSP208 {_ALIKE}the scheduler of DP rank 0 allows 17 tokens per step; ranks differ from "
    )
    assert level[0].startswith(
        f"AgreementError: DSP208 {_ALIKE}the scheduler of DP rank 0 keeps to graph level uniform; ranks differ from "
    )
    # Rank 0 has nothing to say against itself, and hears of the other.
    assert other[0].startswith(
        f"AgreementError: DSP208 {_ALIKE}ranks differ from ranks 1-3; rank 0: differs '' instead"
    )
    assert "mode='off' (environment) in the engine process of DP rank 1" in other[0]
    assert [larger[1], level[1], other[1]] == [True] * 3
    assert later_rounds["engine: a smaller budget"] == ["", False, ""]


def test_without_a_skip_there_is_nothing_to_confirm(later_rounds: Any) -> None:
    assert later_rounds["engine: nothing is in force"][0] == ""
    assert later_rounds["no round"]


def second_engines(folder: Path, *names: str) -> list[dict[str, Any]]:
    found, _ = check("second_engines", folder, *names)
    steps: list[dict[str, Any]] = found["steps"]
    return steps


@pytest.mark.parametrize(
    ("names", "state"),
    [
        (("dense", "another dense", "one rank", "another of one rank"), "off"),
        (("sync", "another sync"), "sync"),
        (("one rank", "another sync"), None),
    ],
)
def test_engines_that_do_not_skip_may_follow_each_other(
    tmp_path: Path, names: tuple[str, ...], state: str | None
) -> None:
    """Each is decided by itself. Where there is something to agree about, in a first round of its own."""
    steps = second_engines(tmp_path, *names)
    assert [step["error"] for step in steps] == [""] * len(names)
    if state:
        assert {step["state"] for step in steps} == {state}
    assert [step["max_num_seqs"] for step in steps] == [8 if "another" in name else 16 for name in names]
    rounds = steps[-1]["rounds"]
    if names[0] == "sync":
        assert rounds == ["start-1", "start-2"]
        assert [step["agreed"] for step in steps] == [False, True]  # not the verdict of the first
    else:
        assert rounds == [f"start-{number}" for number, name in enumerate(names, 1) if "sync" in name]


@pytest.mark.parametrize(
    "names",
    [("skip", "another skip"), ("skip", "sync"), ("skip", "dense"), ("sync", "skip"), ("dense", "skip"),
     ("one rank", "skip")],
)  # fmt: skip
def test_two_engines_of_which_one_skips_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    """What the skip has latched in this process would be that of the other."""
    first, second = second_engines(tmp_path, *names)
    assert first["error"] == ""
    assert second["error"] == ("AgreementError: DSP205 another model runner with another configuration in this process")
    for name in ("state", "rounds", "unconfirmed", "max_num_seqs"):
        assert first[name] == second[name]


def test_an_engine_that_is_started_again_keeps_the_verdict_and_has_to_be_confirmed(tmp_path: Path) -> None:
    first, again = second_engines(tmp_path, "skip", "skip")
    assert (first["error"], again["error"]) == ("", "")
    assert (first["state"], again["state"]) == ("skip", "skip")
    assert first["rounds"] == again["rounds"] == ["start-1"]
    assert again["unconfirmed"]


def test_refusals_are_said_and_require_stops(tmp_path: Path) -> None:
    found, log = check("refusing", tmp_path)
    missing = found["missing_peers"]
    assert (missing["error"], missing["state"]) == ("", "sync")
    assert missing["reasons"] == ["DSP202 no answer within 0.2 s from ranks 1-3"]
    assert "DSP202 no answer within 0.2 s from ranks 1-3; in force on rank 0: sync (stock vllm-ascend)" in log
    assert found["require"]["error"].startswith("SkipRequiredError: DSP204")
    lost = "AgreementError: DSP207 rank 0 lost the key-value store in the process of rank 0: "
    assert found["no_store"]["error"].startswith(lost)
    assert (found["off"]["error"], found["off"]["state"]) == ("", "off")
    assert (found["one_rank"]["error"], found["one_rank"]["state"]) == ("", "off")
    assert found["one_rank"]["reasons"][0].startswith("DSP001")
    assert found["unknown_key"]["error"].startswith("SettingsError: DSP401")

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
    if state == "SKIP":
        assert found["clamp"] == found["facts"]["max_num_seqs"] == 16
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


def test_both_rounds(tmp_path: Path) -> None:
    found, log = check("latching", tmp_path)
    status = found["status"]
    assert (status["state"], status["reasons"]) == ("skip", [])
    assert status["verdict"]["agreed"]
    assert status["plan"]["global_bs"] == 64
    assert status["settings"]["agreement_timeout_s"] == {"value": 5.0, "source": "additional_config"}
    assert (found["stock_capacity"], found["capacity"]) == (40, 16)
    assert sorted(found["captures"]) == sorted(found["batch_sizes"]) == [1, 2, 4, 8, 16]
    assert found["batch_sizes"][-1] == 16
    assert found["padded"] == [1, 4, 16]
    assert found["confirmed"]
    assert log.count("DSP000 skip: no DP metadata all_reduce on rank 0; bound 16 tokens per DP rank, global_bs 64") == 1
    assert found["undo"].startswith("DpSyncPatchError: DSP010")
    assert found["another_runner"].startswith("AgreementError: DSP205")
    assert found["moved"].startswith("AgreementError: DSP206")
    assert "mc2_tokens_capacity 40 instead of 16" in found["moved"]
    assert found["other_mode"].startswith(
        "AgreementError: DSP206 the configuration moved after start-up: graph_level sync instead of one"
    )


def test_refusals_are_said_and_require_stops(tmp_path: Path) -> None:
    found, log = check("refusing", tmp_path)
    missing = found["missing_peers"]
    assert (missing["error"], missing["state"]) == ("", "sync")
    assert missing["reasons"] == ["DSP202 no answer within 0.2 s from rank(s) 1, 2, 3"]
    assert "DSP202 no answer within 0.2 s from rank(s) 1, 2, 3; in force on rank 0: sync (stock vllm-ascend)" in log
    assert found["require"]["error"].startswith("SkipRequiredError: DSP204")
    lost = "AgreementError: DSP207 rank 0 lost the key-value store in the process of rank 0: "
    assert found["no_store"]["error"].startswith(lost)
    assert (found["off"]["error"], found["off"]["state"]) == ("", "off")
    assert (found["one_rank"]["error"], found["one_rank"]["state"]) == ("", "off")
    assert found["one_rank"]["reasons"][0].startswith("DSP001")
    assert found["unknown_key"]["error"].startswith("SettingsError: DSP401")

# SPDX-License-Identifier: Apache-2.0
"""The overlay on stock that skips by itself: the agreed verdict decides, in both directions, in every place.

What runs in the fresh processes is in own_skip_checks.py. Steps of real ranks are in tests/versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fresh import run_after_stock
from this_stock import VERSION

pytestmark = pytest.mark.timeout(1200)

# Stock's own words when its all_reduce asks for a group that this process does not have.
NO_GROUP = "data parallel group is not initialized"
# What is left of a result without the counts: the own tokens, the flag for prefill, the graph mode.
_REST = {"0.12.0rc1": [3, None, True], "0.13.0": [3, None, True, 0], "0.18.0": [False, None, 0]}
_REST_OF_DRAFTS = {"0.13.0": [3, None, False, 0], "0.18.0": [3, None, False]}
_MODE = [3, None, "NONE"]


def check(name: str, *arguments: object) -> tuple[Any, str]:
    given = [str(argument) for argument in arguments]
    code = f"import json, own_skip_checks; print(json.dumps(own_skip_checks.{name}(*{given!r})))"
    result, log = run_after_stock(code)
    return result, log


def test_field_case_20_skip_returns_the_local_count(tmp_path: Path) -> None:
    """As stock's own skip does: arity, types, dtype, device and length; a profile run synchronises."""
    found, log = check("passes", tmp_path)
    local = {"counts": [3, 3], "dtype": "torch.int32", "device": "cpu"}
    expected = {"target": {"values": _REST.get(VERSION, _MODE), **local}}
    if VERSION != "0.12.0rc1":
        expected["draft"] = {"values": _REST_OF_DRAFTS.get(VERSION, _MODE), **local}
    assert found["state"] == "skip"
    assert (found["unconfirmed"], found["confirmed"]) == (["DSP209"] * 2, ["stock"] * 2)
    assert found["skip"] == expected
    assert found["counted"]["passes_skipped"] == len(expected)
    assert found["counted"]["padding_avoided_tokens"] == 13 * len(expected)
    assert found["alone"] == [1, True]
    assert {kind: NO_GROUP in result for kind, result in found["profile run"].items()} == dict.fromkeys(expected, True)
    assert found["capacity"] == 16
    assert found["undo"].startswith("DSP010")
    assert log.count("DSP000 skip: no DP metadata all_reduce on rank 0; bound 16 tokens per DP rank, global_bs 32") == 1


def test_sync_switches_stocks_own_skip_off(tmp_path: Path) -> None:
    found, log = check("synced", tmp_path)
    assert found["state"] == "sync"
    assert found["reasons"][0].startswith("DSP121")
    assert NO_GROUP in found["sync"]
    assert "in force on rank 0: sync (stock vllm-ascend, its own skip switched off)" in log


def test_field_case_30_a_rank_that_is_switched_off_alone_synchronises_with_its_peers(tmp_path: Path) -> None:
    """Stock's own skip on it would leave them alone in the all_reduce."""
    found, _ = check("switched_off_alone", tmp_path)
    assert found["state"] == "sync"
    assert any(reason.startswith("DSP201") for reason in found["reasons"]), found["reasons"]
    assert NO_GROUP in found["sync"]


def test_field_case_30_a_missing_peer_is_an_error(tmp_path: Path) -> None:
    error, _ = check("without_a_peer", tmp_path)
    assert error == (
        "AgreementError: DSP202 no answer within 0.2 s from rank 1; without the overlay they would skip alone"
    )


def test_no_other_device_counts_as_a2_or_a3() -> None:
    found, _ = check("device_types")
    a2, a3 = ("_910B", "_910_93") if VERSION == "0.12.0rc1" else ("A2", "A3")
    assert found.pop(a2) == "A2"
    assert found.pop(a3) == "A3"
    assert set(found.values()) == {"_310P", "_910_95" if VERSION == "0.12.0rc1" else "A5"}

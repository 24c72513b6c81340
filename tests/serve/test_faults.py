# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on one rank only: it lacks the overlay, has other settings, comes late, or leaves MC2.

Every rank is a `vllm serve` of its own where the ranks must differ.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import demo
import httpx
import pytest
from demo import Cluster
from launched_ranks import (
    MAX_NUM_SEQS,
    RECOMPUTE,
    SMALL,
    Baseline,
    Event,
    changed_overlay,
    launched_apart,
    read_ranks,
    scheduled,
    server,
    wait_until_idle,
)

BUDGET = int(SMALL[SMALL.index("--max-num-batched-tokens") + 1])


@dataclass(frozen=True)
class Answers:
    """Log and events of each rank, and the tokens of each prompt from each rank."""

    logs: list[str]
    ranks: list[list[Event]]
    tokens: list[list[list[int]]]


@pytest.fixture(scope="module")
def unequal(baseline: Baseline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    """Two deployments of two ranks each, started side by side: without the overlay on rank 1, and with another one."""
    folder = tmp_path_factory.mktemp("unequal")
    other = changed_overlay(folder / "other", "__init__.py", '__version__ = "', '__version__ = "9.')
    deployments = {
        "missing": launched_apart(
            folder / "missing",
            baseline.model,
            RECOMPUTE,
            overlay=[True, False],
            environments=[{"DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S": "3"}, {}],
        ),
        "different": launched_apart(
            folder / "different",
            baseline.model,
            (*RECOMPUTE, "--distributed-executor-backend", "mp"),  # an engine that cannot see what its worker decided
            overlay=[True, True],
            environments=[{}, {"DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S": "77"} | other],
        ),
    }
    result = {}
    with Cluster() as cluster, ThreadPoolExecutor(2) as pool:
        servers = [one for ranks in deployments.values() for one in ranks]
        for one in servers:
            cluster.start(one.process)
        cluster.wait_until_ready({one.process: f"{one.url}/health" for one in servers})
        for name, ranks in deployments.items():
            tokens = []
            for prompt, count in baseline.prompts:
                both = [pool.submit(rank.complete, prompt, count) for rank in ranks]
                tokens.append([answer.result() for answer in both])
            wait_until_idle(ranks)
            result[name] = Answers([], [], tokens)
        cluster.check()
    for name, ranks in deployments.items():
        result[name].logs.extend(one.log for one in ranks)
        result[name].ranks.extend(read_ranks(ranks))
    return result


def assert_stock_ran(baseline: Baseline, answers: Answers) -> None:
    """All ranks in `sync`: tokens and steps as of stock, the all_reduce in every step, and stock's arguments of MC2."""
    assert answers.tokens == [[tokens, tokens] for tokens in baseline.tokens]
    assert [scheduled([events]) for events in answers.ranks] == [scheduled(baseline.ranks)] * 2
    for log, events in zip(answers.logs, answers.ranks, strict=True):
        assert "DSP000" not in log
        steps = [event["step"] for event in events if event["ev"] == "step"]
        assert len(steps) >= 32
        reduced = Counter(event["step"] for event in events if event.get("group") == "dp:0" and event["step"] >= 0)
        assert reduced == Counter(steps)
        ep = [event for event in events if event["ev"] == "ep" and event["step"] >= 0]
        assert ep
        assert all(event["mask"] for event in ep)
        assert all(event["global_bs"] == 2 * event["bs"] for event in ep)


def test_field_case_30_a_rank_without_the_overlay(baseline: Baseline, unequal: dict[str, Answers]) -> None:
    with_overlay, without = unequal["missing"].logs
    (line,) = re.findall(r".*\bDSP\d{3} .*", with_overlay)
    assert line.endswith("DSP202 no answer within 3 s from rank 1; in force on rank 0: sync (stock vllm-ascend)")
    assert not re.search(r"\bDSP\d{3}\b", without)
    assert_stock_ran(baseline, unequal["missing"])


def test_field_case_30_other_settings_and_another_version(baseline: Baseline, unequal: dict[str, Answers]) -> None:
    for rank, log in enumerate(unequal["different"].logs):
        (line,) = re.findall(r".*\bDSP\d{3} .*", log)
        assert "DSP201 ranks differ from rank 0; rank 1: " in line
        assert "settings.agreement_timeout_s 77.0 instead of 120.0" in line
        assert re.search(r"version '9\.(\S+)' instead of '\1'", line)
        assert line.endswith(f"; in force on rank {rank}: sync (stock vllm-ascend)")
    assert_stock_ran(baseline, unequal["different"])


@pytest.mark.long
def test_ranks_with_other_capture_sizes_do_not_skip(baseline: Baseline, tmp_path: Path) -> None:
    """The overlay names both lists, and leaves the ranks to stock, which ends while it captures."""
    graphs = [
        json.dumps({"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": sizes})
        for sizes in ([1, 2, 4, 8], [1, 2, 8])
    ]
    servers = launched_apart(
        tmp_path,
        baseline.model,
        RECOMPUTE,
        overlay=[True, True],
        environments=[{"VLLM_DISABLE_COMPILE_CACHE": "1", "VIRTUAL_NPU_TIMEOUT_S": "8"}] * 2,
        own_arguments=[("--no-enforce-eager", "--compilation-config", config) for config in graphs],
    )
    with Cluster() as cluster:
        for one in servers:
            cluster.start(one.process)
        for one in reversed(servers):
            assert one.ended_within(180), f"{one.process.name} hangs"
    for rank, one in enumerate(servers):
        (line,) = re.findall(r".*\bDSP\d{3} .*", one.log)
        assert "DSP201 ranks differ from rank 0; rank 1: facts.capture_sizes [1, 2, 8] instead of [1, 2, 4, 8]" in line
        assert line.endswith(f"; in force on rank {rank}: sync (stock vllm-ascend)")
    assert "AssertionError: Aclgraph runtime mode mismatch" in servers[1].log


def test_a_rank_that_leaves_mc2_stops_before_it_communicates(baseline: Baseline, tmp_path: Path) -> None:
    """The last line. The scheduler of rank 1 is let loose after its engine has confirmed, and a prompt comes."""
    confirm = "engine.model_executor.collective_rpc(runtime.confirm_engine, args=kept)"
    loose = f"{confirm}; scheduler.max_num_scheduled_tokens = {BUDGET}"
    unbounded = changed_overlay(tmp_path, "patches/engine_startup.py", confirm, loose)
    environments = [{}, unbounded]
    servers = launched_apart(tmp_path, baseline.model, RECOMPUTE, overlay=[True, True], environments=environments)
    prompt, count = baseline.prompts[0]
    assert len(prompt) > BUDGET > MAX_NUM_SEQS
    with Cluster() as cluster:
        for one in servers:
            cluster.start(one.process)
        cluster.wait_until_ready({one.process: f"{one.url}/health" for one in servers})
        with pytest.raises(httpx.HTTPError):
            servers[1].complete(prompt, count)
        for one in reversed(servers):
            # An API server whose engine has died ends with status 0 all the same.
            assert one.ended_within(60), f"{one.process.name} did not notice"
    peer, culprit = (one.log for one in servers)
    for rank, log in enumerate((peer, culprit)):
        assert f"DSP000 skip: no DP metadata all_reduce on rank {rank}; bound {MAX_NUM_SEQS} tokens" in log
    error = (
        f"MC2OnlyError: DSP301 DP rank 1: a step of {BUDGET} tokens would use ALLTOALL, but the ranks agreed on MC2 "
        f"only, with at most {MAX_NUM_SEQS} tokens per DP rank"
    )
    assert error in culprit
    assert "DSP301" not in peer
    # The peer says for whom it waits, and that this rank never entered another operator.
    last = r"rank 1 \(process \d+, last operator MoeDistributeCombine #\d+, finished\)"
    assert re.search(rf"MoeDistributeDispatch.*rank 0 of 2: .*{last}", peer)
    for events in read_ranks(servers):
        last_step = max(event["step"] for event in events if event["ev"] == "step")
        assert [event["ev"] for event in events if event.get("step") == last_step] == ["step"]
        serving = [event for event in events if event.get("step", -1) >= 0]
        assert not [event for event in serving if event["ev"] == "collective" and event["group"] != "stateless"]


@pytest.mark.long
def test_field_case_28_a_rank_is_later_than_the_device_waits(baseline: Baseline, tmp_path: Path) -> None:
    """A rank is 30 s late at its first dispatch, and the device waits 20 s. The half with 5 s is in the file beside."""
    late = {"VIRTUAL_NPU_DELAY": "1:30000@1", "VIRTUAL_NPU_TIMEOUT_S": "20"}
    flags = ["--data-parallel-size", "2", "--api-server-count", "1", *RECOMPUTE]
    node = server(tmp_path / "node", baseline.model, flags, overlay=True, environment=late)
    with Cluster() as cluster:
        cluster.start(node.process)
        with pytest.raises(demo.DemoError, match="ended with status"):
            cluster.wait_until_ready({node.process: f"{node.url}/health"})
        assert node.process.returncode() != 0
    waited = r"timeout, waited 20 s for rank 1 \(process \d+, last operator MoeDistributeDispatch #1, still in it\)"
    assert re.search(rf"MoeDistributeDispatch.*rank 0 of 2: {waited}", node.log)

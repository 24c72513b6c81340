# SPDX-License-Identifier: Apache-2.0
"""The collective on the graph mode, begun before the inputs are prepared: over real gloo, in a group of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode

from dp_sync_patch import live, metrics, runtime
from dp_sync_patch.errors import MC2OnlyError
from dp_sync_patch.patches import graph_mode

NONE, PIECEWISE, FULL = (mode.value for mode in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """In `skip` with graph level `sync`. Yields the modes that were posted."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(graph_mode, "get_dp_group", lambda: SimpleNamespace(cpu_group=torch.distributed.group.WORLD))
    monkeypatch.setattr(runtime, "sync_graph_mode", True)
    monkeypatch.setattr(runtime, "dp_rank", lambda: 3)
    monkeypatch.setattr(graph_mode, "_posted", None)
    posted, all_of_it = [], []
    real = graph_mode._post

    def post(mode: int) -> Any:
        posted.append(mode)
        all_of_it.append(real(mode))
        return all_of_it[-1]

    monkeypatch.setattr(graph_mode, "_post", post)
    yield posted
    # The group waits for gloo's thread, and does not give the interpreter away for it; gloo's thread needs that where
    # it has the last reference to a work.
    for one in all_of_it:
        one.work.wait()
    torch.distributed.destroy_process_group()


def prepare(monkeypatch: pytest.MonkeyPatch, mode: int, prepared: Callable[[], object] = lambda: None) -> None:
    """`_prepare_inputs` of a batch for which stock will choose this mode."""
    monkeypatch.setattr(live, "graph_mode_of_step", lambda runner, scheduler_output: CUDAGraphMode(mode))
    graph_mode.post_graph_mode(lambda *_: prepared(), None, ("scheduler_output",), {})


@pytest.mark.parametrize("mode", [NONE, PIECEWISE, FULL])
def test_what_was_posted_is_waited_for(monkeypatch: pytest.MonkeyPatch, one_rank: list[int], mode: int) -> None:
    during: list[list[int]] = []
    prepare(monkeypatch, mode, lambda: during.append(list(one_rank)))
    assert during == [[mode]]  # before the inputs
    assert graph_mode.lowest(mode) == mode
    assert one_rank == [mode]
    # A dummy run prepares nothing: its mode is told when it is chosen.
    assert graph_mode.lowest(FULL) == FULL
    assert one_rank == [mode, FULL]


def test_a_higher_mode_than_posted_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, NONE)
    assert graph_mode.lowest(FULL) == NONE


def test_a_lower_mode_than_posted_ends_the_rank_before_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = metrics.counts.mc2_only_errors
    prepare(monkeypatch, FULL)
    with pytest.raises(MC2OnlyError, match="DSP305 DP rank 3: told the other ranks of a FULL graph, and has none"):
        graph_mode.lowest(NONE)
    assert metrics.counts.mc2_only_errors == errors + 1


@pytest.mark.parametrize("attribute", ["sync_graph_mode", "in_profile_run"])
def test_nothing_is_posted_without_the_level_and_in_profile_runs(
    monkeypatch: pytest.MonkeyPatch, one_rank: list[int], attribute: str
) -> None:
    monkeypatch.setattr(runtime, attribute, attribute == "in_profile_run")
    prepare(monkeypatch, FULL)
    assert one_rank == []

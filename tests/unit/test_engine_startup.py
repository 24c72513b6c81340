# SPDX-License-Identifier: Apache-2.0
"""The engine's part of the start-up: it asks its workers, keeps exactly to what they answer, and tells them so.

What the workers do with it, over a real store, is in tests/stock; with served requests in tests/versions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from decode_node import any_facts, decode_node, graph_node
from hypothesis import given
from hypothesis import strategies as st

from dp_sync_patch import metrics, runtime
from dp_sync_patch.errors import AgreementError, SkipRequiredError, logger
from dp_sync_patch.facts import Facts
from dp_sync_patch.patches.engine_startup import confirm_with_workers
from dp_sync_patch.plan import Plan, State, make_plan
from dp_sync_patch.settings import Settings

BUDGET = 4096  # of stock's scheduler


class Engine:
    """What an EngineCore has after its constructor, with workers that answer `answers`."""

    def __init__(self, answers: Callable[[], list[Plan | None]], *, dp: int = 4, **settings: Any) -> None:
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_size=dp, data_parallel_rank=2),
            kv_transfer_config=None,
            additional_config={"dp_sync_patch": settings},
        )
        self.answers = answers
        self.model_executor = SimpleNamespace(
            collective_rpc=self.collective_rpc, shutdown=lambda: self.calls.append("shut down")
        )
        self.calls: list[Any] = []

    def construct(self, vllm_config: str, *, log_stats: bool) -> None:
        """Stock's constructor."""
        self.calls.append((vllm_config, log_stats))
        self.scheduler = SimpleNamespace(
            max_num_scheduled_tokens=BUDGET,
            num_spec_tokens=0,
            scheduler_config=SimpleNamespace(long_prefill_token_threshold=0),
        )

    def collective_rpc(self, method: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        if method is runtime.plan_in_force:
            self.calls.append("asked")
            return self.answers()
        assert method is runtime.confirm_engine
        self.calls.append(args)
        return [None]

    @property
    def enforced(self) -> tuple[int, int]:
        return self.scheduler.max_num_scheduled_tokens, self.scheduler.scheduler_config.long_prefill_token_threshold


def start(answers: Callable[[], list[Plan | None]], **changes: Any) -> tuple[Engine, list[Any]]:
    """The engine after its constructor, and what it did after stock's."""
    engine = Engine(answers, **changes)
    confirm_with_workers(engine.construct, engine, ("config",), {"log_stats": True})
    stock, *after = engine.calls
    assert stock == ("config", True)
    return engine, after


@pytest.fixture(autouse=True)
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The engines that had their counters started; and no lines for hundreds of clamped schedulers."""
    engines: list[Any] = []
    monkeypatch.setattr(metrics, "start_in_workers", engines.append)
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield engines
    logger.setLevel(level)


@given(any_facts(), st.sampled_from(["auto", "refuse"]), st.integers(1, 4))
def test_the_engine_keeps_exactly_to_what_its_workers_answer(facts: Facts, graph_mode: str, workers: int) -> None:
    plan = make_plan(facts, graph_mode=graph_mode)
    if plan.state is not State.SKIP:
        return
    engine, after = start(lambda: [plan] * workers, graph_mode=graph_mode)
    budget = min(plan.sizes.token_budget, BUDGET)
    assert engine.enforced == (budget, 1 if plan.graph_level == "uniform" else 0)
    asked, (configured, confirmed, graph_level) = after
    assert asked == "asked"
    assert configured.values() == {**Settings().values(), "graph_mode": graph_mode}
    assert (confirmed, graph_level) == (budget, plan.graph_level)


UNIFORM = make_plan(
    graph_node([8, 16, 32], separate_routines=True, graph_mode="FULL_DECODE_ONLY"), graph_mode="uniform"
)


def test_uniform_batches_are_made_where_the_workers_answer_that() -> None:
    assert UNIFORM.graph_level == "uniform"
    engine, after = start(lambda: [UNIFORM], graph_mode="uniform")
    assert engine.enforced == (32, 1)
    assert after[1][1:] == (32, "uniform")


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_an_engine_whose_workers_do_not_skip_is_stocks(exported: list[Any], mode: str) -> None:
    """It does not plan by itself: this configuration alone would skip, see `decode_node`."""
    engine, after = start(lambda: [None, None], mode=mode)
    assert engine.enforced == (BUDGET, 0)
    assert after == ["asked"]
    assert exported == ([] if mode == "off" else [engine])


def test_one_dp_rank_has_nobody_to_ask(exported: list[Any]) -> None:
    engine, after = start(lambda: pytest.fail("asked"), dp=1, mode="require")
    assert engine.enforced == (BUDGET, 0)
    assert (after, exported) == ([], [])


def test_require_is_the_engines_word_too() -> None:
    with pytest.raises(SkipRequiredError, match="DSP204 mode=require in the engine of DP rank 2"):
        start(lambda: [None], mode="require")


def test_an_engine_that_is_switched_off_tells_its_skipping_workers(exported: list[Any]) -> None:
    """They refuse, since it is set otherwise than they are; it puts nothing on its scheduler meanwhile."""
    plan = make_plan(decode_node())
    engine, after = start(lambda: [plan], mode="off")
    assert engine.enforced == (BUDGET, 0)
    asked, (configured, budget, _) = after
    assert (asked, configured.mode, budget) == ("asked", "off", BUDGET)
    assert exported == []


def test_workers_that_cannot_answer_do_not_skip(caplog: pytest.LogCaptureFixture) -> None:
    """A worker without the package cannot even unpickle the question."""

    def fail() -> list[Plan | None]:
        raise ModuleNotFoundError("No module named 'dp_sync_patch'")

    logger.propagate, propagate = True, logger.propagate
    try:
        with caplog.at_level(logging.ERROR, logger.name):
            engine, after = start(fail)
    finally:
        logger.propagate = propagate
    assert engine.enforced == (BUDGET, 0)
    assert after == ["asked"]
    assert [record.message[:6] for record in caplog.records] == ["DSP210"]
    assert "No module named 'dp_sync_patch'" in caplog.text


def test_what_the_round_finds_ends_the_engine(exported: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Engine, method: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        if method is runtime.plan_in_force:
            return self.answers()
        raise AgreementError("DSP208", "engine and workers have to be set alike")

    monkeypatch.setattr(Engine, "collective_rpc", refuse)
    with pytest.raises(AgreementError, match="DSP208"):
        start(lambda: [make_plan(decode_node())])
    assert exported == []

# SPDX-License-Identifier: Apache-2.0
"""What stock is told when it asks whether to skip (0.12.0rc1 and later), for every state of the overlay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm_ascend import utils

from dp_sync_patch import runtime, stock
from dp_sync_patch.patches import points_of
from dp_sync_patch.plan import State

STOCK = stock.require()
POINTS = [point for point in points_of("worker", STOCK.vllm_ascend) if point.wrapper.__name__ == "decide_skip"]
DRAFT_POINTS = [point for point in POINTS if "is_draft_model" in point.signature]


@pytest.fixture(autouse=True)
def _no_warning_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_warned", set())


def ask(point: Any, own: bool, *, draft: bool = False, dense_drafter: bool = False) -> bool:
    """Calls the wrapper of a patch point as stock calls the function; `own` is what stock would answer."""
    text = {"architectures": ["Drafter"]} | ({} if dense_drafter else {"n_routed_experts": 8})
    drafter = SimpleNamespace(hf_text_config=SimpleNamespace(to_dict=lambda: text))
    config = SimpleNamespace(speculative_config=SimpleNamespace(method="mtp", draft_model_config=drafter))
    is_method = "." in point.name
    runner = SimpleNamespace(vllm_config=config) if is_method else None
    arguments = () if is_method else (config,)
    answer: bool = point.wrapper(lambda *_, **__: own, runner, arguments, {"is_draft_model": True} if draft else {})
    return answer


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.target)
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("state", "profile", "answer"),
    [
        (State.SKIP, False, True),
        (State.SKIP, True, False),
        (State.SYNC, False, False),
        (State.SYNC, True, False),
        (State.OFF, False, None),  # None: as stock answers
        (State.OFF, True, None),
    ],
)
def test_the_verdict_wins(
    monkeypatch: pytest.MonkeyPatch, point: Any, own: bool, state: State, profile: bool, answer: bool | None
) -> None:
    monkeypatch.setattr(runtime, "state", lambda: state)
    monkeypatch.setattr(runtime, "in_profile_run", profile)
    assert ask(point, own) == (own if answer is None else answer)


if DRAFT_POINTS:

    @pytest.mark.parametrize("point", DRAFT_POINTS, ids=lambda point: point.target)
    @pytest.mark.parametrize("dense", [True, False])
    def test_only_a_dense_drafter_keeps_the_answer_of_stock(
        monkeypatch: pytest.MonkeyPatch, point: Any, dense: bool
    ) -> None:
        """A busy rank may leave a draft pass out; an all_reduce there, new to stock, would make peers wait."""
        monkeypatch.setattr(utils, "_IS_DRAFTER_MOE_MODEL", None)
        monkeypatch.setattr(runtime, "state", lambda: State.SYNC)
        assert ask(point, True, draft=True, dense_drafter=dense) is dense
        assert ask(point, False, draft=True, dense_drafter=dense) is False


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.target)
def test_before_a_verdict_stock_decides_and_one_line_says_so(monkeypatch: pytest.MonkeyPatch, point: Any) -> None:
    monkeypatch.setattr(runtime, "state", lambda: None)
    lines: list[str] = []
    monkeypatch.setattr(runtime.logger, "warning", lines.append)
    assert [ask(point, own) for own in (True, False, True)] == [True, False, True]
    assert lines == ["DSP011 no verdict in this process: stock decides by itself about its skip"]

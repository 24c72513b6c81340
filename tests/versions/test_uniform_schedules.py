# SPDX-License-Identifier: Apache-2.0
"""Graph level `uniform` with drafts on the scheduler of the installed stock version, see scheduler_play.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_deepseek import CONFIG

from dp_sync_patch import stock

pytestmark = [pytest.mark.timeout(1200), pytest.mark.matrix]

PLAYS = {
    "one draft": {"drafts": 1, "asynchronous": False, "seeds": 200},
    "one draft, async": {"drafts": 1, "asynchronous": True, "seeds": 200},
    "drafts": {"drafts": 3, "asynchronous": False, "seeds": 300},
    "drafts, async": {"drafts": 3, "asynchronous": True, "seeds": 300},
    "a grammar throws drafts out": {"drafts": 3, "asynchronous": False, "seeds": 200, "grammar": True},
}
# What must have happened in a play for it to prove something.
SEEN = ("KV between steps", "KV within a step", "without remote KV", "hits", "pieces", "accepted", "filled")
SEEN += ("ended at max_model_len", "given up", "handed back", "finished")
RECEIVED, FILLED = "        receive(request)", "        _fill_up(request, query_len, scheduler.max_model_len)"
# One difference in the overlay that must be noticed, and whether with async scheduling: the text, and what is there
# instead.
CHANGES = {
    "prompts in pieces of any size": (False, "threshold = query_len", "threshold = 0"),
    "a budget that cuts": (False, "max_num_scheduled_tokens % query_len", "max_num_scheduled_tokens % 1"),
    "no drafts for the last piece": (False, "[*request.spec_token_ids, *[token] * lacking]", "request.spec_token_ids"),
    "drafts beyond the end": (False, "if room < query_len:", "if False:"),
    "one token too few again": (False, "num_computed_tokens -= query_len - room", "num_computed_tokens -= 1"),
    "tokens that are on their way": (True, "if request.num_output_placeholders:\n", "if False:\n"),
    "a step behind several tokens and drafts": (True, "request.request_id in unsettled", "False"),
    "held for good": (True, "request.num_output_placeholders += count", "pass"),
    "KV within the last step": (False, "tokens = 0  #", "pass  #"),
    "KV before the last step": (False, f"{RECEIVED}\n{FILLED}", RECEIVED),
    "drafts counted as if nothing were computed": (False, "num_computed_tokens or hit", "num_computed_tokens"),
}

if stock.require().uniform_with_drafts:

    @pytest.fixture(scope="module")
    def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
        questions: dict[str, dict[str, Any]] = {
            **PLAYS,
            "stock": {**PLAYS["drafts"], "stock": True},
            "stock, async": {**PLAYS["drafts, async"], "stock": True},
        }
        for name, (asynchronous, *change) in CHANGES.items():
            questions[name] = {"drafts": 3, "asynchronous": asynchronous, "seeds": 300, "change": change}
        model = tmp_path_factory.mktemp("model")
        (model / "config.json").write_text(json.dumps(CONFIG))
        result = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("scheduler_play.py")), str(model)],
            input=json.dumps(list(questions.values())),
            stdout=subprocess.PIPE,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            check=True,
            text=True,
        )
        return dict(zip(questions, json.loads(result.stdout.splitlines()[-1]), strict=True))

    @pytest.mark.parametrize("play", PLAYS)
    def test_every_step_is_uniform_and_every_answer_is_that_of_the_target(
        answers: dict[str, dict[str, Any]], play: str
    ) -> None:
        assert answers[play]["wrong"] == ""
        assert all(answers[play].get(what, 0) > 10 for what in SEEN), answers[play]

    @pytest.mark.parametrize("play", ["stock", "stock, async"])
    def test_stock_mixes_batches(answers: dict[str, dict[str, Any]], play: str) -> None:
        assert "tokens of request" in answers[play]["wrong"]

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_changed_overlay_is_noticed(answers: dict[str, dict[str, Any]], change: str) -> None:
        assert answers[change]["wrong"]

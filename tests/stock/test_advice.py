# SPDX-License-Identifier: Apache-2.0
"""What `explain` advises is enough: every alternative it prints is followed, on many command lines, to the skip."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_lines import explain_all
from toy_configs import DEEPSEEK_V3, MOE

pytestmark = pytest.mark.timeout(300)

_TRANSFER = '{"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_consumer"}'
_ROUNDS = 4
_LAYOUTS = ((4, 1), (2, 4))  # DP, TP
_LOADS = ((0, 12), (0, 600), (3, 33), (3, 200))  # drafts, max_num_seqs
_GRAPHS: tuple[list[str], ...] = (
    [],
    ["--enforce-eager"],
    ["--compilation-config", '{"cudagraph_capture_sizes": [1, 2, 4, 8]}'],
)
_SCHEDULERS = (
    ["--max-num-batched-tokens", "4096", "--additional-config", '{"recompute_scheduler_enable": true}'],
    ["--max-num-batched-tokens", "2048"],
)


def command_lines(folder: Path) -> list[list[str]]:
    found = []
    for (dp, tp), (drafts, seqs), graphs, scheduler in itertools.product(_LAYOUTS, _LOADS, _GRAPHS, _SCHEDULERS):
        model = folder / ("mtp" if drafts else "moe")
        words = ["vllm", "serve", str(model), "--skip-tokenizer-init", "--enable-expert-parallel"]
        words += ["--data-parallel-size", str(dp), "--tensor-parallel-size", str(tp), "--max-num-seqs", str(seqs)]
        words += ["--max-model-len", "1024", "--kv-transfer-config", _TRANSFER, *graphs, *scheduler]
        if drafts:
            draft = {"method": "deepseek_mtp", "num_speculative_tokens": drafts}
            words += ["--speculative-config", json.dumps(draft)]
        found.append(words)
    return found


def followed(words: list[str], alternative: str) -> list[str]:
    """The command line with assignments of the advice in front and its flags at the end, where they win."""
    advice = shlex.split(alternative.replace(" with ", " "))
    assignments = [word for word in advice if re.fullmatch(r"[A-Z_]+=.*", word)]
    replaced = tuple(word.split("=")[0] + "=" for word in assignments)
    kept = [word for word in words if not (replaced and word.startswith(replaced))]
    return [*assignments, *kept, *(word for word in advice if word not in assignments)]


def test_every_alternative_leads_to_the_skip(tmp_path: Path) -> None:
    for name, config in (("moe", MOE), ("mtp", DEEPSEEK_V3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    waiting = command_lines(tmp_path)
    refused_at_first = 0
    for _ in range(_ROUNDS):
        answers: list[dict[str, Any]] = explain_all(tmp_path, [(words, "A3") for words in waiting])
        advised: list[list[str]] = []
        for words, answer in zip(waiting, answers, strict=True):
            assert "error" not in answer, f"{shlex.join(words)}: {answer['error']}"
            if answer["state"] != "skip":
                for alternative in answer["reasons"][0]["flag"].split(" or "):
                    assert alternative, answer["reasons"]
                    advised.append(followed(words, alternative))
        refused_at_first = refused_at_first or len(advised)
        waiting = [list(words) for words in dict.fromkeys(map(tuple, advised))]
        if not waiting:
            break
    assert waiting == [], f"not there after {_ROUNDS} rounds: {shlex.join(waiting[0])}"
    assert refused_at_first > len(command_lines(tmp_path)) / 2, "hardly any of them was refused"

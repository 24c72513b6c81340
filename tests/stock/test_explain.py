# SPDX-License-Identifier: Apache-2.0
"""Reachability of the skip for two real deployments: what `explain` refuses, and its own advice followed to the letter.

The numbers are those of stock 0.11.0: with 61 + 1 layers and 32 DP ranks it can capture four graphs only, which it
samples from a default list that ends at 256 once it is scaled for three drafts.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_lines import explain_all
from fresh import environment
from toy_configs import DEEPSEEK_V3

pytestmark = pytest.mark.timeout(300)

_RECIPES = {
    "DP32 TP1": ["--data-parallel-size", "32"],
    "DP8 TP4": ["--data-parallel-size", "8", "--tensor-parallel-size", "4"],
}
_COMMON = [
    *("--enable-expert-parallel", "--max-num-seqs", "32", "--max-model-len", "8192", "--skip-tokenizer-init"),
    *("--speculative-config", '{"method": "deepseek_mtp", "num_speculative_tokens": 3}'),
    *("--kv-transfer-config", '{"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_consumer"}'),
    *("--additional-config", '{"recompute_scheduler_enable": true}'),
]

# What is refused by default (found, needed), the two ways out that are advised, and the sizes that each leads to:
# tokens per DP rank, tokens per EP rank, global_bs, HCCL window in MB.
_GOLDEN = {
    "DP32 TP1": {
        "captures": [4, 32, 160, 256],
        "refused": ("DSP106", "200 MB", "at least 1200 MB"),
        "advice": {
            "HCCL_BUFFSIZE=1200": (160, 160, 5120, 1200),
            "HCCL_BUFFSIZE=960 --compilation-config '{\"cudagraph_capture_sizes\": [4, 32, 128]}'":
                (128, 128, 4096, 960),
        },
    },
    "DP8 TP4": {
        "captures": [4, 256],
        "refused": ("DSP106", "200 MB", "at least 480 MB"),
        "advice": {
            "HCCL_BUFFSIZE=480": (256, 64, 2048, 480),
            "HCCL_BUFFSIZE=240 --compilation-config '{\"cudagraph_capture_sizes\": [4, 128]}'": (128, 32, 1024, 240),
        },
    },
}  # fmt: skip

Answers = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek")
    (folder / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    return folder


def command(model: Path, recipe: str, advice: str = "") -> list[str]:
    """The recipe with advice on top: assignments in front, flags at the end."""
    words = shlex.split(advice)
    assignments = [word for word in words if re.fullmatch(r"[A-Z_]+=.*", word)]
    flags = [word for word in words if word not in assignments]
    return [*assignments, "vllm", "serve", str(model), *_RECIPES[recipe], *_COMMON, *flags]


_MTP = ["--speculative-config", '{"method": "deepseek_mtp", "num_speculative_tokens": 1}']
_REFUSED = {
    "DSP431 vLLM's parser refuses this command line": ["--no-such-flag"],
    "DSP432 stock refuses this command line: ValidationError: 1 validation error for VllmConfig": ["--enable-dbo"],
    # No async scheduling with drafts on stock 0.11.0.
    "DSP432 stock refuses this command line: ValueError: Currently, speculative decoding is not supported with async": [
        *("--async-scheduling", "--distributed-executor-backend", "mp"), *_MTP
    ],
}  # fmt: skip


def starts(model: Path, folder: Path) -> dict[str, list[str]]:
    """The same server, started in every way there is."""
    flags = ["--data-parallel-size", "4", "--enforce-eager", *_COMMON]
    config = folder / "node.yaml"
    config.write_text(f"model: {model}\nmax-num-seqs: 8\n")
    return {
        "vllm": ["vllm", "serve", str(model), *flags],
        "module": ["python", "-m", "vllm.entrypoints.cli.main", "serve", str(model), *flags],
        "api_server": ["python3", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *flags],
        "file": ["vllm", "serve", "--config", str(config), *flags],
    }


@pytest.fixture(scope="module")
def answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Both recipes as they are, with each advice and with one thing less than that; and the other command lines."""
    folder = tmp_path_factory.mktemp("explain")
    wanted: dict[tuple[str, str], list[str]] = {}
    for recipe, golden in _GOLDEN.items():
        for advice in golden["advice"]:
            for words in ("", advice, one_mb_less(advice), without_captures(advice)):
                wanted[recipe, words] = command(model, recipe, words)
    for error, flags in _REFUSED.items():
        wanted["refused", error] = ["vllm", "serve", str(model), "--skip-tokenizer-init", *flags]
    for name, words in starts(model, folder).items():
        wanted["start", name] = ["HCCL_BUFFSIZE=4096", *words]
    found = explain_all(folder, [(words, "A3") for words in wanted.values()])
    return dict(zip(wanted, found, strict=True))


def one_mb_less(advice: str) -> str:
    return re.sub(r"HCCL_BUFFSIZE=(\d+)", lambda match: f"HCCL_BUFFSIZE={int(match[1]) - 1}", advice)


def without_captures(advice: str) -> str:
    return advice.split(" --compilation-config")[0]


@pytest.mark.parametrize("recipe", _GOLDEN)
def test_refused_by_default(answers: Answers, recipe: str) -> None:
    answer, golden = answers[recipe, ""], _GOLDEN[recipe]
    assert answer["state"] == "sync"
    (reason,) = answer["reasons"]
    assert (reason["code"], reason["found"], reason["needed"]) == golden["refused"]
    assert reason["flag"].replace(" with ", " ") == " or ".join(golden["advice"])
    facts = answer["facts"]
    assert facts["capture_sizes"] == golden["captures"]
    assert (facts["graph_mode"], facts["mc2_tokens_capacity"]) == ("PIECEWISE", 256)
    assert answer["sizes"]["token_budget"] == 128
    assert facts["recompute_in_effect"]


@pytest.mark.parametrize(("recipe", "advice"), [(name, text) for name in _GOLDEN for text in _GOLDEN[name]["advice"]])
def test_field_case_29_the_advice_is_sufficient_and_necessary(answers: Answers, recipe: str, advice: str) -> None:
    answer = answers[recipe, advice]
    sizes = answer["sizes"]
    assert (answer["state"], answer["reasons"]) == ("skip", [])
    assert (sizes["bound"], sizes["tokens_per_rank"], sizes["global_bs"], sizes["window_mb"]) == (
        _GOLDEN[recipe]["advice"][advice]
    )
    less = [one_mb_less(advice)]
    if "--compilation-config" in advice:
        less.append(without_captures(advice))
    for shorter in less:
        assert [reason["code"] for reason in answers[recipe, shorter]["reasons"]] == ["DSP106"], shorter


def cli(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dp_sync_patch", *words],
        capture_output=True, text=True, timeout=120, check=False, env=environment(**environ),
    )  # fmt: skip


def test_the_command_answers_like_the_function(model: Path, answers: Answers) -> None:
    """Exit status, JSON on stdout only, and the text form with the advice in it."""
    recipe = "DP32 TP1"
    done = cli("explain", "--soc", "A3", "--json", "--", *command(model, recipe))
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer.pop("findings") == []
    assert answer == answers[recipe, ""]
    advice = list(_GOLDEN[recipe]["advice"])[1]
    done = cli("explain", "--soc", "A3", "--", *command(model, recipe, advice))
    assert done.returncode == 0
    assert done.stdout.startswith("plan on A3: skip\n")
    assert "global_bs 4096 over 32 ranks" in done.stdout


@pytest.mark.parametrize(
    ("words", "code"), [(["ls", "-l"], "DSP431"), (["DP_SYNC_PATCH_MODE=sometimes", "vllm", "serve", "x"], "DSP402")]
)
def test_mistakes_are_said_at_once(words: list[str], code: str) -> None:
    done = cli("explain", "--soc", "A3", "--json", "--", *words)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"].startswith(code)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", _REFUSED)
def test_what_stock_refuses(answers: Answers, error: str) -> None:
    assert answers["refused", error]["error"].startswith(error)


@pytest.mark.parametrize("name", ["vllm", "module", "api_server", "file"])
def test_every_way_to_start_a_server(answers: Answers, name: str) -> None:
    answer = answers["start", name]
    # Flags of the command line win over the file, as in vLLM: 32 sequences of 4 tokens.
    assert (answer["state"], answer["sizes"]["token_budget"]) == ("skip", 128)

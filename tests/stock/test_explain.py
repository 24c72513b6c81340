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
from fresh import environment, run
from toy_configs import DEEPSEEK_V3

pytestmark = pytest.mark.timeout(300)

_RECIPES = {
    "DP32 TP1": ["--data-parallel-size", "32"],
    "DP8 TP4": ["--data-parallel-size", "8", "--tensor-parallel-size", "4"],
}
_NODE = [
    *("--enable-expert-parallel", "--max-num-seqs", "32", "--max-model-len", "8192", "--skip-tokenizer-init"),
    *("--kv-transfer-config", '{"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_consumer"}'),
    *("--additional-config", '{"recompute_scheduler_enable": true}'),
]
_COMMON = [*_NODE, "--speculative-config", '{"method": "deepseek_mtp", "num_speculative_tokens": 3}']

# What is refused by default (found, needed), the two ways out that are advised, and the sizes that each leads to:
# tokens per DP rank, tokens per EP rank, global_bs, HCCL window in MB, and rows and MB that dispatch returns.
# `latched`: these two with a global_bs of the capacity that stock ends with by default.
_GOLDEN = {
    "DP32 TP1": {
        "captures": [4, 32, 160, 256],
        "refused": ("DSP106", "200 MB", "at least 1200 MB"),
        "latched": (65536, 896),
        "advice": {
            "HCCL_BUFFSIZE=1200": (160, 160, 5120, 1200, 40960, 560),
            "HCCL_BUFFSIZE=960 --compilation-config '{\"cudagraph_capture_sizes\": [4, 32, 128]}'":
                (128, 128, 4096, 960, 32768, 448),
        },
    },
    "DP8 TP4": {
        "captures": [4, 256],
        "refused": ("DSP106", "200 MB", "at least 480 MB"),
        "latched": (16384, 224),
        "advice": {
            "HCCL_BUFFSIZE=480": (256, 64, 2048, 480, 16384, 224),
            "HCCL_BUFFSIZE=240 --compilation-config '{\"cudagraph_capture_sizes\": [4, 128]}'":
                (128, 32, 1024, 240, 8192, 112),
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


def starts(model: Path, config: Path) -> dict[str, list[str]]:
    """The same server, started in every way there is. `config` is a file with flags."""
    flags = ["--data-parallel-size", "4", "--enforce-eager", *_COMMON]
    window = "HCCL_BUFFSIZE=4096"  # without it none of them would skip
    return {
        "vllm": [window, "vllm", "serve", str(model), *flags],
        "module": [window, "python", "-m", "vllm.entrypoints.cli.main", "serve", str(model), *flags],
        "api_server": [window, "python3", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *flags],
        "file": [window, "vllm", "serve", "--config", str(config), *flags],
        "env": ["env", window, "nice", "-n", "5", "vllm", "serve", str(model), *flags],
        "headless": [window, "vllm", "serve", str(model), "--headless", *flags],
        "external_lb": [window, "vllm", "serve", str(model), "--data-parallel-rank", "2", *flags],
        # The last one counts, as always with argparse; the first alone would hide the recompute scheduler.
        "twice": [window, "vllm", "serve", str(model), "--additional-config", "{}", *flags],
    }


def graphs(k: int, requests: int, *sizes: str) -> list[str]:
    """Flags of a node with `k` drafts and that many sequences, and how its capture list is given."""
    drafts = {"method": "deepseek_mtp", "num_speculative_tokens": k}
    return [*(("--speculative-config", json.dumps(drafts)) if k else ()), "--max-num-seqs", str(requests), *sizes]


def listed(*sizes: int) -> tuple[str, str]:
    return "--compilation-config", json.dumps({"cudagraph_capture_sizes": sizes})


# Stock 0.11.0 multiplies a capture list by the tokens of a request with drafts, and thins it out for 61 layers: what
# counts is the list that it ends with. Flags -> state, that list, the bound.
_FINAL_CAPTURES = {
    "field case 01: without drafts": (graphs(0, 128, *listed(1, 2, 4, 8, 16, 32)), "sync", 32, 128),
    "field case 01: stock multiplies the list": (graphs(3, 32, *listed(1, 2, 4, 8, 16, 32)), "skip", 128, 128),
    "field case 01: captures up to the largest step": (graphs(0, 128, *listed(1, 32, 128)), "skip", 128, 128),
    "field case 02: 12 sequences": (graphs(0, 12), "skip", 24, 16),
    "field case 02: 20 sequences": (graphs(0, 20), "skip", 40, 24),
    "field case 02: 16 sequences": (graphs(0, 16), "skip", 32, 16),
    "field case 02: a list that ends below": (graphs(0, 12, *listed(1, 2, 4, 8)), "sync", 8, 12),
    "field case 03: a ceiling of 42 becomes 40": (graphs(0, 42, "--cuda-graph-sizes", "42"), "sync", 40, 42),
    "field case 03: a ceiling on the grid": (graphs(0, 40, "--cuda-graph-sizes", "40"), "skip", 40, 40),
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
    config = folder / "node.yaml"
    config.write_text(f"model: {model}\nmax-num-seqs: 8\n")
    for name, words in starts(model, config).items():
        wanted["start", name] = words
    for name, (flags, *_) in _FINAL_CAPTURES.items():
        recipe = ["vllm", "serve", str(model), "--data-parallel-size", "4", *_NODE, *flags]
        wanted["captures", name] = ["HCCL_BUFFSIZE=4096", *recipe]
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
    assert rows_and_mb(answer, "mc2_tokens_capacity") == golden["latched"]


@pytest.mark.parametrize(("recipe", "advice"), [(name, text) for name in _GOLDEN for text in _GOLDEN[name]["advice"]])
def test_field_case_29_the_advice_is_sufficient_and_necessary(answers: Answers, recipe: str, advice: str) -> None:
    answer = answers[recipe, advice]
    sizes = answer["sizes"]
    assert (answer["state"], answer["reasons"]) == ("skip", [])
    found = (sizes["bound"], sizes["tokens_per_rank"], sizes["global_bs"], sizes["window_mb"])
    assert (*found, *rows_and_mb(answer, "bound")) == _GOLDEN[recipe]["advice"][advice]
    less = [one_mb_less(advice)]
    if "--compilation-config" in advice:
        less.append(without_captures(advice))
    for shorter in less:
        assert [reason["code"] for reason in answers[recipe, shorter]["reasons"]] == ["DSP106"], shorter


def rows_and_mb(answer: dict[str, Any], of: str) -> tuple[int, int]:
    return answer["dispatch_output"][of]["rows"], answer["dispatch_output"][of]["mb"]


def test_readme_has_the_price_of_global_bs() -> None:
    section = (Path(__file__).resolve().parents[2] / "README.md").read_text().split("### The price of `global_bs`")[1]
    rows = re.findall(r"^\| (DP\d+ TP\d+) \| [^|]+ \| ([\d,]+) \| ([\d,]+) \| (\d+) \|$", section, re.MULTILINE)
    listed = [(recipe, *(int(number.replace(",", "")) for number in numbers)) for recipe, *numbers in rows]
    expected = []
    for recipe, golden in _GOLDEN.items():
        expected.append((recipe, 256 // int(recipe[-1]) * 32, *golden["latched"]))
        expected += [(recipe, global_bs, *price) for _, _, global_bs, _, *price in golden["advice"].values()]
    assert listed == expected


def cli(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dp_sync_patch", *words],
        capture_output=True, text=True, timeout=120, check=False, env=environment(**environ),
    )  # fmt: skip


_MAIN = """
import contextlib, io, json
from dp_sync_patch.__main__ import main
out = io.StringIO()
with contextlib.redirect_stdout(out):
    code = main(WORDS)
print(json.dumps([code, out.getvalue()]))
"""


def forked_cli(*words: str) -> tuple[int, str, str]:
    """As `cli`, without the time that an interpreter needs for stock's imports. Exit status, stdout, the rest."""
    (code, out), log = run(_MAIN.replace("WORDS", repr(list(words))))
    return code, out, log


def test_the_whole_answer(answers: Answers, model: Path) -> None:
    """The JSON form is what scripts of operators rely on."""
    expected = json.loads((Path(__file__).parent / "explain_dp32.json").read_text())
    answer = answers["DP32 TP1", ""]
    command = [{str(model): "MODEL"}.get(word, word) for word in answer["command"]]
    assert {**answer, "command": command} == expected


@pytest.mark.parametrize("name", _FINAL_CAPTURES)
def test_field_case_01_02_03_the_final_captures_decide(answers: Answers, name: str) -> None:
    answer = answers["captures", name]
    _, state, largest, bound = _FINAL_CAPTURES[name]
    assert (answer["state"], answer["facts"]["capture_sizes"][-1], answer["sizes"]["bound"]) == (state, largest, bound)
    assert answer["sizes"]["global_bs"] == 4 * bound
    for reason in answer["reasons"]:
        # One line that gives both numbers.
        assert (reason["code"], reason["found"], reason["needed"]) == (
            "DSP104", f"{bound} tokens per DP rank", f"at most {largest}"
        )  # fmt: skip
    assert len(answer["reasons"]) == (state == "sync")


def test_the_command_answers_like_the_function(model: Path, answers: Answers) -> None:
    """Exit status, JSON on stdout only, and the text form with the advice in it."""
    recipe = "DP32 TP1"
    done = cli("explain", "--soc", "A3", "--json", "--", *command(model, recipe))
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer.pop("findings") == []
    assert answer == answers[recipe, ""]
    advice = list(_GOLDEN[recipe]["advice"])[1]
    code, out, _ = forked_cli("explain", "--soc", "A3", "--", *command(model, recipe, advice))
    assert code == 0
    assert out.startswith("plan on A3: skip\n")
    assert "global_bs 4096 over 32 ranks" in out
    assert "  dispatch returns 32768 rows, 448 MB, per MoE layer; 32768 rows, 448 MB with a global_bs of stock's" in out
    assert "  in force: no DP metadata all_reduce; mc2_tokens_capacity 128, captures [4, 32, 128]" in out
    assert "  note: every rank has to come to the same plan" in out


@pytest.mark.parametrize(
    ("words", "code"), [(["ls", "-l"], "DSP431"), (["DP_SYNC_PATCH_MODE=sometimes", "vllm", "serve", "x"], "DSP402")]
)
def test_mistakes_are_said_at_once(words: list[str], code: str) -> None:
    done = cli("explain", "--soc", "A3", "--json", "--", *words)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"].startswith(code)
    assert "Traceback" not in done.stderr


def test_what_is_wrong_with_the_environment_is_said_beside_the_error(model: Path) -> None:
    """VLLM_PLUGINS of the command line takes the platform away, and with it everything else."""
    code, out, log = forked_cli("explain", "--soc", "A3", "--json", "--", "VLLM_PLUGINS=", "vllm", "serve", str(model))
    assert code == 2
    answer = json.loads(out)
    assert answer["error"].startswith("DSP425 vLLM's platform here is UnspecifiedPlatform")
    assert [finding["code"] for finding in answer["findings"]] == ["DSP424"]
    assert "Traceback" not in log


@pytest.mark.parametrize("command", ["status", "check", "explain"])
def test_field_case_41_the_cause_and_its_package_are_named(tmp_path: Path, command: str) -> None:
    """torch loads torch_npu by itself, and hides why that fails behind an error of its own."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    words = [command, "--soc", "A3", "--", "vllm", "serve", "x"] if command == "explain" else [command]
    done = cli(*words, PYTHONPATH=f"{tmp_path}:{environment()['PYTHONPATH']}")
    assert done.returncode == 2
    cause = "ImportError: libhccl.so: cannot open shared object file (in torch_npu)"
    assert done.stdout.splitlines().count(f"error: DSP430 stock cannot be imported: {cause}") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", _REFUSED)
def test_what_stock_refuses(answers: Answers, error: str) -> None:
    assert answers["refused", error]["error"].startswith(error)


@pytest.mark.parametrize("name", list(starts(Path(), Path())))
def test_every_way_to_start_a_server(answers: Answers, name: str) -> None:
    answer = answers["start", name]
    # Flags of the command line win over the file, as in vLLM: 32 sequences of 4 tokens.
    assert (answer["state"], answer["sizes"]["token_budget"]) == ("skip", 128)
    assert any("this is DP rank 2 alone" in note for note in answer["notes"]) is (name == "external_lb")

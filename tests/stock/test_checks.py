# SPDX-License-Identifier: Apache-2.0
"""`pytest --pyargs dp_sync_patch.checks`, run the way users run it: green on stock, red where something is wrong."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import environment
from toy_configs import MOE

pytestmark = pytest.mark.timeout(300)

# Alters stock when its model runner is imported: one point is missing, another one takes other arguments.
_BREAKER = """
import wrapt

def break_stock(module):
    del module.NPUModelRunner._sync_metadata_across_dp
    module.NPUModelRunner._select_moe_comm_method = lambda self, num_tokens: None

wrapt.register_post_import_hook(break_stock, "vllm_ascend.worker.model_runner_v1")
"""


def run_checks(folder: Path, *arguments: str, **environ: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=280, check=False, env=environment(**environ),
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def serve_command(folder: Path, *flags: str) -> str:
    (folder / "config.json").write_text(json.dumps(MOE))
    transfer = '{"kv_connector": "SharedStorageConnector", "kv_role": "kv_consumer"}'
    return shlex.join(
        [
            *("vllm", "serve", str(folder), "--skip-tokenizer-init", "--enforce-eager", "--enable-expert-parallel"),
            *("--data-parallel-size", "4", "--max-num-seqs", "16", "--kv-transfer-config", transfer),
            *("--additional-config", '{"recompute_scheduler_enable": true}', *flags),
        ]
    )


def test_green_on_stock(tmp_path: Path) -> None:
    code, output = run_checks(
        tmp_path, "--pyargs", "dp_sync_patch.checks",
        DP_SYNC_CHECK_COMMAND=serve_command(tmp_path), DP_SYNC_CHECK_SOC="A3",
    )  # fmt: skip
    assert code == 0, output
    assert "14 passed" in output
    assert "skipped" not in output
    assert "no plan was checked" not in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_red_where_points_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "breaker.py").write_text(_BREAKER)
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    code, output = run_checks(
        tmp_path, "-p", "breaker", "--pyargs", "dp_sync_patch.checks.test_patch_points", PYTHONPATH=path
    )
    assert code == 1
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 3  # each of the two points, and applying all of them
    assert sum("_sync_metadata_across_dp" in line for line in failed) == 1
    assert sum("_select_moe_comm_method" in line for line in failed) == 1
    assert "NPUModelRunner._sync_metadata_across_dp does not exist in this stock" in output


def test_field_case_34_red_where_a_name_is_misspelt(tmp_path: Path) -> None:
    code, output = run_checks(
        tmp_path, "--pyargs", "dp_sync_patch.checks.test_environment", "-k", "nothing_keeps",
        VLLM_PLUGINS="ascend,dp_sync_patchh",
    )  # fmt: skip
    assert code == 1
    assert "DSP423" in output
    assert "did you mean dp_sync_patch?" in output
    assert "no plan was checked" in output


def test_red_where_the_command_line_does_not_skip(tmp_path: Path) -> None:
    code, output = run_checks(
        tmp_path, "--pyargs", "dp_sync_patch.checks.test_environment", "-k", "plan",
        DP_SYNC_CHECK_COMMAND=serve_command(tmp_path, "--enable-lora"), DP_SYNC_CHECK_SOC="A3",
    )  # fmt: skip
    assert code == 1
    assert "DSP138" in output


def test_other_pytest_runs_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\n\ndef test_nothing_of_ours():\n    assert not [m for m in sys.modules if 'dp_sync_patch' in m]\n"
    )
    code, output = run_checks(tmp_path)
    assert code == 0, output
    assert "dp_sync_patch" not in output


def check_command(*words: str, **environ: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "dp_sync_patch", "check", *words],
        capture_output=True, text=True, timeout=280, check=False, env=environment(**environ),
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def test_the_check_command_is_green_on_stock(tmp_path: Path) -> None:
    command = shlex.split(serve_command(tmp_path))
    code, out = check_command("--soc", "A3", "--json", "--", *command, VLLM_PLUGINS="dp_sync_patch")
    answer = json.loads(out)
    assert (code, answer["problems"]) == (0, [])
    assert answer["plan"]["state"] == "skip"
    assert answer["process"]["units"] == {"worker": "applied", "engine": "applied"}
    assert len(answer["process"]["points"]) == 9
    assert answer["VLLM_PLUGINS"] == ["dp_sync_patch"]
    assert answer["versions"]["vllm-ascend"] == "0.11.0"


def test_the_check_command_is_red_where_vllm_would_not_load_the_overlay() -> None:
    code, out = check_command(VLLM_PLUGINS="ascend,dp_sync_patchh", DP_SYNC_PATCH_DELEGATE_PLUGINS="off")
    assert code == 1
    assert "did you mean dp_sync_patch?" in out
    assert "DSP424 VLLM_PLUGINS=ascend,dp_sync_patchh leaves the overlay out" in out
    assert out.splitlines()[-2] == "check: problems found"

# SPDX-License-Identifier: Apache-2.0
"""`pytest --pyargs dp_sync_patch.checks`, run the way users run it: green on stock, red where something is wrong."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fresh import environment, run, run_after_stock
from this_stock import CONNECTOR, TARGETS, VERSION
from toy_configs import MOE

pytestmark = pytest.mark.timeout(1200)

# The process that has imported stock did that without the overlay.
_LOAD_ALL = """
import os
del os.environ["VLLM_PLUGINS"]
"""
# Alters stock when its model runner is imported: one point is missing, another one takes other arguments.
_BROKEN_STOCK = """
import json, os
import pytest, wrapt

def break_stock(module):
    del module.NPUModelRunner._sync_metadata_across_dp
    module.NPUModelRunner.load_model = lambda self, model: None

wrapt.register_post_import_hook(break_stock, "vllm_ascend.worker.model_runner_v1")
os.chdir({folder!r})
options = ["-q", "-p", "no:cacheprovider", "--pyargs", "dp_sync_patch.checks.test_patch_points"]
print(json.dumps(pytest.main(options)))
"""
# As `python -m dp_sync_patch` does it.
_COMMAND = """
import contextlib, io, json
from dp_sync_patch.__main__ import main

out = io.StringIO()
with contextlib.redirect_stdout(out):
    code = main({words!r})
print(json.dumps([code, out.getvalue()]))
"""

# Keeps an unpatched reference beside a patched method, as `from x import f` does with a function.
_KEPT_REFERENCE = """
import json, os
import pytest, wrapt

def keep(module):
    module.kept = vars(module.NPUModelRunner)["load_model"]

wrapt.register_post_import_hook(keep, "vllm_ascend.worker.model_runner_v1")
os.chdir({folder!r})
options = ["-q", "-p", "no:cacheprovider", "--pyargs", "dp_sync_patch.checks.test_patch_points"]
print(json.dumps(pytest.main(options)))
"""


def run_checks(folder: Path, *arguments: str, **environ: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=560, check=False, env=environment(**environ),
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def serve_command(folder: Path, *flags: str) -> str:
    (folder / "config.json").write_text(json.dumps(MOE))
    transfer = json.dumps({"kv_connector": CONNECTOR, "kv_role": "kv_consumer"})
    return shlex.join(
        [
            *("vllm", "serve", str(folder), "--skip-tokenizer-init", "--enforce-eager", "--enable-expert-parallel"),
            *("--data-parallel-size", "4", "--max-num-seqs", "16", "--kv-transfer-config", transfer),
            *("--additional-config", '{"recompute_scheduler_enable": true}', *flags),
        ]
    )


def run_with_command(*flags: str) -> tuple[int, str, list[str]]:
    """All checks, with a command line to check; returns the files left in the working directory as well."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, output = run_checks(
            folder, "--pyargs", "dp_sync_patch.checks",
            DP_SYNC_CHECK_COMMAND=serve_command(folder, *flags), DP_SYNC_CHECK_SOC="A3",
        )  # fmt: skip
        return code, output, sorted(path.name for path in folder.iterdir())


@pytest.mark.ahead.with_args(run_with_command)  # called with a function alone, a mark would decorate it
def test_green_on_stock(ahead: tuple[int, str, list[str]]) -> None:
    code, output, files = ahead
    assert code == 0, output
    assert f"{len(TARGETS) + 5} passed" in output
    assert "skipped" not in output
    assert "no plan was checked" not in output
    assert files == ["config.json"]


def test_red_where_points_do_not_fit(tmp_path: Path) -> None:
    code, output = run_after_stock(_LOAD_ALL + _BROKEN_STOCK.format(folder=str(tmp_path)))
    assert code == 1
    # Without the messages behind the names: pytest cuts those to the terminal's width, but not under CI=true.
    failed = [line.partition(" - ")[0] for line in output.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 3  # each of the two points, and applying all of them
    assert sum("_sync_metadata_across_dp" in name for name in failed) == 1
    assert sum("load_model" in name for name in failed) == 1
    assert "NPUModelRunner._sync_metadata_across_dp does not exist in this stock" in output


def test_field_case_38_red_where_a_reference_stays_unpatched(tmp_path: Path) -> None:
    code, output = run_after_stock(_LOAD_ALL + _KEPT_REFERENCE.format(folder=str(tmp_path)))
    assert code == 1
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1
    assert "test_apply_and_undo_leave_nothing_behind" in failed[0]
    assert "vllm_ascend.worker.model_runner_v1.kept" in output


def test_field_case_41_red_where_stock_cannot_be_imported(tmp_path: Path) -> None:
    """Every check that needs stock fails and says why; none is skipped, none goes missing in silence."""
    (tmp_path / "vllm_ascend.py").write_text("raise ImportError('libascendcl.so: cannot open shared object file')\n")
    code, output = run_checks(
        tmp_path, "--pyargs", "dp_sync_patch.checks", PYTHONPATH=f"{tmp_path}:{environment()['PYTHONPATH']}"
    )
    assert code == 1
    assert "4 failed, 1 passed" in output  # versions and entry points are read from metadata
    assert output.count("ImportError: libascendcl.so: cannot open shared object file (in vllm_ascend)") >= 3


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
        DP_SYNC_CHECK_COMMAND=f"VLLM_PLUGINS=ascend {serve_command(tmp_path, '--enable-lora')}", DP_SYNC_CHECK_SOC="A3",
    )  # fmt: skip
    assert code == 1
    assert "the plan is sync, wanted skip" in output
    assert "DSP138 LoRA is not tested with the skip: found --enable-lora" in output
    # Whatever the plan is, such a node would run without the overlay.
    assert "DSP424 VLLM_PLUGINS=ascend leaves the overlay out" in output


def test_red_where_the_device_is_not_said(tmp_path: Path) -> None:
    code, output = run_checks(
        tmp_path, "--pyargs", "dp_sync_patch.checks.test_environment", "-k", "plan",
        DP_SYNC_CHECK_COMMAND=serve_command(tmp_path),
    )  # fmt: skip
    assert code == 1
    assert "DP_SYNC_CHECK_SOC=: must be one of A2, A3" in output


def test_other_pytest_runs_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\n\ndef test_nothing_of_ours():\n    assert not [m for m in sys.modules if 'dp_sync_patch' in m]\n"
    )
    code, output = run_checks(tmp_path)
    assert code == 0, output
    assert "dp_sync_patch" not in output


def check_command(*words: str, before: str = "", **environ: str) -> tuple[int, str]:
    code = before + _COMMAND.format(words=["check", *words])
    # VLLM_PLUGINS decides what stock is, from the first import on.
    (code, out), log = (
        run(code, **environ) if "VLLM_PLUGINS" in environ else run_after_stock(_LOAD_ALL + code, **environ)
    )
    assert "Traceback" not in log
    return code, out


def test_the_check_command_is_green_on_stock(tmp_path: Path) -> None:
    command = shlex.split(serve_command(tmp_path))
    code, out = check_command("--soc", "A3", "--json", "--", *command, VLLM_PLUGINS="dp_sync_patch")
    answer = json.loads(out)
    assert (code, answer["problems"]) == (0, [])
    assert answer["plan"]["state"] == "skip"
    assert answer["process"]["units"] == {"worker": "applied", "engine": "applied"}
    assert sorted(point["target"] for point in answer["process"]["points"]) == sorted(TARGETS)
    assert answer["VLLM_PLUGINS"] == ["dp_sync_patch"]
    assert answer["versions"]["vllm-ascend"] == VERSION


def test_the_check_command_is_red_where_vllm_would_not_load_the_overlay() -> None:
    code, out = check_command(VLLM_PLUGINS="ascend,dp_sync_patchh", DP_SYNC_PATCH_DELEGATE_PLUGINS="off")
    assert code == 1
    assert "did you mean dp_sync_patch?" in out
    assert "DSP424 VLLM_PLUGINS=ascend,dp_sync_patchh leaves the overlay out" in out
    assert out.splitlines()[-2] == "check: problems found"


def test_the_check_command_is_red_where_the_command_line_leaves_the_overlay_out(tmp_path: Path) -> None:
    """Assignments of the command line are in force before stock is imported, and before anything is judged."""
    command = shlex.split(f"env VLLM_PLUGINS=ascend {serve_command(tmp_path)}")
    code, out = check_command("--soc", "A3", "--", *command)
    assert code == 1
    assert "VLLM_PLUGINS: ['ascend']" in out
    problems = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(problems) == 1
    assert problems[0].startswith("error: DSP424 VLLM_PLUGINS=ascend leaves the overlay out")


def test_the_check_command_is_red_where_the_overlay_is_switched_off() -> None:
    code, out = check_command(DP_SYNC_PATCH_MODE="off")
    assert code == 1
    problems = [line for line in out.splitlines() if line.startswith("error: ")]
    assert problems == ["error: DSP005 switched off by its own setting: mode=off, no worker is patched"]


def test_the_check_command_is_red_where_stock_does_not_fit() -> None:
    code, out = check_command(before=_BROKEN_STOCK.split("os.chdir")[0])
    assert code == 1
    problems = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(problems) == 1
    assert problems[0].startswith("error: unit worker: DSP007 ")
    assert "NPUModelRunner.load_model takes (self, model) instead of (self)" in problems[0]


_SOMEBODY = """
import dp_sync_patch, functools, wrapt

def change(module):
    ours = module.NPUModelRunner.load_model
    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)
    module.NPUModelRunner.load_model = {change}

wrapt.register_post_import_hook(change, "vllm_ascend.worker.model_runner_v1")
"""
_LOAD_MODEL = "vllm_ascend.worker.model_runner_v1:NPUModelRunner.load_model"


def test_the_check_command_names_who_wraps_a_patch_point() -> None:
    """A profiler that was switched on; it is no fault, and nothing can be undone below it."""
    code, out = check_command(before=_SOMEBODY.format(change="functools.wraps(ours)(theirs)"))
    assert code == 0, out
    assert f"  {_LOAD_MODEL}: applied, wrapped by somebody else" in out
    assert out.splitlines()[-2] == "check: all right"


def test_the_check_command_is_red_where_somebody_replaces_a_patch_point() -> None:
    code, out = check_command(before=_SOMEBODY.format(change="theirs"))
    assert code == 1
    problems = [line for line in out.splitlines() if line.startswith("error: ")]
    assert problems == [f"error: DSP009 not undone, changed by somebody else: {_LOAD_MODEL}"]
    assert f"  {_LOAD_MODEL}: changed by somebody else" in out


def test_the_check_command_is_red_where_the_platform_is_not_ascend() -> None:
    code, out = check_command(VLLM_PLUGINS="")
    assert code == 2
    assert "error: DSP424 VLLM_PLUGINS= loads no plugin at all, not even the Ascend platform" in out
    assert "error: DSP425 vLLM's platform here is UnspecifiedPlatform, not the Ascend one" in out


def test_the_check_command_says_all_it_knows_where_stock_refuses(tmp_path: Path) -> None:
    command = shlex.split(serve_command(tmp_path, "--enable-eplb"))
    code, out = check_command("--soc", "A3", "--", *command, DP_SYNC_PATCH_MODE="off")
    assert code == 2
    assert "error: DSP432 stock refuses this command line" in out
    assert "error: DSP005 switched off by its own setting" in out
    assert "unit worker: waiting for" in out


def test_the_check_command_is_red_where_a_plugin_of_somebody_stops_vllm(tmp_path: Path) -> None:
    info = tmp_path / "other_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nother = other_plugin:register\n")
    (tmp_path / "other_plugin.py").write_text("def register():\n    raise KeyError('no licence')\n")
    code, out = check_command(before=f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n")
    assert code == 1
    problems = [line for line in out.splitlines() if line.startswith("error: ")]
    assert problems == ["error: DSP425 vLLM would stop while it loads its plugins: KeyError: 'no licence'"]

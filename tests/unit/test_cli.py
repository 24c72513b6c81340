# SPDX-License-Identifier: Apache-2.0
"""The command line tool where no stock is: findings about the environment, exit status, JSON, no traceback.

What the tool says about stock itself is in tests/stock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from dp_sync_patch import command_line, environment

PROJECT = Path(__file__).parents[2]
GENERAL, PLATFORM = "vllm.general_plugins", "vllm.platform_plugins"
OURS = {GENERAL: ["dp_sync_patch"], PLATFORM: ["dp_sync_patch"]}
ASCEND = {GENERAL: ["ascend_kv_connector"], PLATFORM: ["ascend"]}


def install(site: Path, name: str, version: str, entry_points: dict[str, list[str]], suffix: str = "dist-info") -> None:
    """Metadata as an installer writes it. An egg-info of a checkout has no entry_points.txt when it is stale."""
    folder = site / (f"{name}-{version}.dist-info" if suffix == "dist-info" else f"{name}.egg-info")
    folder.mkdir(parents=True)
    header = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
    (folder / ("METADATA" if suffix == "dist-info" else "PKG-INFO")).write_text(header)
    if entry_points:
        lines = [f"[{group}]\n" + "\n".join(f"{n} = m:f" for n in names) for group, names in entry_points.items()]
        (folder / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where distributions are found: a supported pair, and the overlay."""
    folder = tmp_path / "site"
    install(folder, "vllm", "0.11.0", {})
    install(folder, "vllm_ascend", "0.11.0", ASCEND)
    install(folder, "dp_sync_patch", "0.1.0", OURS)
    monkeypatch.setattr(sys, "path", [str(folder)])
    return folder


def found(**environ: str) -> list[tuple[str, str]]:
    return [(finding.code, finding.severity) for finding in environment.findings(environ)]


def texts(**environ: str) -> str:
    return "\n".join(map(str, environment.findings(environ)))


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, []),
        ({"VLLM_PLUGINS": "dp_sync_patch"}, []),
        ({"VLLM_PLUGINS": "ascend,ascend_kv_connector,dp_sync_patch"}, []),
        ({"VLLM_PLUGINS": "ascend,dp_sync_patch,"}, []),
        ({"VLLM_PLUGINS": ""}, [("DSP424", "error")]),
        ({"VLLM_PLUGINS": "ascend"}, [("DSP424", "error")]),
        ({"VLLM_PLUGINS": "dp_sync_patch, ascend"}, [("DSP412", "warning")]),
        ({"VLLM_PLUGINS": "ascend, dp_sync_patch"}, [("DSP412", "warning"), ("DSP424", "error")]),
        ({"VLLM_PLUGINS": "ascned,dp_sync_patch"}, [("DSP423", "error")]),
        ({"VLLM_PLUGINS": "dp_sync_patch", "DP_SYNC_PATCH_DELEGATE_PLUGINS": "off"}, [("DSP413", "error")]),
        (
            {
                "VLLM_PLUGINS": "ascend,ascend_kv_connector,dp_sync_patch",
                "DP_SYNC_PATCH_DELEGATE_PLUGINS": "off",
            },
            [],
        ),
        ({"DP_SYNC_PATCH_DELEGATE_PLUGINS": "off"}, []),
        ({"DP_SYNC_PATCH_MODUS": "off"}, [("DSP401", "error")]),
        ({"DP_SYNC_PATCH_MODE": "sometimes"}, [("DSP402", "error")]),
    ],
)
def test_findings(environ: dict[str, str], expected: list[tuple[str, str]]) -> None:
    assert found(**environ) == expected


@pytest.mark.usefixtures("site")
def test_field_case_34_a_misspelt_name_gets_a_suggestion() -> None:
    said = texts(VLLM_PLUGINS="ascend,dp_sync_patchh")
    assert "no installed plugin is named 'dp_sync_patchh'; did you mean dp_sync_patch?" in said
    assert "DSP424 VLLM_PLUGINS=ascend,dp_sync_patchh leaves the overlay out" in said
    assert "known: ascend, ascend_kv_connector, dp_sync_patch" in texts(VLLM_PLUGINS="zzz,dp_sync_patch")


@pytest.mark.usefixtures("site")
def test_what_is_left_out_is_named() -> None:
    said = texts(VLLM_PLUGINS="ascend,dp_sync_patch", DP_SYNC_PATCH_DELEGATE_PLUGINS="off")
    assert "leaves out ascend_kv_connector, and delegate_plugins=off" in said
    assert "loads no plugin at all, not even the Ascend platform" in texts(VLLM_PLUGINS="")


@pytest.mark.parametrize("suffix", ["dist-info", "egg-info"])
def test_field_case_34_stale_metadata_is_named_with_its_path(
    site: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    stale = site.parent / "stale"
    install(stale, "dp_sync_patch", "0.0.1", {}, suffix)
    monkeypatch.setattr(sys, "path", [str(stale), str(site)])
    assert found() == [("DSP421", "error")]
    assert f"the metadata that counts is of 0.0.1 in {stale}" in texts()
    assert f"hides 0.1.0 in {site}" in texts()


def test_one_group_without_entry_point_is_enough(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = site.parent / "half"
    install(half, "dp_sync_patch", "0.1.0", {GENERAL: ["dp_sync_patch"]})
    monkeypatch.setattr(sys, "path", [str(half), str(site)])
    assert found() == [("DSP421", "error")]
    assert f"no entry point in {PLATFORM}" in texts()


def test_two_copies_are_a_warning(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = site.parent / "other"
    install(other, "dp_sync_patch", "0.2.0", OURS)
    monkeypatch.setattr(sys, "path", [str(other), str(site)])
    assert found() == [("DSP422", "warning")]
    assert f"0.2.0 in {other}" in texts()
    assert f"0.1.0 in {site}" in texts()
    monkeypatch.setattr(sys, "path", [str(site), str(site)])
    assert found() == []


def test_not_installed_and_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "vllm", "0.13.0", {})
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert found() == [("DSP006", "error"), ("DSP421", "error")]
    assert "found vllm 0.13.0, vllm-ascend not installed" in texts()
    assert "dp_sync_patch is not installed, only importable" in texts()
    described = environment.describe({})
    assert described["versions"]["vllm-ascend"] is None
    assert described["stock_supported"] is False
    assert described["entry_points"] == {GENERAL: {}, PLATFORM: {}}


@pytest.mark.parametrize(
    ("words", "program", "arguments"),
    [
        ("vllm serve M --x 1", "serve", "serve M --x 1"),
        ("A=1 B=a=b vllm serve M", "serve", "serve M"),
        ("env A=1 B=a=b /opt/bin/vllm serve M", "serve", "serve M"),
        ("A=1 B=a=b numactl --cpunodebind=0 python -m vllm.entrypoints.cli.main serve M", "serve", "serve M"),
        ("python -m vllm.entrypoints.openai.api_server --model M", "api_server", "--model M"),
        ("vllm serve M --served-model-name A=9", "serve", "serve M --served-model-name A=9"),
    ],
)
def test_a_command_line_is_split(monkeypatch: pytest.MonkeyPatch, words: str, program: str, arguments: str) -> None:
    for name in ("A", "B", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "unset")  # restores what was there
        monkeypatch.delenv(name)
    assert command_line.prepare(words.split()) == (program, arguments.split())
    given = {name: os.environ[name] for name in ("A", "B") if name in os.environ}
    assert given == ({"A": "1", "B": "a=b"} if "B=" in words else {})
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_operator_can_allow_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "unset")
    command_line.prepare(["HF_HUB_OFFLINE=0", "vllm", "serve", "M"])
    assert os.environ["HF_HUB_OFFLINE"] == "0"


@pytest.mark.parametrize("words", ["", "ls -l", "serve M", "vllm bench latency", "sglang serve M"])
def test_other_commands_are_refused(words: str) -> None:
    with pytest.raises(command_line.CommandLineError, match="DSP431 not a serve command"):
        command_line.prepare(words.split())


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with the two dependencies of the overlay and nothing of the stack (with `python -S`)."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("wrapt", "packaging"):
        spec = util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (folder / name).symlink_to(Path(spec.origin).parent)
    inherited = ("PYTHON", "DP_SYNC_", "VLLM_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
    return {**clean, "PYTHONPATH": f"{folder}{os.pathsep}{PROJECT}"}


def python(bare: dict[str, str], *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        capture_output=True, text=True, timeout=60, check=False, env={**bare, **environ},
    )  # fmt: skip


def cli(bare: dict[str, str], *words: str, **environ: str) -> tuple[int, str, str]:
    done = python(bare, "-m", "dp_sync_patch", *words, **environ)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_field_case_41_status_without_the_stack(bare: dict[str, str]) -> None:
    code, out, _ = cli(bare, "status", "--json")
    answer: dict[str, Any] = json.loads(out)
    assert code == 2
    assert answer["error"] == "DSP430 stock cannot be imported: ModuleNotFoundError: No module named 'vllm_ascend'"
    assert answer["versions"]["vllm"] is None
    assert answer["process"]["state"] == "undecided"
    assert {finding["code"] for finding in answer["findings"]} == {"DSP006", "DSP421"}
    code, out, _ = cli(bare, "check")
    assert code == 2
    assert out.count("DSP430") == 1
    assert "error: DSP006 unsupported stock: found vllm not installed" in out
    assert "check: problems found" in out
    assert "A server that runs already is not asked." in out


def test_field_case_41_explain_without_the_stack(bare: dict[str, str]) -> None:
    code, out, _ = cli(bare, "explain", "--soc", "A3", "--json", "--", "vllm", "serve", "M")
    assert code == 2
    assert json.loads(out)["error"].startswith("DSP006 unsupported stock: found vllm not installed")


@pytest.mark.parametrize("command", ["status", "check"])
def test_a_wrong_setting_hides_nothing_else(bare: dict[str, str], command: str) -> None:
    code, out, err = cli(bare, command, DP_SYNC_PATCH_MODE="sometimes")
    assert code == 2
    assert "versions: dp_sync_patch" in out
    assert "DSP402 setting mode='sometimes' (environment) must be one of auto, off, require" in out
    assert "DSP402" in err  # as in every process that imports the overlay


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required"),
        (["list"], "invalid choice"),
        (["explain", "--", "vllm", "serve", "M"], "--soc"),
        (["explain", "--soc", "A5", "--", "vllm", "serve", "M"], "A5"),
    ],
)
def test_usage_errors(bare: dict[str, str], words: list[str], said: str) -> None:
    code, out, err = cli(bare, *words)
    assert (code, out) == (2, "")
    assert said in err


def test_a_command_line_is_judged_before_anything_is_imported(bare: dict[str, str]) -> None:
    code, out, _ = cli(bare, "check", "--json", "--", "vllm", "serve", "M")
    assert code == 2
    assert json.loads(out)["error"] == "DSP431 --soc is needed with a command line"
    code, out, _ = cli(bare, "check", "--soc", "A3", "--json", "--", "ls")
    assert code == 2
    assert json.loads(out)["error"] == "DSP431 not a serve command: ls"


def test_the_overlay_does_not_import_its_tools(bare: dict[str, str]) -> None:
    """Nor do the tools import the stack before they are asked to."""
    code = "import sys, json, {}; print(json.dumps([n for n in sys.modules if n.startswith(('dp_sync', 'argparse'))]))"
    loaded = json.loads(python(bare, "-c", code.format("dp_sync_patch")).stdout)
    assert "dp_sync_patch.runtime" in loaded
    tools = ("__main__", "command_line", "environment", "checks")
    assert [name for name in loaded if name.startswith(tuple(f"dp_sync_patch.{tool}" for tool in tools))] == []
    assert "argparse" not in loaded
    loaded = json.loads(python(bare, "-c", code.format("dp_sync_patch.__main__")).stdout)
    assert "dp_sync_patch.command_line" in loaded


def test_field_case_41_help_needs_no_stack(bare: dict[str, str]) -> None:
    code, out, _ = cli(bare, "explain", "--help")
    assert code == 0
    assert "the plan for a command line" in out

# SPDX-License-Identifier: Apache-2.0
"""Settings: bad values are refused with a message that names the variable, the value and what is allowed."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from ranks import MEMORY, World


def make_root(world: World) -> int:
    """Return code of the first call that needs the settings."""
    return world.library.HcclGetRootInfo(ctypes.create_string_buffer(4108))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("VIRTUAL_NPU_SOC", "Ascend310P3", "Ascend910_9391 or Ascend910B1"),
        ("VIRTUAL_NPU_SOC", "", "Ascend910_9391 or Ascend910B1"),
        ("VIRTUAL_NPU_DEVICES", "0", "a whole number from 1 to"),
        ("VIRTUAL_NPU_DEVICES", "-2", "a whole number from 1 to"),
        ("VIRTUAL_NPU_DEVICES", "two", "a whole number from 1 to"),
        ("VIRTUAL_NPU_DEVICES", "2.5", "a whole number from 1 to"),
        ("VIRTUAL_NPU_DEVICE_MEMORY_MB", "8", "a whole number from 64 to"),
        ("VIRTUAL_NPU_WINDOW_MB", "0", "a whole number from 1 to"),
        ("VIRTUAL_NPU_WINDOW_MB", "64MB", "a whole number from 1 to"),
        ("VIRTUAL_NPU_TIMEOUT_S", "0", "a number of seconds above 0"),
        ("VIRTUAL_NPU_TIMEOUT_S", "nan", "a number of seconds above 0"),
        ("VIRTUAL_NPU_TIMEOUT_S", "soon", "a number of seconds above 0"),
        ("VIRTUAL_NPU_SHAPES", "lax", "strict or relaxed"),
        ("VIRTUAL_NPU_DUPLICATE_EXPERTS", "maybe", "refuse or report"),
        *(
            ("VIRTUAL_NPU_DELAY", value, "<rank>:<ms> or <rank>:<ms>@<nth dispatch>, several with commas")
            for value in (
                "1",
                "1:",
                ":200",
                "1:0",
                "-1:200",
                "1:2.5",
                "1:200@0",
                "1:200@",
                "1:200,",
                "1:3600001",
                "1:200,1:300",
                "1:200;2:5",
                "9999999999:1",
            )
        ),
    ],
)
def test_bad_value(launch, variable: str, value: str, allowed: str) -> None:
    (result,) = launch(1, "test_npu_settings:make_root", env={variable: value})
    assert result.value not in (0, None)
    assert f"{variable}='{value}' is not valid: it must be {allowed}" in result.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("variable", "allowed"),
    [
        ("VIRTUAL_NPU_LEDGER_DIR", "a directory that exists and can be written"),
        ("VIRTUAL_NPU_LINK_DELAY_FILE", "a file that can be read"),
    ],
)
def test_missing_path(launch, tmp_path: Path, variable: str, allowed: str) -> None:
    (result,) = launch(1, "test_npu_settings:make_root", env={variable: str(tmp_path / "none")})
    assert result.value not in (0, None)
    assert allowed in result.stderr


@pytest.mark.timeout(60)
def test_good_values(launch) -> None:
    env = {"VIRTUAL_NPU_SOC": "Ascend910B1", "VIRTUAL_NPU_DEVICES": "16", "VIRTUAL_NPU_TIMEOUT_S": "0.5",
           "VIRTUAL_NPU_DELAY": "1:200,0:3600000@2"}  # fmt: skip
    (result,) = launch(1, "test_npu_settings:make_root", env=env)
    assert result.value == 0
    assert result.stderr == ""


def settings_of_a_fork(world: World) -> tuple[int, int]:
    """Return codes here, and in a forked child with a bad setting."""
    own = make_root(world)
    pid = os.fork()
    if pid == 0:
        os.environ["VIRTUAL_NPU_SOC"] = "Ascend310P3"
        os._exit(make_root(world))
    return own, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.timeout(60)
def test_a_forked_child_reads_its_own(launch) -> None:
    (result,) = launch(1, "test_npu_settings:settings_of_a_fork")
    own, child = result.value
    assert own == 0
    assert child not in (0, None)
    assert "VIRTUAL_NPU_SOC='Ascend310P3' is not valid" in result.stderr


def window_of_sixteen_ranks(world: World) -> None:
    world.comm(members=[0] + [9] * 100_000)


@pytest.mark.timeout(60)
def test_window_too_small_for_the_group(launch) -> None:
    (result,) = launch(1, "test_npu_settings:window_of_sixteen_ranks", env={"VIRTUAL_NPU_WINDOW_MB": "1"})
    result.failed_with(MEMORY, "VIRTUAL_NPU_WINDOW_MB=1 is too small for 100001 ranks")


def join_with_file_limit(world: World) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    world.comm()


@pytest.mark.timeout(60)
def test_too_little_shared_memory(launch) -> None:
    """The system refuses to make the segment as large as it must be: the error names need and value."""
    (result,) = launch(1, "test_npu_settings:join_with_file_limit", env={"VIRTUAL_NPU_WINDOW_MB": "8"})
    result.failed_with(MEMORY, "too little shared memory", "8.0 MB", "VIRTUAL_NPU_WINDOW_MB=8", "File too large")


def fill_window(world: World) -> None:
    comm = world.comm()
    # 40 GB that do not exist: the call must fail before it reads them.
    comm.call("HcclBroadcast", None, ctypes.c_uint64(40_000_000_000), 7, 0, comm.handle, None)


@pytest.mark.timeout(60)
def test_shared_memory_runs_out_later(launch) -> None:
    """Pages are reserved when they are needed: running out is an error of that call, not a SIGBUS."""
    (result,) = launch(1, "test_npu_settings:fill_window", env={"VIRTUAL_NPU_WINDOW_MB": "200000"})
    result.failed_with(MEMORY, "too little shared memory: rank 0 of communicator", "needs 38147", "MB are available")

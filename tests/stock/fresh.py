# SPDX-License-Identifier: Apache-2.0
"""Processes that have imported nothing of vLLM, vllm-ascend and the overlay, on the stock wheels and the virtual NPU.

`run` forks them from a process that has made the third-party imports, which take most of the time of stock's;
`run_after_stock` from one that has imported modules of stock as well, for tests that begin after that.
`interpreter` starts a real interpreter, for tests whose point that is.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from this_stock import IMPORTS, STOCK_PLUGINS, VERSION

PROJECT = Path(__file__).parents[2]
_HERE = Path(__file__).parent
# Stock reads these; what the developer's shell has set must not decide a test.
_STOCK_PREFIXES = ("DP_SYNC_PATCH_", "VLLM_", "VIRTUAL_NPU_", "HCCL_", "ASCEND_")
# What may differ between forked processes: nothing that was imported before the fork has read it.
_READ_LATE = ("DP_SYNC_PATCH_", "VLLM_", "HCCL_")


def environment(**changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_STOCK_PREFIXES)}
    path = os.pathsep.join(filter(None, [str(PROJECT), str(_HERE), clean.get("PYTHONPATH")]))
    base = {
        "PYTHONPATH": path,
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM keeps there what it finds out about a model in a process of its own; versions overwrite each other's.
        "VLLM_CACHE_ROOT": str(PROJECT / "build" / "vllm_cache" / VERSION),
        "TASK_QUEUE_ENABLE": "0",
        # As vLLM sets it; it comes too late for the process that imports torch first, which then starts a compiler.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    return {**clean, **base, **changes}


def run(code: str, timeout: float = 500, **environ: str) -> Any:
    """Run `code` in a forked process; its last line of stdout is one JSON value. Returns it and all that was logged.

    `environ` are variables that the third-party imports do not read; those of the virtual NPU are not among them.
    """
    early = [name for name in environ if not name.startswith(_READ_LATE)]
    assert not early, f"{early} may have been read before the fork: use interpreter()"
    return _result(*_server().run(code, environment(**environ), timeout))


def run_after_stock(code: str, timeout: float = 500, **environ: str) -> Any:
    """As `run`, in a process that has imported an engine and its worker, with the plugins of stock."""
    return _result(*_server(*IMPORTS).run(code, environment(**{**STOCK_PLUGINS, **environ}), timeout))


def interpreter(code: str, timeout: float = 500, **environ: str) -> Any:
    """As `run`, in a real interpreter that starts from nothing."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment(**environ),
    )
    return _result(done.returncode, done.stdout, done.stderr)


def _result(returncode: int, stdout: str, stderr: str) -> Any:
    assert returncode == 0, f"ended with {returncode}\n{stdout[-4000:]}\n{stderr[-8000:]}"
    lines = stdout.splitlines()
    return json.loads(lines[-1]), "\n".join(lines[:-1]) + stderr


class _Server:
    """The process of fork_server.py. It serves one request at a time, and ends when this process does."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_HERE / "fork_server.py"), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # select() has to see what is there
            env=environment(OPENBLAS_NUM_THREADS="1", **STOCK_PLUGINS),
        )
        atexit.register(self.stop)

    def run(self, code: str, environ: dict[str, str], timeout: float) -> tuple[int, str, str]:
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "stdout", Path(folder) / "stderr"
            out.touch()
            err.touch()
            request = {"code": code, "environ": environ, "cwd": os.getcwd(), "stdout": str(out), "stderr": str(err)}
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            child = self._answer(300)  # the third-party imports of a machine that does something else
            assert child is not None, "the fork server does not answer"
            returncode = self._answer(timeout)
            if returncode is None:
                os.killpg(child, signal.SIGKILL)
                self._answer(60)
            text = out.read_text(), err.read_text()
        assert returncode is not None, f"no end within {timeout:g} s\n{text[0][-4000:]}\n{text[1][-8000:]}"
        return returncode, *text

    def _answer(self, timeout: float) -> int | None:
        """The next number from the server, or None when it does not come in time."""
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], timeout)[0]:
            return None
        line = stdout.readline()
        assert line, "the fork server has ended, see its stderr"
        number: int = json.loads(line)
        return number

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@functools.cache
def _server(*modules: str) -> _Server:
    return _Server(modules)

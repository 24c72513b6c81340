# SPDX-License-Identifier: Apache-2.0
"""Runs code in processes that have torch imported already: importing it takes seconds, forking milliseconds.

One helper process imports torch, which attaches the virtual NPU but reads none of its settings, and then forks for each
piece of code. The fork gets an environment of its own, as a fresh interpreter would.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn, TextIO


class TorchForks:
    """Starts the helper at once; the first piece of code waits until it has imported torch."""

    def __init__(self) -> None:
        self._helper = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, code: str, output: Path, **environment: str) -> int:
        """Runs `code`; its stdout and stderr go to `output`. Returns a number for `finish`."""
        return self._ask(code=code, output=str(output), environment={**os.environ, **environment})

    def finish(self, pid: int, seconds: float) -> int:
        """The exit status, -9 if it had to be killed after `seconds`."""
        return self._ask(pid=pid, seconds=seconds)

    def run(self, code: str, output: Path, **environment: str) -> tuple[int, str]:
        """Exit status and output."""
        status = self.finish(self.start(code, output, **environment), 60)
        return status, output.read_text()

    def close(self) -> None:
        assert self._helper.stdin is not None
        self._helper.stdin.close()
        self._helper.wait(10)

    def _ask(self, **request: object) -> int:
        assert self._helper.stdin is not None
        assert self._helper.stdout is not None
        print(json.dumps(request), file=self._helper.stdin, flush=True)
        return int(self._helper.stdout.readline())


def _become(code: str, output: str, environment: dict[str, str]) -> NoReturn:
    status = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        attached = {"TASK_QUEUE_ENABLE": os.environ["TASK_QUEUE_ENABLE"]}  # set by attach, read by torch_npu later
        os.environ.clear()
        os.environ.update(attached | environment)
        exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:  # noqa: BLE001 (the caller reads it in the output)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(pid: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _serve(requests: TextIO, answers: TextIO) -> None:
    import torch  # noqa: F401

    children: set[int] = set()
    for line in requests:
        request = json.loads(line)
        if "pid" in request:
            answer = _wait(**request)
            children.discard(request["pid"])
        else:
            answer = os.fork()
            if answer == 0:
                _become(**request)
            children.add(answer)
        print(answer, file=answers, flush=True)
    for pid in children:  # the tests ended early
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)  # nothing to tidy up, and torch takes seconds for it


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # torch_npu prints while it is imported
    _serve(sys.stdin, own)

# SPDX-License-Identifier: Apache-2.0
"""Runs as a process of its own: imports what stock imports from third parties, then forks one child per request.

A child has the environment of its request, and of vLLM, vllm-ascend and the overlay nothing imported but the modules
named on this process's command line. Requests and answers are JSON lines on stdin and stdout; fresh.py is the other
end.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import sys
import types
from typing import Any

# Nine tenths of the time that stock's imports take. torch brings torch_npu and the virtual NPU with it.
THIRD_PARTY = (
    "torch",
    "torch_npu.dynamo.torchair",
    "transformers.models",
    "transformers.modeling_utils",
    "transformers.processing_utils",
    "gguf",
    "torchvision.transforms.v2",
    "openai.types.responses",
    "scipy.optimize",
    "numba",
    "fastapi",
    # Only where they are installed: not every version of stock has them.
    "scipy.signal",
    "pandas",
    "compressed_tensors.quantization",
    "xgrammar",
    "fastsafetensors",
)
UNDER_TEST = ("vllm", "vllm_ascend", "dp_sync_patch")


def serve() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # imports print what they like
    before = dict(os.environ)
    for name in THIRD_PARTY:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    for name in sys.argv[1:]:  # what of stock the children find imported already
        importlib.import_module(name)
    # Importing sets variables as well; the children have to find them.
    changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    # A thread would be missing in the children, with whatever it had locked.
    threads = len(os.listdir("/proc/self/task"))
    imported = [name for name in sys.modules if name.split(".")[0] in UNDER_TEST]
    if threads > 1 or (imported and not sys.argv[1:]):
        sys.exit(f"not fit to be forked: {threads} threads, {imported} imported")
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if not (child := os.fork()):
            os.close(answers)
            _become({**request, "environ": {**request["environ"], **changed}})
            return
        os.write(answers, b"%d\n" % child)
        _, status = os.waitpid(child, 0)
        os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))


def _become(request: dict[str, Any]) -> None:
    """In the child: what `python -c code` would have, then the code. It ends as a child of multiprocessing does."""
    os.setsid()
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY),
        (2, request["stderr"], os.O_WRONLY),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    sys.argv[:] = ["-c"]
    sys.path[0] = ""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(request["code"], "<string>", "exec"), vars(main))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without the second that it takes to take all modules apart


serve()

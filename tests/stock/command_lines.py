# SPDX-License-Identifier: Apache-2.0
"""Many command lines explained by one interpreter, each in a forked process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fresh import run_after_stock

_RUN = """
import json, os, sys, tempfile

# What every command line needs, once; the children only read it.
import vllm.entrypoints.cli.serve
from vllm.ray.lazy_utils import is_ray_initialized

is_ray_initialized()
from dp_sync_patch import command_line
from dp_sync_patch.errors import DpSyncPatchError

answers = []
for words, soc in json.load(open(sys.argv[1])):
    with tempfile.TemporaryFile("w+") as answer:
        if not (child := os.fork()):
            try:
                json.dump(command_line.explain(words, soc), answer)
            except DpSyncPatchError as error:
                json.dump({"error": str(error)}, answer)
            answer.flush()
            os._exit(0)
        os.waitpid(child, 0)
        answer.seek(0)
        answers.append(json.load(answer))
print(json.dumps(answers))
"""


def explain_all(folder: Path, commands: list[tuple[list[str], str]]) -> list[dict[str, Any]]:
    """The answer for each command line; they share the imports of one interpreter, nothing else."""
    request = folder / "commands.json"
    request.write_text(json.dumps(commands))
    answers: list[dict[str, Any]]
    code = _RUN.replace("sys.argv[1]", repr(str(request)))
    answers, _ = run_after_stock(code, timeout=900)
    return answers


def serve(model: Path, flags: dict[str, Any], environ: dict[str, str]) -> list[str]:
    """The words of a command line; a flag with None takes no value, and what is no text is given as JSON."""
    words = [f"{name}={value}" for name, value in environ.items()]
    words += ["vllm", "serve", str(model)]
    for name, value in flags.items():
        words.append(name)
        if value is not None:
            words.append(value if isinstance(value, str) else json.dumps(value))
    return words

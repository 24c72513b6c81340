# SPDX-License-Identifier: Apache-2.0
"""For the processes that fresh.py starts: looks at patch points, without importing the overlay."""

from __future__ import annotations

import importlib
import json
import sys
from multiprocessing.connection import Connection
from typing import Any


def resolve(target: str) -> tuple[Any, str]:
    """Module:Class.method -> the class (or the module), and the last name."""
    module, name = target.split(":")
    owner: Any = importlib.import_module(module)
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, attribute


def current(target: str) -> Any:
    owner, attribute = resolve(target)
    return vars(owner)[attribute]


def depth(target: str) -> int:
    """How many wrappers of the overlay are on top of each other there."""
    found, levels = current(target), 0
    while getattr(found, "_self_dp_sync_patch", False):
        found, levels = found.__wrapped__, levels + 1
    return levels


def answer(**values: Any) -> None:
    print(json.dumps(values))


def report_child(connection: Connection, targets: list[str], worker_module: str) -> None:
    """Runs in a child process of multiprocessing: loads what vLLM's engine and its worker load, in their order."""
    before = [depth(target) for target in targets] if "vllm.v1.engine.core" in sys.modules else []
    importlib.import_module("vllm.v1.engine.core")  # what a spawned engine imports first, to find its main function
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    importlib.import_module(worker_module)
    import dp_sync_patch
    from dp_sync_patch.patches import registry

    found = {"before": before, "child": [depth(target) for target in targets], "foreign": registry.foreign()}
    connection.send({**found, "units": dp_sync_patch.status()["units"]})

# SPDX-License-Identifier: Apache-2.0
"""Hooks on modules that are half-made when they are asked for: real modules, in fresh interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]

# A module whose import leads to one that hooks it, as vLLM's modules resolve the platform, and then goes on.
_HALF_MADE = """
import hooking
class Defined: ...
if FAIL:
    raise ImportError("in the middle")
"""
_HOOKING = """
import builtins, sys
from dp_sync_patch import import_hooks

def hook(name):
    module = sys.modules["half_made"]
    builtins.calls.append([name, hasattr(module, "Defined"), import_hooks.is_half_made("half_made")])

builtins.half_made_then = import_hooks.is_half_made("half_made")
for name in HOOKS:
    import_hooks.when_imported("half_made", lambda name=name: hook(name))
builtins.called_then = list(builtins.calls)
"""
_HEAD = """
import builtins, json, sys
builtins.calls = []
builtins.FAIL, builtins.HOOKS = False, ["first"]
from dp_sync_patch import import_hooks
def attempt():
    try:
        import half_made
    except ImportError as error:
        return str(error)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "half_made.py").write_text(_HALF_MADE)
    (tmp_path / "hooking.py").write_text(_HOOKING)
    (tmp_path / "whole.py").write_text("class Defined: ...\n")
    return tmp_path


def run(folder: Path, code: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", _HEAD + code], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", str(PROJECT))]),
             "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_hook_of_a_half_made_module_is_called_once_at_the_end_of_its_import(folder: Path) -> None:
    """With its classes in place, and before whoever imports it goes on: nothing else has to be imported for it."""
    code = """
attempt()
after = list(calls)
attempt()
import importlib, whole
spec = type(sys.modules["half_made"].__spec__).__name__
importlib.reload(sys.modules["half_made"])
print(json.dumps([half_made_then, called_then, after, calls, spec]))
"""
    half_made, called_then, after, calls, spec = run(folder, code)
    assert (half_made, called_then) == (True, [])
    assert after == calls == [["first", True, False]]
    assert spec == "ModuleSpec"  # nothing stays behind


def test_the_hook_of_a_module_whose_import_fails_waits_for_the_next_attempt(folder: Path) -> None:
    """Nobody hooks it again: the overlay arms its hooks once."""
    code = """
builtins.FAIL = True
error = attempt()
failed = list(calls)
builtins.FAIL = False
again = attempt()
print(json.dumps([error, failed, again, [call[:2] for call in calls]]))
"""
    assert run(folder, code) == ["in the middle", [], None, [["first", True]]]


def test_several_hooks_of_one_half_made_module_are_called_in_their_order(folder: Path) -> None:
    code = """
builtins.HOOKS = ["first", "second", "third"]
attempt()
print(json.dumps(calls))
"""
    assert [name for name, *_ in run(folder, code)] == ["first", "second", "third"]


def test_a_later_hook_on_the_same_module_works(folder: Path) -> None:
    """When it is complete, and when it is half-made once more."""
    code = """
attempt()
import_hooks.when_imported("half_made", lambda: calls.append("complete"))
complete = list(calls)
for name in ("half_made", "hooking"):
    del sys.modules[name]
builtins.HOOKS = ["again"]
attempt()
print(json.dumps([complete, calls]))
"""
    complete, calls = run(folder, code)
    assert complete == [["first", True, False], "complete"]
    assert calls[2:] == [["again", True, False]]


def test_a_hook_may_be_registered_by_a_hook(folder: Path) -> None:
    """As one that finds another module half-made does it, see `runtime._on_import`."""
    code = """
attempt()
def outer():
    calls.append("outer")
    import_hooks.when_imported("half_made", lambda: calls.append("inner"))
import_hooks.when_imported("whole", outer)
import whole
print(json.dumps(calls[1:]))
"""
    assert run(folder, code) == ["outer", "inner"]


def test_modules_that_are_not_half_made_are_as_with_wrapt(folder: Path) -> None:
    """Imported already: at once. Not yet: at the end of the import. Both once."""
    code = """
def hook(when):
    calls.append([when, hasattr(sys.modules["whole"], "Defined")])
import_hooks.when_imported("whole", lambda: hook("before"))
before = list(calls)
half_made = import_hooks.is_half_made("whole")
import whole
import_hooks.when_imported("whole", lambda: hook("after"))
print(json.dumps([before, half_made, import_hooks.is_half_made("whole"), calls]))
"""
    assert run(folder, code) == [[], False, False, [["before", True], ["after", True]]]

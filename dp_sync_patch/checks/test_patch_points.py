# SPDX-License-Identifier: Apache-2.0
"""The patch points of this stock version, in this process."""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import wrapt

from dp_sync_patch import runtime, stock
from dp_sync_patch.command_line import import_stock
from dp_sync_patch.errors import DpSyncPatchError
from dp_sync_patch.patches import TRIGGERS, PatchedFunction, PatchPoint, describe, points_of, registry


def _points() -> tuple[list[PatchPoint], str]:
    """All points, or why there are none."""
    try:
        entry = stock.require()
        import_stock()
        return [point for unit in TRIGGERS for point in points_of(unit, entry.vllm_ascend)], ""
    except DpSyncPatchError as error:
        return [], str(error)


POINTS, WHY_NONE = _points()


def _resolve(point: PatchPoint) -> tuple[Any, str, Any]:
    try:
        parent, attribute, _ = wrapt.resolve_path(importlib.import_module(point.module), point.name)
        return parent, attribute, vars(parent)[attribute]
    except (AttributeError, ImportError, KeyError):
        pytest.fail(f"{point.target} does not exist in this stock", pytrace=False)


@pytest.fixture
def unpatched() -> Iterator[None]:
    """Stock as it is, whatever importing it has armed; afterwards as before."""
    runtime.uninstall()
    yield
    runtime.uninstall()


def test_stock_is_supported_and_can_be_imported() -> None:
    if WHY_NONE:
        pytest.fail(WHY_NONE, pytrace=False)
    assert POINTS


@pytest.mark.usefixtures("unpatched")
@pytest.mark.parametrize("point", POINTS or [None], ids=lambda point: point.target if point else "none")
def test_point_is_as_recorded(point: PatchPoint | None) -> None:
    if point is None:
        pytest.fail(f"no patch points: {WHY_NONE}", pytrace=False)
    _, _, original = _resolve(point)
    assert not isinstance(original, wrapt.FunctionWrapper), f"{point.target} is wrapped by somebody else"
    assert describe(original) == point.signature


@pytest.mark.usefixtures("unpatched")
def test_apply_and_undo_leave_nothing_behind() -> None:
    if WHY_NONE:
        pytest.fail(WHY_NONE, pytrace=False)
    before = [_resolve(point) for point in POINTS]
    runtime.install()
    assert registry.units == dict.fromkeys(TRIGGERS, "applied")
    for parent, attribute, original in before:
        patched = vars(parent)[attribute]
        assert isinstance(patched, PatchedFunction)
        assert patched.__wrapped__ is original
    assert _bypassing({id(original) for _, _, original in before}) == []
    assert runtime.uninstall() == len(POINTS)
    for parent, attribute, original in before:
        assert vars(parent)[attribute] is original


def _bypassing(originals: set[int]) -> list[str]:
    """Names in modules and their classes that still lead to an original: calls through them would not be patched."""
    found: list[str] = []
    for module_name, module in list(sys.modules.items()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in originals:
                found.append(f"{module_name}.{name}")
            # Not isinstance(): it would ask lazy modules for their __class__, which imports them.
            if issubclass(type(value), type):
                members = type.__dict__["__dict__"].__get__(value)
                found += [f"{module_name}.{name}.{key}" for key, member in members.items() if id(member) in originals]
    return found

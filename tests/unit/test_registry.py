# SPDX-License-Identifier: Apache-2.0
"""The patch registry against small targets: atomic, idempotent, undone by identity, never over somebody else."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import wrapt

from dp_sync_patch.errors import ForeignWrapperError, StandDownError
from dp_sync_patch.patches import PatchedFunction, PatchPoint, Registry, describe

MODULE = "dp_sync_patch_test_target"


def _add_one(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return wrapped(*args, **kwargs) + 1


class Parent:
    def inherited(self, number: int, *, scale: int = 1) -> int:
        """Original text."""
        return number * scale


class Child(Parent):
    def own(self, number: int) -> int:
        return number

    @staticmethod
    def static(number: int) -> int:
        return number

    @classmethod
    def of_class(cls, number: int) -> int:
        return number

    def raises(self, number: int) -> int:
        raise ValueError(f"stock failure {number}")


@pytest.fixture
def target() -> Iterator[types.ModuleType]:
    """A fresh module with fresh classes, so that no test sees another one's patches."""
    module = types.ModuleType(MODULE)
    parent = type("Parent", (object,), dict(vars(Parent)))
    members = {name: value for name, value in vars(Child).items() if not name.startswith("__")}
    module.Parent = parent  # type: ignore[attr-defined]
    module.Child = type("Child", (parent,), members)  # type: ignore[attr-defined]
    module.function = lambda number: number  # type: ignore[attr-defined]
    sys.modules[MODULE] = module
    yield module
    del sys.modules[MODULE]


def point(name: str, signature: str = "(self, number)", **changes: Any) -> PatchPoint:
    fields = {
        "unit": "worker",
        "module": MODULE,
        "name": name,
        "wrapper": _add_one,
        "signature": signature,
        "why": "a reason",
        "how": "a way",
        "upstream": "vllm-ascend#1857",
        "remove_when": "never",
        "versions": "==0.11.0",
    }
    return PatchPoint(**{**fields, **changes})


OWN = point("Child.own")
STATIC = point("Child.static", "(number)")
CLASSMETHOD = point("Child.of_class", "(cls, number)")
KEYWORD = point("Parent.inherited", "(self, number, *, scale=1)")
RAISES = point("Child.raises")


@pytest.mark.parametrize("field", ["why", "how", "upstream", "remove_when", "versions", "signature"])
def test_a_point_without_documentation_does_not_construct(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        point("Child.own", **{field: ""})


def test_a_point_covers_its_versions_only() -> None:
    assert OWN.covers("0.11.0")
    assert not OWN.covers("0.11.0rc1")
    assert not OWN.covers("0.12.0")


def test_a_default_that_is_a_function_has_no_address() -> None:
    def with_function(self: Any, number: int, logits: Any = lambda hidden: hidden, *, scale: int = 1) -> None: ...

    assert describe(with_function) == "(self, number, logits=<function>, *, scale=1)"


def test_field_case_40_all_forms_are_wrapped_and_call_through(target: Any) -> None:
    registry = Registry()
    points = [OWN, STATIC, CLASSMETHOD, KEYWORD]
    assert registry.apply("worker", points)
    child = target.Child()
    assert child.own(1) == 2
    assert child.own(number=1) == 2
    assert child.static(1) == 2
    assert target.Child.static(1) == 2
    assert child.of_class(1) == 2
    assert target.Child.of_class(number=1) == 2
    assert child.inherited(2, scale=3) == 7
    assert describe(target.Child.inherited) == "(self, number, *, scale=1)"
    assert target.Child.inherited.__doc__ == "Original text."
    assert registry.units == {"worker": "applied"}


def test_an_exception_of_stock_passes_untouched(target: Any) -> None:
    registry = Registry()
    registry.apply("worker", [RAISES])
    with pytest.raises(ValueError, match="stock failure 7"):
        target.Child().raises(7)


def test_applying_again_changes_nothing(target: Any) -> None:
    registry = Registry()
    assert registry.apply("worker", [OWN])
    first = vars(target.Child)["own"]
    for _ in range(3):
        assert not registry.apply("worker", [OWN])
    assert vars(target.Child)["own"] is first
    assert target.Child().own(1) == 2


def test_importing_a_point_may_apply_its_unit(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker applies the engine's unit as well, and importing the engine core runs the hook that does the same."""
    registry = Registry()
    real_import = importlib.import_module
    fired: list[str] = []

    def import_with_a_hook(name: str) -> Any:
        if not fired:
            fired.append(name)
            assert registry.apply("engine", [OWN])
        return real_import(name)

    monkeypatch.setattr(importlib, "import_module", import_with_a_hook)
    assert not registry.apply("engine", [OWN])
    assert registry.units == {"engine": "applied"}
    assert target.Child().own(1) == 2


def test_threads_apply_once(target: Any) -> None:
    registry = Registry()
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(registry.apply("worker", [OWN]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]
    assert target.Child().own(1) == 2


def test_undo_restores_by_identity(target: Any) -> None:
    names = ("own", "static", "of_class", "raises")
    before = {name: vars(target.Child)[name] for name in names}
    registry = Registry()
    registry.apply("worker", [OWN, STATIC, CLASSMETHOD, RAISES, KEYWORD])
    assert registry.undo() == 5
    assert {name: vars(target.Child)[name] for name in names} == before
    assert all(vars(target.Child)[name] is before[name] for name in names)
    assert isinstance(vars(target.Child)["static"], staticmethod)
    assert isinstance(vars(target.Child)["of_class"], classmethod)
    assert registry.undo() == 0


@pytest.mark.parametrize(
    ("broken", "mentions"),
    [
        (point("Child.gone"), "does not exist"),
        (point("Nobody.own"), "does not exist"),
        # Patching the name on the child would not be what was recorded, nor what undo could put back.
        (point("Child.inherited", "(self, number, *, scale=1)"), "inherited from a base class"),
        (point("Child.own", "(self, number, mode)"), r"takes \(self, number\) instead of \(self, number, mode\)"),
    ],
)
def test_a_last_point_that_does_not_fit_leaves_nothing_applied(target: Any, broken: PatchPoint, mentions: str) -> None:
    before = dict(vars(target.Child))
    registry = Registry()
    with pytest.raises(StandDownError, match=mentions) as error:
        registry.apply("worker", [OWN, STATIC, broken])
    assert error.value.code == "DSP007"
    assert broken.target in str(error.value)
    assert dict(vars(target.Child)) == before
    assert registry.describe() == []
    assert registry.units["worker"].startswith("DSP007")


def test_a_failure_while_applying_rolls_back(target: Any) -> None:
    class Sealed(type):
        def __setattr__(cls, name: str, value: object) -> None:
            if isinstance(value, PatchedFunction):
                raise RuntimeError("sealed")
            super().__setattr__(name, value)

    target.Sealed = Sealed("Sealed", (), {"own": Child.own})
    before = dict(vars(target.Child))
    registry = Registry()
    with pytest.raises(RuntimeError, match="sealed"):
        registry.apply("worker", [OWN, STATIC, point("Sealed.own")])
    assert dict(vars(target.Child)) == before
    assert registry.describe() == []


def test_a_wrapper_that_does_not_stick_rolls_back(target: Any) -> None:
    class Deaf(type):
        def __setattr__(cls, name: str, value: object) -> None:
            """Ignores every assignment."""

    target.Deaf = Deaf("Deaf", (), {"own": Child.own})
    registry = Registry()
    with pytest.raises(StandDownError, match="does not keep its wrapper"):
        registry.apply("worker", [OWN, point("Deaf.own")])
    assert target.Child().own(1) == 1


def test_a_foreign_wrapper_on_top_is_refused(target: Any) -> None:
    registry = Registry()
    registry.apply("worker", [OWN, STATIC])
    ours = vars(target.Child)["own"]
    theirs = wrapt.FunctionWrapper(ours, lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs) * 10)
    target.Child.own = theirs
    assert registry.foreign() == [OWN.target]
    assert registry.foreign(wrapped_too=False) == []
    assert [entry["state"] for entry in registry.describe()] == ["applied, wrapped by somebody else", "applied"]
    with pytest.raises(ForeignWrapperError, match=r"Child\.own"):
        registry.undo()
    assert vars(target.Child)["own"] is theirs
    assert target.Child().static(1) == 2, "nothing may be undone when something cannot be"
    assert target.Child().own(1) == 20
    target.Child.own = ours
    assert registry.undo() == 2
    assert target.Child().own(1) == 1


@pytest.mark.parametrize("name", ["own", "static", "of_class", "inherited"])
def test_a_profiler_that_keeps_to_functools_wraps_is_no_replacement(target: Any, name: str) -> None:
    """It starts from what the class hands out, which for a wrapper of wrapt is another object."""
    registry = Registry()
    registry.apply("worker", [OWN, STATIC, CLASSMETHOD, KEYWORD])
    owner = target.Parent if name == "inherited" else target.Child
    seen = getattr(owner, name)
    setattr(owner, name, functools.wraps(seen)(lambda *args, **kwargs: seen(*args, **kwargs)))
    assert len(registry.foreign()) == 1
    assert registry.foreign(wrapped_too=False) == []
    setattr(owner, name, lambda *args, **kwargs: 0)
    assert registry.foreign(wrapped_too=False) == registry.foreign()
    assert {entry["state"] for entry in registry.describe()} == {"applied", "changed by somebody else"}


def test_a_foreign_wrapper_below_stays(target: Any) -> None:
    original = vars(target.Child)["own"]
    theirs = wrapt.FunctionWrapper(original, lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs) * 10)
    target.Child.own = theirs
    registry = Registry()
    registry.apply("worker", [OWN])
    assert target.Child().own(1) == 11
    registry.undo()
    assert vars(target.Child)["own"] is theirs


def test_a_second_copy_of_the_overlay_does_not_wrap_again(target: Any) -> None:
    Registry().apply("worker", [OWN])
    with pytest.raises(StandDownError, match="another copy"):
        Registry().apply("worker", [OWN])
    assert target.Child().own(1) == 2


def _in_child(connection: Any) -> None:
    target = sys.modules.get(MODULE)
    connection.send((os.getpid(), None if target is None else target.Child().own(1)))


def test_fork_inherits_and_spawn_starts_clean(target: Any) -> None:
    registry = Registry()
    registry.apply("worker", [OWN])
    results = {}
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(target=_in_child, args=(theirs,))
        process.start()
        assert ours.poll(60)
        pid, results[method] = ours.recv()
        process.join(60)
        assert pid == process.pid != os.getpid()
        assert process.exitcode == 0
    assert results == {"fork": 2, "spawn": None}

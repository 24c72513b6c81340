# SPDX-License-Identifier: Apache-2.0
"""Registry of patch points: verify all of a unit, then apply all, or nothing.

A unit is what one kind of process needs: `worker` (the model runner and its MoE operators) and `engine` (the scheduler
budget). Each unit is applied when its trigger module has been imported, never before, so that processes that do not
need it import nothing more than they would without the overlay.
"""

import importlib
import inspect
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import wrapt
from packaging.specifiers import SpecifierSet

from dp_sync_patch.errors import ForeignWrapperError, StandDownError, logger

# States of a point. Somebody who wraps ours and calls through, as profilers do, takes nothing away.
APPLIED, WRAPPED, CHANGED = "applied", "applied, wrapped by somebody else", "changed by somebody else"
Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True, kw_only=True)
class PatchPoint:
    """One patched attribute. The text fields are part of the point, so that tables and `status` cannot drift."""

    unit: str
    module: str
    name: str  # "Class.method"
    wrapper: Wrapper
    signature: str  # as `describe` gives it for `versions`
    why: str
    how: str
    upstream: str
    remove_when: str
    versions: str  # requirement on the vllm-ascend version

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name):
                raise ValueError(f"patch point {self.module}:{self.name} has no {field.name}")
        SpecifierSet(self.versions)

    @property
    def target(self) -> str:
        return f"{self.module}:{self.name}"

    def covers(self, version: str) -> bool:
        return SpecifierSet(self.versions).contains(version, prereleases=True)


@dataclass(frozen=True)
class Place:
    """Where one version of vllm-ascend keeps a patched object, and what it looks like there."""

    versions: str
    module: str
    name: str
    signature: str


def points_at(*places: Place, **common: Any) -> tuple[PatchPoint, ...]:
    """One point per place, with the same wrapper and documentation."""
    return tuple(PatchPoint(**common, **vars(place)) for place in places)


if TYPE_CHECKING:
    _FunctionWrapper = wrapt.FunctionWrapper[..., Any]
else:  # wrapt 1.x has no generic wrappers
    _FunctionWrapper = wrapt.FunctionWrapper


class PatchedFunction(_FunctionWrapper):
    """Our own type; the mark tells our wrappers from others, even those of a second copy of this module."""

    _self_dp_sync_patch = True


@dataclass
class _Applied:
    point: PatchPoint
    parent: Any
    attribute: str
    original: Any
    wrapper: PatchedFunction


def describe(function: Any) -> str:
    """Signature without annotations: names, kinds and defaults are what a wrapper depends on."""
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    described = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    return re.sub(r"<function .*? at 0x[0-9a-f]+>", "<function>", described)  # a default; the address is the process's


class Registry:
    """The patch points of one process and what has become of them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._applied: list[_Applied] = []
        self.units: dict[str, str] = {}  # unit -> "applied" or the reason why not

    def apply(self, unit: str, points: list[PatchPoint]) -> bool:
        """Verify all points, then apply all. Returns False when the unit is in force already.

        Raises:
            StandDownError: a point does not fit; none of the unit is in force.
        """
        with self._lock:
            try:
                for point in points:
                    _import(point)
                if self.units.get(unit) == "applied":  # perhaps just now: an import above can be the unit's trigger
                    return False
                verified = [_verify(point) for point in points]
                done: list[_Applied] = []
                try:
                    for entry in verified:
                        setattr(entry.parent, entry.attribute, entry.wrapper)
                        done.append(entry)
                        if vars(entry.parent).get(entry.attribute) is not entry.wrapper:
                            raise StandDownError("DSP007", f"{entry.point.target} does not keep its wrapper")
                except BaseException:
                    for entry in reversed(done):
                        _restore(entry)
                    raise
            except StandDownError as error:
                self.units[unit] = str(error)
                raise
            self._applied.extend(verified)
            self.units[unit] = "applied"
            return True

    def foreign(self, *, wrapped_too: bool = True) -> list[str]:
        """Targets whose attribute is no longer our wrapper; without those where calls still reach it if told so."""
        found = [(entry, vars(entry.parent).get(entry.attribute)) for entry in self._applied]
        return [
            entry.point.target
            for entry, now in found
            if now is not entry.wrapper and (wrapped_too or not _leads_to(now, entry.wrapper))
        ]

    def undo(self) -> int:
        """Put the original objects back, last one first. Returns how many.

        Raises:
            ForeignWrapperError: another wrapper sits on one of ours; nothing is undone.
        """
        with self._lock:
            if foreign := self.foreign():
                raise ForeignWrapperError("DSP009", f"not undone, changed by somebody else: {', '.join(foreign)}")
            count = len(self._applied)
            while self._applied:
                _restore(self._applied.pop())
            self.units.clear()
            return count

    def describe(self) -> list[dict[str, Any]]:
        """The applied points with their documentation, for `status`."""
        states = dict.fromkeys(self.foreign(), WRAPPED)
        states |= dict.fromkeys(self.foreign(wrapped_too=False), CHANGED)
        return [
            {
                "target": entry.point.target,
                "unit": entry.point.unit,
                "state": states.get(entry.point.target, APPLIED),
                "why": entry.point.why,
                "how": entry.point.how,
                "upstream": entry.point.upstream,
                "remove_when": entry.point.remove_when,
                "versions": entry.point.versions,
            }
            for entry in self._applied
        ]


def _import(point: PatchPoint) -> Any:
    try:
        return importlib.import_module(point.module)
    except ImportError as error:
        raise StandDownError("DSP007", f"{point.module} cannot be imported: {error}") from None


def _verify(point: PatchPoint) -> _Applied:
    module = _import(point)
    try:
        parent, attribute, original = wrapt.resolve_path(module, point.name)
    except AttributeError as error:
        raise StandDownError("DSP007", f"{point.target} does not exist: {error}") from None
    if getattr(original, "_self_dp_sync_patch", False):
        raise StandDownError("DSP007", f"{point.target} is patched already, by another copy of the overlay")
    if attribute not in vars(parent):
        # A base class may have a method of the same name and signature: not what was recorded.
        raise StandDownError("DSP007", f"{point.target} does not exist: the name is inherited from a base class")
    found = describe(original)
    if found != point.signature:
        raise StandDownError("DSP007", f"{point.target} takes {found} instead of {point.signature}")
    return _Applied(point, parent, attribute, original, PatchedFunction(original, point.wrapper))


def _leads_to(found: Any, wrapper: PatchedFunction) -> bool:
    """Whether calls of `found` get to `wrapper`, as far as one can see: profilers wrap like functools.wraps does."""
    while found is not None and found is not wrapper:
        # What a class hands out is wrapt's bound form of a wrapper, with the original below it.
        found = wrapper if getattr(found, "_self_parent", None) is wrapper else getattr(found, "__wrapped__", None)
    return found is wrapper


def _restore(entry: _Applied) -> None:
    setattr(entry.parent, entry.attribute, entry.original)


registry = Registry()

# unit -> the module whose import means that this process needs the unit
TRIGGERS = {
    "worker": "vllm_ascend.worker.model_runner_v1",
    "engine": "vllm.v1.engine.core",
}
# Modules that have imported the one above when they are complete. They stand in for it where an import finder that was
# put before wrapt's keeps it to itself, as that of msserviceprofiler does with the modules that it profiles.
STAND_INS = {
    "worker": ("vllm_ascend.worker.worker", "vllm_ascend.worker.worker_v1"),
    "engine": ("vllm.v1.engine.core_client",),
}


def points_of(unit: str, version: str) -> list[PatchPoint]:
    """The points of a unit for one vllm-ascend version. Imports the wrappers, hence torch: never at package import."""
    modules = {
        "worker": ("startup", "metadata_sync", "draft_passes", "graph_mode", "comm_selector", "mc2_arguments"),
        "engine": ("engine_startup",),
    }
    found: list[PatchPoint] = []
    for name in modules[unit]:
        found.extend(importlib.import_module(f"dp_sync_patch.patches.{name}").POINTS)
    chosen = [point for point in found if point.covers(version)]
    logger.debug("unit %s has %d patch points for vllm-ascend %s", unit, len(chosen), version)
    return chosen

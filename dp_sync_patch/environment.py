# SPDX-License-Identifier: Apache-2.0
"""What is installed, and what VLLM_PLUGINS makes of it. For the tools only; imports no package of the stack.

vLLM says nothing when a name in VLLM_PLUGINS matches no plugin, nor when stale metadata hides an entry point.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from typing import Any

from dp_sync_patch import plugin, settings, stock
from dp_sync_patch.errors import DpSyncPatchError

DISTRIBUTION = "dp_sync_patch"
_PACKAGES = ("vllm", "vllm-ascend", "torch", "torch-npu", "wrapt", "packaging")


@dataclass(frozen=True)
class Finding:
    """Something an operator should know. An error means that the overlay cannot work like this."""

    code: str
    severity: str  # error or warning
    sentence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.code} {self.sentence}; {self.advice}"


def describe(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Versions, the vLLM entry points of the overlay and of vllm-ascend, and VLLM_PLUGINS as vLLM splits it."""
    environ = os.environ if environ is None else environ
    return {
        "versions": {name: _version(name) for name in (DISTRIBUTION, *_PACKAGES)},
        "supported": stock.supported(),
        "stock_supported": stock.current() is not None,
        "entry_points": {
            group: {entry.name: entry.value for entry in metadata.entry_points(group=group)}
            for group in (plugin.GENERAL_GROUP, plugin.PLATFORM_GROUP)
        },
        "VLLM_PLUGINS": plugin.allowed(environ),
        "findings": [vars(finding) for finding in findings(environ)],
    }


def findings(environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Everything that keeps the overlay from being loaded, or from being loaded as the operator meant it."""
    environ = os.environ if environ is None else environ
    found: list[Finding] = []
    try:
        stock.require()
    except DpSyncPatchError as error:
        found.append(_from(error, "install a supported pair"))
    delegates = True
    try:
        delegates = settings.load(environ=environ).delegate_plugins == "on"
    except DpSyncPatchError as error:
        found.append(_from(error, "correct or unset it"))
    return found + _entry_point_findings() + _plugin_findings(plugin.allowed(environ), delegates)


def _from(error: DpSyncPatchError, advice: str) -> Finding:
    return Finding(error.code, "error", str(error).removeprefix(f"{error.code} "), advice)


def _entry_point_findings() -> list[Finding]:
    """importlib.metadata reads the first distribution of a name on sys.path, and hides the others."""
    copies = list(metadata.distributions(name=DISTRIBUTION))
    places = [f"{copy.version} in {copy.locate_file('')}" for copy in copies]
    found: list[Finding] = []
    for group in (plugin.GENERAL_GROUP, plugin.PLATFORM_GROUP):
        if any(entry.name == DISTRIBUTION for entry in metadata.entry_points(group=group)):
            continue
        if not copies:
            sentence, advice = "is not installed, only importable", "pip install it into this environment"
        else:
            hidden = f", and hides {', '.join(places[1:])}" if len(places) > 1 else ""
            sentence = f"has no entry point in {group}: the metadata that counts is of {places[0]}{hidden}"
            advice = "remove the stale *.egg-info or *.dist-info there"
        found.append(Finding("DSP421", "error", f"{DISTRIBUTION} {sentence}", advice))
        break
    if not found and len(set(places)) > 1:
        advice = "keep one of them"
        found.append(Finding("DSP422", "warning", f"installed more than once: {', '.join(places)}", advice))
    return found


def _plugin_findings(allowed: list[str] | None, delegates: bool) -> list[Finding]:
    """What vLLM would pass over in silence. Without VLLM_PLUGINS it loads everything."""
    if allowed is None:
        return []
    value = f"VLLM_PLUGINS={','.join(allowed)}"
    groups = metadata.entry_points()
    known = {entry.name for group in groups.groups if group.startswith("vllm.") for entry in groups.select(group=group)}
    found: list[Finding] = []
    for name in allowed:
        if name in known or not name:
            continue
        if name.strip() in known:
            sentence = f"{value}: vLLM matches names exactly, and {name!r} has blanks"
            found.append(Finding("DSP412", "warning", sentence, "remove the blanks"))
            continue
        close = get_close_matches(name.strip(), sorted(known), n=1)
        advice = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"
        found.append(Finding("DSP423", "error", f"{value}: no installed plugin is named {name!r}", advice))
    if DISTRIBUTION not in allowed:
        what = "loads no plugin at all, not even the Ascend platform" if allowed == [""] else "leaves the overlay out"
        found.append(Finding("DSP424", "error", f"{value} {what}", f"add {DISTRIBUTION}, or unset the variable"))
    elif not delegates and (missing := sorted(_stock_plugins() - set(allowed))):
        sentence = f"{value} leaves out {', '.join(missing)}, and delegate_plugins=off keeps it so"
        found.append(Finding("DSP413", "error", sentence, "name them too, or set delegate_plugins=on"))
    return found


def _stock_plugins() -> set[str]:
    try:
        entries = metadata.distribution(stock.VLLM_ASCEND).entry_points
    except metadata.PackageNotFoundError:
        return set()
    return {entry.name for entry in entries if entry.group in (plugin.GENERAL_GROUP, plugin.PLATFORM_GROUP)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

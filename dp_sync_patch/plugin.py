# SPDX-License-Identifier: Apache-2.0
"""The two vLLM entry points, both named `dp_sync_patch`.

VLLM_PLUGINS filters every plugin group by entry-point name, so `VLLM_PLUGINS=dp_sync_patch` takes the Ascend platform
and the Ascend connectors away. Both callables delegate to what was filtered out, unless the operator opts out with
DP_SYNC_PATCH_DELEGATE_PLUGINS=off.
"""

import os
from collections.abc import Mapping
from functools import partial
from importlib import metadata

from dp_sync_patch import runtime, settings
from dp_sync_patch.errors import SettingsError, logger
from dp_sync_patch.stock import VLLM_ASCEND

PLATFORM_GROUP = "vllm.platform_plugins"
GENERAL_GROUP = "vllm.general_plugins"
_STOCK_PLATFORM = "ascend"
_delegated: set[str] = set()


def allowed(environ: Mapping[str, str] | None = None) -> list[str] | None:
    """VLLM_PLUGINS as vLLM splits it: None = load everything; blanks are kept."""
    value = (os.environ if environ is None else environ).get("VLLM_PLUGINS")
    return None if value is None else value.split(",")


def _stock_entry_points(group: str) -> list[metadata.EntryPoint]:
    try:
        distribution = metadata.distribution(VLLM_ASCEND)
    except metadata.PackageNotFoundError:
        return []
    return [entry for entry in distribution.entry_points if entry.group == group]


def platform() -> str | None:
    """Entry point of `vllm.platform_plugins`. vLLM calls it twice, and swallows what it raises.

    Returns:
        what the filtered-out `ascend` entry point returns; None when that one is active by itself, since two active
        platforms are an error.
    """
    chosen = allowed()
    if chosen is None or _STOCK_PLATFORM in chosen:
        return None
    try:
        if settings.load().delegate_plugins == "off":
            return None
    except SettingsError as error:
        # Reported here as well, because vLLM goes on with another platform. `register` raises it.
        logger.error("%s", error)
    for entry in _stock_entry_points(PLATFORM_GROUP):
        if entry.name == _STOCK_PLATFORM:
            name: str | None = entry.load()()
            return name
    logger.warning("DSP411 VLLM_PLUGINS=%s, but %s is not installed: no platform", ",".join(chosen), VLLM_ASCEND)
    return None


def register() -> None:
    """Entry point of `vllm.general_plugins`: check the settings, pass them on, load the filtered-out Ascend plugins.

    The import hooks are armed by importing the package. What raises here stops vLLM, as intended for bad settings.
    """
    delegate = settings.load().delegate_plugins == "on"
    _register_variables()
    runtime.install()
    chosen = allowed()
    if chosen is None:
        return
    if padded := [name for name in chosen if name != name.strip()]:
        logger.warning("DSP412 VLLM_PLUGINS has blanks around %s; vLLM matches names exactly", padded)
    excluded = [entry for entry in _stock_entry_points(GENERAL_GROUP) if entry.name not in chosen]
    if not delegate:
        if excluded:
            names = ", ".join(entry.name for entry in excluded)
            logger.warning("DSP413 VLLM_PLUGINS leaves out %s, and delegate_plugins=off keeps it so", names)
        return
    fresh = [entry for entry in excluded if entry.name not in _delegated]
    for entry in fresh:
        # Stock's connector registration refuses a second call.
        _delegated.add(entry.name)
        entry.load()()
    if fresh:
        names = ", ".join(entry.name for entry in fresh)
        logger.info("loaded the plugins of %s that VLLM_PLUGINS left out: %s", VLLM_ASCEND, names)


def _register_variables() -> None:
    """vLLM copies the environment variables that it knows to its Ray actors, and no others."""
    from vllm import envs

    for name in settings.variables():
        if name in os.environ:  # else nothing changes
            envs.environment_variables.setdefault(name, partial(os.environ.get, name))

# SPDX-License-Identifier: Apache-2.0
"""Settings: environment `DP_SYNC_PATCH_*`, then the section `dp_sync_patch` of the configuration, then the default.

The section stands in `kv_transfer_config.kv_connector_extra_config`, a free mapping that every decode node has, or in
`additional_config`, where vllm-ascend allows unknown keys (up to 0.26.0rc1). Both travel to every process. All channels
are validated in full; an unknown name is an error, so that a typo cannot switch a safety off.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dp_sync_patch.errors import SettingsError

PREFIX = "DP_SYNC_PATCH_"
CONFIG_KEY = "dp_sync_patch"
CONNECTOR, ADDITIONAL = "kv_connector_extra_config", "additional_config"


def _choice(*allowed: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return parse


def _seconds(value: Any) -> float:
    allowed = "a number of seconds above 0 and at most 86400"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(allowed)
    try:
        seconds = float(value)
    except ValueError:
        raise ValueError(allowed) from None
    if not (math.isfinite(seconds) and 0 < seconds <= 86400):
        raise ValueError(allowed)
    return seconds


def _release(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"none|\d+\.\d+\.\d+(rc\d+)?", value):
        raise ValueError("none, or a release of vllm-ascend such as 0.23.0")
    return value


_PARSERS: dict[str, Callable[[Any], Any]] = {
    # auto: skip where it is proven safe. off: stock; from the environment no worker is patched, from the configuration,
    # which is known too late for that, all wrappers pass through. require: refuse to start when the skip cannot be on.
    "mode": _choice("auto", "off", "require"),
    # What to do where one rank may run a FULL graph while another runs eager in the same step. uniform: the scheduler
    # makes decode batches only, a prompt without remote KV is computed one token per step, or 1 + k with k drafts.
    # sync: an all_reduce of one int in each step, all ranks use the lowest mode of them. refuse: no skip. auto: the
    # first one that is possible.
    "graph_mode": _choice("auto", "uniform", "sync", "refuse"),
    # How long the ranks wait for each other at start-up.
    "agreement_timeout_s": _seconds,
    # on: VLLM_PLUGINS=dp_sync_patch still loads the plugins of vllm-ascend; off: plain filtering as in vLLM.
    "delegate_plugins": _choice("on", "off"),
    # A release of vllm-ascend that the installed build, of another version, has the source of. It is checked.
    "same_as": _release,
}
# Needed before a VllmConfig exists.
_ENVIRONMENT_ONLY = frozenset({"delegate_plugins", "same_as"})


@dataclass(frozen=True)
class Settings:
    """The values in force. `sources` says for each one where it came from: environment, default, or the name of the
    mapping whose section has it."""

    mode: str = "auto"
    graph_mode: str = "auto"
    agreement_timeout_s: float = 120.0
    delegate_plugins: str = "on"
    same_as: str = "none"
    sources: tuple[tuple[str, str], ...] = tuple((name, "default") for name in _PARSERS)

    def values(self) -> dict[str, Any]:
        """What the ranks compare: the values without their sources."""
        return {name: value for name, value in asdict(self).items() if name != "sources"}

    def describe(self, name: str) -> str:
        """A value and its source, for messages."""
        return f"{getattr(self, name)!r} ({dict(self.sources)[name]})"


def load(vllm_config: Any = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read and validate all channels.

    Args:
        vllm_config: vLLM's VllmConfig, or None where none exists yet.
        environ: the environment; the one of this process by default.

    Raises:
        SettingsError: an unknown name, a value that is not allowed (the message lists what is), or two sections of the
            configuration that differ.
    """
    given: dict[str, tuple[Any, str]] = {}
    for where, section in _sections(vllm_config):
        for key, value in section.items():
            if key not in _PARSERS or key in _ENVIRONMENT_ONLY:
                allowed = ", ".join(name for name in _PARSERS if name not in _ENVIRONMENT_ONLY)
                raise SettingsError("DSP401", f"unknown setting {where}.{CONFIG_KEY}.{key}; allowed: {allowed}")
            if given.setdefault(key, (value, where))[0] != value:
                other = f"{given[key][0]!r} ({given[key][1]})"
                raise SettingsError("DSP403", f"setting {key}={other} is {value!r} in {where}; allowed: one of them")
    for variable, value in (os.environ if environ is None else environ).items():
        if not variable.startswith(PREFIX):
            continue
        key = variable.removeprefix(PREFIX).lower()
        if key not in _PARSERS or variable != variable.upper():
            allowed = ", ".join(variables())
            raise SettingsError("DSP401", f"unknown setting {variable}; allowed: {allowed}")
        given[key] = (value, "environment")

    values: dict[str, Any] = {}
    for key, (value, source) in given.items():
        try:
            values[key] = _PARSERS[key](value)
        except ValueError as error:
            raise SettingsError("DSP402", f"setting {key}={value!r} ({source}) must be {error}") from None
    return Settings(**values, sources=tuple((name, given.get(name, (None, "default"))[1]) for name in _PARSERS))


def variables() -> list[str]:
    """The names of all environment variables."""
    return [PREFIX + name.upper() for name in _PARSERS]


def _sections(vllm_config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if vllm_config is None:
        return
    transfer = vllm_config.kv_transfer_config
    mappings = {
        CONNECTOR: transfer.kv_connector_extra_config if transfer is not None else None,
        ADDITIONAL: vllm_config.additional_config,
    }
    for where, mapping in mappings.items():
        section = (mapping or {}).get(CONFIG_KEY, {})
        if not isinstance(section, Mapping):
            raise SettingsError("DSP401", f"{where}.{CONFIG_KEY} must be a mapping, found {section!r}")
        yield where, section

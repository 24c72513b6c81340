# SPDX-License-Identifier: Apache-2.0
"""Which stock version is installed, and how the supported versions differ, as data."""

from dataclasses import dataclass
from importlib import metadata

from packaging.version import InvalidVersion, Version

from dp_sync_patch.errors import StandDownError

VLLM_ASCEND = "vllm-ascend"


@dataclass(frozen=True)
class Stock:
    """What the overlay has to know about one pair of vllm and vllm-ascend."""

    vllm: str
    vllm_ascend: str
    # The only worker whose model runner we patch; torchair and others override what we rely on.
    worker_cls: str
    # Schedulers that were read and found to honour `max_num_scheduled_tokens` in every step.
    schedulers: frozenset[str]
    # Those of them that hand a request back to the prefill node instead of computing it again on this one.
    recompute_schedulers: frozenset[str]
    # Speculative methods whose draft passes synchronise through the patched function only.
    speculative_methods: frozenset[str]
    # Model types whose communication method is hard-wired to something else than MC2.
    models_without_mc2: frozenset[str]


_SUPPORTED = (
    Stock(
        vllm="0.11.0",
        vllm_ascend="0.11.0",
        worker_cls="vllm_ascend.worker.worker_v1.NPUWorker",
        schedulers=frozenset(
            {
                "vllm.v1.core.sched.scheduler.Scheduler",
                "vllm.v1.core.sched.async_scheduler.AsyncScheduler",
                "vllm_ascend.core.scheduler.AscendScheduler",
                "vllm_ascend.core.recompute_scheduler.RecomputeScheduler",
            }
        ),
        recompute_schedulers=frozenset({"vllm_ascend.core.recompute_scheduler.RecomputeScheduler"}),
        speculative_methods=frozenset({"deepseek_mtp"}),
        models_without_mc2=frozenset({"PanguProMoE"}),
    ),
)


def installed() -> dict[str, str | None]:
    """Versions of the stock packages from their metadata (importing them would be slow and could fail)."""
    found: dict[str, str | None] = {}
    for name in ("vllm", VLLM_ASCEND):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def supported() -> str:
    """The supported pairs, for messages and tables."""
    return ", ".join(f"vllm {entry.vllm} + vllm-ascend {entry.vllm_ascend}" for entry in _SUPPORTED)


def find(versions: dict[str, str | None]) -> Stock | None:
    """The entry for the installed pair. Pre-, post- and development releases are other code, hence not supported;
    a local suffix such as `+empty` names a build of the same code, hence ignored."""
    for entry in _SUPPORTED:
        if _same(versions.get("vllm"), entry.vllm) and _same(versions.get(VLLM_ASCEND), entry.vllm_ascend):
            return entry
    return None


def require() -> Stock:
    """The entry for the installed pair.

    Raises:
        StandDownError: this pair is not supported.
    """
    versions = installed()
    entry = find(versions)
    if entry is None:
        found = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
        raise StandDownError("DSP006", f"unsupported stock: found {found}, supported {supported()}")
    return entry


def _same(found: str | None, wanted: str) -> bool:
    if found is None:
        return False
    try:
        return Version(Version(found).public) == Version(wanted)
    except InvalidVersion:
        return False

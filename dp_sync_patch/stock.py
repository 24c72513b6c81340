# SPDX-License-Identifier: Apache-2.0
"""Which stock version is installed, and how the supported versions differ, as data."""

from dataclasses import dataclass, replace
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from dp_sync_patch import settings, source_check
from dp_sync_patch.errors import DpSyncPatchError, StandDownError

VLLM_ASCEND = "vllm-ascend"


@dataclass(frozen=True, kw_only=True)
class Stock:
    """What the overlay has to know about one pair of vllm and vllm-ascend. Patch points are listed with the patches."""

    vllm: str
    vllm_ascend: str
    # Whether it has a row without failures in tests/versions/last_matrix.json. A version without one is not patched.
    has_been_run: bool
    # Stock skips the all_reduce on its own here, on conditions that do not hold on every rank (vllm-ascend#8240,
    # vllm-ascend#13826). In `sync` that is switched off, so a rank without the overlay would be alone with it.
    own_skip: bool
    # The only worker whose model runner we patch; torchair, xlite and the 310P override what we rely on.
    worker_cls: str
    # Schedulers that were read and found to honour `max_num_scheduled_tokens` in every step.
    schedulers: frozenset[str]
    # Those of them that hand a request back to the prefill node instead of computing it again on this one.
    recompute_schedulers: frozenset[str]
    # Speculative methods whose draft passes synchronise through the patched functions only.
    speculative_methods: frozenset[str]
    # Most draft passes for which an idle rank and every busy one issue the same number of MC2 operators.
    max_draft_passes: int
    # Graph modes (names of CUDAGraphMode) for which the padded bound and the captures of this version were worked out.
    graph_modes: frozenset[str]
    # Experts of one rank above which the A2 leaves MC2; 0: no such limit.
    a2_max_local_experts: int
    # Model types whose communication method is hard-wired to something else than MC2.
    models_without_mc2: frozenset[str]
    # Graph modes in which draft passes have the same mode on all ranks once the target passes have.
    drafts_follow_in: frozenset[str] = frozenset()
    # Without async scheduling the drafter has graphs of its own here, which have not been run.
    drafts_follow_with_async_only: bool = False
    # Whether graph level `uniform` goes with drafts. Up to 0.13.0 the recompute scheduler has none for a request in its
    # first step here, and a wrapper could not add them; on 0.18.0 some tokens of such runs were others than in `sync`.
    uniform_with_drafts: bool = False

    def reads(self, option: str) -> bool:
        """Whether stock looks at this environment variable or key of additional_config at all."""
        return SpecifierSet(OPTIONS.get(option, "")).contains(self.vllm_ascend, prereleases=True)


_ANY = 2**31  # no limit
_VLLM_SCHEDULERS = frozenset(
    {"vllm.v1.core.sched.scheduler.Scheduler", "vllm.v1.core.sched.async_scheduler.AsyncScheduler"}
)
_RECOMPUTE = "vllm_ascend.core.recompute_scheduler.RecomputeScheduler"
_ASYNC_RECOMPUTE = "vllm_ascend.core.recompute_scheduler.AsyncRecomputeScheduler"

_0_11_0 = Stock(
    vllm="0.11.0",
    vllm_ascend="0.11.0",
    has_been_run=True,
    own_skip=False,
    worker_cls="vllm_ascend.worker.worker_v1.NPUWorker",
    schedulers=_VLLM_SCHEDULERS | {"vllm_ascend.core.scheduler.AscendScheduler", _RECOMPUTE},
    recompute_schedulers=frozenset({_RECOMPUTE}),
    speculative_methods=frozenset({"deepseek_mtp"}),
    max_draft_passes=_ANY,  # with `level_draft_passes`
    graph_modes=frozenset({"NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"}),
    a2_max_local_experts=0,
    models_without_mc2=frozenset({"PanguProMoE"}),
    drafts_follow_in=frozenset({"FULL_DECODE_ONLY"}),  # else drafts of an idle rank are in no graph, and others are
)
_0_12_0rc1 = replace(
    _0_11_0,
    vllm="0.12.0",
    vllm_ascend="0.12.0rc1",
    own_skip=True,
    schedulers=_VLLM_SCHEDULERS | {_RECOMPUTE, _ASYNC_RECOMPUTE},
    recompute_schedulers=frozenset({_RECOMPUTE, _ASYNC_RECOMPUTE}),
    speculative_methods=frozenset({"mtp"}),
    max_draft_passes=1,  # a batch with prefill stops after the first pass, and an idle rank does not
    graph_modes=frozenset({"NONE"}),
    drafts_follow_in=frozenset(),  # the proposer looks at its own batch again
)
_0_13_0 = replace(
    _0_12_0rc1,
    vllm="0.13.0",
    vllm_ascend="0.13.0",
    worker_cls="vllm_ascend.worker.worker.NPUWorker",
    graph_modes=frozenset({"NONE", "PIECEWISE", "FULL_DECODE_ONLY"}),
    models_without_mc2=frozenset(),
)
_0_18_0 = replace(
    _0_13_0,
    vllm="0.18.0",
    vllm_ascend="0.18.0",
    max_draft_passes=_ANY,  # no longer dependent on what is in the batch
    a2_max_local_experts=24,
    drafts_follow_in=frozenset({"FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"}),
    drafts_follow_with_async_only=True,
)
_0_23_0 = replace(
    _0_18_0,
    vllm="0.23.0",
    vllm_ascend="0.23.0",
    # The default; versions before make PIECEWISE of it.
    graph_modes=frozenset({"NONE", "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"}),
    drafts_follow_with_async_only=False,
    uniform_with_drafts=True,
)
KNOWN = (_0_11_0, _0_12_0rc1, _0_13_0, _0_18_0, _0_23_0)

# Options that not every version reads, with the vllm-ascend versions that do. Elsewhere they change nothing in stock.
OPTIONS = {
    "VLLM_ASCEND_ENABLE_MLP_OPTIMIZE": "<0.12.0rc1",
    "VLLM_ASCEND_ENABLE_DBO": "<0.12.0rc1",
    "VLLM_ASCEND_ENABLE_FLASHCOMM": "<0.23.0",
    "VLLM_USE_V2_MODEL_RUNNER": ">=0.12.0rc1",
    "VLLM_ASCEND_ENABLE_FUSED_MC2": ">=0.13.0",
    "VLLM_ASCEND_FLASHCOMM2_PARALLEL_SIZE": ">=0.12.0rc1",
    "VLLM_ASCEND_ENABLE_FLASHCOMM2_OSHARED": "==0.12.0rc1",
    "VLLM_ASCEND_BALANCE_SCHEDULING": ">=0.13.0",
    "finegrained_tp_config": ">=0.12.0rc1",
    "layer_sharding": ">=0.13.0",
    "init_redundancy_expert": "<0.18.0",
    "mix_placement": ">=0.13.0,!=0.18.0",
    "enable_mc2_hierarchy_comm": ">=0.18.0",
    "enable_fused_mc2": ">=0.23.0",
    "enable_flashcomm1": ">=0.23.0",
    "enable_flashcomm2_parallel_size": ">=0.23.0",
    "enable_balance_scheduling": ">=0.23.0",
}


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
    run = [entry for entry in KNOWN if entry.has_been_run]
    return ", ".join(f"vllm {entry.vllm} + vllm-ascend {entry.vllm_ascend}" for entry in run)


def find(versions: dict[str, str | None]) -> Stock | None:
    """The entry for the installed pair. Pre-, post- and development releases are other code, hence not supported;
    a local suffix such as `+empty` names a build of the same code, hence ignored."""
    for entry in KNOWN:
        same = _same(versions.get("vllm"), entry.vllm) and _same(versions.get(VLLM_ASCEND), entry.vllm_ascend)
        if entry.has_been_run and same:
            return entry
    return None


def require() -> Stock:
    """The entry for the installed pair, or, if the source is the same, for the release that `same_as` names.

    Raises:
        StandDownError: this pair is not supported, or it is not the same as the named release.
        SettingsError: bad settings.
    """
    versions = installed()
    found = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    named = settings.load().same_as
    if named != "none":
        release = next((entry for entry in KNOWN if entry.has_been_run and entry.vllm_ascend == named), None)
        if release is None:
            raise StandDownError("DSP006", f"same_as={named} is no supported vllm-ascend version: {supported()}")
        if different := source_check.differing(named):
            raise StandDownError("DSP012", f"found {found}, not the source of {named}: {', '.join(different)}")
        return release
    entry = find(versions)
    if entry is None:
        raise StandDownError("DSP006", f"unsupported stock: found {found}, supported {supported()}")
    return entry


def current() -> Stock | None:
    """As `require`, without the reason."""
    try:
        return require()
    except DpSyncPatchError:
        return None


def _same(found: str | None, wanted: str) -> bool:
    if found is None:
        return False
    try:
        return Version(Version(found).public) == Version(wanted)
    except InvalidVersion:
        return False

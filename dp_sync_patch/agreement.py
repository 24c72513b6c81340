# SPDX-License-Identifier: Apache-2.0
"""One verdict for all ranks, through a key-value store. Never a collective: a rank without the overlay would hang it.

Every rank publishes its record. Rank 0 waits for all of them until the deadline, compares them and writes the verdict;
the others only follow what is written. Nobody else decides, with one exception: when rank 0 itself stays silent, a
follower writes the fallback. Both write with compare_set, so the first verdict is the only one and a slow or late rank
cannot split the decision.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

PREFIX = "dp_sync_patch"
# Between two looks at the store: a tenth of what has been waited so far, within these. 255 ranks that wait for one ask
# the process of rank 0 some 500 times a second then, and see an error's verdict before that process has ended.
_POLL_S = (0.02, 0.5)
# A follower outwaits rank 0's deadline by this much before it writes the fallback itself.
_GRACE_S = 10.0
_NAMED_FIELDS = 8
_NAMED_GROUPS = 8


class Store(Protocol):
    """The part of torch.distributed.Store that is used."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


@dataclass(frozen=True)
class Verdict:
    """What all ranks do. `agreed`: every rank published the same record."""

    agreed: bool
    code: str = ""
    why: str = ""


def decide(
    store: Store,
    record: Mapping[str, Any],
    *,
    round_name: str,
    rank: int,
    world_size: int,
    timeout_s: float,
    grace_s: float = _GRACE_S,
) -> Verdict:
    """Publish `record` (JSON values), and return the verdict of this round.

    Args:
        round_name: separates the rounds of a start-up from each other.
        timeout_s: how long rank 0 waits for the records of all ranks.
    """
    verdict_key = f"{PREFIX}/{round_name}/verdict"
    store.set(_key(round_name, rank), json.dumps(record, sort_keys=True))
    if rank == 0:
        mine = _judge(store, round_name, world_size, timeout_s)
    elif _wait(store, [verdict_key], timeout_s + grace_s):
        return _read(store.get(verdict_key))
    else:
        mine = Verdict(False, "DSP203", f"rank 0 wrote no verdict within {timeout_s + grace_s:g} s")
    return _read(store.compare_set(verdict_key, "", json.dumps(asdict(mine))))


def _key(round_name: str, rank: int) -> str:
    return f"{PREFIX}/{round_name}/rank/{rank}"


def _read(payload: bytes) -> Verdict:
    """What is in a verdict beside these fields was written by another version, hence is of ranks that differ."""
    written = json.loads(payload)
    return Verdict(written["agreed"], written["code"], written["why"])


def _wait(store: Store, keys: list[str], timeout_s: float) -> bool:
    # Polling check() behaves the same on every store; wait() differs in its exceptions, and logs on a timeout.
    began = time.monotonic()
    while not store.check(keys):
        waited = time.monotonic() - began
        if waited >= timeout_s:
            return False
        least, most = _POLL_S
        time.sleep(min(max(waited / 10, least), most, timeout_s - waited))
    return True


def _judge(store: Store, round_name: str, world_size: int, timeout_s: float) -> Verdict:
    """Rank 0: wait for every record and compare them with the one that most ranks have."""
    keys = [_key(round_name, rank) for rank in range(world_size)]
    if not _wait(store, keys, timeout_s):
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if missing:
            return Verdict(False, "DSP202", f"no answer within {timeout_s:g} s from {_named(missing)}")
    ranks_of: dict[bytes, list[int]] = {}
    for rank, key in enumerate(keys):
        ranks_of.setdefault(store.get(key), []).append(rank)
    if len(ranks_of) == 1:
        return Verdict(True)
    # The largest group; rank 0's, which is the first, where others are as large.
    usual = max(ranks_of, key=lambda record: len(ranks_of[record]))
    most = _flatten(json.loads(usual))
    differences = [
        f"{_named(ranks)}: " + ", ".join(_differing(most, _flatten(json.loads(record))))
        for record, ranks in ranks_of.items()
        if record != usual
    ]
    shown = differences[:_NAMED_GROUPS]
    if len(differences) > _NAMED_GROUPS:
        shown.append(f"{len(differences) - _NAMED_GROUPS} more groups of ranks")
    return Verdict(False, "DSP201", f"ranks differ from {_named(ranks_of[usual])}; " + "; ".join(shown))


def _named(ranks: list[int]) -> str:
    """Ranks in rising order: rank 3; ranks 0, 2-5, 7."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    listed = ", ".join("-".join(map(str, run)) for run in runs)
    return f"ranks {listed}" if len(ranks) > 1 else f"rank {listed}"


def _differing(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    absent = "(absent)"
    fields = [
        f"{name} {other.get(name, absent)!r} instead of {mine.get(name, absent)!r}"
        for name in sorted(mine.keys() | other.keys())
        if mine.get(name, absent) != other.get(name, absent)
    ]
    # The same difference shows up in everything that follows from it; the cause is among the first.
    return fields[:_NAMED_FIELDS] + ([f"{len(fields) - _NAMED_FIELDS} more"] if len(fields) > _NAMED_FIELDS else [])


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat

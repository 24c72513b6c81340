# SPDX-License-Identifier: Apache-2.0
"""Counters: plain integers where the wrappers run, copied to Prometheus by a thread where metrics are on.

vLLM serves /metrics from its API server, which sees other processes through PROMETHEUS_MULTIPROC_DIR only; vLLM sets it
for several API servers, an operator can export it. Without it, or with --disable-log-stats, nothing is started.
A rank cannot know the token counts of the others in `skip` (knowing them is the collective that was removed), so every
number is about this rank; those of all ranks add up.
"""

import os
import threading
import time
from dataclasses import asdict, dataclass
from multiprocessing.util import Finalize
from typing import Any

from dp_sync_patch import runtime
from dp_sync_patch.errors import logger
from dp_sync_patch.plan import State

_PERIOD_S = 2.0
_LOG_EVERY = 300  # periods, hence ten minutes

# A pass is what stock agrees about once: a target pass, or one round of MTP drafts, however many passes that has.
HELP = {
    "passes_skipped": "Target passes and rounds of MTP drafts without the DP metadata all_reduce.",
    "passes_synced": "Target passes and rounds of MTP drafts that went through stock's DP metadata all_reduce.",
    "passes_ragged": "skip: passes with fewer tokens than the agreed bound; sync: passes padded to a busier rank.",
    "padding_tokens": "Tokens added to a pass: up to the busiest rank (sync), a dummy's up to a graph size (skip).",
    "padding_avoided_tokens": "skip: tokens between a pass and the agreed bound, at most what sync would have added.",
    "draft_passes_added": "skip: dummy draft passes after a batch with prefill, so that all ranks run equally many.",
    "mc2_only_errors": "Passes refused because they would have left MC2 or exceeded the agreed bound.",
}


@dataclass(slots=True)
class Counts:
    """What happened in this process since it started, warm-up included. Profile runs do not count.

    With one DP rank stock's method returns at once, which counts as synced.
    """

    passes_skipped: int = 0
    passes_synced: int = 0
    passes_ragged: int = 0
    padding_tokens: int = 0
    padding_avoided_tokens: int = 0
    draft_passes_added: int = 0
    mc2_only_errors: int = 0

    def values(self) -> dict[str, int]:
        return asdict(self)


counts = Counts()
_exporter: "_Exporter | None" = None


def refused() -> None:
    """The last pass of a process: counted, and copied at once."""
    counts.mc2_only_errors += 1
    if _exporter is not None:
        _exporter.copy()


def start_in_workers(engine: Any) -> None:
    """Once, when an engine of several DP ranks has started. A failure here must not stop the engine."""
    if not engine.log_stats or "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return
    try:
        engine.model_executor.collective_rpc(start)
    except Exception as error:  # noqa: BLE001  counters are not worth a decode node
        logger.warning("DSP414 counters are not exported: %s", error)


def start(worker: Any) -> None:
    """In each worker: export from the first TP rank of a DP rank, where the ranks have a state to tell of."""
    global _exporter
    state = runtime.reported_state()
    if _exporter is not None or state in (None, State.OFF) or "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return
    from prometheus_client import values

    if not values.ValueClass._multiprocess:
        logger.warning(
            "DSP414 counters are not exported: this process was forked from one that had imported prometheus_client "
            "before PROMETHEUS_MULTIPROC_DIR was set; export it before `vllm serve`"
        )
        return
    config = worker.vllm_config
    labels = (str(config.model_config.served_model_name), str(config.parallel_config.data_parallel_rank))
    _exporter = _Exporter(labels, state is State.SKIP)
    threading.Thread(target=_exporter.run, name="dp_sync_patch metrics", daemon=True).start()


class _Exporter:
    """Copies the counts; vLLM drops collectors with "vllm" in their name, hence the names."""

    def __init__(self, labels: tuple[str, str], skip: bool) -> None:
        from prometheus_client import Counter, Gauge

        names = ("model_name", "engine")
        self._counters = {
            name: Counter(f"dp_sync_patch_{name}", text, names).labels(*labels) for name, text in HELP.items()
        }
        # 1 on every DP rank, or the all_reduce is in force on all of them.
        state = Gauge("dp_sync_patch_skip", "1: skip, 0: sync.", names, multiprocess_mode="mostrecent")
        state.labels(*labels).set(int(skip))
        self._rank = labels[1]
        self._copied = dict.fromkeys(HELP, 0)
        self._failed = False
        self._lock = threading.Lock()
        Finalize(None, self.copy, exitpriority=0)  # vLLM's processes end without atexit

    def copy(self) -> None:
        """Add what is new since the last copy. When that fails, it is logged, and nothing is copied any more."""
        with self._lock:
            if self._failed:
                return
            try:
                current = counts.values()
                for name, value in current.items():
                    self._counters[name].inc(value - self._copied[name])
                self._copied = current
            except Exception as error:  # noqa: BLE001  counters are not worth a decode node
                self._failed = True
                logger.warning("DSP414 counters are no longer exported: %s", error)

    def run(self) -> None:
        logged = self._copied
        period = 0
        while not self._failed:
            self.copy()
            period += 1
            if period % _LOG_EVERY == 0 and logged != self._copied:
                logged = self._copied
                text = ", ".join(f"{name} {value}" for name, value in logged.items())
                logger.info("DP rank %s, counted since its start: %s", self._rank, text)
            time.sleep(_PERIOD_S)

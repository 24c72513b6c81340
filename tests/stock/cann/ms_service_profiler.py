# SPDX-License-Identifier: Apache-2.0
"""The module of CANN that msserviceprofiler writes its spans with. This one keeps their names."""

from __future__ import annotations

from typing import Any

spans: list[str] = []  # that were begun
ended = 0


class Level:
    INFO = 20


class Profiler:
    def __init__(self, level: Any) -> None:
        """Nothing is filtered by level here."""

    def span_start(self, name: str) -> Profiler:
        spans.append(name)
        return self

    def span_end(self) -> Profiler:
        global ended
        ended += 1
        return self

    def __getattr__(self, name: str) -> Any:
        """domain, attr, metric and so on, all of which return the profiler."""
        return lambda *args, **kwargs: self

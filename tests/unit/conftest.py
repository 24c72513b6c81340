# SPDX-License-Identifier: Apache-2.0
"""Hypothesis: the same examples on every machine, and no per-example deadline, which a busy machine would miss."""

from hypothesis import settings

settings.register_profile("default-run", deadline=None, derandomize=True)
settings.load_profile("default-run")

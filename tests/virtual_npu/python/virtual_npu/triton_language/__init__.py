# SPDX-License-Identifier: Apache-2.0
"""What triton-ascend adds to ``triton.language.extra``: :func:`extend` makes this folder part of that package."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def extend(extra: Any) -> None:
    """Post-import hook of ``triton.language.extra``."""
    extra.__path__.append(str(Path(__file__).parent))

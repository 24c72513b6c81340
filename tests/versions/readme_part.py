# SPDX-License-Identifier: Apache-2.0
"""Parts of README that a command writes stand between two marks."""

from __future__ import annotations


def with_part(readme: str, begin: str, text: str, end: str) -> str:
    """README with `text` between its marks.

    Raises:
        ValueError: one of the marks is not there, or more than once.
    """
    before, *rest = readme.split(begin)
    if len(rest) != 1 or rest[0].count(end) != 1:
        raise ValueError(f"README needs {begin.strip()!r} and then {end.strip()!r}, each of them once")
    return before + begin + text + end + rest[0].split(end)[1]

# SPDX-License-Identifier: Apache-2.0
"""Which stock versions are patched: those that the overlay has been run on, and nothing between or beside them."""

from __future__ import annotations

import pytest

from dp_sync_patch import stock


@pytest.mark.parametrize(
    ("vllm", "ascend"),
    [
        ("0.11.0", "0.11.0"),
        ("0.12.0", "0.12.0rc1"),
        ("0.13.0", "0.13.0"),
        ("0.18.0", "0.18.0"),
        ("0.18.0+empty", "0.18.0+empty"),
    ],
)
def test_a_version_that_has_been_run_is_found(vllm: str, ascend: str) -> None:
    found = stock.find({"vllm": vllm, "vllm-ascend": ascend})
    assert found is not None
    assert found.vllm_ascend == ascend.partition("+")[0]


@pytest.mark.parametrize(
    ("vllm", "ascend"),
    [
        ("0.23.0", "0.23.0"),  # read, but not run
        ("0.12.0", "0.12.0"),
        ("0.18.1", "0.18.1"),  # between two known ones
        ("0.18.0", "0.18.0rc1"),
        ("0.18.0", "0.18.0.post1"),
        ("0.18.0", "0.18.1.dev3+gabcdef0"),
        ("0.11.0", "0.18.0"),
        (None, "0.18.0"),
    ],
)
def test_any_other_version_is_refused_with_the_list(vllm: str | None, ascend: str) -> None:
    assert stock.find({"vllm": vllm, "vllm-ascend": ascend}) is None
    assert stock.supported() == (
        "vllm 0.11.0 + vllm-ascend 0.11.0, vllm 0.12.0 + vllm-ascend 0.12.0rc1, vllm 0.13.0 + vllm-ascend 0.13.0, "
        "vllm 0.18.0 + vllm-ascend 0.18.0"
    )

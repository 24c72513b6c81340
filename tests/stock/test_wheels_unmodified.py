# SPDX-License-Identifier: Apache-2.0
"""The stock wheels are what the package index ships: nothing the project installs or runs changes a file of them."""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import distribution
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["vllm", "vllm-ascend", "torch-npu"])
def test_every_file_matches_its_record(name: str) -> None:
    files = distribution(name).files
    assert files is not None
    hashed = [file for file in files if file.hash is not None]
    assert len(hashed) > 100
    changed = []
    for file in hashed:
        assert file.hash is not None
        digest = hashlib.new(file.hash.mode, Path(str(file.locate())).read_bytes()).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            changed.append(str(file))
    assert changed == []

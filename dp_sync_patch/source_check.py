# SPDX-License-Identifier: Apache-2.0
"""Whether the installed stock has the Python source of a known release, whatever its version calls itself.

A build from a release's tag is often versioned as a development build of the next one (vllm-ascend#16559). The digests
in source_digests.json are of the published wheels, over the folders whose code the overlay was read and run against.
"""

import hashlib
import json
from importlib import util
from pathlib import Path

DIGESTS = Path(__file__).with_name("source_digests.json")
# Written by a build: they differ between builds of the same source.
_GENERATED = frozenset({"_version.py", "_build_info.py"})


def differing(release: str) -> list[str]:
    """Places, relative to site-packages, whose source is not that of this vllm-ascend release; empty: all the same."""
    recorded: dict[str, str] = json.loads(DIGESTS.read_text())[release]
    return [place for place, expected in recorded.items() if digest(place) != expected]


def digest(place: str) -> str | None:
    """Of one file, or of all Python files in a folder and below it (of a package itself: without its subfolders).

    None: not installed. Nothing is imported.
    """
    package, _, inner = place.partition("/")
    spec = util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    path = root / inner
    if path.is_dir():
        files = sorted(path.rglob("*.py") if inner else path.glob("*.py"))
    else:
        files = [path] if path.is_file() else []
    if not files:
        return None
    sha = hashlib.sha256()
    for file in files:
        if file.name not in _GENERATED:
            content = file.read_bytes()
            sha.update(f"{file.relative_to(root)} {len(content)}\n".encode() + content)
    return sha.hexdigest()

# SPDX-License-Identifier: Apache-2.0
"""Post-import hooks that wait for the end of an import which is under way.

vLLM resolves its platform, and so imports the overlay, in the middle of many imports. wrapt calls a hook for such a
half-made module at once, when the classes that it is for do not exist yet.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import wrapt


class _WatchedSpec(ModuleSpec):
    """The spec of a half-made module. importlib clears `_initializing` on it when the import is over, and tells nobody
    else: a Ray actor or a spawned engine imports nothing after that before it is in `EngineCore.__init__`."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            for hook in self.__dict__.pop("_dp_sync_patch_hooks"):
                when_imported(self.name, hook)  # at once, or with the next try where the import has failed


def is_half_made(module: str) -> bool:
    """Whether the import of a module has begun and is not over."""
    return bool(getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False))


def when_imported(module: str, hook: Callable[[], None]) -> None:
    """Call `hook` once the module is complete: now, at the end of its import, or when it is imported later."""
    if not is_half_made(module):
        wrapt.register_post_import_hook(lambda _: hook(), module)
        return
    spec = sys.modules[module].__spec__
    assert spec is not None  # as is_half_made has seen
    spec.__class__ = _WatchedSpec
    spec.__dict__.setdefault("_dp_sync_patch_hooks", []).append(hook)

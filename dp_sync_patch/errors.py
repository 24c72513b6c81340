# SPDX-License-Identifier: Apache-2.0
"""Exceptions and the logger. Every message starts with a stable code (DSPxxx) that operators can grep for.

Codes: DSP0xx not our business or not patched, DSP1xx a condition of the skip is not met, DSP2xx start-up agreement,
DSP3xx raised while serving, DSP4xx settings and plugin loading.
"""

import logging

# A child of "vllm": the only logger in a vLLM process that has a handler (its root logger has none).
logger = logging.getLogger("vllm.dp_sync_patch")


class DpSyncPatchError(RuntimeError):
    """Base of all errors of the overlay; `code` is the stable reason code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code} {message}")
        self.code = code


class SettingsError(DpSyncPatchError):
    """A setting has an unknown name or a value outside its range."""


class StandDownError(DpSyncPatchError):
    """A patch point cannot be applied (missing, another signature, too late); nothing of its unit is applied."""


class ForeignWrapperError(DpSyncPatchError):
    """Somebody wrapped a patch point after us, so that undoing ours would remove theirs."""


class AgreementError(DpSyncPatchError):
    """The ranks cannot run together; raised on every rank, before a step that would communicate."""


class SkipRequiredError(DpSyncPatchError):
    """`mode=require`, but the skip cannot be on."""


class MC2OnlyError(DpSyncPatchError):
    """A step would leave MC2, or exceed its bound, while the skip is on; raised before anything is communicated."""

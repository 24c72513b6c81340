# SPDX-License-Identifier: Apache-2.0
"""The part of CANN's Python module ``acl`` that stock vllm-ascend imports (``acl.rt.memcpy``)."""

from acl import rt

__all__ = ["rt"]

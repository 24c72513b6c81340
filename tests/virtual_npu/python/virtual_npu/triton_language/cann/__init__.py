# SPDX-License-Identifier: Apache-2.0
"""``triton.language.extra.cann``, as triton-ascend names it."""

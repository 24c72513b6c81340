# SPDX-License-Identifier: Apache-2.0
"""What the dispatcher of the installed stock version hands to dispatch and combine while the verdict is `sync`.

The objects are stock's, patched by the overlay as in a worker, in a process of their own (this file as a script).
"""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dp_sync_patch import runtime, stock
from dp_sync_patch.plan import State

STOCK = stock.require()
GLOBAL_BS = 64
ROWS, ACTIVE = 3, 2


def main() -> None:
    """Prints the arguments of both operators, for each state and with and without hierarchical communication."""
    import torch
    import vllm_ascend.ops
    import vllm_ascend.worker.model_runner_v1  # noqa: F401
    from vllm_ascend.ops.fused_moe.token_dispatcher import TokenDispatcherWithMC2

    ids, weights, experts = torch.zeros(ROWS, 2, dtype=torch.int32), torch.ones(ROWS, 2), torch.arange(16)
    mask = torch.arange(ROWS) < ACTIVE
    unread = dict.fromkeys(("ep_recv_counts", "tp_recv_counts", "assist_info_for_combine", "expand_scales"))

    def arguments(state: State | None, hierarchy: bool) -> dict[str, Any]:
        runtime._latched = None if state is None else SimpleNamespace(state=state)
        dispatcher = object.__new__(TokenDispatcherWithMC2)
        dispatcher.__dict__.update(
            **{"with_quant": False, "moe_all_to_all_group_name": "group", "ep_world_size": 4, "ep_rank_id": 1},
            **{"need_extra_args": False, "enable_dispatch_v2": True, "need_expert_scale": hierarchy},
            **{"global_bs": GLOBAL_BS},
        )
        hidden = torch.zeros(ROWS, 4)
        context = {"expert_map": experts, "topk_ids": ids, "topk_weights": weights, **unread}
        given = {
            "dispatch": dispatcher.get_dispatch_mc2_kwargs(hidden, weights, ids, experts, mask),
            "combine": dispatcher.get_combine_mc_kwargs(hidden, context),
        }
        return {
            name: [one["global_bs"], one["x_active_mask"].tolist() if "x_active_mask" in one else None]
            for name, one in given.items()
        }

    states = {"sync": State.SYNC, "none": None}
    print(json.dumps({name: [arguments(state, False), arguments(state, True)] for name, state in states.items()}))


if STOCK.vllm_ascend in ("0.12.0rc1", "0.13.0"):

    @pytest.fixture(scope="module")
    def found() -> dict[str, Any]:
        done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    @pytest.mark.parametrize("operator", ["dispatch", "combine"])
    def test_hierarchical_mc2_in_sync_needs_no_global_bs_and_the_mask(found: dict[str, Any], operator: str) -> None:
        """These versions never pass what this mode of the operator needs (vllm-ascend#8039)."""
        mask = [True] * ACTIVE + [False] * (ROWS - ACTIVE)
        flat, hierarchical = (given[operator] for given in found["sync"])
        assert flat == [GLOBAL_BS, None]
        assert hierarchical == [0, mask]
        # Without a verdict stock is left alone.
        assert [given[operator] for given in found["none"]] == [[GLOBAL_BS, None]] * 2


if __name__ == "__main__":
    main()

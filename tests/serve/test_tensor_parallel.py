# SPDX-License-Identifier: Apache-2.0
"""A decode node with DP2 TP2 EP4: token counts that do not divide by TP, worker processes apart from their engines."""

from __future__ import annotations

import random
from pathlib import Path

from serve_node import Prompt, serve
from toy_model import write_toy_model

MAX_NUM_SEQS = 16  # the bound per DP rank, hence half of it per EP rank


def test_uneven_and_odd_batches_equal_stock(tmp_path: Path) -> None:
    model = write_toy_model(tmp_path / "model")
    draw = random.Random(5)
    sizes = [(5, 40), (77, 21), (500, 15), (9, 33), (31, 12), (3, 50), (140, 9)]
    prompts: list[Prompt] = [([draw.randrange(3, 384) for _ in range(length)], count) for length, count in sizes]
    arguments = [
        *("--data-parallel-size", "2", "--tensor-parallel-size", "2", "--max-num-seqs", str(MAX_NUM_SEQS)),
        *("--max-model-len", "1024", "--max-num-batched-tokens", "256", "--num-gpu-blocks-override", "64"),
    ]
    stock = serve(tmp_path / "stock", model, prompts, False, arguments, {})
    overlay = serve(tmp_path / "overlay", model, prompts, True, arguments, {})

    assert overlay.tokens == stock.tokens
    assert [len(tokens) for tokens in overlay.tokens] == [count for _, count in sizes]
    assert len(stock.ranks) == len(overlay.ranks) == 4
    for rank in stock.ranks:
        assert rank.dp_collectives >= rank.steps - 1 > 0
    per_rank = MAX_NUM_SEQS // 2
    seen = set()
    for rank in overlay.ranks:
        assert rank.dp_collectives == 0
        calls = [call for step in rank.dispatches.values() for call in step]
        assert {call["global_bs"] for call in calls} == {4 * per_rank}
        seen |= {call["bs"] for call in calls}
    # Padded to TP: an idle rank's single token still gives each TP rank a row, and none exceeds the bound.
    assert min(seen) == 1
    assert max(seen) == per_rank

# SPDX-License-Identifier: Apache-2.0
"""The int8 checkpoint stands for the bf16 one: only experts are quantised, by at most half a step of their channel."""

from __future__ import annotations

import torch
from toy_model import ToyModelShape, build_weights
from toy_w8a8 import dequantise, quantise


def test_experts_are_int8_within_half_a_step_and_the_rest_is_untouched() -> None:
    weights = build_weights(ToyModelShape(num_hidden_layers=1, num_experts=4), seed=1)
    stored, kinds = quantise(weights)
    assert set(stored) == set(kinds)
    back = dequantise(stored)
    assert set(back) == set(weights)
    experts = {name for name in weights if ".experts." in name}
    assert len(experts) == 3 * 4
    for name, weight in weights.items():
        if name not in experts:
            assert kinds[name] == "FLOAT"
            assert torch.equal(back[name], weight)
            continue
        scale = stored[f"{name}_scale"].float()
        assert (stored[name].dtype, scale.shape) == (torch.int8, (weight.shape[0], 1))
        assert not stored[f"{name}_offset"].any()
        # The largest value of a channel may be cut where rounding the scale to bf16 made it smaller.
        assert ((back[name] - weight.float()).abs() <= 0.5 * scale + weight.float().abs() * 2**-8).all()
        assert stored[name].int().abs().amax(1).min() >= 126
        assert {kinds[name + suffix] for suffix in ("", "_scale", "_offset")} == {"W8A8_DYNAMIC"}

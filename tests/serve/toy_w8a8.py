# SPDX-License-Identifier: Apache-2.0
"""Writes the demo's checkpoint with int8 experts, in the form that vllm-ascend reads with `--quantization ascend`.

Only the experts are quantised (W8A8_DYNAMIC: weights per output channel, symmetric; activations per row while serving),
so what differs from the bf16 checkpoint is what MC2 carries: dispatch sends int8 rows and a scale for each.

Stock 0.11.0 cannot run it: its norm layers ask the attention behind them how it is quantised, and it is not.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from toy_model import ToyModelShape, write_toy_model

Weights = dict[str, torch.Tensor]
ARGUMENTS = ("--quantization", "ascend")
_EXPERT = re.compile(r"\.experts\.\d+\.\w+_proj\.weight$")


def quantise(weights: Weights) -> tuple[Weights, dict[str, str]]:
    """The tensors of the checkpoint with int8 experts, and the kind of each for `quant_model_description.json`."""
    found: Weights = {}
    kinds: dict[str, str] = {}
    for name, weight in weights.items():
        parts = {"": weight}
        if _EXPERT.search(name):
            # Stock keeps scales in the model's dtype: rounded first, so that the int8 values fit the scale in use.
            scale = (weight.float().abs().amax(1, keepdim=True) / 127).to(weight.dtype)
            values = (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
            parts = {"": values, "_scale": scale, "_offset": torch.zeros_like(scale)}
        for suffix, tensor in parts.items():
            found[name + suffix] = tensor
            kinds[name + suffix] = "W8A8_DYNAMIC" if len(parts) > 1 else "FLOAT"
    return found, kinds


def dequantise(weights: Weights) -> Weights:
    """What the tensors of `quantise` stand for, in fp32 where they are int8, under the names of the bf16 checkpoint."""
    found = {name: tensor for name, tensor in weights.items() if not name.endswith(("_scale", "_offset"))}
    for name, tensor in found.items():
        if tensor.dtype == torch.int8:
            found[name] = tensor.float() * weights[f"{name}_scale"].float()
    return found


def write_toy_w8a8(directory: Path, shape: ToyModelShape | None = None) -> Path:
    """Write the checkpoint to ``directory`` (created if missing) and return it."""
    path = write_toy_model(directory, shape) / "model.safetensors"
    weights, kinds = quantise(load_file(path))
    save_file(weights, str(path), metadata={"format": "pt"})
    (directory / "quant_model_description.json").write_text(json.dumps({"model_quant_type": "W8A8_DYNAMIC", **kinds}))
    return directory

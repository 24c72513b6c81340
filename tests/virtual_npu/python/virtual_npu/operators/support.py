# SPDX-License-Identifier: Apache-2.0
"""What every operator family needs: refusals that name operator and argument, and poison for memory left unwritten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse(operator: str, **arguments: Any) -> None:
    """Raise for the first argument that was really given (not None, False, 0 or ""): this emulation does not cover it.

    Raises:
        NotImplementedError: names operator, argument and value.
    """
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = f"{value.dtype} tensor {list(value.shape)}"
        elif not value and not isinstance(value, (list, tuple)):
            continue
        raise NotImplementedError(f"virtual NPU: {operator}: {name}={value} is not emulated")


def expect(holds: bool, operator: str, argument: str, got: object, needed: object) -> None:
    """Raise if an argument breaks the operator's contract.

    Raises:
        ValueError: names operator, argument, the value found and the value needed.
    """
    if not holds:
        raise ValueError(f"virtual NPU: {operator}: {argument}={got}, needed: {needed}")


def poison(tensor: Tensor) -> Tensor:
    """Fill with NaN (floating point) or 0x7F bytes (integers), in place: memory that the hardware does not write."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(int.from_bytes(b"\x7f" * tensor.element_size(), "little"))


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new CPU tensor full of poison."""
    return poison(torch.empty(shape, dtype=dtype))


def rows32(tensor: Tensor) -> Tensor:
    """The values in fp32, contiguous: a reduction over the last dimension then runs the same way for every row."""
    return tensor.to(torch.float32).contiguous()


def sigmoid32(tensor: Tensor) -> Tensor:
    """Sigmoid in fp32, built on exp.

    torch's own CPU sigmoid and silu give the last few elements of a tensor to a scalar loop with another rounding: a
    row's value would depend on how many rows follow it.
    """
    return 1.0 / (1.0 + torch.exp(-tensor.to(torch.float32)))


def first_lowest_top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest values of the last dimension, largest first; among equals the lowest index wins."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]

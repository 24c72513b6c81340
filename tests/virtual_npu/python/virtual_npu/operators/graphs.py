# SPDX-License-Identifier: Apache-2.0
"""Python operators in ACL graphs: recorded with addresses, computed again at every replay.

What capture and replay mean is said in ``cann/graph.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import Kernels

RUN, RECORD, REPLACE = 0, 1, 2  # vnpu::Turn


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested argument or result, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def at_address(value: Any, kernels: Kernels) -> Any:
    """An argument as a graph holds it: addresses of device memory, copies of what lies on the host."""
    if isinstance(value, Tensor):
        return value.clone() if value.device.type == "cpu" else kernels.at_address(value)
    if isinstance(value, (list, tuple)):
        return [at_address(item, kernels) for item in value]
    return value


def captured_kernel(
    name: str, function: Callable[..., Any], undeclared: tuple[str, ...], kernels: Kernels
) -> Callable[[int, tuple[Any, ...], dict[str, Any]], Any]:
    """What a captured or updated call of the operator does instead of running.

    Args:
        undeclared: the arguments that it writes to and whose schema does not say so.
    """
    operator, _, overload = name.partition(".")
    schema = torch._C._get_schema(operator, overload)
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    written = [
        argument.name
        for argument in schema.arguments
        if argument.name in undeclared or (argument.alias_info is not None and argument.alias_info.is_write)
    ]

    def call(turn: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(positional, args, strict=False)) | kwargs
        own_args = [at_address(value, kernels) for value in args]
        own_kwargs = {key: at_address(value, kernels) for key, value in kwargs.items()}
        pairs = zip(tensors_in([own_args, *own_kwargs.values()]), tensors_in([args, *kwargs.values()]), strict=True)
        passed = {id(own): npu for own, npu in pairs}
        device = next(tensor for tensor in passed.values() if tensor.device.type != "cpu")
        changed = [tensor for argument in written for tensor in tensors_in(given.get(argument))]
        places: list[Tensor | None] = []  # where each result lies; None: in an argument

        def replay() -> None:
            for result, place in zip(tensors_in(function(*own_args, **own_kwargs)), places, strict=False):
                if place is None:
                    continue
                if result.shape != place.shape:
                    raise RuntimeError(
                        f"virtual NPU: {name} in a graph: the shape of its result depends on values: "
                        f"{list(result.shape)}, when captured {list(place.shape)}"
                    )
                place.copy_(result)

        if turn == REPLACE:
            # The graph may be half way through a replay, so this must touch no memory.
            if len(schema.returns) not in (0, len(changed)):
                raise RuntimeError(f"virtual NPU: {name} in the update of a task group: it makes a new tensor")
            kernels.record(replay)
            return None if not schema.returns else changed[0] if len(changed) == 1 else tuple(changed)

        def to_npu(value: Any) -> Any:
            if isinstance(value, Tensor):
                known = passed.get(id(value))
                if known is not None:
                    places.append(None)
                    return known
                result = kernels.as_npu(value, device)
                places.append(kernels.at_address(result))
                return result
            if isinstance(value, (list, tuple)):
                return type(value)(to_npu(item) for item in value)
            return value

        for tensor in changed:
            kernels.preserve(tensor)
        result = to_npu(function(*own_args, **own_kwargs))
        kernels.record(replay)
        return result

    return call

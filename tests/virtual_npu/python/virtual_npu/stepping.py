# SPDX-License-Identifier: Apache-2.0
"""What the ledger cannot see from below torch_npu: engine steps, the groups of communicators, and gloo.

Only observes: every wrapped call goes through unchanged. Without VIRTUAL_NPU_LEDGER_DIR nothing is wrapped.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wrapt

CANN = Path(__file__).parent / "lib" / "libvirtual_cann.so"
GLOO_KINDS = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "barrier")


class Ledger:
    """The process's ledger in libvirtual_cann.so, reached by its C interface."""

    def __init__(self) -> None:
        self._cann = ctypes.CDLL(str(CANN))
        self._cann.vnpu_ledger_step.argtypes = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64]
        self._cann.vnpu_ledger_note.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
        self._steps = 0
        self._named: set[str] = set()

    @property
    def enabled(self) -> bool:
        return bool(self._cann.vnpu_ledger_enabled())

    def note(self, event: str, **fields: Any) -> None:
        """Append an event; ``fields`` are JSON values."""
        self._cann.vnpu_ledger_note(event.encode(), json.dumps(fields)[1:-1].encode())

    def step(self, kind: str, scheduled_tokens: int) -> None:
        """Begin engine step 0, 1, ... of this process: ``execute`` with its scheduled tokens, or ``dummy`` with 0."""
        if self._steps == 0:
            # Engines are multiprocessing children: they end by os._exit, after finalizers but without destructors.
            multiprocessing.util.Finalize(None, self._cann.vnpu_ledger_flush, exitpriority=0)
        self.name_communicators()
        self._cann.vnpu_ledger_step(self._steps, kind.encode(), scheduled_tokens)
        self._steps += 1

    def name_communicators(self) -> None:
        """Note which vLLM group each new HCCL communicator belongs to (they are created at their first collective)."""
        import torch

        for name, group in _vllm_groups():
            if name in self._named or group.world_size == 1:
                continue
            backend = group.device_group._get_backend(torch.device("npu"))
            communicator = backend.get_hccl_comm_name(torch.distributed.get_rank(), init_comm=False)
            if communicator:
                self._named.add(name)
                self.note("group", comm=communicator, name=name, rank=group.rank_in_group, size=group.world_size)


def _vllm_groups() -> list[tuple[str, Any]]:
    from vllm.distributed import parallel_state

    groups = [(name, reference()) for name, reference in parallel_state._groups.items()]
    return [(name, group) for name, group in groups if group is not None]


def _group_name(process_group: Any) -> str:
    """vLLM's name of a gloo group; ``stateless`` for those outside it, such as the engines' vote every 32 steps."""
    for name, group in _vllm_groups():
        if group.cpu_group is process_group:
            return name
    return "stateless" if process_group is not None else "world"


def watch() -> None:
    """Arm the observers; they wrap when stock imports the worker, so a process that never does is left alone."""
    ledger = Ledger()
    if not ledger.enabled:
        return

    def watch_worker(module: Any) -> None:
        def execute_model(wrapped: Callable[..., Any], worker: Any, args: Any, kwargs: Any) -> Any:
            output = args[0] if args else kwargs["scheduler_output"]
            # A call without tokens only moves KV cache; the engine follows it with a dummy batch, which is the step.
            if output.total_num_scheduled_tokens > 0:
                ledger.step("execute", output.total_num_scheduled_tokens)
            return wrapped(*args, **kwargs)

        def execute_dummy_batch(wrapped: Callable[..., Any], worker: Any, args: Any, kwargs: Any) -> Any:
            ledger.step("dummy", 0)
            return wrapped(*args, **kwargs)

        wrapt.wrap_function_wrapper(module, "NPUWorker.execute_model", execute_model)
        wrapt.wrap_function_wrapper(module, "NPUWorker.execute_dummy_batch", execute_dummy_batch)
        _watch_gloo(ledger)

    for module in ("vllm_ascend.worker.worker_v1", "vllm_ascend.worker.worker"):  # the second from 0.13.0 on
        wrapt.register_post_import_hook(watch_worker, module)


class _Begun(wrapt.ObjectProxy):  # type: ignore[misc]
    """The handle of a collective that goes on in the background; notes how long the host waits for its end."""

    def __init__(self, work: Any, ledger: Ledger, group: str) -> None:
        super().__init__(work)
        self._self_ledger = ledger
        self._self_group = group

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self.__wrapped__.wait(*args, **kwargs)
        finally:
            host_us = (time.perf_counter() - begin) * 1e6
            self._self_ledger.note("collective_wait", backend="gloo", group=self._self_group, host_us=host_us)


def _watch_gloo(ledger: Ledger) -> None:
    """Record each collective on a gloo group, as C++ records HCCL's (kind, group, bytes, host time of the call)."""
    import torch
    import torch.distributed as dist

    def observed(kind: str) -> Callable[..., Any]:
        def call(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
            group = kwargs.get("group", next((value for value in args if isinstance(value, dist.ProcessGroup)), None))
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            # By the tensors: a stateless group (vLLM's vote) is not in torch's registry. A barrier has none.
            on_host = tensors[0].device.type == "cpu" if tensors else "gloo" in dist.get_backend(group)
            if not on_host:
                return wrapped(*args, **kwargs)
            name = _group_name(group)
            begin = time.perf_counter()
            try:
                result = wrapped(*args, **kwargs)
            finally:
                ledger.note(
                    "collective",
                    backend="gloo",
                    group=name,
                    kind=kind,
                    bytes=sum(tensor.nbytes for tensor in tensors),
                    host_us=(time.perf_counter() - begin) * 1e6,
                )
            return result if result is None else _Begun(result, ledger, name)

        return call

    for kind in GLOO_KINDS:
        wrapt.wrap_function_wrapper(dist, kind, observed(kind))

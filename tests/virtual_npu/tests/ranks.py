# SPDX-License-Identifier: Apache-2.0
"""Rank processes for the tests: ctypes access to HCCL and MC2, a file store, and a launcher with a hard time limit."""

from __future__ import annotations

import contextlib
import ctypes as c
import dataclasses
import importlib
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

ROOT_INFO_BYTES = 4108
HCCL_TYPES = {
    "int8": 0, "int16": 1, "int32": 2, "float16": 3, "float32": 4, "int64": 5, "uint64": 6, "uint8": 7, "uint16": 8,
    "uint32": 9, "float64": 10, "bf16": 11,
}  # fmt: skip
ACL_TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "int64": 9, "bool": 12, "bf16": 27}
REDUCE = {"sum": 0, "prod": 1, "max": 2, "min": 3}
PARA, MEMORY, NOT_SUPPORT, UNAVAIL, TIMEOUT, REMOTE = 1, 3, 5, 7, 9, 21


class HcclError(RuntimeError):
    """A call that returned something else than 0."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(call, code)  # both, so that it can be pickled
        self.code = code


def shared_memory_entries() -> set[str]:
    """What has a name in shared memory, but for the segments and semaphores of Python's multiprocessing, which vLLM on
    this machine may make or remove meanwhile."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("psm_", "sem."))}


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to bf16 bits (uint16), rounding half to even; no NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class CommConfig(c.Structure):
    """The first fields of HcclCommConfig."""

    _fields_ = [
        ("size", c.c_uint64), ("magic", c.c_uint32), ("version", c.c_uint32), ("reserved", c.c_uint64),
        ("buffer_mb", c.c_uint32), ("deterministic", c.c_uint32), ("name", c.c_char * 128), ("rest", c.c_char * 160),
    ]  # fmt: skip


class SendRecvItem(c.Structure):
    _fields_ = [("kind", c.c_int), ("buf", c.c_void_p), ("count", c.c_uint64), ("dtype", c.c_int), ("peer", c.c_uint32)]


def pointer(array: np.ndarray) -> c.c_void_p:
    return c.c_void_p(array.ctypes.data)


def counts(values: list[int]) -> Any:
    return (c.c_uint64 * len(values))(*values)


class Comm:
    """One rank's communicator, on numpy arrays; bf16 is uint16 with dtype="bf16". Failures raise HcclError."""

    def __init__(self, library: c.CDLL, handle: c.c_void_p, size: int, rank: int) -> None:
        self.library, self.handle, self.size, self.rank = library, handle, size, rank

    def call(self, function: str, *args: Any) -> None:
        code = getattr(self.library, function)(*args)
        if code != 0:
            raise HcclError(function, code)

    def name(self) -> str:
        text = c.create_string_buffer(128)
        self.call("HcclGetCommName", self.handle, text)
        return text.value.decode()

    def async_error(self) -> int:
        code = c.c_int(-1)
        self.call("HcclGetCommAsyncError", self.handle, c.byref(code))
        return code.value

    def destroy(self) -> None:
        self.call("HcclCommDestroy", self.handle)

    def all_reduce(self, data: np.ndarray, op: str = "sum", dtype: str = "") -> np.ndarray:
        out = np.zeros_like(data)
        kind = HCCL_TYPES[dtype or data.dtype.name]
        self.call(
            "HcclAllReduce", pointer(data), pointer(out), c.c_uint64(data.size), kind, REDUCE[op], self.handle, None
        )
        return out

    def reduce(self, data: np.ndarray, root: int, op: str = "sum") -> np.ndarray:
        out = np.zeros_like(data)
        kind = HCCL_TYPES[data.dtype.name]
        self.call(
            "HcclReduce", pointer(data), pointer(out), c.c_uint64(data.size), kind, REDUCE[op], root, self.handle, None
        )
        return out

    def broadcast(self, data: np.ndarray, root: int) -> np.ndarray:
        kind = HCCL_TYPES[data.dtype.name]
        self.call("HcclBroadcast", pointer(data), c.c_uint64(data.size), kind, root, self.handle, None)
        return data

    def scatter(self, data: np.ndarray, root: int, count: int) -> np.ndarray:
        out = np.zeros(count, data.dtype)
        kind = HCCL_TYPES[data.dtype.name]
        self.call("HcclScatter", pointer(data), pointer(out), c.c_uint64(count), kind, root, self.handle, None)
        return out

    def all_gather(self, data: np.ndarray) -> np.ndarray:
        out = np.zeros(data.size * self.size, data.dtype)
        kind = HCCL_TYPES[data.dtype.name]
        self.call("HcclAllGather", pointer(data), pointer(out), c.c_uint64(data.size), kind, self.handle, None)
        return out

    def all_gather_v(self, data: np.ndarray, sizes: list[int]) -> np.ndarray:
        out = np.zeros(sum(sizes), data.dtype)
        offsets = [sum(sizes[:i]) for i in range(self.size)]
        kind = HCCL_TYPES[data.dtype.name]
        self.call(
            "HcclAllGatherV", pointer(data), c.c_uint64(data.size), pointer(out), counts(sizes), counts(offsets), kind,
            self.handle, None,
        )  # fmt: skip
        return out

    def reduce_scatter(self, data: np.ndarray, op: str = "sum") -> np.ndarray:
        out = np.zeros(data.size // self.size, data.dtype)
        kind = HCCL_TYPES[data.dtype.name]
        self.call(
            "HcclReduceScatter", pointer(data), pointer(out), c.c_uint64(out.size), kind, REDUCE[op], self.handle, None
        )
        return out

    def reduce_scatter_v(self, data: np.ndarray, sizes: list[int], op: str = "sum") -> np.ndarray:
        out = np.zeros(sizes[self.rank], data.dtype)
        offsets = [sum(sizes[:i]) for i in range(self.size)]
        kind = HCCL_TYPES[data.dtype.name]
        self.call(
            "HcclReduceScatterV", pointer(data), counts(sizes), counts(offsets), pointer(out), c.c_uint64(out.size),
            kind, REDUCE[op], self.handle, None,
        )  # fmt: skip
        return out

    def all_to_all(self, data: np.ndarray) -> np.ndarray:
        out = np.zeros_like(data)
        kind = HCCL_TYPES[data.dtype.name]
        count = c.c_uint64(data.size // self.size)
        self.call("HcclAlltoAll", pointer(data), count, kind, pointer(out), count, kind, self.handle, None)
        return out

    def all_to_all_v(self, data: np.ndarray, sends: list[int], takes: list[int]) -> np.ndarray:
        out = np.zeros(sum(takes), data.dtype)
        kind = HCCL_TYPES[data.dtype.name]
        offsets = [counts([sum(sizes[:i]) for i in range(self.size)]) for sizes in (sends, takes)]
        self.call(
            "HcclAlltoAllV", pointer(data), counts(sends), offsets[0], kind, pointer(out), counts(takes), offsets[1],
            kind, self.handle, None,
        )  # fmt: skip
        return out

    def all_to_all_vc(self, data: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        out = np.zeros(int(matrix[:, self.rank].sum()), data.dtype)
        kind = HCCL_TYPES[data.dtype.name]
        table = counts([int(v) for v in matrix.ravel()])
        self.call("HcclAlltoAllVC", pointer(data), table, kind, pointer(out), kind, self.handle, None)
        return out

    def barrier(self) -> None:
        self.call("HcclBarrier", self.handle, None)

    def send(self, data: np.ndarray, to: int) -> None:
        kind = HCCL_TYPES[data.dtype.name]
        self.call("HcclSend", pointer(data), c.c_uint64(data.size), kind, to, self.handle, None)

    def recv(self, data: np.ndarray, source: int) -> np.ndarray:
        kind = HCCL_TYPES[data.dtype.name]
        self.call("HcclRecv", pointer(data), c.c_uint64(data.size), kind, source, self.handle, None)
        return data

    def batch(self, items: list[tuple[str, np.ndarray, int]]) -> None:
        """items: ("send" or "recv", array, peer)."""
        table = (SendRecvItem * max(1, len(items)))()
        for entry, (kind, data, peer) in zip(table, items, strict=False):
            entry.kind, entry.buf, entry.count = int(kind == "recv"), data.ctypes.data, data.size
            entry.dtype, entry.peer = HCCL_TYPES[data.dtype.name], peer
        self.call("HcclBatchSendRecv", table, len(items), self.handle, None)

    def sub_comm(self, members: list[int] | None, number: int, name: str = "") -> Comm | None:
        handle, parent = c.c_void_p(), c.c_void_p(self.handle.value)
        if members is None:
            self.call(
                "HcclCreateSubCommConfig", c.byref(parent), 0, None, c.c_uint64(0xFFFFFFFF), 0, None, c.byref(handle)
            )
            assert handle.value is None
            return None
        ids = (c.c_uint32 * len(members))(*members)
        position = members.index(self.rank)
        settings = config(name)
        self.call(
            "HcclCreateSubCommConfig", c.byref(parent), len(members), ids, c.c_uint64(number), position,
            c.byref(settings), c.byref(handle),
        )  # fmt: skip
        return Comm(self.library, handle, len(members), position)


def config(name: str = "", buffer_mb: int = 0xFFFFFFFF) -> CommConfig:
    """buffer_mb: megabytes, default "not set"."""
    return CommConfig(312, 0xF0F0F0F0, 6, 0, buffer_mb, 0, name.encode())


class World:
    """What a rank process gets: its rank, the library, and communicators by a label that all their ranks use."""

    def __init__(self, library: str, folder: Path, size: int, rank: int) -> None:
        self.library = c.CDLL(library)
        self.folder, self.size, self.rank = folder, size, rank

    def put(self, key: str, value: bytes) -> None:
        part = self.folder / f"{key}.{self.rank}.part"
        part.write_bytes(value)
        part.rename(self.folder / key)

    def get(self, key: str, seconds: float = 30) -> bytes:
        end = time.monotonic() + seconds
        while not (self.folder / key).exists():
            if time.monotonic() > end:
                raise TimeoutError(f"no {key}")
            time.sleep(0.002)
        return (self.folder / key).read_bytes()

    def meet(self, label: str) -> None:
        """Returns once every rank is here: for short time-outs to start together, and for nobody to end too early."""
        self.put(f"{label}-{self.rank}", b"")
        for rank in range(self.size):
            self.get(f"{label}-{rank}")

    def comm(
        self, label: str = "world", members: list[int] | None = None, name: str = "", buffer_mb: int = 0xFFFFFFFF
    ) -> Comm:
        """Makes the communicator of `members` (default: all); the first makes the root info. `name`: hcclCommName."""
        members = list(range(self.size)) if members is None else members
        root = c.create_string_buffer(ROOT_INFO_BYTES)
        if self.rank == members[0]:
            code = self.library.HcclGetRootInfo(root)
            if code != 0:
                raise HcclError("HcclGetRootInfo", code)
            self.put(f"root-{label}", root.raw)
        else:
            root.raw = self.get(f"root-{label}")
        return self.join(root.raw, len(members), members.index(self.rank), name, buffer_mb)

    def join(self, root: bytes, size: int, rank: int, name: str = "", buffer_mb: int = 0xFFFFFFFF) -> Comm:
        handle = c.c_void_p()
        settings = config(name, buffer_mb)
        code = self.library.HcclCommInitRootInfoConfig(size, root, rank, c.byref(settings), c.byref(handle))
        if code != 0:
            raise HcclError("HcclCommInitRootInfoConfig", code)
        return Comm(self.library, handle, size, rank)


@dataclasses.dataclass
class RankResult:
    ok: bool
    value: Any
    error: BaseException | None
    stderr: str
    exit_code: int | None
    seconds: float  # from the start of the function to its end

    def failed_with(self, code: int, *texts: str) -> None:
        """Asserts an HcclError of that code, and that the library's message holds all of `texts`."""
        assert isinstance(self.error, HcclError), (
            f"expected an HcclError, got {self.error or self.value}\n{self.stderr}"
        )
        assert self.error.code == code, f"{self.error}\n{self.stderr}"
        for text in texts:
            assert text in self.stderr, f"no '{text}' in: {self.stderr}"


def complaint(call: Callable[[], Any]) -> str:
    """What the library writes to this rank's stderr while `call` fails; "" if it does not fail."""
    stderr = Path("/proc/self/fd/2")
    before = stderr.stat().st_size
    try:
        call()
    except HcclError:
        return stderr.read_text()[before:]
    return ""


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    yield


def _rank_main(
    pipe: Any, library: str, folder: Path, size: int, rank: int, function: str, args: tuple, env: dict[str, str]
) -> None:
    os.environ.update(env)
    with _stderr_to(folder / f"stderr-{rank}"):
        module, _, name = function.partition(":")
        begin = time.monotonic()
        try:
            value = getattr(importlib.import_module(module), name)(World(library, folder, size, rank), *args)
            outcome = (True, value, None)
        except Exception as error:  # noqa: BLE001 (handed to the test, which looks at it)
            outcome = (False, None, error)
        pipe.send_bytes(pickle.dumps((*outcome, time.monotonic() - begin)))


def run_ranks(
    library: str,
    folder: Path,
    size: int,
    function: str,
    args: tuple,
    *,
    env: dict[str, str] | None = None,
    rank_env: dict[int, dict[str, str]] | None = None,
    start: str = "forkserver",
    limit: float = 60,
) -> list[RankResult]:
    """Runs `function` ("module:name", called with a World and args) in `size` processes, at most `limit` seconds."""
    # Not forked from the test runner by default: once that has imported torch, its settings are latched.
    context = multiprocessing.get_context(start)
    multiprocessing.set_forkserver_preload(["numpy", "pytest"])  # what every rank would import anyway
    base = {"VIRTUAL_NPU_TIMEOUT_S": "20", **(env or {})}
    processes, pipes = [], []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        all_env = {**base, **(rank_env or {}).get(rank, {})}
        process = context.Process(
            target=_rank_main, args=(theirs, library, folder, size, rank, function, args, all_env), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(mine)
    end = time.monotonic() + limit
    outcomes: dict[int, tuple] = {}
    open_pipes = dict(enumerate(pipes))
    while open_pipes and time.monotonic() < end:
        for ready in wait(list(open_pipes.values()), timeout=max(0.0, end - time.monotonic())):
            rank = next(r for r, p in open_pipes.items() if p is ready)
            with contextlib.suppress(EOFError):  # a killed rank sends nothing: its outcome stays None
                outcomes[rank] = pickle.loads(ready.recv_bytes())
            del open_pipes[rank]
    hung = sorted(open_pipes)
    results = []
    for rank, process in enumerate(processes):
        if rank in hung:
            process.kill()
        process.join(10)
        path = folder / f"stderr-{rank}"
        text = path.read_text() if path.exists() else ""
        ok, value, error, seconds = outcomes.get(rank, (False, None, None, float("nan")))
        results.append(RankResult(ok, value, error, text, process.exitcode, seconds))
    if hung:
        report = "\n".join(f"rank {r}: {results[r].stderr}" for r in range(size))
        raise TimeoutError(f"ranks {hung} did not finish within {limit} s\n{report}")
    return results

# SPDX-License-Identifier: Apache-2.0
"""A KV connector that carries the KV cache of a prompt from a prefill node to a decode node through a shared directory.

Stock vLLM's SharedStorageConnector does not fit here: it expects one tensor per layer with a leading dimension of 2,
calls `.cuda()`, loads inside the forward pass and rounds the prompt down to whole blocks. Ascend keeps a tuple of
tensors per layer (key and value; for MLA the two latent parts), and a real decode node receives all prompt tokens
between two steps. This connector does it the second way, so the engine sees what it sees with Mooncake:

* prefill node, `kv_transfer_params={"do_remote_decode": true, "transfer_id": id}`: at the end of the step that computes
  the last prompt token, after the draft pass if there is one, the worker writes one file per TP rank, before the
  response leaves the node. The response carries the parameters for the decode node.
* decode node, `{"do_remote_prefill": true, "transfer_id": id, "num_tokens": n, "tp_size": p}`: the request waits in
  WAITING_FOR_REMOTE_KVS while a thread reads the file; the cache is filled at the start of a later step. The scheduler
  then runs the last prompt token once more (a step of 1 token) to draw the first output token. The file is removed.
  The TP size here may be a multiple of the prefill node's: each rank takes its own KV heads, or all of an MLA cache,
  which is the same on every TP rank.
* no file, or one for another prompt length or TP size: the decode node prefills the prompt itself and logs a warning.
  Stock connectors do the same with parameters they cannot use; 0.11.0 has no way to fail one request from a connector.

Files are written under a temporary name and renamed, so a reader never sees half of one. A file nobody fetched is
removed by the writer after `ttl_s` seconds (default 600). Both `directory` and `ttl_s` are read from
`kv_connector_extra_config`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.file_kv_connector")

_TRANSFER_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,159}")
_SUFFIX = ".safetensors"

# All that differs between the vLLM versions 0.11.0 to 0.23.0 in what this connector uses.


def _base_arguments(kv_cache_config: object) -> dict[str, Any]:
    """What the base class takes on top of configuration and role; 0.11.0 does not know the cache configuration."""
    known = "kv_cache_config" in inspect.signature(KVConnectorBase_V1.__init__).parameters
    return {"kv_cache_config": kv_cache_config} if known else {}


def _is_resumed(cached: CachedRequestData, index: int) -> bool:
    """Whether the request comes back from a preemption, so that its block ids are all it has, not an addition."""
    resumed_req_ids = getattr(cached, "resumed_req_ids", None)
    if resumed_req_ids is None:  # 0.11.0
        return bool(cached.resumed_from_preemption[index])
    return cached.req_ids[index] in resumed_req_ids


def valid_transfer_id(params: dict[str, Any], req_id: str) -> str | None:
    """transfer_id of the request (default: its request id), or None if it is not a plain file name."""
    transfer_id = params.get("transfer_id", req_id)
    return transfer_id if isinstance(transfer_id, str) and _TRANSFER_ID.fullmatch(transfer_id) else None


@dataclass
class Transfer:
    """One prompt to write or to read.

    block_ids are the blocks of this node, first_token the first token to move (a multiple of the block size; tokens
    before it came from the local prefix cache), num_tokens the prompt length, tp_size that of the node that writes.
    """

    req_id: str
    transfer_id: str
    num_tokens: int
    block_ids: list[int]
    tp_size: int
    first_token: int = 0


@dataclass
class FileConnectorMetadata(KVConnectorMetadata):
    """What the worker has to do in this step; `cancels` are request ids whose blocks were freed while loading."""

    saves: list[Transfer] = field(default_factory=list)
    loads: list[Transfer] = field(default_factory=list)
    cancels: set[str] = field(default_factory=set)


class TransferDirectory:
    """File names, atomic writes, reads and clean-up; knows nothing about vLLM.

    A file holds `num_tokens` rows per cache tensor, so the two nodes may differ in block size and block numbers. Each
    rank of the reading node gets a hard link of its own and removes it: no rank has to know when the others are done.
    """

    def __init__(self, directory: Path, tp_rank: int, tp_size: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._tp_rank = tp_rank
        self._tp_size = tp_size

    def _written(self, transfer_id: str, tp_rank: int, tp_size: int) -> Path:
        return self._directory / f"{transfer_id}.tp{tp_rank}of{tp_size}{_SUFFIX}"

    def _claimed(self, transfer_id: str, tp_rank: int) -> Path:
        return self._directory / f"{transfer_id}.for{tp_rank}of{self._tp_size}{_SUFFIX}"

    def write(self, transfer_id: str, num_tokens: int, tensors: dict[str, torch.Tensor]) -> None:
        target = self._written(transfer_id, self._tp_rank, self._tp_size)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        save_file(tensors, str(temporary), metadata={"num_tokens": str(num_tokens)})
        temporary.replace(target)

    def stored_tokens(self, transfer_id: str, tp_size: int) -> int | None:
        """Prompt length of the transfer that a node with this TP size stored, None if a file of it is missing."""
        paths = [self._written(transfer_id, rank, tp_size) for rank in range(tp_size)]
        if not all(path.exists() for path in paths):
            return None
        with safe_open(str(paths[0]), framework="pt") as reader:
            return int(reader.metadata()["num_tokens"])

    def claim(self, transfer_id: str, tp_size: int) -> None:
        """Turns what `tp_size` ranks stored into one link per rank of this node, whose TP size is a multiple of it."""
        for rank in range(self._tp_size):
            source = self._written(transfer_id, rank * tp_size // self._tp_size, tp_size)
            self._claimed(transfer_id, rank).hardlink_to(source)
        for rank in range(tp_size):
            self._written(transfer_id, rank, tp_size).unlink()

    def read(self, transfer_id: str) -> dict[str, torch.Tensor]:
        """What `claim` has set aside for this rank."""
        with safe_open(str(self._claimed(transfer_id, self._tp_rank)), framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - not a dict

    def remove(self, transfer_id: str) -> None:
        """Removes this rank's link."""
        self._claimed(transfer_id, self._tp_rank).unlink(missing_ok=True)

    def sweep(self, ttl_s: float) -> None:
        """Removes what nobody fetched for `ttl_s` seconds, left-over temporary files included."""
        deadline = time.time() - ttl_s
        for path in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another rank swept it
                if _SUFFIX in path.name and path.stat().st_mtime < deadline:
                    logger.warning("KV transfer %s was not fetched within %s s and is removed", path.name, ttl_s)
                    path.unlink()


class FileKVConnector(KVConnectorBase_V1):
    """See the module text. Raises ValueError on an unusable setting, and for pipeline parallelism."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: object = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, **_base_arguments(kv_cache_config))
        config = vllm_config.kv_transfer_config
        directory = config.get_from_extra_config("directory", None)
        if not isinstance(directory, str) or not directory:
            raise ValueError("FileKVConnector needs kv_connector_extra_config.directory, a path both nodes share")
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("FileKVConnector does not support pipeline parallelism: a rank holds only its own layers")
        self._ttl_s = float(config.get_from_extra_config("ttl_s", 600))
        self._block_size: int = vllm_config.cache_config.block_size
        self._tp_size: int = vllm_config.parallel_config.tensor_parallel_size
        self._tp_rank = get_tensor_model_parallel_rank() if role == KVConnectorRole.WORKER else 0
        self._files = TransferDirectory(Path(directory), self._tp_rank, self._tp_size)
        # Scheduler side.
        self._prompts: dict[str, Transfer] = {}
        self._to_load: list[Transfer] = []
        self._loading: set[str] = set()
        self._cancelled: set[str] = set()
        # Worker side.
        self._caches: dict[str, tuple[torch.Tensor, ...]] = {}
        self._reads: dict[str, tuple[Transfer, Future[dict[str, torch.Tensor]]]] = {}
        self._received: set[str] = set()
        self._reader = ThreadPoolExecutor(1, "kv-reader") if role == KVConnectorRole.WORKER else None

    # Scheduler side -------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """All prompt tokens that the local prefix cache lacks, loaded between steps; (0, False) without a file."""
        params = request.kv_transfer_params or {}
        if not params.get("do_remote_prefill"):
            return 0, False
        missing = self._why_unusable(request, params)
        if missing is not None:
            logger.warning("Request %s is prefilled on the decode node: %s", request.request_id, missing)
            params["do_remote_prefill"] = False
            return 0, False
        count = request.num_prompt_tokens - num_computed_tokens
        return count, count > 0

    def _why_unusable(self, request: Request, params: dict[str, Any]) -> str | None:
        transfer_id = valid_transfer_id(params, "")
        if transfer_id is None:
            return f"kv_transfer_params carry no usable transfer_id: {params}"
        tp_size = params.get("tp_size")
        if not isinstance(tp_size, int) or tp_size < 1 or self._tp_size % tp_size != 0:
            return f"TP size {self._tp_size} is no multiple of the prefill node's, {tp_size}"
        stored = self._files.stored_tokens(transfer_id, tp_size)
        if stored is None:
            return f"there is no KV transfer {transfer_id}"
        if stored != request.num_prompt_tokens:
            return f"KV transfer {transfer_id} holds {stored} tokens, the prompt has {request.num_prompt_tokens}"
        return None

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        params = request.kv_transfer_params or {}
        if not params.get("do_remote_prefill"):
            return
        # One transfer per request. A prompt of one token comes back here with num_computed_tokens 0 after its load.
        params["do_remote_prefill"] = False
        if num_external_tokens > 0:
            self._files.claim(params["transfer_id"], params["tp_size"])
            self._to_load.append(
                Transfer(
                    request.request_id,
                    params["transfer_id"],
                    request.num_prompt_tokens,
                    blocks.get_block_ids()[0],
                    params["tp_size"],
                    first_token=request.num_prompt_tokens - num_external_tokens,
                )
            )
            self._loading.add(request.request_id)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> FileConnectorMetadata:
        meta = FileConnectorMetadata(loads=self._to_load, cancels=self._cancelled)
        self._to_load, self._cancelled = [], set()
        for new in scheduler_output.scheduled_new_reqs:
            params = (new.sampling_params.extra_args or {}).get("kv_transfer_params") if new.sampling_params else None
            if not params or not params.get("do_remote_decode"):
                continue
            transfer_id = valid_transfer_id(params, new.req_id)
            if transfer_id is None:
                logger.warning("Request %s is not handed over: transfer_id is not a plain file name", new.req_id)
                continue
            prompt_length = len(new.prompt_token_ids or ())
            transfer = Transfer(new.req_id, transfer_id, prompt_length, list(new.block_ids[0]), self._tp_size)
            self._collect(meta, transfer, new.num_computed_tokens, scheduler_output)
        cached = scheduler_output.scheduled_cached_reqs
        for index, req_id in enumerate(cached.req_ids):
            pending = self._prompts.get(req_id)
            if pending is None:
                continue
            new_block_ids = cached.new_block_ids[index]
            if _is_resumed(cached, index):
                pending.block_ids = []
            if new_block_ids is not None:
                pending.block_ids.extend(new_block_ids[0])
            self._collect(meta, pending, cached.num_computed_tokens[index], scheduler_output)
        return meta

    def _collect(
        self, meta: FileConnectorMetadata, transfer: Transfer, num_computed: int, scheduler_output: SchedulerOutput
    ) -> None:
        """Saves the prompt in the step that computes its last token; until then it stays pending (chunked prefill)."""
        if num_computed + scheduler_output.num_scheduled_tokens[transfer.req_id] >= transfer.num_tokens:
            self._prompts.pop(transfer.req_id, None)
            meta.saves.append(transfer)
        else:
            self._prompts[transfer.req_id] = transfer

    def update_connector_output(self, connector_output: Any) -> None:
        self._loading -= connector_output.finished_recving or set()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        req_id = request.request_id
        self._prompts.pop(req_id, None)
        if req_id in self._loading:
            # The blocks go back to the pool now; the worker must not write to them any more.
            self._loading.discard(req_id)
            self._cancelled.add(req_id)
        params = request.kv_transfer_params or {}
        complete = request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        transfer_id = valid_transfer_id(params, req_id)
        if not params.get("do_remote_decode") or not complete or transfer_id is None:
            return False, None
        return False, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer_id,
            "num_tokens": request.num_prompt_tokens,
            "tp_size": self._tp_size,
        }

    # Worker side ----------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """kv_caches: layer name -> tensor or tuple of tensors [num_blocks, kernel block size, heads, head size]."""
        for layer_name, caches in kv_caches.items():
            tensors = (caches,) if isinstance(caches, torch.Tensor) else tuple(caches)
            for tensor in tensors:
                if tensor.dim() != 4 or self._block_size % tensor.shape[1] != 0 or not tensor.is_contiguous():
                    raise ValueError(
                        f"FileKVConnector cannot address the cache of {layer_name}: shape {tuple(tensor.shape)}, "
                        f"block size {self._block_size}"
                    )
            self._caches[layer_name] = tensors

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Drops cancelled loads, fills the cache from reads that are complete, and starts the reads of this step."""
        meta = self._metadata()
        for req_id in meta.cancels:
            if (read := self._reads.pop(req_id, None)) is not None:
                self._await(read[1], read[0])
                self._files.remove(read[0].transfer_id)
        for req_id, (transfer, future) in list(self._reads.items()):
            if future.done():
                self._fill(transfer, self._await(future, transfer))
                self._files.remove(transfer.transfer_id)
                del self._reads[req_id]
                self._received.add(req_id)
        assert self._reader is not None
        for transfer in meta.loads:
            self._reads[transfer.req_id] = (transfer, self._reader.submit(self._files.read, transfer.transfer_id))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request is not scheduled before its load is complete."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing per layer: the whole prompt is written when all layers have run."""

    def wait_for_save(self) -> None:
        """Nothing yet: the draft layer's cache of this step is filled after this call."""

    def clear_connector_metadata(self) -> None:
        """The end of a step, drafts included: writes the prompts whose last token it has computed."""
        meta = self._metadata()
        for transfer in meta.saves:
            tensors = {
                f"{layer_name}.{index}": torch.cat([part.cpu() for part in self._parts(cache, transfer)])
                for layer_name, caches in self._caches.items()
                for index, cache in enumerate(caches)
            }
            self._files.write(transfer.transfer_id, transfer.num_tokens, tensors)
        if meta.saves:
            self._files.sweep(self._ttl_s)
        super().clear_connector_metadata()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        received, self._received = self._received, set()
        return None, received or None

    def shutdown(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(wait=False, cancel_futures=True)

    def _metadata(self) -> FileConnectorMetadata:
        meta = self._get_connector_metadata()
        assert isinstance(meta, FileConnectorMetadata)
        return meta

    @staticmethod
    def _await(future: Future[dict[str, torch.Tensor]], transfer: Transfer) -> dict[str, torch.Tensor]:
        """The scheduler saw the complete file, so a failed read is a broken disk, not a missing transfer: raise."""
        try:
            return future.result(timeout=60)
        except Exception as error:
            raise RuntimeError(f"KV transfer {transfer.transfer_id} of request {transfer.req_id} is lost") from error

    def _parts(self, cache: torch.Tensor, transfer: Transfer) -> list[torch.Tensor]:
        """Views of the cache, one per block, that hold tokens first_token .. num_tokens of the prompt in order."""
        slots = cache.flatten(0, 1)
        parts = []
        for start in range(transfer.first_token, transfer.num_tokens, self._block_size):
            base = transfer.block_ids[start // self._block_size] * self._block_size
            parts.append(slots[base : base + min(self._block_size, transfer.num_tokens - start)])
        return parts

    def _fill(self, transfer: Transfer, tensors: dict[str, torch.Tensor]) -> None:
        # So many ranks here share what one rank there wrote: its KV heads in order, or copies of its only one.
        share = self._tp_size // transfer.tp_size
        for layer_name, caches in self._caches.items():
            for index, cache in enumerate(caches):
                stored = tensors.get(f"{layer_name}.{index}")
                if stored is not None:
                    first_head = self._tp_rank % share * stored.shape[1] // share
                    stored = stored[:, first_head : first_head + cache.shape[2]]
                if stored is None or stored.shape[1:] != cache.shape[2:]:
                    raise RuntimeError(
                        f"KV transfer {transfer.transfer_id} does not hold the cache of {layer_name}: both nodes need "
                        "the same model and the same kind of --speculative-config"
                    )
                row = transfer.first_token
                for part in self._parts(cache, transfer):
                    part.copy_(stored[row : row + part.shape[0]])
                    row += part.shape[0]

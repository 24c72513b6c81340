# SPDX-License-Identifier: Apache-2.0
"""Cases for examples/kv_connector.py, run by test_kv_connector.py in a process of their own.

Real parts: vLLM's engine config, vllm-ascend's RecomputeScheduler on the decode node, vLLM's Scheduler on the prefill
node, the connector in both roles. Only the forward pass is replaced: the "cache" of a token is a function of the token,
its position, the layer and the head, written where the scheduler's block table says, and checked on the other node.
"""

from __future__ import annotations

import inspect
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import kv_connector
import pytest
import torch
from kv_connector import FileKVConnector
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm_ascend.ascend_config import clear_ascend_config
from vllm_ascend.core.recompute_scheduler import RecomputeScheduler

try:
    from vllm.utils.hashing import sha256
except ImportError:  # 0.11.0
    from vllm.utils import sha256

BLOCK = 128
BLOCKS = 12
TARGET_LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
DRAFT_LAYER = "model.layers.2.self_attn.attn"
LAYERS = (*TARGET_LAYERS, DRAFT_LAYER)
# Heads of all TP ranks together, and their sizes in the tensors of one layer: key and value, or the two parts of MLA.
LAYOUTS = {"gqa": (2, (16, 16)), "mla": (1, (64, 16))}


def engine_config(model: Path, directory: Path, role: str, **arguments: Any) -> VllmConfig:
    clear_ascend_config()  # one per process, and the two nodes share this one
    transfer = KVTransferConfig(
        kv_connector="FileKVConnector",
        kv_connector_module_path="kv_connector",
        kv_role=role,
        kv_connector_extra_config={"directory": str(directory), **arguments.pop("extra", {})},
    )
    return EngineArgs(
        model=str(model),
        max_model_len=1024,
        max_num_seqs=8,
        enforce_eager=True,
        kv_transfer_config=transfer,
        **arguments,
    ).create_engine_config()


class Node:
    """A scheduler with its connector, and one worker connector per TP rank with a cache on the CPU."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        config: VllmConfig,
        layout: str = "gqa",
        tp_size: int = 1,
        kernel_block: int = BLOCK,
        layers: tuple[str, ...] = LAYERS,
    ) -> None:
        spec = FullAttentionSpec(BLOCK, num_kv_heads=2, head_size=16, dtype=torch.bfloat16)
        kv_cache_config = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(list(layers), spec)])
        config.cache_config.num_gpu_blocks = BLOCKS
        config.parallel_config.tensor_parallel_size = tp_size
        producer = config.kv_transfer_config.is_kv_producer
        scheduler_class = Scheduler if producer else RecomputeScheduler
        newer = {"block_size": BLOCK} if "block_size" in inspect.signature(Scheduler.__init__).parameters else {}
        self.scheduler = scheduler_class(config, kv_cache_config, StructuredOutputManager(config), **newer)
        self.workers = []
        self.loads: list[Any] = []
        self.received: Counter[str] = Counter()  # by request: ranks that have its cache
        self.caches = []
        self.heads = []  # of each rank: the numbers of its heads; one head on several ranks is the same on all
        total_heads, head_sizes = LAYOUTS[layout]
        for rank in range(tp_size):
            first = rank * total_heads // tp_size
            self.heads.append(range(first, first + max(1, total_heads // tp_size)))
            monkeypatch.setattr(kv_connector, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            worker = FileKVConnector(config, KVConnectorRole.WORKER)
            chunk = BLOCK // kernel_block
            shape = (BLOCKS * chunk, kernel_block, len(self.heads[rank]))
            cache = {layer: tuple(torch.zeros(*shape, size) for size in head_sizes) for layer in layers}
            worker.register_kv_caches(cache)
            self.workers.append(worker)
            self.caches.append(cache)

    def step(self) -> dict[str, list[int]]:
        """One engine step with a stand-in for the forward pass. Returns the new tokens."""
        output = self.scheduler.schedule()
        self.loads += output.kv_connector_metadata.loads
        for rank, worker in enumerate(self.workers):
            worker.bind_connector_metadata(output.kv_connector_metadata)
            worker.start_load_kv(None)  # type: ignore[arg-type]
            if output.total_num_scheduled_tokens:
                self.write(rank, output, TARGET_LAYERS)
                worker.wait_for_save()
            self.received.update(worker.get_finished(output.finished_req_ids)[1] or ())
            if output.total_num_scheduled_tokens:
                self.write(rank, output, (DRAFT_LAYER,))
                worker.clear_connector_metadata()
        # Ranks may finish a load in different steps; the engine waits for the last one.
        received = {req_id for req_id, ranks in self.received.items() if ranks == len(self.workers)}
        for req_id in received:
            del self.received[req_id]
        req_ids = list(output.num_scheduled_tokens)
        complete = [self.scheduler.requests[req_id].num_computed_tokens >= self.scheduler.requests[req_id].num_tokens
                    for req_id in req_ids]  # fmt: skip
        sampled = [[5] if done else [] for done in complete]
        runner_output = ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: index for index, req_id in enumerate(req_ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=KVConnectorOutput(finished_recving=received or None),
        )
        self.outputs = self.scheduler.update_from_output(output, runner_output)
        self.scheduled = dict(output.num_scheduled_tokens)
        return dict(zip(req_ids, sampled, strict=True))

    def slots(self, request: Request) -> list[int]:
        (block_ids,) = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        return [block * BLOCK + offset for block in block_ids for offset in range(BLOCK)]

    def write(self, rank: int, output: Any, layers: tuple[str, ...]) -> None:
        """A forward pass over what is scheduled: it leaves these layers' cache behind."""
        for req_id, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[req_id]
            slots = self.slots(request)
            end = request.num_computed_tokens
            for layer, caches in self.caches[rank].items():
                if layer not in layers:
                    continue
                for part, cache in enumerate(caches):
                    rows = cache.flatten(0, 1)
                    for position in range(end - count, end):
                        expected = content(request.all_token_ids[position], position, layer, part)
                        for row, head in zip(rows[slots[position]], self.heads[rank], strict=True):
                            row.fill_(expected + head)

    def check(self, request: Request, count: int) -> None:
        """The first `count` tokens of the request are in the cache of every rank."""
        slots = self.slots(request)
        for rank, layers in enumerate(self.caches):
            for layer, caches in layers.items():
                for part, cache in enumerate(caches):
                    rows = cache.flatten(0, 1)
                    for position in range(count):
                        expected = content(request.all_token_ids[position], position, layer, part)
                        for row, head in zip(rows[slots[position]], self.heads[rank], strict=True):
                            assert torch.all(row == expected + head), (rank, layer, part, position, head)

    def until_scheduled(self, request: Request, deadline_s: float = 20.0) -> list[int]:
        """Steps until the request is scheduled for the first time; returns the tokens of each step."""
        counts = []
        deadline = time.monotonic() + deadline_s
        while not counts or counts[-1] == 0:
            assert time.monotonic() < deadline, f"{request.request_id} is {request.status.name}"
            self.step()
            counts.append(self.scheduled.get(request.request_id, 0))
            time.sleep(0.002)
        return counts


def content(token: int, position: int, layer: str, part: int) -> float:
    """What a token leaves in head 0; head n has n more."""
    return float(10 * token + 70 * position + 100_000 * LAYERS.index(layer) + 300_000 * part)


def make_request(name: str, tokens: list[int], params: dict[str, Any] | None, max_tokens: int) -> Request:
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        extra_args={"kv_transfer_params": params} if params else None,
    )
    return Request(name, tokens, sampling, None, eos_token_id=2, block_hasher=get_request_block_hasher(BLOCK, sha256))


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (length,), generator=generator).tolist()


def prefill(node: Node, name: str, tokens: list[int], **params: Any) -> dict[str, Any] | None:
    """Runs the prompt on the prefill node; returns the kv_transfer_params of its answer."""
    request = make_request(name, tokens, {"do_remote_decode": True, **params}, 1)
    node.scheduler.add_request(request)
    node.until_scheduled(request)
    while not request.is_finished():
        node.step()
    answers = [output for outputs in node.outputs.values() for output in outputs.outputs if output.request_id == name]
    assert len(answers) == 1
    return answers[0].kv_transfer_params


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from toy_model import write_toy_model

    init_none_hash(sha256)
    return write_toy_model(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture
def nodes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Node, Node]:
    return pair(model, tmp_path, monkeypatch)


def pair(
    model: Path,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    tp_sizes: tuple[int, int] = (1, 1),
    kernel_blocks: tuple[int, int] = (BLOCK, BLOCK),
    **options: Any,
) -> tuple[Node, Node]:
    """A prefill and a decode node; tp_sizes and kernel_blocks are those of the two."""
    producer = engine_config(model, directory, "kv_producer", max_num_batched_tokens=256)
    consumer = engine_config(
        model,
        directory,
        "kv_consumer",
        max_num_batched_tokens=64,
        additional_config={"recompute_scheduler_enable": True},
    )
    assert consumer.scheduler_config.scheduler_cls.endswith("RecomputeScheduler")
    prefill_node, decode_node = (
        Node(monkeypatch, config, tp_size=tp_size, kernel_block=kernel_block, **options)
        for config, tp_size, kernel_block in zip((producer, consumer), tp_sizes, kernel_blocks, strict=True)
    )
    return prefill_node, decode_node


@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 256, 600])
def test_the_cache_arrives_and_one_token_is_computed(nodes: tuple[Node, Node], tmp_path: Path, length: int) -> None:
    producer, consumer = nodes
    tokens = prompt(length)
    params = prefill(producer, "p", tokens, transfer_id="t1")
    assert params == {
        **{"do_remote_prefill": True, "do_remote_decode": False},
        **{"transfer_id": "t1", "num_tokens": length, "tp_size": 1},
    }
    request = make_request("d", tokens, params, 4)
    consumer.scheduler.add_request(request)
    counts = consumer.until_scheduled(request)
    # No token while the cache is on its way, then a step of one.
    assert len(counts) >= 2
    assert counts == [0] * (len(counts) - 1) + [1]
    consumer.check(request, length)
    assert list(request.output_token_ids) == [5]
    assert list(tmp_path.iterdir()) == []
    while not request.is_finished():
        consumer.step()
        assert consumer.scheduled.get("d", 0) <= 1
    assert len(request.output_token_ids) == 4


@pytest.mark.parametrize(
    ("layout", "tp_sizes", "kernel_blocks"),
    [
        ("gqa", (2, 2), (128, 128)),
        ("gqa", (1, 2), (128, 128)),
        ("gqa", (1, 4), (128, 128)),  # two heads, each on two ranks
        ("gqa", (2, 4), (128, 128)),
        ("mla", (1, 1), (64, 128)),
        ("mla", (1, 2), (128, 64)),
        ("mla", (2, 4), (128, 128)),
    ],
)
def test_layouts_and_tensor_parallel_ranks(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    tp_sizes: tuple[int, int],
    kernel_blocks: tuple[int, int],
) -> None:
    options = {"layout": layout, "tp_sizes": tp_sizes, "kernel_blocks": kernel_blocks}
    producer, consumer = pair(model, tmp_path, monkeypatch, **options)
    tokens = prompt(300)
    params = prefill(producer, "p", tokens, transfer_id="t1")
    assert len(list(tmp_path.iterdir())) == tp_sizes[0]
    request = make_request("d", tokens, params, 2)
    consumer.scheduler.add_request(request)
    consumer.until_scheduled(request)
    consumer.check(request, 300)
    assert list(tmp_path.iterdir()) == []


def test_heads_of_several_ranks_are_not_put_together(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, consumer = pair(model, tmp_path, monkeypatch, tp_sizes=(2, 1))
    params = prefill(producer, "p", prompt(40), transfer_id="t1")
    request = make_request("d", prompt(40), params, 2)
    consumer.scheduler.add_request(request)
    assert consumer.until_scheduled(request) == [40]


def test_a_prefill_node_without_the_draft_layer_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, _ = pair(model, tmp_path, monkeypatch, layers=TARGET_LAYERS)
    _, consumer = pair(model, tmp_path, monkeypatch)
    params = prefill(producer, "p", prompt(40), transfer_id="t1")
    request = make_request("d", prompt(40), params, 2)
    consumer.scheduler.add_request(request)
    with pytest.raises(RuntimeError, match=rf"does not hold the cache of {DRAFT_LAYER}"):
        consumer.until_scheduled(request)


def test_local_prefix_blocks_are_not_loaded_again(nodes: tuple[Node, Node]) -> None:
    producer, consumer = nodes
    tokens = prompt(300)
    for name in ("a", "b"):
        params = prefill(producer, "p" + name, tokens, transfer_id=name)
        request = make_request(name, tokens, params, 2)
        consumer.scheduler.add_request(request)
        consumer.until_scheduled(request)
        consumer.check(request, 300)
        while not request.is_finished():
            consumer.step()
    assert [transfer.first_token for transfer in consumer.loads] == [0, 256]


@pytest.mark.parametrize(
    "params",
    [
        None,
        {"do_remote_prefill": True, "transfer_id": "gone", "tp_size": 1},
        {"do_remote_prefill": True, "tp_size": 1},
        {"do_remote_prefill": True, "transfer_id": "../x", "tp_size": 1},
        {"do_remote_prefill": True, "transfer_id": 3, "tp_size": 1},
    ],
)
def test_without_a_transfer_the_prompt_is_computed_in_chunks(nodes: tuple[Node, Node], params: Any) -> None:
    _, consumer = nodes
    request = make_request("d", prompt(150), params, 2)
    consumer.scheduler.add_request(request)
    counts = []
    while not request.is_finished():
        consumer.step()
        counts.append(consumer.scheduled.get("d", 0))
    assert counts == [64, 64, 22, 1]


def test_a_transfer_of_another_prompt_is_not_used(nodes: tuple[Node, Node]) -> None:
    producer, consumer = nodes
    params = prefill(producer, "p", prompt(40), transfer_id="t1")
    request = make_request("d", prompt(41), params, 2)
    consumer.scheduler.add_request(request)
    assert consumer.until_scheduled(request) == [41]


def test_an_id_that_is_no_file_name_is_not_handed_over(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    producer, _ = nodes
    assert prefill(producer, "p", prompt(10), transfer_id="../../etc/x") is None
    assert list(tmp_path.iterdir()) == []


def test_an_abort_while_loading_leaves_the_blocks_alone(
    nodes: tuple[Node, Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, consumer = nodes
    params = prefill(producer, "p", prompt(200), transfer_id="t1")
    request = make_request("d", prompt(200), params, 4)
    consumer.scheduler.add_request(request)
    consumer.step()
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    consumer.scheduler.finish_requests("d", RequestStatus.FINISHED_ABORTED)
    # The freed blocks belong to somebody else before the read is complete.
    for caches in consumer.caches[0].values():
        for cache in caches:
            cache.fill_(-1)
    for _ in range(5):
        consumer.step()
        time.sleep(0.02)
    for caches in consumer.caches[0].values():
        assert all(torch.all(cache == -1) for cache in caches)
    assert list(tmp_path.iterdir()) == []
    assert consumer.scheduler.finished_recving_kv_req_ids == set()


def test_a_lost_file_stops_the_engine_instead_of_decoding_garbage(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    producer, consumer = nodes
    params = prefill(producer, "p", prompt(20), transfer_id="t1")
    request = make_request("d", prompt(20), params, 4)
    consumer.scheduler.add_request(request)
    output = consumer.scheduler.schedule()
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"broken")
    worker = consumer.workers[0]
    worker.bind_connector_metadata(output.kv_connector_metadata)
    worker.start_load_kv(None)  # type: ignore[arg-type]
    output.kv_connector_metadata.loads.clear()
    worker._reader.shutdown()  # waits for the read
    with pytest.raises(RuntimeError, match="KV transfer t1 of request d is lost"):
        worker.start_load_kv(None)  # type: ignore[arg-type]


def test_what_nobody_fetches_is_removed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config(model, tmp_path, "kv_producer", max_num_batched_tokens=256, extra={"ttl_s": 60})
    producer = Node(monkeypatch, config)
    prefill(producer, "p1", prompt(10), transfer_id="old")
    (old,) = tmp_path.iterdir()
    os.utime(old, (time.time() - 61, time.time() - 61))
    prefill(producer, "p2", prompt(10), transfer_id="new")
    assert [path.name for path in tmp_path.iterdir()] == ["new.tp0of1.safetensors"]


def test_settings_are_checked(model: Path, tmp_path: Path) -> None:
    config = engine_config(model, tmp_path, "kv_producer")
    config.kv_transfer_config.kv_connector_extra_config.clear()
    with pytest.raises(ValueError, match=r"kv_connector_extra_config\.directory"):
        FileKVConnector(config, KVConnectorRole.SCHEDULER)
    config = engine_config(model, tmp_path, "kv_producer")
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ValueError, match="pipeline parallelism"):
        FileKVConnector(config, KVConnectorRole.SCHEDULER)

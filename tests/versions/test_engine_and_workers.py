# SPDX-License-Identifier: Apache-2.0
"""The engine enforces what its workers agreed on, and nothing else: a node that does not skip is scheduled as by stock.

With an executor of its own process a worker knows what the engine cannot see: the device, the process group, and what
the other ranks decided.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
from demo import Cluster, DemoError, Process, node_environment
from launched_ranks import HOST, OVERLAY_PLUGINS, RECOMPUTE, Event, Server, changed_overlay, new_port, scheduled, server
from node_runs import DP2, graph_flags, make_prompts
from toy_model import ToyModelShape, write_toy_model

PROMPT, COUNT = make_prompts([(90, 4)])[0]
BY_STOCK = [64, 26, 1, 1, 1]  # of PROMPT, with the budget of 64 tokens that the nodes have
A2 = {"VIRTUAL_NPU_SOC": "Ascend910B1"}
A3 = {"VIRTUAL_NPU_SOC": "Ascend910_9391"}


GRAPHS = ("FULL_DECODE_ONLY", [1, 2, 4, 8])


def node(
    folder: Path, executor: str, *, overlay: bool = True, graphs: bool = True, environment: dict[str, str] | None = None
) -> Server:
    """DP2, on the A2 if the environment does not say otherwise.

    Args:
        graphs: separate routines, where `skip` would also change batches and captures.
    """
    flags = [*DP2, *(graph_flags(*GRAPHS) if graphs else ()), "--distributed-executor-backend", executor]
    environment = {**A2, "VLLM_DISABLE_COMPILE_CACHE": "1", **(environment or {})}
    model = write_toy_model(folder / "model", ToyModelShape())
    return server(folder / "node", model, flags, overlay=overlay, environment=environment)


def answer(nodes: list[Server]) -> list[list[int]]:
    """The tokens of each node, which are up at the same time."""
    with Cluster() as cluster:
        for one in nodes:
            cluster.start(one.process)
        cluster.wait_until_ready({one.process: f"{one.url}/health" for one in nodes})
        tokens = [one.complete(PROMPT, COUNT) for one in nodes]
        cluster.check()
    return tokens


def ledgers(one: Server) -> list[list[Event]]:
    """The events of each rank that made steps. Outside MC2 no event tells which rank it is."""
    read = [[json.loads(line) for line in path.read_text().splitlines()] for path in one.ledger.iterdir()]
    return [events for events in read if any(event["ev"] == "step" for event in events)]


def captured(events: list[Event]) -> int:
    return sum(event["ev"] == "graph" and event["op"] == "capture" for event in events)


def assert_sync(one: Server) -> None:
    """With the reason that only a worker knows: on the A2 two ranks are too few for MC2."""
    codes = re.findall(r"\bDSP\d{3}\b.*", one.log)
    assert len(codes) == 2
    assert all(code.startswith("DSP107 stock uses MC2 on A2 from 16 ranks on") for code in codes)


@pytest.mark.matrix
def test_sync_the_engine_does_not_plan_by_itself(tmp_path: Path) -> None:
    one = node(tmp_path, "mp", graphs=False)
    answer([one])
    assert_sync(one)
    assert scheduled(ledgers(one)) == BY_STOCK


@pytest.mark.matrix
@pytest.mark.parametrize("executor", ["mp", "uni"])
def test_sync_and_off_are_scheduled_and_captured_as_by_stock(tmp_path: Path, executor: str) -> None:
    nodes = {
        "stock": node(tmp_path / "stock", executor, overlay=False),
        "sync": node(tmp_path / "sync", executor),
        "off": node(tmp_path / "off", executor, environment={"DP_SYNC_PATCH_MODE": "off"}),
    }
    tokens = answer(list(nodes.values()))
    assert tokens == [tokens[0]] * 3
    assert_sync(nodes["sync"])
    assert not re.search(r"\bDSP\d", nodes["off"].log)
    ranks = {name: ledgers(one) for name, one in nodes.items()}
    captures = [captured(events) for events in ranks["stock"]]
    assert captures[0] > 0
    for name, events in ranks.items():
        assert scheduled(events) == BY_STOCK, name
        assert [captured(one) for one in events] == captures == [captures[0]] * 2, name


@pytest.mark.parametrize(
    ("setting", "value", "method"),
    # A worker that is forked from an engine without the overlay's hooks has none either.
    [("graph_mode", "sync", "fork"), pytest.param("mode", "off", "spawn", marks=pytest.mark.matrix)],
)
def test_field_case_57_settings_that_reach_the_engine_only(
    tmp_path: Path, setting: str, value: str, method: str
) -> None:
    """As where a launcher passes the environment on to some processes: the node ends before it is ready."""
    without = changed_overlay(
        tmp_path / "copy",
        "settings.py",
        "(os.environ if environ is None else environ)",
        "({} if 'Worker' in __import__('multiprocessing').current_process().name else os.environ)",
    )
    changes = {f"DP_SYNC_PATCH_{setting.upper()}": value, "VLLM_WORKER_MULTIPROC_METHOD": method}
    one = node(tmp_path, "mp", graphs=False, environment={**A3, **without, **changes})
    with Cluster() as cluster:
        cluster.start(one.process)
        with pytest.raises(DemoError, match="ended with status"):
            cluster.wait_until_ready({one.process: f"{one.url}/health"})
    assert one.log.count("DSP000 skip") == 2  # the workers do not know
    differs = (
        f"{setting}='{value}' (environment) in the engine process of DP rank {{}}, and 'auto' (default) in its worker"
    )
    for rank in (0, 1):
        assert f"DSP208 engine and workers have to be set alike: {differs.format(rank)}" in one.log


_OFFLINE = """
import sys, json
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    transfer = KVTransferConfig(**arguments.pop("kv_transfer_config"))
    llm = LLM(kv_transfer_config=transfer, **arguments)
    print("constructed", flush=True)
    llm.generate([{"prompt_token_ids": list(range(3, 93))}], SamplingParams(max_tokens=4))
    print("answered", flush=True)
"""


def test_an_engine_that_does_not_confirm_ends_all_ranks(tmp_path: Path) -> None:
    """Offline, where no coordinator holds an engine back until the others are ready: the request waits already."""
    model = write_toy_model(tmp_path / "model", ToyModelShape())
    silent = changed_overlay(
        tmp_path / "copy",
        "patches/engine_startup.py",
        "engine.model_executor.collective_rpc(runtime.confirm_engine, args=kept)",
        "pass",
    )
    together = {
        **{"VLLM_DP_SIZE": "2", "VLLM_DP_MASTER_IP": HOST, "VLLM_DP_MASTER_PORT": str(new_port())},
        **{"VLLM_PLUGINS": OVERLAY_PLUGINS, "DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S": "5", "VIRTUAL_NPU_TIMEOUT_S": "60"},
    }
    arguments = {
        **{"model": str(model), "enforce_eager": True, "enable_prefix_caching": False, "enable_expert_parallel": True},
        **{"max_model_len": 384, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 16},
        "additional_config": json.loads(RECOMPUTE[1]),
        "kv_transfer_config": {
            **{"kv_connector": "FileKVConnector", "kv_connector_module_path": "kv_connector"},
            **{"kv_role": "kv_consumer", "kv_connector_extra_config": {"directory": str(tmp_path / "kv")}},
        },
    }
    ranks = []
    for rank in range(2):
        ledger = tmp_path / f"ledger{rank}"
        ledger.mkdir()
        own = {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": "0", "ASCEND_RT_VISIBLE_DEVICES": str(rank)}
        environment = node_environment(ledger) | together | own | (silent if rank == 1 else {})
        command = [sys.executable, "-c", _OFFLINE, json.dumps(arguments)]
        ranks.append(Process(f"rank {rank}", command, tmp_path / f"rank{rank}.log", environment))
    with Cluster() as cluster:
        for one in ranks:
            cluster.start(one)
        for one in ranks:
            deadline = time.monotonic() + 300
            while one.returncode() is None and time.monotonic() < deadline:
                one.remember()
                time.sleep(0.1)
            assert one.returncode() not in (None, 0), one.tail()
    logs = [one.log.read_text(errors="replace") for one in ranks]
    assert "DSP202 no answer within 5 s from rank 1, in the round 'engine' of the start-up" in logs[0]
    assert "constructed" not in logs[0]
    assert "constructed" in logs[1]
    assert "answered" not in logs[1]
    assert "DSP209 DP rank 1: the ranks skip, and the engine process of this rank has not confirmed" in logs[1]
    calls = []
    for rank in range(2):
        (path,) = (tmp_path / f"ledger{rank}").iterdir()
        events = [json.loads(line) for line in path.read_text().splitlines()]
        assert not [event for event in events if event["ev"] in ("ep", "collective") and event.get("step", -1) >= 0]
        calls.append([(event["op"], event["ordinal"]) for event in events if event["ev"] == "ep"])
    assert calls[0] == calls[1]  # of the start-up

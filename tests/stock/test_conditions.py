# SPDX-License-Identifier: Apache-2.0
"""Every condition by itself: one change of a real `vllm serve` command line, read through stock's own configuration.

The base case skips. Each case changes what is needed to break one condition and shows the state and the reason; the
answers come from `dp_sync_patch.command_line`, one forked process per command line since stock keeps part of its
configuration per process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command_lines import explain_all
from toy_configs import DENSE, MOE

from dp_sync_patch.plan import RULES

pytestmark = pytest.mark.timeout(300)

_CONSUMER = {"kv_connector": "SharedStorageConnector", "kv_role": "kv_consumer"}
_BASE: dict[str, Any] = {
    "--data-parallel-size": 4,
    "--enable-expert-parallel": None,
    "--enforce-eager": None,
    "--max-model-len": 32768,
    "--max-num-seqs": 16,
    "--max-num-batched-tokens": 4096,
    "--skip-tokenizer-init": None,
    "--kv-transfer-config": _CONSUMER,
    "--additional-config": {"recompute_scheduler_enable": True},
}
_GRAPHS = ("--enforce-eager",)  # what has to go for graphs


@dataclass(frozen=True)
class Case:
    """One command line: the base case without `drop`, with `flags`, environment and additional_config on top."""

    name: str
    state: str
    codes: tuple[str, ...] = ()
    found: str = ""  # part of what the first reason says was found
    flags: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    additional: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    soc: str = "A3"
    model: str = "moe"
    bound: int | None = None  # tokens per DP rank

    def words(self, folder: Path) -> list[str]:
        flags = {name: value for name, value in _BASE.items() if name not in self.drop} | self.flags
        if self.additional:
            flags["--additional-config"] = {**_BASE["--additional-config"], **self.additional}
        words = [f"{name}={value}" for name, value in self.environ.items()]
        words += ["vllm", "serve", str(folder / self.model)]
        for name, value in flags.items():
            words.append(name)
            if value is not None:
                words.append(value if isinstance(value, str) else json.dumps(value))
        return words


def sync(name: str, *codes: str, **changes: Any) -> Case:
    return Case(name, "sync", codes, **changes)


def captures(*sizes: int, **more: Any) -> dict[str, Any]:
    return {"--compilation-config": {"cudagraph_capture_sizes": list(sizes), **more}}


_BIG_WINDOW = {"HCCL_BUFFSIZE": "4096"}
_A2 = {"soc": "A2", "environ": _BIG_WINDOW}
_NO_RECOMPUTE = {"recompute_scheduler_enable": False}

# What no command line of 0.11.0 can ask for; tests/versions has them.
_LATER_STOCK = {"DSP113", "DSP114", "DSP125", "DSP142", "DSP143", "DSP144", "DSP145", "DSP146"}

# fmt: off
CASES = (
    Case("base", "skip", bound=16),
    # Not our business.
    Case("one DP rank", "off", ("DSP001",), flags={"--data-parallel-size": 1}),
    Case("field case 14: dense model", "off", ("DSP002",), found="qwen3", model="dense",
         drop=("--enable-expert-parallel",)),
    Case("external launcher", "off", ("DSP003",), found="external_launcher",
         flags={"--distributed-executor-backend": "external_launcher"},
         environ={"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}),
    Case("elastic EP", "off", ("DSP004",), found="VLLM_ELASTIC_EP_SCALE_UP_LAUNCH",
         environ={"VLLM_ELASTIC_EP_SCALE_UP_LAUNCH": "1"}),
    # Plain MC2 on every rank.
    sync("expert parallelism off", "DSP101", drop=("--enable-expert-parallel",)),
    sync("kv_both", "DSP102", found="kv_both", flags={"--kv-transfer-config": {**_CONSUMER, "kv_role": "kv_both"}}),
    sync("field case 06: producer", "DSP102", found="kv_producer",
         flags={"--kv-transfer-config": {**_CONSUMER, "kv_role": "kv_producer"}}),
    sync("no KV transfer", "DSP102", found="None", drop=("--kv-transfer-config",)),
    sync("unknown device", "DSP103", found="UNDEFINED", soc="UNDEFINED"),
    sync("capacity without the recompute scheduler", "DSP104", found="4096", additional=_NO_RECOMPUTE),
    sync("field case 04: 17 tokens for a capacity of 16", "DSP104", found="17", additional=_NO_RECOMPUTE,
         flags={"--max-num-batched-tokens": 17}),
    Case("field case 04: 16 tokens for a capacity of 16", "skip", bound=16, additional=_NO_RECOMPUTE,
         flags={"--max-num-batched-tokens": 16}),
    sync("the ascend scheduler hides the recompute scheduler", "DSP104", found="4096",
         additional={"ascend_scheduler_config": {"enabled": True, "enable_chunked_prefill": True}}),
    sync("the async scheduler hides the recompute scheduler", "DSP104", found="4096",
         flags={"--async-scheduling": None, "--distributed-executor-backend": "mp"}),
    sync("field case 09: A2 rows", "DSP105", found="257", **_A2,
         flags={"--data-parallel-size": 16, "--max-num-seqs": 257}),
    Case("field case 09: A2 rows that fit", "skip", bound=256, **_A2,
         flags={"--data-parallel-size": 16, "--max-num-seqs": 256}),
    Case("field case 09: A2 rows that fit by TP", "skip", bound=512, **_A2, drop=_GRAPHS,
         flags={"--data-parallel-size": 8, "--tensor-parallel-size": 2, "--max-num-seqs": 512, **captures(512)}),
    sync("field case 09: A3 rows", "DSP105", found="520", drop=_GRAPHS, environ=_BIG_WINDOW,
         flags={"--max-num-seqs": 520, **captures(520)}),
    sync("HCCL window", "DSP106", found="1 MB", environ={"HCCL_BUFFSIZE": "1"}),
    sync("HCCL window that is no number", "DSP106", found="no positive number", environ={"HCCL_BUFFSIZE": "2OO"}),
    sync("A2 with 4 ranks", "DSP107", found="4 ranks", soc="A2"),
    sync("experts per token not in the model's configuration", "DSP108", found="0 per token",
         flags={"--hf-overrides": {"num_experts_per_tok": 0}}),
    sync("experts that do not divide", "DSP109", found="16 experts", flags={"--data-parallel-size": 3}),
    sync("field case 10: hierarchy", "DSP110", found="HCCL_INTRA_PCIE_ENABLE=1",
         environ={"HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "0"}),
    Case("field case 10: half of hierarchy", "skip", environ={"HCCL_INTRA_PCIE_ENABLE": "1"}),
    sync("a model type without MC2", "DSP111", flags={"--hf-overrides": {"model_type": "PanguProMoE"}}),
    sync("compile_sizes", "DSP112", found="64", drop=_GRAPHS, flags=captures(1, 2, 4, 8, 16, compile_sizes=[8, 64])),
    # The worst case is enforced; one graph routine.
    sync("foreign scheduler", "DSP120", found="my.Scheduler", additional=_NO_RECOMPUTE,
         flags={"--scheduler-cls": "my.Scheduler", "--max-num-batched-tokens": 16}),
    sync("multimodal input in one piece", "DSP121", flags={"--disable-chunked-mm-input": None}),
    sync("field case 08: FULL_DECODE_ONLY", "DSP122", found="FULL_DECODE_ONLY", drop=_GRAPHS,
         environ={"DP_SYNC_PATCH_GRAPH_MODE": "refuse"},
         flags={"--compilation-config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}),
    # Stock 0.11.0 turns this one into PIECEWISE, which is one routine for every batch.
    Case("field case 08: FULL_AND_PIECEWISE", "skip", bound=20, drop=_GRAPHS,
         flags={"--compilation-config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}),
    sync("steps above the largest graph", "DSP123", drop=_GRAPHS,
         flags={"--tensor-parallel-size": 4, "--max-num-seqs": 11, **captures(10)}),
    Case("default captures", "skip", bound=20, drop=_GRAPHS),
    *(sync(f"field case 16: captures {list(sizes)}", "DSP104", found="16", drop=_GRAPHS, flags=captures(*sizes))
      for sizes in ((1, 2, 4, 8), (8, 4, 2, 1))),
    *(Case(f"field case 16: captures {list(sizes)} are enough for 8", "skip", bound=8, drop=_GRAPHS,
           flags={"--max-num-seqs": 8, **captures(*sizes)}) for sizes in ((1, 2, 4, 8), (8, 4, 2, 1))),
    # Features whose collectives have the shape of the local batch, or that change the sequence of operators.
    sync("torchair", "DSP130", found="NPUTorchairWorker", drop=_GRAPHS,
         additional={"torchair_graph_config": {"enabled": True}}),
    sync("foreign worker", "DSP130", found="my.Worker", flags={"--worker-cls": "my.Worker"}),
    sync("shared-expert DP", "DSP130", "DSP131", found="NPUTorchairWorker",
         additional={"enable_shared_expert_dp": True}),
    *(sync(f"field case 13: {name}", "DSP132", found=name, environ={name: "1"})
      for name in ("VLLM_ASCEND_ENABLE_FLASHCOMM1", "VLLM_ASCEND_ENABLE_FLASHCOMM")),
    sync("sequence parallelism", "DSP132", found="enable_sequence_parallelism",
         flags={"--compilation-config": {"pass_config": {"enable_sequence_parallelism": True}}}),
    sync("field case 12: LM-head TP", "DSP133", found="2", additional={"lmhead_tensor_parallel_size": 2}),
    Case("field case 12: LM-head TP of one", "skip", additional={"lmhead_tensor_parallel_size": 1}),
    # Stock allows it with torchair only.
    sync("field case 12: o_proj TP", "DSP130", "DSP134", drop=_GRAPHS,
         additional={"oproj_tensor_parallel_size": 2, "torchair_graph_config": {"enabled": True}}),
    sync("MLP TP", "DSP135", environ={"VLLM_ASCEND_ENABLE_MLP_OPTIMIZE": "1"}),
    sync("dual-batch overlap", "DSP136", environ={"VLLM_ASCEND_ENABLE_DBO": "1"}),
    *(sync(f"EPLB by {name}", "DSP137", found=f"additional_config.{name}", additional={name: value})
      for name, value in (("dynamic_eplb", True), ("expert_map_path", "map.json"),
                          ("expert_map_record_path", "map.json"), ("init_redundancy_expert", 4))),
    *(sync(f"EPLB by {name}", "DSP137", found=name, environ={name: "true"})
      for name in ("DYNAMIC_EPLB", "EXPERT_MAP_RECORD")),
    sync("LoRA", "DSP138", flags={"--enable-lora": None}),
    sync("pipeline parallelism", "DSP139", found="2", flags={"--pipeline-parallel-size": 2}),
    sync("context parallelism", "DSP140", found="2",
         flags={"--decode-context-parallel-size": 2, "--tensor-parallel-size": 2}),
    sync("a speculative method that is not known", "DSP141", found="ngram", drop=_GRAPHS,
         flags={"--speculative-config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 4},
                "--max-num-seqs": 4, **captures(3, 6, 12)}),
    # What newer releases know is nothing to stock 0.11.0, so it is nothing to the overlay.
    Case("field case 07: balance scheduling", "skip", environ={"VLLM_ASCEND_BALANCE_SCHEDULING": "1"}),
    Case("field case 11: enable_mc2_hierarchy_comm", "skip", additional={"enable_mc2_hierarchy_comm": True}),
    Case("kv_load_failure_policy", "skip",
         flags={"--kv-transfer-config": {**_CONSUMER, "kv_load_failure_policy": "recompute"}}),
    # Ways to start the same node.
    Case("field case 44: external load balancer", "skip", bound=16,
         flags={"--data-parallel-rank": 2, "--data-parallel-size-local": 1}),
    Case("headless", "skip", bound=16, flags={"--headless": None}),
    Case("switched off", "off", ("DSP005",), environ={"DP_SYNC_PATCH_MODE": "off"}),
    Case("switched off by additional_config", "off", ("DSP005",), additional={"dp_sync_patch": {"mode": "off"}}),
)
# fmt: on


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("conditions")
    for name, config in (("moe", MOE), ("dense", DENSE)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    found = explain_all(folder, [(case.words(folder), case.soc) for case in CASES])
    return {case.name: answer for case, answer in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_condition(answers: dict[str, dict[str, Any]], case: Case) -> None:
    answer = answers[case.name]
    assert "error" not in answer, answer
    assert (answer["state"], tuple(reason["code"] for reason in answer["reasons"])) == (case.state, case.codes)
    if case.found:
        assert case.found in answer["reasons"][0]["found"]
    if case.bound is not None:
        assert answer["sizes"]["bound"] == case.bound


def test_every_condition_has_a_case() -> None:
    """DSP124 (the process group of a worker) is no matter of a command line; tests/unit has it."""
    rules = {rule.code for rule in RULES} - {"DSP124"} - _LATER_STOCK
    assert rules <= {case.codes[0] for case in CASES if len(case.codes) == 1} | {"DSP131", "DSP134"}
    assert {"DSP131", "DSP134"} <= {code for case in CASES for code in case.codes}

# SPDX-License-Identifier: Apache-2.0
"""A decode node that skips, and one change of its command line for each condition that this stock version can break.

Everything is read from the VllmConfig that stock itself makes of the command line. On 0.11.0 tests/stock has the same
question with that version's own options.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from command_lines import explain_all, serve
from packaging.specifiers import SpecifierSet
from this_stock import CONNECTOR, VERSION
from toy_configs import DEEPSEEK_V3, DENSE, MOE

pytestmark = pytest.mark.timeout(1800)

_CONSUMER = {"kv_connector": CONNECTOR, "kv_role": "kv_consumer"}
_BASE: dict[str, Any] = {
    "--data-parallel-size": 2,
    "--enable-expert-parallel": None,
    "--enforce-eager": None,
    "--max-model-len": 4096,
    "--max-num-seqs": 16,
    "--max-num-batched-tokens": 4096,
    "--skip-tokenizer-init": None,
    "--kv-transfer-config": _CONSUMER,
}
_GRAPHS = ("--enforce-eager",)  # what has to go for graphs
_MODELS = {"moe": MOE, "dense": DENSE, "deepseek": DEEPSEEK_V3}


@dataclass(frozen=True)
class Case:
    """The base case without `drop`, with the rest on top. `stock`: what stock itself says when it refuses to start."""

    name: str
    codes: tuple[str, ...] = ()  # none: the skip; all of these are among the reasons
    versions: str = ">=0.12.0rc1"
    state: str = "sync"
    found: str = ""  # part of what the reason of the first code says was found
    stock: str = ""
    flags: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    additional: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    soc: str = "A3"
    model: str = "moe"
    recompute: bool = True

    def applies(self) -> bool:
        return SpecifierSet(self.versions).contains(VERSION, prereleases=True)


def role(name: str) -> dict[str, Any]:
    return {"--kv-transfer-config": {**_CONSUMER, "kv_role": name}}


def fine_tp(name: str) -> dict[str, Any]:
    return {"finegrained_tp_config": {f"{name}_tensor_parallel_size": 2}}


def graphs(mode: str) -> dict[str, Any]:
    return {"--compilation-config": {"cudagraph_mode": mode}}


def drafts(count: int) -> dict[str, Any]:
    return {"--speculative-config": {"method": "mtp", "num_speculative_tokens": count}}


_DEEPSEEK: dict[str, Any] = {"model": "deepseek", "environ": {"HCCL_BUFFSIZE": "8192"}}
_TP2 = {"--tensor-parallel-size": 2}
# With KV transfer stock wants whole blocks on each of these ranks.
_INTERLEAVE = {"--cp-kv-cache-interleave-size": 128}
_DCP = {"--decode-context-parallel-size": 2, "--tensor-parallel-size": 4, **_INTERLEAVE}
_PCP = {"--prefill-context-parallel-size": 2, **_INTERLEAVE}
_INTRA = {"HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "0"}

# fmt: off
CASES = [case for case in (
    Case("the standard decode node"),
    # Not our business.
    Case("one DP rank", ("DSP001",), state="off", flags={"--data-parallel-size": 1}),
    Case("a dense model", ("DSP002",), state="off", found="qwen3", model="dense", drop=("--enable-expert-parallel",)),
    Case("elastic EP", ("DSP004",), state="off", environ={"VLLM_ELASTIC_EP_SCALE_UP_LAUNCH": "1"}),
    # Plain MC2 on every rank.
    Case("expert parallelism off", ("DSP101",), drop=("--enable-expert-parallel",)),
    Case("kv_both", ("DSP102",), found="kv_both", flags=role("kv_both"), recompute=False),
    Case("a producer", ("DSP102",), found="kv_producer", flags=role("kv_producer"), recompute=False),
    Case("no KV transfer", ("DSP102",), found="None", drop=("--kv-transfer-config",), recompute=False),
    Case("310P", ("DSP103",), found="_310P", soc="_310P"),
    Case("A5", ("DSP103",), found="A5", soc="A5"),
    Case("no recompute scheduler", ("DSP104",), found="4096", recompute=False),
    Case("field case 04: no recompute scheduler, and steps that fit", recompute=False,
         flags={"--max-num-batched-tokens": 16}),
    Case("HCCL window", ("DSP106",), found="1 MB", environ={"HCCL_BUFFSIZE": "1"}),
    Case("A2 with two ranks", ("DSP107",), found="2 ranks", soc="A2"),
    Case("experts that do not divide", ("DSP109",), found="16 experts", flags={"--data-parallel-size": 3}),
    Case("field case 10: hierarchy", ("DSP110",), found="HCCL_INTRA_PCIE_ENABLE=1", environ=_INTRA),
    Case("field case 10: half of hierarchy", environ={"HCCL_INTRA_PCIE_ENABLE": "1"}),
    Case("field case 11: hierarchy by option", ("DSP110",), ">=0.18.0", found="enable_mc2_hierarchy_comm",
         additional={"enable_mc2_hierarchy_comm": True}),
    Case("A2 with many experts per rank", ("DSP113",), ">=0.18.0", found="32 experts per rank", soc="A2",
         model="deepseek", flags={"--data-parallel-size": 8}),
    Case("fused MC2 by environment", ("DSP114",), ">=0.13.0", environ={"VLLM_ASCEND_ENABLE_FUSED_MC2": "1"}),
    Case("fused MC2 by option", ("DSP114",), ">=0.23.0", additional={"enable_fused_mc2": 1}),
    # The worst case is enforced; one graph routine.
    Case("a scheduler that is not known", ("DSP120",), found="SchedulerDynamicBatch",
         additional={"SLO_limits_for_dynamic_batch": 50}, recompute=False, flags={"--max-num-batched-tokens": 16}),
    Case("multimodal input in one piece", ("DSP121",), flags={"--disable-chunked-mm-input": None}),
    Case("one graph routine that is not known", ("DSP125",), "<0.13.0", found="PIECEWISE", drop=_GRAPHS,
         flags=graphs("PIECEWISE")),
    Case("separate graph routines that are not known", ("DSP125", "DSP122"), "<0.13.0", found="FULL_DECODE_ONLY",
         drop=_GRAPHS, flags=graphs("FULL_DECODE_ONLY")),
    Case("one graph routine", versions=">=0.13.0", drop=_GRAPHS, flags=graphs("PIECEWISE")),
    Case("one graph routine and a draft", versions=">=0.13.0", drop=_GRAPHS,
         flags={**graphs("PIECEWISE"), **drafts(1)}, **_DEEPSEEK),
    Case("field case 08: FULL_DECODE_ONLY", versions=">=0.13.0", drop=_GRAPHS, flags=graphs("FULL_DECODE_ONLY")),
    Case("both kinds of graphs", versions=">=0.13.0", drop=_GRAPHS, flags=graphs("FULL_AND_PIECEWISE")),
    Case("separate graph routines refused", ("DSP122",), ">=0.13.0", found="FULL_DECODE_ONLY", drop=_GRAPHS,
         flags=graphs("FULL_DECODE_ONLY"), environ={"DP_SYNC_PATCH_GRAPH_MODE": "refuse"}),
    Case("separate graph routines and a draft", ("DSP122",), "==0.13.0", found="FULL_DECODE_ONLY", drop=_GRAPHS,
         flags={**graphs("FULL_DECODE_ONLY"), **drafts(1)}, **_DEEPSEEK),
    Case("separate graph routines that a draft follows", versions=">=0.18.0", drop=_GRAPHS,
         flags={**graphs("FULL_DECODE_ONLY"), **drafts(1)}, **_DEEPSEEK),
    Case("separate graph routines and a draft with its own", ("DSP122",), "==0.18.0", found="FULL_DECODE_ONLY",
         drop=_GRAPHS, flags={**graphs("FULL_DECODE_ONLY"), **drafts(1), "--no-async-scheduling": None}, **_DEEPSEEK),
    # Features whose collectives have the shape of the local batch, or that change the sequence of operators.
    Case("xlite", ("DSP130",), found="xlite_worker.XliteWorker", flags={"--block-size": 128},
         additional={"xlite_graph_config": {"enabled": True}}),
    Case("the worker of the 310P", ("DSP130",), ">=0.18.0", found="NPUWorker310",
         flags={"--worker-cls": "vllm_ascend._310p.worker_310p.NPUWorker310"}),
    Case("a foreign worker", ("DSP130",), found="my.Worker", flags={"--worker-cls": "my.Worker"}),
    Case("shared-expert DP", ("DSP131",), flags=_TP2, additional={"enable_shared_expert_dp": True}),
    Case("field case 13: FlashComm by environment", ("DSP132",), flags=_TP2,
         environ={"VLLM_ASCEND_ENABLE_FLASHCOMM1": "1"}),
    Case("field case 13: FlashComm by option", ("DSP132",), ">=0.23.0", flags=_TP2,
         additional={"enable_flashcomm1": True}),
    Case("field case 12: LM-head TP", ("DSP133",), found="2", additional=fine_tp("lmhead")),
    Case("field case 12: o_proj TP", ("DSP134",), found="2", drop=_GRAPHS, additional=fine_tp("oproj"),
         flags=graphs("FULL_DECODE_ONLY")),
    Case("MLP TP", ("DSP135",), additional=fine_tp("mlp")),
    Case("EPLB by option", ("DSP137",), found="dynamic_eplb", versions=">=0.12.0rc1,<0.18.0",
         additional={"dynamic_eplb": True}, environ={"DYNAMIC_EPLB": "true"}),
    Case("EPLB by group", ("DSP137",), found="eplb_config", versions=">=0.13.0",
         additional={"eplb_config": {"dynamic_eplb": True}}, environ={"DYNAMIC_EPLB": "true"}),
    Case("vLLM's EPLB", stock="load balancing is only supported on CUDA", flags={"--enable-eplb": None}),
    Case("LoRA", ("DSP138",), flags={"--enable-lora": None}),
    Case("pipeline parallelism", ("DSP139",), found="2", flags={"--pipeline-parallel-size": 2}),
    Case("decode context parallelism", ("DSP140",), found="decode 2", flags=_DCP),
    Case("prefill context parallelism", ("DSP140",), ">=0.13.0,<0.23.0", found="prefill 2", flags=_PCP),
    Case("prefill context parallelism on 0.12.0rc1", versions="<0.13.0", flags=_PCP, stock="is not fully supported"),
    Case("prefill context parallelism on later versions", versions=">=0.23.0", flags=_PCP,
         stock="PCP (Prefill Context Parallelism) and DP (Data Parallelism) cannot be enabled simultaneously"),
    Case("a speculative method that is not known", ("DSP141",), found="ngram",
         flags={"--speculative-config": {"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_max": 4}}),
    Case("one draft", versions=">=0.12.0rc1", flags=drafts(1), **_DEEPSEEK),
    Case("two drafts", ("DSP142",), "<0.18.0", found="2", flags=drafts(2), **_DEEPSEEK),
    Case("two drafts on later versions", versions=">=0.18.0", flags=drafts(2), **_DEEPSEEK),
    Case("embedding TP", ("DSP143",), additional=fine_tp("embedding")),
    Case("o_lora TP", ("DSP143",), ">=0.23.0", drop=_GRAPHS, additional=fine_tp("olora"),
         flags=graphs("FULL_DECODE_ONLY")),
    Case("FlashComm2", stock="not applicable in D-scenario environments", flags=_TP2,
         environ={"VLLM_ASCEND_FLASHCOMM2_PARALLEL_SIZE": "1"}),
    Case("field case 07: balance scheduling", ("DSP145",), "==0.13.0", environ={"VLLM_ASCEND_BALANCE_SCHEDULING": "1"}),
    Case("field case 07: balance scheduling on later versions", versions=">=0.18.0",
         stock="only supports PD-mixed mode", environ={"VLLM_ASCEND_BALANCE_SCHEDULING": "1"}),
    Case("field case 32: the second model runner", ("DSP146",), environ={"VLLM_USE_V2_MODEL_RUNNER": "1"}),
    # Ways to start the same node.
    Case("field case 44: external load balancer", flags={"--data-parallel-rank": 1, "--data-parallel-size-local": 1}),
    Case("headless", flags={"--headless": None}),
    Case("switched off", ("DSP005",), state="off", environ={"DP_SYNC_PATCH_MODE": "off"}),
) if case.applies()]
# fmt: on


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("refusals")
    for name, config in _MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    commands = []
    for case in CASES:
        flags = {name: value for name, value in _BASE.items() if name not in case.drop} | case.flags
        flags["--additional-config"] = {"recompute_scheduler_enable": case.recompute, **case.additional}
        commands.append((serve(folder / case.model, flags, case.environ), case.soc))
    return {case.name: answer for case, answer in zip(CASES, explain_all(folder, commands), strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_condition(answers: dict[str, dict[str, Any]], case: Case) -> None:
    answer = answers[case.name]
    if case.stock:
        assert answer.get("error", "").startswith("DSP432 stock refuses this command line")
        assert case.stock in answer["error"]
        return
    assert "error" not in answer, answer
    reasons = {reason["code"]: reason for reason in answer["reasons"]}
    if case.codes:
        assert answer["state"] == case.state
        assert set(case.codes) <= reasons.keys()
        reason = reasons[case.codes[0]]
        assert case.found in reason["found"]
        assert reason["sentence"]
        assert reason["needed"]
    else:
        assert (answer["state"], list(reasons)) == ("skip", [])


def test_facts_of_the_standard_decode_node(answers: dict[str, dict[str, Any]]) -> None:
    facts, sizes = (answers["the standard decode node"][name] for name in ("facts", "sizes"))
    expected = {
        "stock_version": VERSION,
        "is_moe": True,
        "data_parallel_size": 2,
        "kv_role": "kv_consumer",
        "recompute_in_effect": True,
        "splits_prompts": True,
        "worker_cls_known": True,
        "hidden_size": 1024,
        "num_experts": 16,
        "experts_per_token": 8,
        "graph_mode": "NONE",
        "hccl_buffsize_mb": 200,
        "mc2_tokens_capacity": 16,
    }
    assert {name: facts[name] for name in expected} == expected
    assert facts["scheduler_cls"].endswith("RecomputeScheduler")
    assert (sizes["token_budget"], sizes["bound"], sizes["global_bs"]) == (16, 16, 32)

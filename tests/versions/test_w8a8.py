# SPDX-License-Identifier: Apache-2.0
"""MC2 with int8 rows (quant_mode 2): a decode node whose experts are quantised, DP2 EP2 on a virtual A3.

Dispatch then quantises each row and hands its scale over beside it, so the output shapes and the grouped products
behind them are others than with bf16. All figures come from the ledgers of the virtual NPU.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import toy_w8a8
from launched_ranks import MAX_NUM_SEQS, Prompt
from test_decode_node import REFUSED, Run, run

from dp_sync_patch import stock

pytestmark = [pytest.mark.timeout(1800), pytest.mark.matrix]

STOCK_VERSIONS = ("0.18.0",)  # that this has been run on; see toy_w8a8 for 0.11.0
FOLDERS = [str(Path(file).parent) for file in (toy_w8a8.__file__, toy_w8a8.write_toy_model.__code__.co_filename)]

# transformers computes the model on the CPU, in a process without torch_npu. Each served token is compared with what
# the model chooses after the same prompt and the tokens served before it, so that one difference stays one.
REFERENCE = """
import json, sys
from transformers.utils import import_utils
import transformers.utils
# transformers would import torch_npu to see whether it works.
import_utils.is_torch_npu_available = transformers.utils.is_torch_npu_available = lambda *_, **__: False
import torch
from safetensors.torch import load_file
from toy_w8a8 import dequantise
from transformers import AutoConfig, Qwen3MoeForCausalLM

folder, texts = sys.argv[1], json.load(sys.stdin)
model = Qwen3MoeForCausalLM(AutoConfig.from_pretrained(folder)).float().eval()

@torch.no_grad()
def agreeing(weights):
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    found = 0
    for prompt, served in texts:
        logits = model(torch.tensor([prompt + served])).logits[0, len(prompt) - 1 : -1]
        found += int((logits.argmax(-1) == torch.tensor(served)).sum())
    return found

stored = load_file(folder + "/model.safetensors")
halved = {name: weight / 2 if name.endswith("_scale") else weight for name, weight in stored.items()}
print(json.dumps([agreeing(dequantise(stored)), agreeing(dequantise(halved))]))
"""

if stock.require().vllm_ascend in STOCK_VERSIONS:

    @pytest.fixture(scope="module")
    def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return toy_w8a8.write_toy_w8a8(tmp_path_factory.mktemp("model"))

    @pytest.fixture(scope="module")
    def prompts() -> list[Prompt]:
        """All but the last are so short that no step of `sync` can be too large for MC2.

        Stock's other method rounds to bf16 between the two products of an expert, where the fused operator behind MC2
        does not. That decides near ties, and has nothing to do with the collective.
        """
        draw = random.Random(5)
        lengths = ((2, 24), (1, 12), (1, 16), (1, 9), (1, 20), (2, 30), (90, 10))
        assert sum(length for length, _ in lengths[:-1]) <= MAX_NUM_SEQS
        return [([draw.randrange(3, 384) for _ in range(length)], count) for length, count in lengths]

    @pytest.fixture(scope="module")
    def synced(model: Path, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Run:
        return run(tmp_path_factory.mktemp("sync"), model, prompts[:-1], (*toy_w8a8.ARGUMENTS, *REFUSED))

    @pytest.fixture(scope="module")
    def skipped(model: Path, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Run:
        return run(tmp_path_factory.mktemp("skip"), model, prompts, toy_w8a8.ARGUMENTS)

    def test_every_step_dispatches_int8_rows(synced: Run, skipped: Run) -> None:
        for found in (synced, skipped):
            for rank in range(2):
                calls = found.dispatches(rank)
                assert {event["quant_mode"] for event in calls} == {2}
                assert {event["step"] for event in calls} == set(found.steps(rank))

    def test_sync_has_one_collective_in_each_step_and_skip_has_none(synced: Run, skipped: Run) -> None:
        assert "DSP121" in synced.log
        assert skipped.log.count("DSP000 skip") == 2
        for rank in range(2):
            assert len(skipped.steps(rank)) > 32
            assert skipped.dp_collectives(rank) == {}
            assert synced.dp_collectives(rank) == dict.fromkeys(synced.steps(rank), 1)

    def test_skip_is_ragged_with_the_agreed_bound_and_no_mask(skipped: Run) -> None:
        calls = [skipped.dispatches(rank) for rank in range(2)]
        assert sum(a["bs"] != b["bs"] for a, b in zip(*calls, strict=True)) > 10
        assert {event["bs"] for event in calls[0] + calls[1]} >= {1, MAX_NUM_SEQS}
        assert {(event["global_bs"], event["mask"]) for event in calls[0] + calls[1]} == {(2 * MAX_NUM_SEQS, False)}

    def test_the_tokens_are_the_same_with_and_without_the_collective(synced: Run, skipped: Run) -> None:
        assert skipped.tokens[:-1] == synced.tokens

    def test_the_tokens_are_those_of_the_dequantised_weights(model: Path, prompts: list[Prompt], skipped: Run) -> None:
        """Also that this could fail: with scales of half the size the model chooses others."""
        texts = list(zip([prompt for prompt, _ in (prompts[0], *prompts)], skipped.tokens, strict=True))
        total = sum(len(served) for _, served in texts)
        environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": os.pathsep.join(FOLDERS)}
        answer = subprocess.run(
            [sys.executable, "-c", REFERENCE, str(model)],
            input=json.dumps(texts),
            env=os.environ | environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr[-4000:]
        right, wrong = json.loads(answer.stdout.splitlines()[-1])
        assert right >= 0.97 * total
        assert wrong < 0.85 * total

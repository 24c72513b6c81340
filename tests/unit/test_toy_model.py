# SPDX-License-Identifier: Apache-2.0
"""The toy checkpoint: loadable offline, the same bytes every time, and with output that depends on the context.

Every case is a fresh process without torch_npu: the model is computed by transformers on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENV = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

GENERATE = """
import json, sys
from transformers.utils import import_utils
import transformers.utils
# transformers would import torch_npu to see whether it works.
import_utils.is_torch_npu_available = transformers.utils.is_torch_npu_available = lambda *_, **__: False
import torch
from transformers import AutoTokenizer, Qwen3MoeForCausalLM
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = Qwen3MoeForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16).eval()
prompts = torch.randint(3, 384, (16, 30))
changed = prompts.clone()
changed[:, 5:15] = torch.randint(3, 384, (16, 10))
with torch.no_grad():
    outputs = [model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                              eos_token_id=None, pad_token_id=0)[:, 30:].tolist() for ids in (prompts, changed)]
text = "a decode node, na\\u00efve \\u4e2d"
chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
ids = tokenizer(text).input_ids
print(json.dumps({"outputs": outputs, "same_text": tokenizer.decode(ids) == text, "size": len(tokenizer),
                  "chat": chat, "chat_ids": tokenizer(chat).input_ids[:2], "dtype": str(model.dtype)}))
"""


def write(directory: Path, *arguments: str) -> None:
    command = [sys.executable, str(EXAMPLES / "toy_model.py"), str(directory), *arguments]
    subprocess.run(command, env=ENV, check=True, capture_output=True, timeout=120)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy") / "model"
    write(directory)
    return directory


def test_same_seed_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path / "again")
    write(tmp_path / "other", "--seed", "1")
    assert digests(tmp_path / "again") == digests(checkpoint)
    assert digests(tmp_path / "other")["model.safetensors"] != digests(checkpoint)["model.safetensors"]


def test_offline_tokenizer_and_greedy_output(checkpoint: Path) -> None:
    command = [sys.executable, "-c", GENERATE, str(checkpoint)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same_text"]
    assert result["size"] == 384
    assert result["dtype"] == "torch.bfloat16"
    assert result["chat"].startswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant")
    assert result["chat_ids"][0] == 1  # <|im_start|> is one token
    outputs, changed = result["outputs"]
    # The output varies within a request and between requests.
    assert min(len(set(ids)) for ids in outputs) >= 8
    assert len({tuple(ids) for ids in outputs}) == len(outputs)
    # Ten prompt tokens that are not the last one change what is generated: a KV cache with a gap would show.
    assert sum(before != after for before, after in zip(outputs, changed, strict=True)) >= 14

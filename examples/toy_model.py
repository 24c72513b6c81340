# SPDX-License-Identifier: Apache-2.0
"""Writes a small Qwen3-MoE checkpoint with seeded random weights, and a byte-level tokenizer, without any download.

Two things are chosen so that two runs of the same requests can be compared token by token:

* Greedy output must vary and must depend on the whole context, or a broken KV transfer would go unnoticed. Attention is
  therefore strong against the residual stream.
* Neighbouring logits must not tie, or a rounding difference between batch sizes would look like a fault. `lm_head` is
  mostly a random permutation of the embedding, so one token usually leads by far; the context decides the others.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Strength of the attention and expert outputs against the residual stream at hidden size 128. With these, about three
# tokens in four follow the permutation of `lm_head` and the rest is decided by the context.
_ATTENTION_GAIN = 3.5
_ATTENTION_SHARPNESS = 1.5
_EXPERT_GAIN = 1.5

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Text for the byte-pair merges; what it says does not matter, it only has to be the same on every machine.
_MERGE_TEXT = (
    "a decode node runs one step after another and every rank takes part in each of them",
    "the prefill node reads the prompt and hands the key value cache over to the decode node",
    "ranks without a request still run the experts for their peers with a token of their own",
    "when the counts differ between the ranks the busiest one sets the bound for all the others",
    "the router picks the experts of each row and the rows travel to the rank that holds them",
)


@dataclass(frozen=True)
class ToyModelShape:
    """Sizes of the checkpoint. Defaults keep one decode step on a CPU in the low milliseconds.

    head_dim stays below 128: at 128 vllm-ascend 0.11.0 takes another rotary operator.
    """

    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    vocab_size: int = 384
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0


def build_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` entries: the special tokens, 256 bytes, and merges.

    Raises ValueError if the built-in text does not yield enough merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_MERGE_TEXT, trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries instead of vocab_size={vocab_size}")
    return tokenizer


def build_weights(shape: ToyModelShape, seed: int) -> dict[str, torch.Tensor]:
    """bf16 tensors under the names of transformers' Qwen3MoeForCausalLM, drawn from one CPU generator."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * std).to(torch.bfloat16)

    hidden, inter, head_dim = shape.hidden_size, shape.moe_intermediate_size, shape.head_dim
    q_size, kv_size = shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim
    # The successor's lead in `lm_head` grows with the square root of the hidden size, so the gains follow it.
    scale = (hidden / 128) ** 0.5
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    embedding = normal(shape.vocab_size, hidden, std=1.0)
    weights: dict[str, torch.Tensor] = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones.clone()}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = ones.clone()
        weights[prefix + "post_attention_layernorm.weight"] = ones.clone()
        weights[prefix + "self_attn.q_proj.weight"] = normal(q_size, hidden, std=hidden**-0.5)
        weights[prefix + "self_attn.k_proj.weight"] = normal(kv_size, hidden, std=hidden**-0.5)
        weights[prefix + "self_attn.v_proj.weight"] = normal(kv_size, hidden, std=hidden**-0.5)
        weights[prefix + "self_attn.o_proj.weight"] = normal(hidden, q_size, std=scale * _ATTENTION_GAIN * q_size**-0.5)
        # Scores of standard deviation near 2 make attention pick a few positions instead of averaging all of them.
        norm_gain = torch.full((head_dim,), _ATTENTION_SHARPNESS, dtype=torch.bfloat16)
        weights[prefix + "self_attn.q_norm.weight"] = norm_gain
        weights[prefix + "self_attn.k_norm.weight"] = norm_gain.clone()
        weights[prefix + "mlp.gate.weight"] = normal(shape.num_experts, hidden, std=2.0 * hidden**-0.5)
        for expert in range(shape.num_experts):
            name = f"{prefix}mlp.experts.{expert}."
            weights[name + "gate_proj.weight"] = normal(inter, hidden, std=hidden**-0.5)
            weights[name + "up_proj.weight"] = normal(inter, hidden, std=hidden**-0.5)
            weights[name + "down_proj.weight"] = normal(hidden, inter, std=scale * _EXPERT_GAIN * inter**-0.5)
    # Row of a token = embedding of its predecessor: one cycle over the ordinary tokens, special ones have none.
    first = len(SPECIAL_TOKENS)
    cycle = torch.randperm(shape.vocab_size - first, generator=generator) + first
    lm_head = torch.zeros(shape.vocab_size, hidden)
    lm_head[cycle.roll(-1)] = embedding.float()[cycle]
    weights["lm_head.weight"] = (lm_head * hidden**-0.5).to(torch.bfloat16)
    return weights


def model_config(shape: ToyModelShape) -> dict[str, Any]:
    """config.json of the checkpoint."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": 2 * shape.hidden_size,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": shape.max_position_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def write_toy_model(directory: Path, shape: ToyModelShape | None = None, seed: int = 20251125) -> Path:
    """Writes the checkpoint to `directory` (created if missing), the same bytes for the same shape and seed.

    Returns the directory. Raises OSError if it cannot be written, ValueError for a vocab_size that is out of reach.
    """
    shape = shape or ToyModelShape()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(shape.vocab_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    documents: dict[str, dict[str, Any]] = {
        "config.json": model_config(shape),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[0],
            "eos_token": SPECIAL_TOKENS[2],
            "pad_token": SPECIAL_TOKENS[0],
            "model_max_length": shape.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    save_file(build_weights(shape, seed), str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small Qwen3-MoE checkpoint with random weights.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=20251125)
    parser.add_argument("--hidden-size", type=int, default=ToyModelShape.hidden_size)
    args = parser.parse_args()
    print(write_toy_model(args.directory, ToyModelShape(hidden_size=args.hidden_size), args.seed))


if __name__ == "__main__":
    main()

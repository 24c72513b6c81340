# SPDX-License-Identifier: Apache-2.0
"""Writes a small DeepSeek-V3-style checkpoint (MLA, MoE, one MTP layer) with seeded random weights.

Built like the demo's model: greedy tokens mostly follow a permutation in `lm_head`. The MTP layer reads the same
permutation, so drafts are right often but not always, and accepted and rejected drafts both occur.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from toy_model import SPECIAL_TOKENS, build_tokenizer

HIDDEN = 128
LAYERS = 2
HEADS = 4
Q_LORA, KV_LORA = 64, 64
NOPE, ROPE, VALUE = 32, 16, 32
EXPERTS, TOP_K, INTER = 16, 2, 64
VOCAB = 384

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": Q_LORA,
    "kv_lora_rank": KV_LORA,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "intermediate_size": 2 * HIDDEN,
    "moe_intermediate_size": INTER,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": TOP_K,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "ep_size": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    # Stock's MLA reads the tables of the YaRN rotary embedding, which every real DeepSeek checkpoint has.
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 2048,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _weights(seed: int) -> dict[str, torch.Tensor]:
    """bf16 tensors under the names of the DeepSeek-V3 checkpoints; layer LAYERS is the MTP layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * gain * columns**-0.5).to(torch.bfloat16)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    embedding = torch.randn(VOCAB, HIDDEN, generator=generator).to(torch.bfloat16)
    first = len(SPECIAL_TOKENS)
    cycle = torch.randperm(VOCAB - first, generator=generator) + first
    lm_head = torch.zeros(VOCAB, HIDDEN)
    lm_head[cycle.roll(-1)] = embedding.float()[cycle]
    head = (lm_head * HIDDEN**-0.5).to(torch.bfloat16)
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones(HIDDEN), "lm_head.weight": head}
    for layer in range(LAYERS + 1):
        draft = layer == LAYERS
        prefix = f"model.layers.{layer}."
        # The MTP layer adds little to what eh_proj hands it, so its drafts follow the permutation more closely.
        gain = 0.3 if draft else 1.5
        attention, experts = prefix + "self_attn.", prefix + "mlp."
        weights |= {
            prefix + "input_layernorm.weight": ones(HIDDEN),
            prefix + "post_attention_layernorm.weight": ones(HIDDEN),
            attention + "q_a_proj.weight": normal(Q_LORA, HIDDEN),
            attention + "q_a_layernorm.weight": ones(Q_LORA),
            attention + "q_b_proj.weight": normal(HEADS * (NOPE + ROPE), Q_LORA, 1.5),
            attention + "kv_a_proj_with_mqa.weight": normal(KV_LORA + ROPE, HIDDEN),
            attention + "kv_a_layernorm.weight": ones(KV_LORA),
            attention + "kv_b_proj.weight": normal(HEADS * (NOPE + VALUE), KV_LORA, 1.5),
            attention + "o_proj.weight": normal(HIDDEN, HEADS * VALUE, 2 * gain),
            experts + "gate.weight": normal(EXPERTS, HIDDEN, 2.0),
            experts + "gate.e_score_correction_bias": torch.zeros(EXPERTS),
        }
        for name in ["shared_experts", *(f"experts.{expert}" for expert in range(EXPERTS))]:
            weights |= {
                f"{experts}{name}.gate_proj.weight": normal(INTER, HIDDEN),
                f"{experts}{name}.up_proj.weight": normal(INTER, HIDDEN),
                f"{experts}{name}.down_proj.weight": normal(HIDDEN, INTER, gain),
            }
        if draft:
            eh_proj = torch.cat([torch.eye(HIDDEN), 0.1 * torch.randn(HIDDEN, HIDDEN, generator=generator)], dim=1)
            weights |= {
                prefix + "enorm.weight": ones(HIDDEN),
                prefix + "hnorm.weight": ones(HIDDEN),
                prefix + "eh_proj.weight": eh_proj.to(torch.bfloat16),
                prefix + "embed_tokens.weight": embedding.clone(),
                prefix + "shared_head.norm.weight": ones(HIDDEN),
                prefix + "shared_head.head.weight": head.clone(),
            }
    return weights


def write_toy_deepseek(directory: Path, seed: int = 20251125) -> Path:
    """Write the checkpoint to ``directory`` (created if missing) and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer(VOCAB).save(str(directory / "tokenizer.json"))
    documents = {
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL_TOKENS[2]},
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    save_file(_weights(seed), str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory

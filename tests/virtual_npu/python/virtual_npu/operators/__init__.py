# SPDX-License-Identifier: Apache-2.0
"""The fused NPU operators, computed by plain CPU torch.

``OPERATORS`` maps each dispatcher name to a pure function on CPU tensors with the operator's argument names and
defaults. ``register`` installs them for NPU tensors: arguments become CPU tensors over the same memory, results
become NPU tensors, and an argument that the function returns (in-place and out= operators) comes back as the very NPU
tensor that was passed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.library import Library

from . import attention, graphs, linear, linear_quant, misc, moe, norm, rope_cache

OPERATORS: dict[str, Callable[..., Any]] = {
    # products whose rows do not depend on the batch, in place of torch's CPU kernels
    "aten::mm": linear.mm,
    "aten::mm.out": linear.into("aten::mm.out", linear.mm),
    "aten::addmm": linear.addmm,
    "aten::addmm.out": linear.into("aten::addmm.out", linear.addmm),
    "aten::bmm": linear.bmm,
    "aten::bmm.out": linear.into("aten::bmm.out", linear.bmm),
    "aten::baddbmm": linear.baddbmm,
    "aten::baddbmm.out": linear.into("aten::baddbmm.out", linear.baddbmm),
    "aten::matmul": linear.matmul,
    "aten::matmul.out": linear.into("aten::matmul.out", linear.matmul),
    "aten::embedding": misc.embedding,
    "aten::sigmoid": linear.sigmoid,
    "aten::silu": linear.silu,
    "atb::_npu_matmul_add_fp32": linear.npu_matmul_add_fp32,
    "npu::npu_transpose_batchmatmul": linear.npu_transpose_batchmatmul,
    # norms and activations
    "npu::npu_rms_norm": norm.npu_rms_norm,
    "npu::npu_add_rms_norm": norm.npu_add_rms_norm,
    "npu::npu_add_rms_norm_quant": norm.npu_add_rms_norm_quant,
    "npu::npu_swiglu": norm.npu_swiglu,
    # mixture of experts
    "npu::npu_moe_gating_top_k_softmax": moe.npu_moe_gating_top_k_softmax,
    "npu::npu_moe_gating_top_k": moe.npu_moe_gating_top_k,
    "npu::npu_moe_init_routing": moe.npu_moe_init_routing,
    "npu::npu_moe_init_routing_v2": moe.npu_moe_init_routing_v2,
    "npu::npu_moe_token_permute": moe.npu_moe_token_permute,
    "npu::npu_moe_token_unpermute": moe.npu_moe_token_unpermute,
    "npu::npu_moe_finalize_routing": moe.npu_moe_finalize_routing,
    "npu::npu_moe_re_routing": moe.npu_moe_re_routing,
    "npu::npu_moe_compute_expert_tokens": moe.npu_moe_compute_expert_tokens,
    "npu::npu_grouped_matmul": moe.npu_grouped_matmul,
    "npu::npu_grouped_matmul.List": moe.npu_grouped_matmul,
    "npu::npu_grouped_matmul_swiglu_quant": moe.npu_grouped_matmul_swiglu_quant,
    # int8
    "npu::npu_dynamic_quant": linear_quant.npu_dynamic_quant,
    "npu::npu_quantize": linear_quant.npu_quantize,
    "npu::npu_quant_matmul": linear_quant.npu_quant_matmul,
    "npu::npu_dequant_swiglu_quant": linear_quant.npu_dequant_swiglu_quant,
    # rotary embedding and KV cache
    "atb::_npu_rotary_embedding": rope_cache.npu_rotary_embedding,
    "npu::npu_apply_rotary_pos_emb": rope_cache.npu_apply_rotary_pos_emb,
    "npu::npu_rotary_mul": rope_cache.npu_rotary_mul,
    "npu::npu_interleave_rope": rope_cache.npu_interleave_rope,
    "npu::npu_kv_rmsnorm_rope_cache": rope_cache.npu_kv_rmsnorm_rope_cache,
    "npu::npu_scatter_nd_update_": rope_cache.npu_scatter_nd_update,
    "atb::_npu_reshape_and_cache": rope_cache.npu_reshape_and_cache,
    "atb::npu_paged_cache_load": rope_cache.npu_paged_cache_load,
    "atb::npu_paged_cache_load.out": rope_cache.npu_paged_cache_load_out,
    # attention
    "atb::_npu_flash_attention": attention.npu_flash_attention,
    "atb::_npu_flash_attention_qlens": attention.npu_flash_attention_qlens,
    "atb::_npu_paged_attention": attention.npu_paged_attention,
    "atb::_npu_paged_attention_splitfuse": attention.npu_paged_attention_splitfuse,
    "atb::_npu_paged_attention_get_workspace": misc.empty_workspace,
    "atb::npu_ring_mla": attention.npu_ring_mla,
    "atb::npu_ring_mla.out": attention.npu_ring_mla_out,
    "npu::npu_fused_infer_attention_score": attention.npu_fused_infer_attention_score,
    "npu::npu_fused_infer_attention_score.out": attention.npu_fused_infer_attention_score_out,
    "npu::_npu_fused_infer_attention_score_get_max_workspace": misc.empty_workspace,
    "npu::npu_fused_infer_attention_score_v2": attention.npu_fused_infer_attention_score_v2,
    "npu::npu_fused_infer_attention_score_v2.out": attention.npu_fused_infer_attention_score_v2_out,
    "npu::_npu_fused_infer_attention_score_v2_get_max_workspace": misc.empty_workspace,
    "npu::npu_fusion_attention": attention.npu_fusion_attention,
    "npu::npu_attention_update": attention.npu_attention_update,
    # the rest
    "npu::npu_format_cast": misc.npu_format_cast,
    "npu::npu_format_cast.Tensor": misc.npu_format_cast_like,
    "npu::npu_format_cast_": misc.npu_format_cast_like_,
    "npu::npu_format_cast_.acl_format": misc.npu_format_cast_,
    "npu::npu_prefetch": misc.npu_prefetch,
    "npu::npu_top_k_top_p": misc.npu_top_k_top_p,
    # vllm-ascend's own operators
    "_C_ascend::npu_apply_top_k_top_p": misc.npu_top_k_top_p,
    "_C_ascend::npu_add_rms_norm_bias": norm.npu_add_rms_norm_bias,
    "_C_ascend::moe_gating_top_k": moe.moe_gating_top_k,
    "_C_ascend::npu_moe_init_routing_custom": moe.npu_moe_init_routing_custom,
    "_C_ascend::rotary_embedding": rope_cache.ascend_rotary_embedding,
    "_C_ascend::batch_matmul_transpose": linear.batch_matmul_transpose,
    "_C_ascend::get_masked_input_and_mask": misc.get_masked_input_and_mask,
}

# What operators write to beside what their schemas declare.
WRITES: dict[str, tuple[str, ...]] = {
    "npu::npu_apply_rotary_pos_emb": ("query", "key"),
    "npu::npu_kv_rmsnorm_rope_cache": ("k_cache", "ckv_cache"),
    "npu::npu_fused_infer_attention_score.out": ("out",),
    "npu::npu_fused_infer_attention_score_v2.out": ("out",),
    "_C_ascend::batch_matmul_transpose": ("tensor_c",),
}
# These run on the host alone: a graph does not hold them, and they may be called while a stream is blocked.
ON_HOST = {name for name, function in OPERATORS.items() if function in (misc.empty_workspace, misc.npu_prefetch)}

NPU = "PrivateUse1"

_libraries: dict[str, Library] = {}  # a registration lives as long as its Library


class Kernels(Protocol):
    """What is used of the C++ extension ``virtual_npu.kernels``."""

    def as_cpu(self, tensor: Tensor) -> Tensor: ...
    def as_npu(self, cpu: Tensor, like: Tensor) -> Tensor: ...
    def at_address(self, tensor: Tensor) -> Tensor: ...
    def active(self) -> bool: ...
    def turn(self, name: str) -> int: ...
    def preserve(self, tensor: Tensor) -> None: ...
    def record(self, call: Callable[[], None]) -> None: ...


def kernel(name: str, function: Callable[..., Any], kernels: Kernels) -> Any:
    """The NPU kernel of a function on CPU tensors."""
    as_cpu, as_npu, active = kernels.as_cpu, kernels.as_npu, kernels.active
    captured = graphs.captured_kernel(name, function, WRITES.get(name, ()), kernels)
    on_host = name in ON_HOST

    def run(*args: Any, **kwargs: Any) -> Any:
        if active() and not on_host:
            turn = kernels.turn(name)
            if turn != graphs.RUN:
                return captured(turn, args, kwargs)
        # id of an alias -> (alias, NPU tensor); holding the alias keeps its id unique
        passed: dict[int, tuple[Tensor, Tensor]] = {}

        def to_cpu(value: Any) -> Any:
            if isinstance(value, Tensor):
                if value.device.type == "cpu":
                    return value
                alias = as_cpu(value)
                passed[id(alias)] = (alias, value)
                return alias
            if isinstance(value, (list, tuple)):
                return [to_cpu(item) for item in value]
            return value

        def to_npu(value: Any) -> Any:
            if isinstance(value, Tensor):
                known = passed.get(id(value))
                return known[1] if known is not None else as_npu(value, like)
            if isinstance(value, (list, tuple)):
                return type(value)(to_npu(item) for item in value)
            return value

        cpu_args = [to_cpu(value) for value in args]
        cpu_kwargs = {name: to_cpu(value) for name, value in kwargs.items()}
        like = next(iter(passed.values()))[1]
        return to_npu(function(*cpu_args, **cpu_kwargs))

    run.__name__ = run.__qualname__ = function.__name__
    return run


def is_defined(name: str) -> bool:
    """Whether the installed torch, torch_npu and vllm-ascend know the operator: what they have differs by version."""
    operator, _, overload = name.partition(".")
    return torch._C._get_operation_overload(operator, overload) is not None


# torch_npu 2.10 declares the dtypes of quantised operators as integers: c10::ScalarType.
_SCALAR_TYPES = {
    **{0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 11: torch.bool},
    **{5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16},
    **{12: torch.qint8, 13: torch.quint8, 14: torch.qint32},
}


def adapted(name: str) -> Callable[..., Any]:
    """The table's function behind the installed operator's schema, which differs by version.

    Defaults are the schema's, since the dispatcher leaves out arguments that equal them; an argument that the function
    does not know is refused unless it has its default; dtypes that the schema declares as integers become dtypes.
    """
    function = OPERATORS[name]
    operator, _, overload = name.partition(".")
    arguments = torch._C._get_schema(operator, overload).arguments
    parameters = inspect.signature(function).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return function
    known = [argument for argument in arguments if argument.name in parameters]
    defaults = {argument.name: argument.default_value for argument in known if argument.has_default_value()}
    refused = {argument.name: argument.default_value for argument in arguments if argument.name not in parameters}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        refused = {}  # the function refuses them itself
    dtypes = {
        argument.name
        for argument in known
        if "dtype" in str(parameters[argument.name].annotation) and "ScalarType" not in str(argument.type)
    }
    positional = [argument.name for argument in arguments if not argument.kwarg_only]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(positional, args, strict=False)) | kwargs
        for argument, default in refused.items():
            value = given.pop(argument, default)
            if isinstance(value, Tensor) or value != default:
                raise NotImplementedError(f"virtual NPU: {name}: {argument}={value} is not emulated")
        given = defaults | given
        for argument in dtypes:
            given[argument] = _SCALAR_TYPES.get(given[argument], given[argument])
        return function(**given)

    run.__name__ = function.__name__
    return run


def load_vllm_ascend_operators() -> None:
    """Load vllm-ascend's extension, which defines ``_C_ascend``, if vllm-ascend is installed.

    A kernel registered later wins, so it must be loaded before ours register; a later ``import`` finds it loaded.
    """
    package = importlib.util.find_spec("vllm_ascend")
    if package is None or not package.submodule_search_locations:
        return
    extension = next(Path(package.submodule_search_locations[0]).glob("vllm_ascend_C*.so"), None)
    if extension is not None:
        ctypes.CDLL(str(extension))


def register(kernels: Kernels) -> list[str]:
    """Install the table's operators that this stock version defines, for NPU tensors; returns their names.

    Call once, after torch_npu is imported. torch_npu's kernels for the autograd key hand on to these, so they stay.
    """
    load_vllm_ascend_operators()
    names = [name for name in OPERATORS if is_defined(name)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel.*", category=UserWarning)
        for name in names:
            namespace, operator = name.split("::")
            if namespace not in _libraries:
                _libraries[namespace] = Library(namespace, "IMPL")
            _libraries[namespace].impl(operator, kernel(name, adapted(name), kernels), NPU)
    return names

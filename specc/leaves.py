"""The functions of Hugging Face's modeling modules that stay whole: recurrences and their convolutions.

Each row of ``LEAVES`` names a module global and what it means in specc's operators. ``install`` puts a
routing function in the global's place. What it does depends on who calls:

* a capture for specc's backend gets the operator, whichever implementation transformers chose;
* a forward over specc's own cache, run eagerly, is served by the cache's layer;
* everything else gets the function that was there before.

Source: transformers' ``integrations/hub_kernels.py`` chooses fla, causal_conv1d or mamba_ssm when the
modeling module is imported, and falls back to the torch functions of the same names.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from specc import compat
from specc.lowerings import causal_conv1d, gated_delta_rule, ssd

MODELS = "transformers.models."


class Recurrence(Protocol):
    """What serves a recurrence that is run eagerly over specc's cache. Arguments as the operators'."""

    def gated_delta_rule(self, *args: Any) -> tuple[Tensor, Tensor | None]: ...

    def ssd(self, *args: Any) -> tuple[Tensor, Tensor | None]: ...


@dataclasses.dataclass(frozen=True)
class Leaf:
    """``function`` of the modeling modules of ``families``, and what stands in for it.

    ``meaning`` takes the function's arguments; NotImplemented from it leaves the call to the function.
    """

    function: str
    families: tuple[str, ...]
    meaning: Callable[..., Any]


def hand_over(layer: Recurrence, like: Tensor) -> Tensor:
    """An empty tensor that stands for ``layer``'s state until a leaf is called with it."""
    stand_in = like.new_empty(0)
    stand_in.specc_layer = layer  # type: ignore[attr-defined]
    return stand_in


def mark_padding(inputs: Tensor, padding: Tensor) -> None:
    """Have an eager convolution over ``inputs`` give zeros where ``padding``, bool [B, T], is true.

    A bias would make padding count otherwise, and models leave it in where there is one row.
    """
    inputs.specc_padding = padding  # type: ignore[attr-defined]


def _layer_of(state: Tensor | None) -> Recurrence | None:
    return getattr(state, "specc_layer", None)


def _gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    captured = compat.captured_for_specc()
    layer = None if captured else _layer_of(initial_state)
    if cu_seqlens is not None or not (captured or layer):
        return NotImplemented
    tensors = (query, key, value, g, beta)
    scale = query.shape[-1] ** -0.5
    if layer is not None:
        return layer.gated_delta_rule(*tensors, scale, use_qk_l2norm_in_kernel)
    out, final = gated_delta_rule(*tensors, initial_state, scale, use_qk_l2norm_in_kernel)
    return out, final if output_final_state else None


def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    *,
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Any:
    captured = compat.captured_for_specc()
    layer = None if captured else _layer_of(initial_states)
    if z is not None or seq_idx is not None or not (captured or layer):
        return NotImplemented
    tensors = (x, dt, A, B, C, D, dt_bias)
    limits = (dt_softplus, float(dt_limit[0]), float(dt_limit[1]))
    if layer is not None:
        out, final = layer.ssd(*tensors, *limits)
    else:
        out, final = ssd(*tensors, initial_states, *limits)
    return (out, final) if return_final_states else out


def _ssd_token(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **kwargs: Any,
) -> Any:
    captured = compat.captured_for_specc()
    layer = None if captured else _layer_of(state)
    if not (captured or layer):
        return NotImplemented
    # dt, A, D and dt_bias come expanded to the state's dimensions.
    tokens = (x[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None])
    per_head = (None if D is None else D[:, 0], None if dt_bias is None else dt_bias[:, 0])
    limits = (dt_softplus, 0.0, float("inf"))
    if layer is not None:
        out, _ = layer.ssd(*tokens, *per_head, *limits)
    else:
        out, final = ssd(*tokens, *per_head, state, *limits)
        state.copy_(final)
    return out[:, 0] if z is None else out[:, 0] * torch.nn.functional.silu(z)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    captured = compat.captured_for_specc()
    padding = None if captured else getattr(x, "specc_padding", None)
    if seq_idx is not None or not (captured or padding is not None):
        return NotImplemented
    taps = weight.shape[-1]
    out = causal_conv1d(x, x.new_zeros(x.shape[0], x.shape[1], taps - 1), weight, bias, activation)
    if padding is None:
        return out
    return out.masked_fill(torch.nn.functional.pad(padding, (x.shape[-1] - padding.shape[1], 0))[:, None], 0)


def _convolution_token(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Any:
    if not compat.captured_for_specc():
        return NotImplemented
    out = causal_conv1d(x, conv_state, weight, bias, activation)
    conv_state.copy_(torch.cat([conv_state, x], dim=-1)[..., -conv_state.shape[-1] :])
    return out


GATED_DELTA = ("qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid")
MAMBA2 = ("mamba2", "falcon_h1", "bamba", "nemotron_h", "granitemoehybrid", "zamba2")
SHORT_CONVOLUTION = ("lfm2", "lfm2_moe")
FAMILIES = GATED_DELTA + MAMBA2 + SHORT_CONVOLUTION

LEAVES: tuple[Leaf, ...] = (
    Leaf("torch_chunk_gated_delta_rule", GATED_DELTA, _gated_delta_rule),
    Leaf("torch_recurrent_gated_delta_rule", GATED_DELTA, _gated_delta_rule),
    Leaf("mamba2_chunk_scan", MAMBA2, _ssd),
    Leaf("mamba2_selective_state_update", MAMBA2, _ssd_token),
    Leaf("causal_conv1d_fn", FAMILIES, _convolution),
    Leaf("causal_conv1d_update", FAMILIES, _convolution_token),
)

# Families whose forward of several tokens over a warm cache is wrong in transformers 5.17 and 5.23.
WRONG_WHEN_WARM = {
    "mamba": "its scan starts from a zero state whenever it is fed more than one token",
    "falcon_mamba": "its scan starts from a zero state whenever it is fed more than one token",
    "jamba": "its scan starts from a zero state whenever it is fed more than one token",
    "zamba": "its scan starts from a zero state whenever it is fed more than one token",
    "recurrent_gemma": "its recurrence ignores the state whenever it is fed more than one token",
}


def family(module_name: str) -> str | None:
    """The family of a transformers modeling module, or None for other modules."""
    if not module_name.startswith(MODELS):
        return None
    name, _, rest = module_name.removeprefix(MODELS).partition(".")
    return name if rest == f"modeling_{name}" else None


def modeling_families(model: torch.nn.Module) -> set[str]:
    """The transformers families that a model's modules belong to."""
    return _families(type(module) for module in model.modules())


def _families(classes: Iterable[type]) -> set[str]:
    names = {family(each.__module__) for each in classes}
    return {name for name in names if name is not None}


def why_unverifiable(model: torch.nn.Module) -> str | None:
    """Why a block cannot be verified over this model's recurrent states, or None."""
    return _why_unverifiable(modeling_families(model), compat.is_stateful(model))


def why_graph_unverifiable(gm: GraphModule) -> str | None:
    """The same of the modules that a Dynamo graph was captured from."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in gm.graph.nodes)
    classes = {kind for stack in stacks for _, kind in stack.values() if isinstance(kind, type)}
    return _why_unverifiable(_families(classes), any(map(compat.is_stateful, classes)))


def _why_unverifiable(families: set[str], stateful: bool) -> str | None:
    wrong = sorted(families & set(WRONG_WHEN_WARM))
    if wrong:
        return f"cannot verify several tokens at once in transformers: {WRONG_WHEN_WARM[wrong[0]]}"
    if stateful and not families & set(FAMILIES):
        return "has recurrent layers, whose state specc cannot roll back yet"
    return None


def install(families: Iterable[str] = FAMILIES) -> None:
    """Route the leaves of these families' modeling modules, where these are imported. Done once each."""
    for name in set(families) & set(FAMILIES):
        module = sys.modules.get(f"{MODELS}{name}.modeling_{name}")
        if module is not None:
            _route(module, name)


def _route(module: ModuleType, name: str) -> None:
    for leaf in LEAVES:
        original = getattr(module, leaf.function, None)
        if name in leaf.families and original is not None and not hasattr(original, "specc_leaf"):
            setattr(module, leaf.function, _routed(leaf, original))


def _routed(leaf: Leaf, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def routed(*args: Any, **kwargs: Any) -> Any:
        result = leaf.meaning(*args, **kwargs)
        return original(*args, **kwargs) if result is NotImplemented else result

    routed.specc_leaf = leaf.function  # type: ignore[attr-defined]
    return routed

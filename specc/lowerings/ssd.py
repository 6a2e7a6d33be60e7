"""``specc::ssd``: Mamba2's recurrence over a block or a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specc.lowerings.checkpoints import as_one_call
from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import define_op

CHUNK, SHORT = 64, 16


def step_sizes(dt: Tensor, dt_bias: Tensor | None, softplus: bool, dt_min: float, dt_max: float) -> Tensor:
    """d of raw ``dt`` [..., NH], in float32."""
    steps = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    return (functional.softplus(steps) if softplus else steps).clamp(dt_min, dt_max)


def block_steps(dt: Tensor, *options: Any) -> Tensor:
    """``step_sizes`` of a block [B, T, NH], token by token.

    At the end of a vector's length CPUs compute otherwise: bits would depend on the block.
    """
    each = [step_sizes(token.contiguous(), *options) for token in dt.unbind(1)]
    return torch.stack(each, 1) if each else dt.float()


def per_head(x: Tensor, heads: int) -> Tensor:
    """B or C [..., G, N] as float32 [..., NH, N]: head h reads group ``h // (NH // G)``."""
    return x.float().repeat_interleave(heads // x.shape[-2], dim=-2)


def advance(state: Tensor, a: Tensor, x: Tensor, b: Tensor, steps: Tensor) -> Tensor:
    """The state [B, NH, P, N] after one more record: x [B, NH, P], B [B, NH, N], steps [B, NH]."""
    decay = (a.float() * steps).exp()
    return state * decay[..., None, None] + (x.float() * steps[..., None])[..., None] * b[..., None, :]


def read(state: Tensor, x: Tensor, c: Tensor, d: Tensor | None) -> Tensor:
    """One token's output [B, NH, P] from the state behind it; C [B, NH, N]."""
    y = (state @ c[..., None])[..., 0]
    return y if d is None else y + x.float() * d.float()[:, None]


def reference(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """``S <- e^{A d} S + d x B^T; y = S C + D x`` for each token, d = clamp(softplus?(dt + dt_bias)).

    x: [B, T, NH, P]; dt: [B, T, NH], raw; A: [NH], negative; B, C: [B, T, G, N], NH a multiple of G; D,
    dt_bias: [NH] or None; state: [B, NH, P, N], any float dtype, or None for zeros. Returns y in x's dtype
    and the last state in float32. Computed in float32, in chunks where T is a prompt's.
    After Dao and Gu, Transformers are SSMs (arXiv:2405.21060), section 6.
    """
    batch, tokens, heads, dim = x.shape
    options = dt_bias, softplus, dt_min, dt_max
    zeros = (batch, heads, dim, b.shape[-1])
    carried = torch.zeros(zeros, device=x.device) if state is None else state.float()
    if tokens > SHORT:
        y, carried = _by_chunks(x.float(), step_sizes(dt, *options), a.float(), b, c, carried)
        y = y if d is None else y + x.float() * d.float()[:, None]
        return y.to(x.dtype).contiguous(), carried
    steps = block_steps(dt, *options)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    b, c = per_head(b, heads), per_head(c, heads)
    for token in range(tokens):
        carried = advance(carried, a, x[:, token], b[:, token], steps[:, token])
        y[:, token] = read(carried, x[:, token], c[:, token], d)
    return y, carried.clone() if tokens == 0 else carried


def _by_chunks(
    x: Tensor,
    steps: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """As ``reference`` without D. Chunks are computed side by side; only their states wait for each other."""
    tokens, heads = x.shape[1:3]
    # A step of size 0 changes nothing, so the last chunk may be filled up.
    x, steps, b, c = (
        functional.pad(each, (0, 0) * (each.dim() - 2) + (0, -tokens % CHUNK)).unflatten(1, (-1, CHUNK))
        for each in (x, steps, per_head(b, heads), per_head(c, heads))
    )
    # [B, chunks, NH, CHUNK, ...]
    x, b, c = (each.transpose(2, 3) for each in (x, b, c))
    steps = steps.transpose(2, 3)
    decay = (a[:, None] * steps).cumsum(-1)
    x = x * steps[..., None]
    between = decay[..., :, None] - decay[..., None, :]
    seen = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    weights = (c @ b.mT) * between.masked_fill(~seen, -torch.inf).exp()
    added = (x * (decay[..., -1:] - decay).exp()[..., None]).mT @ b
    starts = []
    for chunk in range(x.shape[1]):
        starts.append(state)
        state = state * decay[:, chunk, :, -1, None, None].exp() + added[:, chunk]
    y = weights @ x + (c @ torch.stack(starts, 1).mT) * decay.exp()[..., None]
    return y.transpose(2, 3).flatten(1, 2)[:, :tokens], state


def _fake(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    batch, _tokens, heads, dim = x.shape
    torch._check(heads % b.shape[2] == 0, lambda: "ssd: the heads must be a multiple of the groups")
    final = x.new_empty((batch, heads, dim, b.shape[3]), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), final


def sample_block(device: str, tokens: int = 4) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D, dt_bias of two rows, four heads of two groups."""
    dtype = usual_dtype(device)
    x = torch.randn(2, tokens, 4, 32, device=device, dtype=dtype)
    dt = torch.randn(2, tokens, 4, device=device, dtype=dtype)
    b, c = torch.randn(2, 2, tokens, 2, 32, device=device, dtype=dtype)
    a, d, dt_bias = torch.rand(3, 4, device=device)
    return x, dt, -a - 0.1, b, c, d, dt_bias


def _sample(device: str) -> tuple[object, ...]:
    state = torch.randn(2, 4, 32, 32, device=device)
    return *sample_block(device, 20), state, True, 0.0, float("inf")


ssd = define_op(
    "ssd",
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? state, "
    "bool softplus, float dt_min, float dt_max) -> (Tensor, Tensor)",
    reference,
    _fake,
    _sample,
    (as_one_call(reference),),
)

"""``specc::gated_delta_rule``: Gated DeltaNet's recurrence over a block or a prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from specc.lowerings import triton_kernels
from specc.lowerings.checkpoints import as_one_call
from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import Provider, Reason, define_op

CHUNK, SHORT = 64, 16
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def per_head(x: Tensor, heads: int, l2norm: bool) -> Tensor:
    """q or k [..., H, K] as float32 [..., HV, K]: value head h reads key head ``h // (HV // H)``."""
    x = x.float()
    if l2norm:
        x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
    return x.repeat_interleave(heads // x.shape[-2], dim=-2)


def advance(state: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The state [B, HV, K, V] after one more token: k [B, HV, K], v [B, HV, V], g and beta [B, HV]."""
    state = state * g.float().exp()[..., None, None]
    u = (v.float() - read(state, k)) * beta.float()[..., None]
    return state + k[..., None] * u[..., None, :]


def read(state: Tensor, x: Tensor) -> Tensor:
    """``S^T x``: [B, HV, V] of x [B, HV, K]."""
    return (x[..., None, :] @ state)[..., 0, :]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """``S <- e^g S; u = beta (v - S^T k); S <- S + k u^T; o = S^T q`` for each token.

    q, k: [B, T, H, K]; v: [B, T, HV, V], HV a multiple of H; g (log decay), beta: [B, T, HV]; state:
    [B, HV, K, V] or None for zeros; any float dtypes. l2norm: q and k are divided by
    ``sqrt(sum(x^2) + 1e-6)``; q is multiplied by ``scale``. Returns o in v's dtype and the last state in
    float32. Computed in float32, in chunks where T is a prompt's.
    After Yang et al., Gated Delta Networks (arXiv:2412.06464).
    """
    batch, tokens, heads, dim = v.shape
    q, k = per_head(q, heads, l2norm) * scale, per_head(k, heads, l2norm)
    carried = q.new_zeros((batch, heads, q.shape[-1], dim)) if state is None else state.float()
    if tokens > SHORT:
        block = tuple(x.transpose(1, 2).float() for x in (q, k, v, g, beta))
        o, carried = _by_chunks(block, carried)
        return o.transpose(1, 2).to(v.dtype).contiguous(), carried
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    for token in range(tokens):
        carried = advance(carried, k[:, token], v[:, token], g[:, token], beta[:, token])
        o[:, token] = read(carried, q[:, token])
    return o, carried.clone() if carried is state else carried


def _by_chunks(block: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one linear system a chunk for its u. q, k, v: [B, HV, T, ...]; g, beta: [B, HV, T]."""
    q, k, v, g, beta = block
    tokens = q.shape[2]
    padding = -tokens % CHUNK
    q, k, v = (functional.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    g, beta = (functional.pad(x, (0, padding)).unflatten(2, (-1, CHUNK)) for x in (g, beta))
    since = g.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    # Above the diagonal the differences are positive and may overflow.
    decay = (since[..., :, None] - since[..., None, :]).masked_fill(~lower, float("-inf")).exp()
    grown = since.exp()[..., None]
    system = beta[..., None] * (k @ k.mT) * decay
    sides = torch.cat([v, k * grown], -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    own, seen = solved.split([v.shape[-1], k.shape[-1]], -1)
    scores, q = (q @ k.mT) * decay, q * grown
    total = since[..., -1:]
    k, total = (k * (total - since).exp()[..., None]).mT, total.exp()[..., None]
    o = torch.empty_like(v)
    for chunk in range(o.shape[2]):
        u = own[:, :, chunk] - seen[:, :, chunk] @ state
        o[:, :, chunk] = q[:, :, chunk] @ state + scores[:, :, chunk] @ u
        state = state * total[:, :, chunk] + k[:, :, chunk] @ u
    return o.flatten(2, 3)[:, :, :tokens], state


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    check_block("gated_delta_rule", q, k, v, g, beta)
    last = v.new_empty((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype=torch.float32)
    return torch.empty_like(v, memory_format=torch.contiguous_format), last


def check_block(name: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    """For fake kernels: raises RuntimeError where a block's shapes do not go together."""
    torch._check(q.shape == k.shape, lambda: f"{name}: q and k of one shape")
    torch._check(v.shape[:2] == k.shape[:2], lambda: f"{name}: as many values as keys")
    torch._check(v.shape[2] % k.shape[2] == 0, lambda: f"{name}: a multiple of the key heads")
    torch._check(g.shape == v.shape[:3], lambda: f"{name}: g per token and value head")
    torch._check(beta.shape == v.shape[:3], lambda: f"{name}: beta per token and value head")


def block_unfit(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Reason:
    """Why the kernels cannot take a block's tensors, or None."""
    if not isinstance(v.shape[1], int):
        # Asking a symbolic length anything would make it a condition of the graph.
        return "takes blocks of a length that is known while compiling"
    if {q.dtype, k.dtype} - set(FLOATS) or q.dtype != k.dtype:
        return f"needs q and k of one of float32, float16, bfloat16, got {q.dtype} and {k.dtype}"
    if {v.dtype, g.dtype, beta.dtype} - set(FLOATS):
        return f"has no kernel for v, g, beta of {v.dtype}, {g.dtype}, {beta.dtype}"
    if 0 in v.shape or v.shape[1] > SHORT:
        return f"takes blocks of 1 to {SHORT} tokens, got {list(v.shape)}"
    dims = k.shape[3], v.shape[3]
    if not all(16 <= dim <= 256 for dim in dims):
        return f"takes key and value dimensions of 16 to 256, got {dims}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "needs q, k and v contiguous in the last dimension"
    return None


def state_unfit(state: Tensor) -> Reason:
    """Why the kernels cannot take a state or a pool of states, or None."""
    if state.dtype not in (torch.float32, torch.bfloat16):
        return f"needs a state of float32 or bfloat16, got {state.dtype}"
    return None if state.stride(-1) == 1 else "needs a state contiguous in the last dimension"


def _triton_supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm: bool,
) -> Reason:
    why = block_unfit(q, k, v, g, beta) or (None if state is None else state_unfit(state))
    return why or triton_kernels.unfit(q, k, v, g, beta, state)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    from specc.lowerings.triton_kernels import gated_delta_rule

    with torch.cuda.device_of(q):
        return gated_delta_rule.recurrent(q, k, v, g, beta, state, scale, l2norm)


def sample_block(device: str) -> tuple[Tensor, ...]:
    """q, k, v, g, beta of two rows of 5 tokens, 2 key heads of 32 and 4 value heads of 64."""
    dtype = usual_dtype(device)
    q, k = torch.randn(2, 2, 5, 2, 32, device=device, dtype=dtype)
    v = torch.randn(2, 5, 4, 64, device=device, dtype=dtype)
    return q, k, v, -torch.rand(2, 5, 4, device=device), torch.rand(2, 5, 4, device=device)


def _sample(device: str) -> tuple[object, ...]:
    return *sample_block(device), torch.randn(2, 4, 32, 64, device=device), 32**-0.5, True


gated_delta_rule = define_op(
    "gated_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state, float scale, bool l2norm) "
    "-> (Tensor, Tensor)",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10), as_one_call(reference)),
)

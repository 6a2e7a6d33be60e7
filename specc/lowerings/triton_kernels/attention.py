"""Paged attention by Triton: a token's bits depend on its own query and keys and on nothing else.

See attention_kernels for how the sums are fixed. The number of rows of a tile never depends on a block's
length either, so that decoding and verification run the same instructions.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import triton
from torch import Tensor

from specc.lowerings.triton_kernels.attention_kernels import attend, combine

CHUNK = 512
SECTION = 2048

# Blocks of up to this many tokens share one configuration, hence their bits.
SHORT = 16
# Programs per multiprocessor: so many with a section each keep a GPU busy; so many are launched.
BUSY, LAUNCHED = 1.0, 4
SCRATCH_LIMIT = 256 * 2**20
# Farther back than any key: no window.
FAR = 2**30


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The shape of a program: at most ``rows`` (query, head) pairs by ``keys`` keys at a time."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tiles_for(backend: str, dtype: torch.dtype, lanes: int, group: int, *, short: bool) -> Tiles:
    """The configuration of a call. It knows a block's length only as short (up to SHORT) or long.

    backend: "cuda" or "hip"; dtype: the queries'; lanes: the wider head dimension, padded.
    """
    precision = "exact" if dtype == torch.float32 else "half"
    tiles = TILES[backend, precision, max(lanes, 64), short]
    needed = triton.next_power_of_2(SHORT * group) if short else tiles.rows
    rows = max(min(tiles.rows, needed), triton.next_power_of_2(group), 16)
    return dataclasses.replace(tiles, rows=rows)


# (backend, precision, lanes, short). HIP: 64 KB of shared memory on gfx942.
TILES = {
    ("cuda", "half", 64, True): Tiles(64, 64, 4, 4),
    ("cuda", "half", 128, True): Tiles(64, 64, 4, 3),
    ("cuda", "half", 256, True): Tiles(64, 64, 8, 2),
    ("cuda", "half", 64, False): Tiles(128, 64, 8, 3),
    ("cuda", "half", 128, False): Tiles(128, 64, 8, 3),
    ("cuda", "half", 256, False): Tiles(64, 64, 8, 2),
    ("cuda", "exact", 64, True): Tiles(32, 32, 4, 2),
    ("cuda", "exact", 128, True): Tiles(16, 32, 4, 2),
    ("cuda", "exact", 256, True): Tiles(16, 16, 8, 2),
    ("cuda", "exact", 64, False): Tiles(32, 32, 4, 2),
    ("cuda", "exact", 128, False): Tiles(16, 32, 4, 2),
    ("cuda", "exact", 256, False): Tiles(16, 16, 8, 2),
    ("hip", "half", 64, True): Tiles(64, 64, 4, 2),
    ("hip", "half", 128, True): Tiles(64, 32, 4, 2),
    ("hip", "half", 256, True): Tiles(64, 32, 4, 1),
    ("hip", "half", 64, False): Tiles(128, 64, 8, 1),
    ("hip", "half", 128, False): Tiles(64, 64, 4, 1),
    ("hip", "half", 256, False): Tiles(64, 32, 4, 1),
    ("hip", "exact", 64, True): Tiles(32, 32, 4, 1),
    ("hip", "exact", 128, True): Tiles(32, 32, 4, 1),
    ("hip", "exact", 256, True): Tiles(16, 32, 4, 1),
    ("hip", "exact", 64, False): Tiles(32, 32, 4, 1),
    ("hip", "exact", 128, False): Tiles(32, 32, 4, 1),
    ("hip", "exact", 256, False): Tiles(16, 32, 4, 1),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who computes what; found on the host, so from shapes alone.

    ``programs`` triples of row, KV head and block of queries; ``splits`` programs for each; ``slots``
    states kept for each token and head; rows with fewer than ``wanted / programs`` sections are split
    into chunks.
    """

    blocks: int
    programs: int
    splits: int
    slots: int
    wanted: int


def plan(
    rows: int, kv_heads: int, blocks: int, capacity: int, processors: int, answers: int, value_dim: int
) -> Plan:
    """capacity: keys that a row of the table can hold; answers: tokens times heads.

    The scratch takes ``4 * answers * slots * (value_dim + 2)`` bytes, of SCRATCH_LIMIT at most unless
    one slot alone needs more.
    """
    programs = rows * kv_heads * blocks
    wanted = math.ceil(BUSY * processors)
    chunked = (-(-wanted // programs) - 1) * (SECTION // CHUNK)
    slots = max(min(-(-capacity // CHUNK), chunked), -(-capacity // SECTION))
    splits = min(-(-LAUNCHED * processors // programs), slots)
    if slots == 1:
        return Plan(blocks, programs, 1, 1, wanted)
    if splits == 1 or 4 * answers * slots * (value_dim + 2) > SCRATCH_LIMIT:
        return Plan(blocks, programs, 1, 1, 0)
    return Plan(blocks, programs, splits, slots, wanted)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """What ``specc::unified_attention`` says, for shapes and dtypes that its provider "triton" supports.

    A token's bits are the same in any batch, at any place of a block of up to SHORT tokens, and for any
    width of the table. Reads nothing from the device, so a graph may capture it; the scratch is taken
    from the caching allocator.
    """
    tokens, heads, key_dim = q.shape
    num_pages, page_size, kv_heads, value_dim = v_pages.shape
    rows, width = page_table.shape
    out = torch.empty(tokens, heads, value_dim, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    if rows == 0 or width == 0 or max_seqlen_q <= 0:
        return out.zero_()
    group = heads // kv_heads
    block_k, block_v = (max(triton.next_power_of_2(dim), 16) for dim in (key_dim, value_dim))
    backend = "cuda" if torch.version.hip is None else "hip"
    tiles = tiles_for(backend, q.dtype, max(block_k, block_v), group, short=max_seqlen_q <= SHORT)
    blocks = -(-min(max_seqlen_q, tokens) // (tiles.rows // group))
    processors = _processors(q.device)
    work = plan(rows, kv_heads, blocks, width * page_size, processors, tokens * heads, value_dim)
    states = torch.empty(tokens * heads * work.slots, value_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(tokens * heads * work.slots, 2, dtype=torch.float32, device=q.device)
    q, page_table = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, page_table))
    cu_seqlens_q, seqused_k = cu_seqlens_q.contiguous(), seqused_k.contiguous()
    window = min(window, FAR) if window else FAR
    # Offsets within a page in 32 bits, and pools of one layout: each spares registers.
    near = page_size * max(k_pages.stride(1), v_pages.stride(1)) < 2**31
    twins = k_pages.stride()[:2] == v_pages.stride()[:2]
    # A positive factor may be applied to the maximum instead of to each score.
    linear = softcap == 0 and scale > 0 and k_scale is None
    per_score, cap = _in_log2_units(scale, softcap)
    shape = {
        "GROUP": group, "DV": value_dim, "PAGE": page_size, "BLOCK_M": tiles.rows, "BLOCK_V": block_v,
        "CHUNK": CHUNK, "SECTION": SECTION, "enable_fp_fusion": False,
    }  # fmt: skip
    attend[(work.programs, work.splits)](
        q, k_pages, v_pages, page_table, cu_seqlens_q, seqused_k, sinks, k_scale, v_scale, out, states, sums,
        tokens, rows, kv_heads, blocks, max_seqlen_q, width, num_pages, work.splits, work.slots, work.wanted,
        per_score, cap, window,
        *q.stride()[:2], page_table.stride(0), *k_pages.stride()[:3], *v_pages.stride()[:3],
        DK=key_dim, NEAR=near, TWINS=twins, WINDOWED=window != FAR, CAPPED=softcap != 0, LINEAR=linear,
        WALK=work.wanted == 0, BLOCK_N=tiles.keys, BLOCK_K=block_k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **shape,
    )  # fmt: skip
    if work.splits > 1:
        combine[(rows * max_seqlen_q * heads,)](
            cu_seqlens_q, seqused_k, sinks, v_scale, out, states, sums,
            tokens, heads, max_seqlen_q, width, work.slots, work.programs, work.wanted, window,
            num_warps=1, **shape,
        )  # fmt: skip
    return out


def _in_log2_units(scale: float, softcap: float) -> tuple[float, float]:
    """What multiplies scores, and the cap: c * tanh(x) is taken as c - 2 c / (exp2(y) + 1)."""
    log2e = 1 / math.log(2)
    if softcap == 0:
        return scale * log2e, 0.0
    return 2 * scale / softcap * log2e, softcap * log2e

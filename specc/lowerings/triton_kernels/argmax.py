"""A masked split argmax: per block of the vocabulary, then over the blocks.

Two launches, because one program per row leaves most of a GPU idle at the batch sizes of decoding.
Lanes past the vocabulary and NaN can never win, on any wave size; ties go to the lowest index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _block_maxima(logits, maxima, indices, row_stride, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    in_vocab = column < vocab
    x = tl.load(logits + row.to(tl.int64) * row_stride + column, mask=in_vocab, other=float("-inf")).to(
        tl.float32
    )
    x = tl.where(x == x, x, float("-inf"))
    best = tl.max(x, 0)
    # -inf is also what padding holds: the lowest winning lane is a real one because padding comes last.
    first = tl.min(tl.where(x == best, column, vocab), 0)
    slot = row.to(tl.int64) * tl.num_programs(1) + block
    tl.store(maxima + slot, best)
    tl.store(indices + slot, tl.minimum(first, vocab - 1))


@triton.jit
def _merge_blocks(maxima, indices, out, num_blocks, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    live = block < num_blocks
    best = tl.load(maxima + row * num_blocks + block, mask=live, other=float("-inf"))
    index = tl.load(indices + row * num_blocks + block, mask=live, other=2147483647)
    winner = tl.where(best == tl.max(best, 0), index, 2147483647)
    tl.store(out + row, tl.min(winner, 0).to(tl.int64))


def split_argmax(logits: Tensor) -> Tensor:
    """Index of the first maximum of each row. logits: fp32, fp16 or bf16 [..., V]; returns int64 [...]."""
    vocab = logits.shape[-1]
    rows = logits.reshape(-1, vocab)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    num_rows = rows.shape[0]
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out.view(logits.shape[:-1])
    num_blocks = triton.cdiv(vocab, BLOCK)
    maxima = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)
    indices = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=logits.device)
    _block_maxima[(num_rows, num_blocks)](rows, maxima, indices, rows.stride(0), vocab, BLOCK=BLOCK)
    _merge_blocks[(num_rows,)](maxima, indices, out, num_blocks, BLOCKS=triton.next_power_of_2(num_blocks))
    return out.view(logits.shape[:-1])

"""The kernel that fills the pool, in the interpreter: the same bits as the reference, and nothing else."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specc.lowerings.kv_write import reference, to_stored
from specc.lowerings.triton_kernels import kv_write as kernels
from tests.interpreted.memory import untouched
from tests.lowerings.pools import (
    FP8,
    LAYOUTS,
    POOLS,
    STATES,
    bits,
    float8_edges,
    in_layout,
    states_in_layout,
)

STATE_LAYOUTS = ("tokens first", "heads first", "of a fused projection")


def slots_of(draw: st.DrawFn, num_slots: int) -> Tensor:
    """Different slots, some of them strays that are different only once clamped."""
    slot = st.integers(-3, num_slots + 3)
    clamped = st.lists(slot, min_size=1, max_size=5, unique_by=lambda at: min(max(at, 0), num_slots - 1))
    return torch.tensor(draw(clamped))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_pool_is_the_references_bit_by_bit(data: st.DataObject) -> None:
    draw = data.draw
    num_pages, page, heads = (
        draw(st.integers(1, 4)),
        draw(st.sampled_from([1, 6, 16, 64])),
        draw(st.integers(1, 3)),
    )
    slots = slots_of(draw, num_pages * page)
    ours, theirs = [], []
    for _ in "kv":
        dim, layout = draw(st.sampled_from([1, 8, 20, 24, 64])), draw(st.sampled_from(sorted(LAYOUTS)))
        pages, buffer = in_layout(layout, (num_pages, page, heads, dim), draw(st.sampled_from(POOLS)))
        states = states_in_layout(
            draw(st.sampled_from(STATE_LAYOUTS)), len(slots), heads, dim, draw(st.sampled_from(STATES))
        )
        scale = draw(st.none() | st.sampled_from([0.013, 1.0, 3.7]).map(lambda x: torch.tensor([x])))
        ours.append((states, pages, buffer, scale))
        other = buffer.clone()
        theirs.append((other.as_strided(pages.shape, pages.stride(), pages.storage_offset()), other))
    (k, k_pages, k_buffer, k_scale), (v, v_pages, v_buffer, v_scale) = ours
    with mock.patch.object(kernels, "BLOCK", draw(st.sampled_from([16, 1024]))):
        kernels.kv_write(k, v, k_pages, v_pages, slots, k_scale, v_scale)
    reference(k, v, theirs[0][0], theirs[1][0], slots, k_scale, v_scale)
    assert torch.equal(bits(k_buffer), bits(theirs[0][1]))
    assert torch.equal(bits(v_buffer), bits(theirs[1][1]))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("scale", [None, torch.tensor([0.37])])
@pytest.mark.parametrize("dtype", STATES)
def test_float8_rounds_and_saturates_as_the_reference(dtype: torch.dtype, scale: Tensor | None) -> None:
    k = float8_edges().to(dtype)
    k = torch.cat([k, k.new_zeros(-len(k) % 1024)]).view(-1, 1, 1024)
    v, slots = k[:, :, :1], torch.arange(len(k))
    k_pages, v_pages = (torch.zeros(len(k), 1, 1, dim, dtype=FP8) for dim in (1024, 1))
    kernels.kv_write(k, v, k_pages, v_pages, slots, scale, scale)
    number, expected = ~k.isnan(), to_stored(k, FP8, scale)
    assert torch.equal(bits(k_pages[:, 0])[number], bits(expected)[number])
    assert bool(k_pages[:, 0].float()[~number].isnan().all())
    assert torch.equal(v_pages[:, 0].float().nan_to_num(500), expected[..., :1].float().nan_to_num(500))


def test_int32_and_strided_slots() -> None:
    k = torch.randn(3, 2, 8)
    k_pages, v_pages = torch.zeros(2, 2, 4, 2, 8)
    slots = torch.tensor([6, -1, 1, -1, 4, -1], dtype=torch.int32)[::2]
    kernels.kv_write(k, -k, k_pages, v_pages, slots, None, None)
    assert torch.equal(k_pages.flatten(0, 1)[[6, 1, 4]], k)
    assert torch.equal(v_pages, -k_pages)
    assert int(k_pages.ne(0).sum()) == k.numel()


def test_no_tokens() -> None:
    pages, none = torch.zeros(1, 4, 2, 8), torch.zeros(0, 2, 8)
    kernels.kv_write(none, none, pages, pages, torch.zeros(0, dtype=torch.long), None, None)


@pytest.mark.parametrize("far", ["page", "offset", "head"])
def test_offsets_beyond_32_bits(far: str) -> None:
    """Pools of 2**31 numbers and more, at whichever dimension they get that far."""
    stride = {"page": (2**30 + 8, 64, 16), "offset": (64, 2**30 + 8, 16), "head": (64, 16, 2**30 + 8)}[far]
    size = 2 * (2**30 + 8) + 256
    pages = untouched(size).view(FP8).as_strided((3, 3, 3, 8), (*stride, 1))
    k, v_pages = torch.randn(2, 3, 8), torch.zeros(3, 3, 3, 8)
    kernels.kv_write(k, k, pages, v_pages, torch.tensor([8, 1]), None, None)
    expected = torch.zeros(9, 3, 8)
    expected[[8, 1]] = k
    assert torch.equal(v_pages.flatten(0, 1), expected)
    assert torch.equal(pages.float().flatten(0, 1), expected.to(FP8).float())

"""The kernels of short convolutions and of commits, in the interpreter, against the references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specc.lowerings import causal_conv1d_replay, commit_conv, commit_snapshots, conv_inputs
from specc.lowerings.triton_kernels import causal_conv1d
from specc.lowerings.triton_kernels import commit_snapshots as snapshots_kernel
from tests.interpreted.memory import untouched
from tests.lowerings.conv_calls import Ring, channels_last, oracle, past

CHANNELS = 130


def cloned(value: Any) -> Any:
    if isinstance(value, list):
        return [each.clone() for each in value]
    return value.clone() if isinstance(value, Tensor) else value


def assert_as_reference(
    run: Callable[..., Any], reference: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Results and everything mutated; NaN where the reference has NaN."""
    theirs = tuple(map(cloned, args))
    ours, expected = run(*args), reference(*theirs)
    if ours is not None:
        assert ours.stride() == expected.stride()
    rounding = 2e-2 if args[0][0].dtype == torch.bfloat16 else 1e-5
    for mine, other in zip((ours, *args), (expected, *theirs), strict=True):
        if isinstance(mine, str):
            continue
        torch.testing.assert_close(mine, other, rtol=rounding, atol=rounding, equal_nan=True)


def a_filter(width: int, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    return torch.randn(CHANNELS, width), torch.randn(CHANNELS) if bias else None


def ring_call(
    tokens: int, dtype: torch.dtype = torch.float32, size: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = channels_last(4, CHANNELS, tokens, dtype)
    ring = torch.randn(5, size, CHANNELS).to(dtype)
    ring[3] = torch.nan
    return x, ring, torch.tensor([9, -2, 1, 30]), torch.tensor([4, 2, -1, 0])


@pytest.mark.parametrize(
    ("tokens", "width", "activation"), [(1, 4, "silu"), (5, 2, None), (16, 3, "swish"), (40, 4, "silu")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_and_inputs(tokens: int, width: int, activation: str | None, dtype: torch.dtype) -> None:
    x, ring, seq_lens, slots = ring_call(tokens, dtype)
    args = x, ring, *a_filter(width, width != 3), activation, seq_lens, slots
    assert_as_reference(causal_conv1d.replay, causal_conv1d_replay.reference, args)
    x = x.contiguous() if width == 2 else x
    args = x, ring, seq_lens, slots.int(), width
    assert_as_reference(causal_conv1d.inputs, conv_inputs.reference, args)
    assert_as_reference(causal_conv1d.inputs, conv_inputs.reference, (x, ring, seq_lens, None, width))


def test_replay_is_the_convolution_of_the_text() -> None:
    text, filter = channels_last(2, 6, 120), (torch.randn(6, 4), torch.randn(6), "silu")
    ring = Ring(text, [-5, 0], [2, 0], 10, causal_conv1d.replay)
    expected = oracle(text, *filter)
    for tokens, good in ((40, [40, 40]), (7, [3, 0]), (1, [1, 1]), (7, [7, 6])):
        at = ring.seq.tolist()
        y = ring.feed(tokens, good, *filter)
        wanted = past(expected, at, tokens)
        for row in range(2):
            live = slice(max(0, -at[row]), good[row])
            torch.testing.assert_close(y[row, :, live].double(), wanted[row, :, live], rtol=1e-5, atol=1e-5)
    assert bool(ring.ring[[1, 3]].isnan().all())


@pytest.mark.parametrize("width", [1, 3, 4])
def test_commit_conv(width: int) -> None:
    x, state = channels_last(4, CHANNELS, 5), torch.randn(9, CHANNELS, width)
    last, track = torch.tensor([3, -1, 4, 99]), torch.tensor([2, 0, -1, 1])
    slots, tracks = torch.tensor([5, 0, -1, 3]), torch.tensor([1, 2, 4, -1])
    for call in ((slots, tracks, track), (None, None, None), (slots, None, None)):
        assert_as_reference(causal_conv1d.commit, commit_conv.reference, (state, x, last, *call))
    assert_as_reference(
        causal_conv1d.commit,
        commit_conv.reference,
        (state, x.contiguous(), last.int(), slots.int(), tracks, track),
    )


@pytest.mark.parametrize("apart", [False, True])
def test_commit_snapshots(apart: bool) -> None:
    states, snapshots = list(torch.randn(3, 6, 3, 700)), list(torch.randn(3, 4, 5, 3, 700))
    if apart:
        states[1] = states[1].clone()
    last, track = torch.tensor([3, -1, 4, 99]), torch.tensor([2, 0, -1, 1])
    slots, tracks = torch.tensor([5, 0, -1, 3]), torch.tensor([1, 2, 4, -1])
    for call in ((slots, tracks, track), (None, None, None), (slots.int(), None, None)):
        args = states, snapshots, last, *call
        assert_as_reference(snapshots_kernel.commit, commit_snapshots.reference, args)


def test_snapshots_beyond_32_bits() -> None:
    stride = 2**31 + 16
    snapshots = untouched(2 * stride + 64).as_strided((3, 2, 32), (stride, 32, 1)).view(torch.int8)
    snapshots[2, 1] = torch.arange(32)
    states = torch.zeros(3, 32, dtype=torch.int8)
    last = torch.tensor([-1, -1, 1])
    snapshots_kernel.commit([states], [snapshots], last, None, None, None)
    assert states[2].tolist() == list(range(32))
    assert not bool(states[:2].any())

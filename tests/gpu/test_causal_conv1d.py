"""The kernels of short convolutions and of commits on a CUDA device, against float64 and the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specc.lowerings import REGISTRY, commit_snapshots
from tests.lowerings.conv_calls import Ring, channels_last, oracle, past
from tests.lowerings.pools import bits

KERNELS = ("causal_conv1d_replay", "conv_inputs", "commit_conv", "commit_snapshots")
DTYPES = (torch.float32, torch.bfloat16)


def cloned(value: Any) -> Any:
    if isinstance(value, list):
        return [each.clone() for each in value]
    return value.clone() if isinstance(value, Tensor) else value


def assert_as_reference(name: str, args: tuple[Any, ...]) -> None:
    theirs = tuple(map(cloned, args))
    ours, expected = getattr(torch.ops.specc, name).triton(*args), REGISTRY[name].reference(*theirs)
    rounding = 2e-2 if args[0][0].dtype == torch.bfloat16 else 1e-5
    for mine, other in zip((ours, *args), (expected, *theirs), strict=True):
        if not isinstance(mine, str):
            torch.testing.assert_close(mine, other, rtol=rounding, atol=rounding, equal_nan=True)


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_is_chosen_and_is_an_operator(name: str) -> None:
    call = REGISTRY[name].sample("cuda")
    assert REGISTRY[name].choose(*call).provider.name == "triton"
    torch.library.opcheck(REGISTRY[name].overload, call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [6, 192, 1000])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_replay_is_the_convolution_of_the_text(width: int, channels: int, dtype: torch.dtype) -> None:
    text = channels_last(3, channels, 700, dtype).cuda()
    filter = torch.randn(channels, width).cuda(), torch.randn(channels).cuda(), "silu"
    ring = Ring(text, [-5, 0, -1], [2, 0, 4], width - 1 + 16, torch.ops.specc.causal_conv1d_replay.triton)
    expected = oracle(text, *filter)
    few = 1e-4 if dtype == torch.float32 else 2e-2
    for tokens, good in ((600, [600] * 3), (7, [3, 0, 7]), (1, [1, 1, 1]), (16, [16, 2, 9]), (2, [2, 2, 2])):
        at = ring.seq.tolist()
        y = ring.feed(tokens, good, *filter)
        wanted = past(expected, at, tokens)
        for row in range(3):
            live = slice(max(0, -at[row]), good[row])
            torch.testing.assert_close(y[row, :, live].double(), wanted[row, :, live], rtol=few, atol=few)
            assert not y[row, :, : max(0, -at[row])].any(), "padding gives zeros"
    assert bool(ring.ring[[1, 3, 5]].isnan().all())


@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_bits_do_not_depend_on_the_blocks(activation: str | None) -> None:
    text = channels_last(2, 192, 48).cuda()
    filter = torch.randn(192, 4).cuda(), torch.randn(192).cuda(), activation
    outputs = []
    for plan in ([1] * 48, [48], [16, 16, 16], [5, 1, 7, 3, 16, 16]):
        ring = Ring(text, [0, 0], [0, 1], 20, torch.ops.specc.causal_conv1d_replay.triton)
        outputs.append(torch.cat([ring.feed(tokens, [tokens] * 2, *filter) for tokens in plan], 2))
    for each in outputs[1:]:
        assert torch.equal(bits(each.contiguous()), bits(outputs[0].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("layout", ["channels", "tokens", "slice"])
def test_inputs_and_replay_as_the_references(layout: str, tokens: int, dtype: torch.dtype) -> None:
    x = channels_last(4, 300, tokens, dtype).cuda()
    x = {"channels": x, "tokens": x.contiguous(), "slice": x[:, 20:150]}[layout]
    ring = torch.randn(5, 12, x.shape[1]).to(dtype).cuda()
    ring[3] = torch.nan
    seq_lens, slots = torch.tensor([9, -2, 1, 30]).cuda(), torch.tensor([4, 2, -1, 0]).cuda()
    weight = torch.randn(x.shape[1], 4).to(dtype).cuda()
    assert_as_reference("conv_inputs", (x, ring, seq_lens, slots, 4))
    assert_as_reference("causal_conv1d_replay", (x, ring, weight, None, "silu", seq_lens, slots))
    assert_as_reference("causal_conv1d_replay", (x, ring, weight, weight[:, 0], None, seq_lens, None))


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("tracked", [False, True])
def test_commit_conv(width: int, tracked: bool) -> None:
    x, state = channels_last(4, 1000, 5).cuda(), torch.randn(9, 1000, width).cuda()
    last, track, slots, tracks = torch.tensor(
        [[3, -1, 4, 99], [2, 0, -1, 1], [5, 0, -1, 3], [1, 2, 4, -1]]
    ).cuda()
    args = (state, x, last, slots, *((tracks, track) if tracked else (None, None)))
    for _ in range(20):
        # Again and again: a window is written over the one that is being read.
        assert_as_reference("commit_conv", args)


@pytest.mark.parametrize("kind", ["one buffer", "apart"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_commit_snapshots(kind: str, dtype: torch.dtype) -> None:
    states = list(torch.randn(5, 49, 3, 1000).cuda())
    snapshots = list(torch.randn(5, 32, 4, 3, 1000).to(dtype).cuda())
    if kind == "apart":
        states, snapshots = ([each.clone() for each in layers] for layers in (states, snapshots))
    last, track = torch.randint(-1, 4, (32,)).cuda(), torch.randint(-1, 4, (32,)).cuda()
    order = torch.randperm(48).cuda()
    slots, tracks = order[:32].clone(), torch.full((32,), -1).cuda()
    slots[[3, 9]], tracks[:16] = -1, order[32:]
    assert_as_reference("commit_snapshots", (states, snapshots, last, slots, tracks, track))
    assert_as_reference("commit_snapshots", (states, snapshots, last, None, None, None))


def test_snapshots_beyond_2_31_numbers() -> None:
    snapshots = torch.zeros(3, 2, 5, 2**27, dtype=torch.bfloat16, device="cuda")
    snapshots[2, 1, 4, -8:] = torch.arange(8.0)
    states = torch.zeros(3, 2, 2**27, dtype=torch.bfloat16, device="cuda")
    last = torch.tensor([-1, 4], device="cuda")
    commit_snapshots(list(states), list(snapshots), last, None, None, None)
    assert states[2, 1, -8:].tolist() == list(range(8))
    assert int((states != 0).sum()) == 7


def test_a_ring_beyond_2_31_numbers() -> None:
    memory = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    ring = memory.as_strided((3, 8, 64), (2**30 + 512, 64, 1))
    near = torch.zeros(3, 8, 64, dtype=torch.bfloat16, device="cuda")
    x, weight = channels_last(2, 64, 5, torch.bfloat16).cuda(), torch.randn(64, 4).cuda()
    lens, slots = torch.tensor([3, 0]).cuda(), torch.tensor([2, 0]).cuda()
    run = torch.ops.specc.causal_conv1d_replay.triton
    assert torch.equal(
        run(x, ring, weight, None, "silu", lens, slots), run(x, near, weight, None, "silu", lens, slots)
    )
    assert torch.equal(ring, near)

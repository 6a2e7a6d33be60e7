"""The short convolutions' references against float64, with rings, left padding and dropped drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from specc.errors import ProviderError
from specc.lowerings import REGISTRY, causal_conv1d, causal_conv1d_replay, commit_conv, conv_inputs
from specc.lowerings.triton_kernels import obstacle
from tests.lowerings.conv_calls import Ring, channels_last, oracle, past
from tests.lowerings.pools import bits

LIMITS = settings(max_examples=50, deadline=None)
needs_triton = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = (None, "silu", "swish")


def a_filter(
    channels: int, width: int, bias: bool, activation: str | None
) -> tuple[Tensor, Tensor | None, str | None]:
    return torch.randn(channels, width), torch.randn(channels) if bias else None, activation


def close(ours: Tensor, expected: Tensor) -> None:
    few = 2e-5 if ours.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours.double(), expected, rtol=few, atol=few)


@LIMITS
@given(
    width=st.integers(2, 4),
    more=st.integers(0, 2),
    tokens=st.integers(1, 9),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_conv_is_the_sum(
    width: int,
    more: int,
    tokens: int,
    bias: bool,
    activation: str | None,
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    text = channels_last(2, 6, 5 + tokens, dtype)
    text = text if transposed else text.contiguous()
    weight, offset, _ = a_filter(6, width, bias, activation)
    window = text[..., 5 - (width - 1) - more : 5].clone()
    window[..., :more] = torch.nan
    y = causal_conv1d(text[..., 5:], window, weight, offset, activation)
    assert (y.dtype, y.stride(1)) == (dtype, 1)
    close(y, oracle(text, weight, offset, activation)[..., 5:])


@LIMITS
@given(data=st.data(), width=st.integers(2, 4), dtype=st.sampled_from(DTYPES))
def test_replay_is_the_convolution_of_the_text(data: st.DataObject, width: int, dtype: torch.dtype) -> None:
    """Texts that start behind padding, blocks longer than the ring, prompts shorter than the filter."""
    text = channels_last(2, 6, 700, dtype)
    filter = a_filter(6, width, data.draw(st.booleans()), data.draw(st.sampled_from(ACTIVATIONS)))
    starts = [data.draw(st.integers(-20, 0)), 0]
    tokens = data.draw(st.lists(st.sampled_from([1, 2, 5, 16, 30]), min_size=1, max_size=4))
    tokens[0] = data.draw(st.sampled_from([1, 3, 600]))
    most = max(tokens[1:], default=1)
    ring = Ring(text, starts, [2, 0], width - 1 + most)
    expected = oracle(text, *filter)
    for i, block in enumerate(tokens):
        # A prompt is all final, a block's end may be wrong.
        good = [block] * 2 if i == 0 else data.draw(st.lists(st.integers(0, block), min_size=2, max_size=2))
        at = ring.seq.tolist()
        y = ring.feed(block, good, *filter)
        wanted = past(expected, at, block)
        for row in range(2):
            first = min(max(0, -at[row]), good[row])
            close(y[row, :, first : good[row]], wanted[row, :, first : good[row]])
            assert not y[row, :, : max(0, -at[row])].any(), "padding gives zeros"
    assert bool(ring.ring[[1, 3]].isnan().all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_bits_do_not_depend_on_the_blocks(activation: str | None) -> None:
    # Of other widths CPUs compute a vector's last elements otherwise.
    text, filter = channels_last(2, 48, 48), a_filter(48, 4, True, activation)
    outputs = []
    for plan in ([1] * 48, [48], [16, 16, 16], [5, 1, 7, 3, 16, 16]):
        ring = Ring(text, [0, -3], [0, 1], 20)
        outputs.append(torch.cat([ring.feed(tokens, [tokens] * 2, *filter) for tokens in plan], 2))
    for each in outputs[1:]:
        assert torch.equal(bits(each), bits(outputs[0]))


@LIMITS
@given(data=st.data(), width=st.integers(2, 4), tokens=st.integers(1, 9))
def test_conv_inputs_lists_what_the_filter_reads(data: st.DataObject, width: int, tokens: int) -> None:
    text = channels_last(3, 5, 60)
    ring = Ring(text, [0, 0, 0], [3, 0, 1], width - 1 + 9)
    ring.feed(20, [20, data.draw(st.integers(12, 20)), 13], *a_filter(5, width, False, None))
    seq_lens = ring.seq.clone()
    seq_lens[2] = data.draw(st.integers(-4, 1))
    slots = torch.tensor([3, -1, 1])
    at, x = seq_lens.tolist(), channels_last(3, 5, tokens)
    expected = torch.cat([past(text, [each - (width - 1) for each in at], width - 1), x], 2)
    before = ring.ring.clone()
    if at[2] >= 0:
        # This row goes back to its start.
        ring.ring[1, :2] = before[1, :2] = text[2, :, :2].mT
    inputs = conv_inputs(x, ring.ring, seq_lens, slots, width)
    expected[1] = 0
    expected[2, :, : max(0, width - 1 - at[2])] = 0
    assert torch.equal(inputs, expected)
    for row, slot in ((0, 3), (2, 1)):
        for token in range(tokens):
            if at[row] + token >= 0:
                before[slot, (at[row] + token) % ring.ring.shape[1]] = x[row, :, token]
    assert torch.equal(bits(ring.ring), bits(before))


def test_a_dead_row_gives_zero_and_touches_nothing() -> None:
    x, filter = channels_last(2, 6, 3), a_filter(6, 4, True, "silu")
    ring = torch.randn(2, 8, 6)
    before = ring.clone()
    assert not bool(
        causal_conv1d_replay(x, ring, *filter, torch.tensor([4, 5]), torch.tensor([-1, -1])).any()
    )
    assert torch.equal(ring, before)
    y = causal_conv1d_replay(x, ring, *filter, torch.tensor([4, 5]), torch.tensor([-1, 0]))
    assert not bool(y[0].any())
    assert bool(y[1].any())
    assert torch.equal(ring[1], before[1])


@LIMITS
@given(data=st.data(), width=st.integers(1, 4), tokens=st.integers(1, 9), dtype=st.sampled_from(DTYPES))
def test_commit_conv_moves_the_window(
    data: st.DataObject, width: int, tokens: int, dtype: torch.dtype
) -> None:
    x, state = channels_last(3, 6, tokens), torch.randn(6, 6, width).to(dtype)
    last = data.draw(st.lists(st.integers(-1, tokens - 1), min_size=3, max_size=3))
    track = data.draw(st.lists(st.integers(-1, tokens - 1), min_size=3, max_size=3))
    slots, track_slots = [4, data.draw(st.sampled_from([-1, 0])), 2], [1, 3, -1]
    expected = state.clone()
    for row in range(3):
        inputs = torch.cat([state[slots[row]], x[row].to(dtype)], 1)
        for to, step in ((slots[row], last[row]), (track_slots[row], track[row])):
            if step >= 0 and to >= 0 and slots[row] >= 0:
                expected[to] = inputs[:, step + 1 : step + 1 + width]
    commit_conv(state, x, *map(torch.tensor, (last, slots, track_slots, track)))
    assert torch.equal(state, expected)


def test_committed_windows_continue_the_text() -> None:
    text, filter = channels_last(2, 6, 40), a_filter(6, 4, True, "silu")
    expected, state = oracle(text, *filter), torch.zeros(2, 6, 4)
    at = [0, 0]
    for tokens, good in ((5, [3, 5]), (1, [1, 1]), (7, [0, 2]), (4, [4, 1])):
        block = past(text, at, tokens)
        y = causal_conv1d(block, state, *filter)
        for row in range(2):
            close(y[row, :, : good[row]], expected[row, :, at[row] : at[row] + good[row]])
        commit_conv(state, block, torch.tensor(good) - 1, None, None, None)
        at = [a + n for a, n in zip(at, good, strict=True)]


def test_fakes_refuse_what_does_not_match() -> None:
    x, window, weight = torch.randn(1, 4, 2), torch.randn(1, 4, 2), torch.randn(4, 4)
    x, window, weight = (each.to("meta") for each in (x, window, weight))
    with pytest.raises(RuntimeError, match="no activation is called gelu"):
        causal_conv1d(x, window, weight, None, "gelu")
    with pytest.raises(RuntimeError, match="must hold all inputs"):
        causal_conv1d(x, window, weight, None, None)
    with pytest.raises(RuntimeError, match="no activation is called relu"):
        causal_conv1d_replay(x, window, weight, None, "relu", torch.zeros(1), None)
    with pytest.raises(RuntimeError, match="one last step for each row"):
        commit_conv(window, x, torch.zeros(2, device="meta").long(), None, None, None)


def test_opcheck_of_the_edges() -> None:
    x, ring, lens = (
        channels_last(2, 6, 9, torch.bfloat16),
        torch.randn(2, 5, 6).bfloat16(),
        torch.tensor([-4, 0]),
    )
    weight, bias, _ = a_filter(6, 3, True, None)
    for name, args in {
        "causal_conv1d": (x, torch.randn(2, 6, 2).bfloat16(), weight, None, None),
        "causal_conv1d_replay": (x, ring, weight, bias, "swish", lens, None),
        "conv_inputs": (x, ring, lens, None, 3),
        "commit_conv": (torch.randn(2, 6, 3), x, torch.tensor([-1, 3]), None, None, None),
    }.items():
        torch.library.opcheck(REGISTRY[name].overload, args)


KERNELS = ("causal_conv1d_replay", "conv_inputs", "commit_conv", "commit_snapshots")


@needs_triton
@pytest.mark.parametrize("hip", [None, "7.2"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_gpu_takes_triton(name: str, hip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        sample = REGISTRY[name].sample("cuda")
    monkeypatch.setattr(torch.version, "hip", hip)
    assert REGISTRY[name].choose(*sample).provider.name == "triton"


@pytest.mark.parametrize("name", KERNELS)
def test_a_cpu_takes_the_reference(name: str) -> None:
    decision = REGISTRY[name].choose(*REGISTRY[name].sample("cpu"))
    assert decision.describe() == "reference (not triton: needs a CUDA or HIP device, got cpu)"


REFUSALS: list[tuple[str, int, Callable[[Any], Any], str]] = [
    ("causal_conv1d_replay", 0, lambda x: x.double(), "no kernel for x of torch.float64"),
    ("causal_conv1d_replay", 2, lambda w: w.new_empty(8, 9), "filters up to 8 wide, got 9"),
    ("causal_conv1d_replay", 5, lambda lens: lens.int(), "no kernel for seq_lens of torch.int32"),
    ("conv_inputs", 1, lambda ring: ring.double(), "a ring of torch.float64"),
    ("conv_inputs", 3, lambda slots: slots.short(), "no kernel for slots of torch.int16"),
    ("commit_conv", 0, lambda state: state.double(), "a window of torch.float64"),
    ("commit_conv", 2, lambda last: last.short(), "no kernel for last_correct_step_indices of torch.int16"),
    ("commit_snapshots", 0, lambda states: [each.double() for each in states], "states of torch.float64"),
    ("commit_snapshots", 0, lambda states: [each.mT for each in states], "snapshots of the states' shape"),
    ("commit_snapshots", 0, lambda states: [x.new_empty(4, 2, 16, 8).mT for x in states], "in one piece of"),
    ("commit_snapshots", 3, lambda slots: slots.cpu(), "needs all tensors on one device"),
    ("commit_snapshots", 5, lambda steps: steps.short(), "no kernel for steps_to_track of torch.int16"),
]


@pytest.mark.parametrize(("name", "position", "change", "why"), REFUSALS)
def test_triton_says_what_it_cannot_serve(
    name: str, position: int, change: Callable[[Any], Any], why: str
) -> None:
    with FakeTensorMode():
        args = list(REGISTRY[name].sample("cuda"))
        args[position] = change(args[position])
        with pytest.raises(ProviderError, match=why):
            REGISTRY[name].choose(*args, forced="triton")

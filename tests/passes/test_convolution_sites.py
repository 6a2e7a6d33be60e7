"""Convolutions over a window or a ring on the Dynamo graph: canonicalize alone, equal to the captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specc.lowerings import causal_conv1d, causal_conv1d_replay, conv_inputs
from specc.passes import canonicalize
from specc.passes.framework import call_arguments
from tests.passes.attention_graphs import Run, compiled, compiled_once
from tests.passes.recurrent_graphs import (
    ROWS,
    WIDTH,
    conv_ring,
    convolve,
    inputs,
    over_ring,
    over_window,
    over_window_token,
    weights,
    window,
)

CONV, REPLAY, INPUTS = causal_conv1d.overload, causal_conv1d_replay.overload, conv_inputs.overload
PASSES = (canonicalize.PASS,)


def once(fn: Callable[..., Any], *args: Any, **settings: Any) -> Run:
    return compiled_once(fn, args, passes=PASSES, **settings)


def only(run: Run, target: Any) -> dict[str, Any]:
    (node,) = run.after.graph.find_nodes(op="call_function", target=target)
    return call_arguments(node)


@pytest.mark.parametrize("q_len", [2, 4, 9])
@pytest.mark.parametrize("columns", [WIDTH - 1, WIDTH])
def test_window_and_block(q_len: int, columns: int) -> None:
    run = once(over_window, inputs(q_len), window(columns), *weights())
    given = only(run, CONV)
    assert [given[name].op for name in ("x", "window")] == ["placeholder", "placeholder"]
    assert run.count("new_zeros") == 0
    assert (run.count("copy_"), run.count(torch.cat)) == (1, 1), "the cache still takes over the new window"
    assert run.refusals == []


def test_one_token_is_in_that_form_already() -> None:
    run = once(over_window_token, inputs(1), window(), *weights())
    assert run.count(CONV) == 1
    assert [remark.reason for remark in run.remarks] == ["specc.causal_conv1d is specc.causal_conv1d.default"]


@pytest.mark.parametrize("q_len", [1, 4, 30])
@pytest.mark.parametrize("starts", [(9, 2), (0, 1), (-2, 5)])
def test_ring_and_block(q_len: int, starts: tuple[int, int]) -> None:
    run = once(over_ring, inputs(q_len), conv_ring(), *weights(), torch.tensor(starts))
    given = only(run, REPLAY)
    assert given["seq_lens"].op == "placeholder"
    assert run.count(CONV, INPUTS, "new_zeros") == 0
    assert run.refusals == []


@pytest.mark.parametrize(
    ("function", "before", "lens"), [(over_window, window, ()), (over_ring, conv_ring, ([9, 2],))]
)
def test_blocks_of_any_length(function: Callable[..., Tensor], before: Any, lens: Any) -> None:
    starts = tuple(torch.tensor(each) for each in lens)
    calls = [(inputs(q_len), before(), *weights(), *starts) for q_len in (5, 7, 13)]
    runs = compiled(function, *calls, passes=PASSES)
    assert len(runs) == 2, "the second length makes it symbolic"
    for run in runs:
        assert run.count(REPLAY if lens else CONV) == 1
        assert run.count("new_zeros", INPUTS) == 0
        assert run.refusals == []


def test_layers_keep_their_own_windows() -> None:
    def layers(x: Tensor, kept: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        for each in kept:
            x = over_window(x, each, weight, bias)
        return x

    run = once(layers, inputs(3), [window(), window(), window()], *weights())
    assert (run.count(CONV), run.count("new_zeros"), run.count("copy_")) == (3, 0, 3)


def test_no_activation_no_bias() -> None:
    def short(x: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
        full = torch.cat([kept, x], dim=-1)
        kept.copy_(full[..., -kept.shape[-1] :])
        return convolve(full, weight, None, None)[:, :, -x.shape[-1] :]

    given = only(once(short, inputs(3), window(), weights()[0]), CONV)
    assert (given["bias"], given["activation"]) == (None, None)


def all_outputs(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    full = torch.cat([kept, x], dim=-1)
    kept.copy_(full[..., -kept.shape[-1] :])
    return convolve(full, weight, bias)


def more_outputs(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return convolve(torch.cat([kept, x], dim=-1), weight, bias)[:, :, -x.shape[-1] - 1 :]


def first_outputs(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return convolve(torch.cat([kept, x], dim=-1), weight, bias)[:, :, : x.shape[-1]]


def read_before(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    full = torch.cat([kept, x], dim=-1)
    kept.copy_(full[..., -kept.shape[-1] :])
    newest = kept[..., -1:] + 1
    return convolve(full, weight, bias)[:, :, -x.shape[-1] :] + newest


def changed_before(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    full = torch.cat([kept, x], dim=-1)
    kept.zero_()
    return convolve(full, weight, bias)[:, :, -x.shape[-1] :]


def computed_window(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return convolve(torch.cat([kept * 2, x], dim=-1), weight, bias)[:, :, -x.shape[-1] :]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (all_outputs, "reads outputs that are not the block's alone"),
        (more_outputs, "reads outputs that are not the block's alone"),
        (first_outputs, "reads outputs that are not the block's alone"),
        (read_before, "reads the cache between them and the convolution"),
        (changed_before, "is changed in place by zero_"),
        (computed_window, "they are no window of a cache and a block"),
    ],
)
def test_windows_that_do_not_fit_are_left(function: Callable[..., Tensor], reason: str) -> None:
    run = once(function, inputs(3), window(), *weights())
    (refusal,) = run.refusals
    assert refusal.startswith("convolution keeps its inputs: ")
    assert reason in refusal
    assert run.count(CONV, "new_zeros", torch.cat) == 3


def test_window_shorter_than_the_filter_is_left() -> None:
    run = once(over_window, inputs(4), window(WIDTH - 2), *weights())
    assert run.refusals == ["convolution keeps its inputs: the window before the block is too short"]


def other_width(x: Tensor, ring: Tensor, weight: Tensor, bias: Tensor, seq_lens: Tensor) -> Tensor:
    full = torch.ops.specc.conv_inputs(x, ring, seq_lens, None, WIDTH + 1)
    return convolve(full, weight, bias)[:, :, -x.shape[-1] :]


def read_twice(x: Tensor, ring: Tensor, weight: Tensor, bias: Tensor, seq_lens: Tensor) -> Tensor:
    full = torch.ops.specc.conv_inputs(x, ring, seq_lens, None, WIDTH)
    return convolve(full, weight, bias)[:, :, -x.shape[-1] :] + full[..., -x.shape[-1] :]


def ring_read_before(x: Tensor, ring: Tensor, weight: Tensor, bias: Tensor, seq_lens: Tensor) -> Tensor:
    full = torch.ops.specc.conv_inputs(x, ring, seq_lens, None, WIDTH)
    total = ring.sum()
    return convolve(full, weight, bias)[:, :, -x.shape[-1] :] + total


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (other_width, f"it is {WIDTH} wide, and its inputs are for {WIDTH + 1}"),
        (read_twice, "something else reads them, too"),
        (ring_read_before, "reads the cache between them and the convolution"),
    ],
)
def test_rings_that_do_not_fit_are_left(function: Callable[..., Tensor], reason: str) -> None:
    run = once(function, inputs(3), conv_ring(), *weights(), torch.arange(ROWS) + 9)
    (refusal,) = run.refusals
    assert reason in refusal
    assert run.count(REPLAY) == 0
    assert run.count(CONV, INPUTS) == 2
